"""Lists that are made to hurt whoever reads them: one clear line, or the row is counted; memory stays bounded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_pipeline.source import lists


def row(number: int, caption: object = None) -> dict:
    return {"url": f"http://a.example/{number}.jpg", "caption": caption or f"a red circle {number}"}


def lines(*more: str) -> str:
    return "\n".join([json.dumps(row(number)) for number in range(20)] + list(more))


def csv_of(*more: str) -> str:
    return "\n".join(["url,caption", *(f"http://a.example/{n}.jpg,a red circle {n}" for n in range(20)), *more])


LONG = lists.MAX_LINE_CHARS + 1
DEEP, WIDE, NUL = "[" * 200_000 + "]" * 200_000, "x" * 5_000_000, b"\xff\xfe\x00\x01"
TYPES = '{"url":"a","caption":"b","w":1}\n{"url":"a","caption":"b","w":"x"}'
UNCLOSED = 'http://a.example/b.jpg,"' + "x,\n" * 900_000
BROKEN = {
    "lists in lists": ("jsonl", lines(f'{{"url":{DEEP}}}'), "line 21: got lists in lists"),
    "an endless line": ("jsonl", lines('{"url": "' + "x" * LONG + '"}'), "line 21: got more than 4,194,304 characters"),
    "half a line": ("jsonl", lines('{"url": "http'), "line 21: Unterminated string"),
    "no object": ("jsonl", lines("[1]"), "got a line that is no JSON object"),
    "a number beyond 64 bits": ("jsonl", lines('{"url": 1' + "0" * 30 + "}"), "int"),
    "a number of 5,000 digits": ("jsonl", lines('{"url": 1' + "0" * 5000 + "}"), "line 21: Exceeds the limit"),
    "a text where numbers were": ("jsonl", TYPES, "w|int"),
    "no text at all": ("jsonl", NUL, "can't decode|codec"),
    "a field of 5 MB": ("csv", csv_of(f'http://a.example/b.jpg,"{WIDE}"'), "a row of more than 1 MiB"),
    "a quote that is never closed": ("csv", csv_of(UNCLOSED), "a row of more than 1 MiB"),
    "too many cells": ("csv", csv_of("a,b,c,d"), "Expected 2 columns, got 4"),
    "no parquet": ("parquet", "PAR1 and nothing more", "not a readable parquet file"),
}


def workspace(project: Path, folder: Path, kind: str, body: str | bytes | None) -> Path:
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["source"].update(kind=kind, path=str(folder / f"list.{kind}"))
    params["filter"]["missing_score"] = "keep"
    params["filter"]["missing_unsafe"] = "keep"
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    if body is not None:
        (folder / f"list.{kind}").write_bytes(body if isinstance(body, bytes) else body.encode())
    return folder / "params.yaml"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_list_is_one_clear_line(name, project, tmp_path, capsys, monkeypatch):
    import re

    from data_pipeline.source import stage
    from raphael.base.stage import main

    kind, body, said = BROKEN[name]
    params = workspace(project, tmp_path, kind, body)
    monkeypatch.chdir(tmp_path)
    assert main("source", stage.run, "", ["--params", str(params)]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if "source: error" in line]
    assert len(error) == 1 and f"list.{kind}" in error[0] and re.search(said, error[0]) and len(error[0]) < 700


RUN = """
import runpy, sys
module, sys.argv = sys.argv[1], ["x", "--params", sys.argv[2]]
try:
    runpy.run_module(module, run_name="__main__")
finally:
    print("peak", open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


READ = """
import sys
import pyarrow.parquet
pyarrow.parquet.read_table(sys.argv[1])
print("peak", open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def peak_mb(code: str, *arguments: object, folder: Path) -> int:
    """Of the code as a process of its own; getrusage would tell of this process, too, which made the list."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("peak ")[1]) // 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_caption_of_100_mb_is_counted_and_costs_what_reading_it_costs(project, tmp_path):
    size = 100_000_000
    rows = [row(number, "x" * size if number == 5 else None) for number in range(60)]
    params = workspace(project, tmp_path, "parquet", None)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    del rows
    reading = peak_mb(READ, tmp_path / "list.parquet", folder=tmp_path)  # 540 by pyarrow 22
    source = peak_mb(RUN, "data_pipeline.source", params, folder=tmp_path)
    report = json.loads((tmp_path / "reports/source.json").read_text())
    assert report["dropped"] == {"held out for evaluation": 6, lists.TOO_LONG: 1} and report["kept"] == 53
    ids = pq.read_table(tmp_path / "data/source/metadata.parquet")["url"].to_pylist()
    assert len(ids) == 53 and "http://a.example/5.jpg" not in ids
    # 996 once: two copies more. How much reading takes itself varies with the allocator's threads (540 to 650).
    assert source < reading + 2 * size // 2**20
    assert peak_mb(RUN, "data_pipeline.select", params, folder=tmp_path) < reading / 2  # 615 once; imports take 90


def test_a_text_of_one_mebibyte_stays_and_a_byte_more_goes(project, tmp_path, monkeypatch):
    from data_pipeline.source import stage
    from raphael.base.stage import main

    texts = ["x" * lists.MAX_TEXT_BYTES, "x" * (lists.MAX_TEXT_BYTES + 1), "é" * (lists.MAX_TEXT_BYTES // 2 + 1), None]
    rows = [row(number) for number in range(40)]
    for number, text in enumerate(texts):
        rows[number]["caption"] = text
    rows[9]["url"] = "http://a.example/" + "y" * lists.MAX_TEXT_BYTES
    params = workspace(project, tmp_path, "parquet", None)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    monkeypatch.chdir(tmp_path)
    assert main("source", stage.run, "", ["--params", str(params)]) == 0
    kept = pq.read_table(tmp_path / "data/source/metadata.parquet")
    assert json.loads((tmp_path / "reports/source.json").read_text())["dropped"][lists.TOO_LONG] == 3
    assert texts[0] in kept["caption"].to_pylist() and None in kept["caption"].to_pylist()


def test_json_lines_are_read_in_batches_of_bounded_size(monkeypatch, tmp_path):
    monkeypatch.setattr(lists, "BATCH_CHARS", 1000)
    (tmp_path / "list.jsonl").write_text(lines())
    batches = list(lists._jsonl(tmp_path / "list.jsonl"))
    assert len(batches) == 2 and sum(map(len, batches)) == 20
    found = [value for batch in batches for value in batch.column("url").to_pylist()]
    assert found == [row(number)["url"] for number in range(20)]
