"""`raphael data status`: what it says of a workspace that is half done, of one that runs, and of damage."""

from __future__ import annotations

import json
import os
import shutil
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from truth.faulty_runs import change

from data_pipeline.tools.scale.status import DONE, NOT_RUN, RUNNING, STOPPED, as_text, look, main
from raphael.base.config.params import load_config
from raphael.base.integrity.pieces import Pieces
from raphael.base.stage import read_json, write_json
from raphael.base.stage_work import only_run


@pytest.fixture
def workspace(data_workspace, tmp_path):
    """All stages done; a copy, without what other tests of this process left half done in the one that they share."""
    root = shutil.copytree(data_workspace, tmp_path / "ws", symlinks=True)
    for folder in (root / "work").iterdir():
        if folder.name != "timings":
            shutil.rmtree(folder)
    return root


def found(root, now_s=None):
    return {one.stage: one for one in look(root, load_config(root / "params.yaml"), now_s)}


def begun(root, stage, ending, names, seconds_ago=0.0):
    """A work folder with finished partitions, each with its line in the list."""
    folder = root / "work" / stage / "0123456789abcdef"
    paths = [folder / f"{name}{ending}" for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"a partition")
    Pieces(folder, stage).add(*paths)
    for path in paths:
        os.utime(path, times=(time.time() - seconds_ago,) * 2)
    return folder


def test_of_a_finished_workspace_it_says_what_the_reports_and_timings_say(workspace):
    for stage, one in found(workspace).items():
        if one.state == NOT_RUN:
            assert not (workspace / f"reports/{stage}.json").exists()
            continue
        report = read_json(workspace / f"reports/{stage}.json")
        timings = read_json(workspace / f"work/timings/{stage}.json")
        assert one.state == DONE and one.rows == report["total"] and one.failures == report["dropped"]
        assert (one.seconds, one.rows_per_s) == (timings["seconds"], timings.get("items_per_s"))
    assert found(workspace)["score"].partitions == found(workspace)["score"].partitions_total == 1


def test_a_stage_that_was_killed_has_partitions_and_rows_done_and_no_speed(workspace):
    change(workspace, "encode", batch_size=1)  # 16 rows a chunk
    rows = pq.ParquetFile(workspace / "data/captions/captions.parquet").metadata.num_rows
    for gone in ("reports/encode.json", "work/timings/encode.json"):
        (workspace / gone).unlink()
    begun(workspace, "encode", ".npz", ["chunk_000000000"])
    write_json(workspace / "work/progress/encode.json", {"done": 16, "total": rows, "unit": "images"})
    one = found(workspace)["encode"]
    assert (one.state, one.holder, one.rows_per_s) == (STOPPED, "", None)
    assert (one.partitions, one.partitions_total) == (1, -(-rows // 16))
    assert (one.rows, one.rows_total, one.unit) == (16, rows, "images")


def test_of_a_running_stage_the_rows_of_an_earlier_run_are_no_speed_of_this_one(workspace):
    """10 s ago it began with two partitions of 16 there; now there are five and 80 rows."""
    change(workspace, "encode", batch_size=1)
    begun(workspace, "encode", ".npz", ["chunk_0", "chunk_1"], seconds_ago=60)
    begun(workspace, "encode", ".npz", ["chunk_2", "chunk_3", "chunk_4"], seconds_ago=1)
    write_json(workspace / "work/progress/encode.json", {"done": 80, "total": 800, "unit": "images"})
    lock = workspace / "work/locks/encode"
    with only_run(lock, "encode"):
        since_s = time.mktime(time.strptime(read_json(lock)["since"], "%Y-%m-%d %H:%M:%S"))
        for path in (workspace / "work/encode/0123456789abcdef").glob("chunk_[234].npz"):
            os.utime(path, times=(since_s + 5,) * 2)
        one = found(workspace, since_s + 10)["encode"]
        assert (one.state, one.partitions) == (RUNNING, 5) and f"process {os.getpid()} on" in one.holder
        assert one.seconds == pytest.approx(10) and one.rows_per_s == pytest.approx((80 - 2 * 16) / 10)
        with pytest.raises(Exception, match="another run of encode"), only_run(lock, "encode"):
            pass
    assert found(workspace)["encode"].state != RUNNING, "the lock's file stays, nobody holds it"


def test_a_line_of_the_list_that_is_being_written_is_no_partition_yet(workspace):
    (workspace / "reports/encode.json").unlink()
    folder = begun(workspace, "encode", ".npz", ["chunk_0", "chunk_1"])
    with open(folder / "pieces.jsonl", "a") as file:
        file.write('["chunk_2.npz", 11')
    Pieces(folder, "encode")  # a second line of one that is gone again
    (folder / "chunk_1.npz").unlink()
    assert found(workspace)["encode"].partitions == 1


def test_of_a_download_that_is_half_done_it_counts_failures_by_reason_from_its_shards(workspace):
    reasons = [["http 404", None, "http 404", "timeout"], [None, "timeout", "timeout", None]]
    folder = workspace / "work/download/0123456789abcdef"
    (folder / "shards").mkdir(parents=True)
    for number, column in enumerate(reasons):
        pq.write_table(pa.table({"reason": pa.array(column, pa.string())}), folder / f"shards/{number:05d}.parquet")
        (folder / f"shards/{number:05d}.tar").touch()
    Pieces(folder, "download").add(*sorted(folder.glob("shards/*")))
    write_json(workspace / "work/progress/download.json", {"done": 8, "total": 40, "unit": "rows"})
    one = found(workspace)["download"]
    assert one.state == STOPPED and one.failures == {"http 404": 2, "timeout": 3} and one.failures_of == ""
    links = pq.ParquetFile(workspace / "data/selected/links.parquet").metadata.num_rows
    shard_rows = load_config(workspace / "params.yaml").download.shard_rows
    assert (one.partitions, one.partitions_total) == (2, -(-links // shard_rows))
    (folder / "shards/00001.parquet").write_bytes(b"cut")
    one = found(workspace)["download"]
    assert one.failures == {"http 404": 2, "timeout": 1} and "00001.parquet: not readable" in as_text([one])


def test_an_empty_workspace_has_not_run_and_damage_is_named(project, tmp_path, capsys):
    shutil.copy(project / "params.yaml", tmp_path / "params.yaml")
    assert {one.state for one in found(tmp_path).values()} == {NOT_RUN}
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/select.json").write_text("{")
    assert main(["--params", str(tmp_path / "params.yaml")]) == 0
    assert "select: select.json: not readable" in capsys.readouterr().out
    assert main(["--params", str(tmp_path / "absent.yaml")]) == 1
    assert "no such file" in capsys.readouterr().err


def test_the_table_and_the_json_say_the_same(workspace, capsys):
    assert main(["--params", str(workspace / "params.yaml")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert main(["--params", str(workspace / "params.yaml"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [line.split()[0] for line in shown[1:]] == [one["stage"] for one in told]
    dropped = next(one for one in told if one["stage"] == "filter")["failures"]
    line = next(line for line in shown if line.startswith("filter"))
    most = max(dropped, key=lambda reason: (dropped[reason], [-ord(letter) for letter in reason]))
    assert f"{dropped[most]:,} {most}" in line
