"""What an owner asks to be forgotten leaves every file; the truth is a workspace that never had it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.common.opt_out import OptOut
from data_pipeline.tools import forget, forget_dvc, forget_files
from raphael.base.config.params import load_config
from raphael.base.record_files.stored import Shipping
from raphael.base.records import FORM, Records, RecordWriter
from raphael.base.stage import StageError, file_sha256, only_run, read_json
from tests.truth.image_workspace import add_member, drawn, png, write_params

COUNT, PER_SHARD, LIST = 9, 3, "no.txt"
FIELDS = {"wide": {"moments": ("float16", (2, 2))}, "high": {"moments": ("float16", (2, 3))}}


def url_of(number: int) -> str:
    return f"http://{'art.example' if number in (2, 5) else 'b.example'}/p/{number}.png"


def build(root: Path, project: Path, absent: set[int] = frozenset(), dead: int = 7) -> Path:
    """Nine rows in three shards, row `dead` without an image; those `absent` never were there."""
    for name in ("source", "selected", "shards", "filtered", "captions", "scores", "records"):
        (root / "data" / name).mkdir(parents=True)
    rows = [_row(number, number == dead) for number in range(COUNT)]
    there = [row for row in rows if row["id"] not in absent]
    empty = dict.fromkeys(("URL", "TEXT", "WIDTH"))
    listed = [
        empty if row["id"] in absent else {"URL": row["url"], "TEXT": row["caption"], "WIDTH": 40} for row in rows
    ]
    schema = pa.schema([("URL", pa.string()), ("TEXT", pa.string()), ("WIDTH", pa.int64())])
    pq.write_table(pa.Table.from_pylist(listed, schema), root / "data/source/metadata.parquet")
    with zipfile.ZipFile(root / "data/source/site.zip", "w") as site:
        paths = [f"p/{row['id']}.png" for row in there if "art.example" in row["url"]]
        for path in paths:
            site.writestr(path, b"body")
        site.writestr("behaviours.json", json.dumps(dict.fromkeys(paths, "cut")))
    _write(there, root / "data/selected/links.parquet", "id", "url", "caption")
    for first in range(0, COUNT, PER_SHARD):
        here = [row for row in there if first <= row["id"] < first + PER_SHARD]
        shard = root / f"data/shards/{first // PER_SHARD:05d}.parquet"
        _write(here, shard, "key", "id", "url", "caption", "status", "sha256", "source_sha256")
        _write(here, root / "data/scores" / shard.name, "id")
        with tarfile.open(shard.with_suffix(".tar"), "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in here:
                if row["status"] == "success":
                    add_member(tar, f"{row['key']}.png", row["body"])
                    facts = {name: row[name] for name in ("key", "url", "caption")}
                    add_member(tar, f"{row['key']}.json", json.dumps(facts).encode())
    kept = [row for row in there if row["status"] == "success"]
    _write(kept, root / "data/filtered/pictures.parquet", "key", "id", "url", "sha256")
    _write(kept, root / "data/captions/captions.parquet", "key", "caption")
    facts = {"captions_sha256": file_sha256(root / "data/captions/captions.parquet")}
    with RecordWriter(root / "data/records", FIELDS, facts, 2) as writer:
        for bucket, fields in FIELDS.items():
            mine = [row for row in kept if (row["id"] % 2 == 0) == (bucket == "wide")]
            values = [np.full(fields["moments"][1], row["id"], np.float16) for row in mine]
            writer.append([row["key"] for row in mine], {"moments": np.stack(values)}, bucket)
    captions = {row["key"]: row["caption"] for row in kept}
    (root / "data/records/captions.json").write_text(json.dumps(captions, indent=2, ensure_ascii=False) + "\n")
    write_params(root, project, filter={"opt_out": LIST}, download={"local_host": "art.example"})
    return root


def _row(number: int, dead: bool) -> dict:
    caption, image = drawn(number)
    body = png(image)
    sha256 = None if dead else hashlib.sha256(body).hexdigest()
    return {
        "id": number, "key": f"{number:09d}", "url": url_of(number), "caption": caption, "body": body,
        "status": "failed" if dead else "success", "sha256": sha256, "source_sha256": sha256,
    }  # fmt: skip


def _write(rows: list[dict], path: Path, *columns: str) -> None:
    schema = pa.schema([(name, pa.int64() if name == "id" else pa.string()) for name in columns])
    chosen = [{name: row[name] for name in columns} for row in rows]
    pq.write_table(pa.Table.from_pylist(chosen, schema), path, compression="zstd")


def contents(root: Path) -> dict[str, object]:
    """Every file under data/ by what it says, so that another writer of parquet or tar would be equal."""
    found: dict[str, object] = {}
    for path in sorted(path for path in (root / "data").rglob("*") if path.is_file()):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".parquet":
            found[name] = pq.read_table(path).to_pylist()
        elif path.suffix == ".tar":
            with tarfile.open(path) as tar:
                found[name] = [(member.name, tar.extractfile(member).read()) for member in tar]
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as site:
                found[name] = {inside: site.read(inside) for inside in site.namelist()}
        elif path.name == "manifest.json":
            about = json.loads(path.read_text())["facts"]
            found[name] = {**about, "facts": set(about["facts"])}
        else:
            found[name] = path.read_bytes()
    return found


def forgotten(root: Path, *lines: str) -> list[dict]:
    before = Path.cwd()
    os.chdir(root)
    try:
        return forget.run(load_config("params.yaml"), list(lines))
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    ("lines", "absent"),
    [
        (["https://B.example:80/p/4.png#x"], {4}),
        (["art.example"], {2, 5}),
        (["http://b.example/p/7.png"], {7}),
        ([f"sha256:{hashlib.sha256(png(drawn(0)[1])).hexdigest()}", "art.example"], {0, 2, 5}),
        ([f"http://b.example/p/{number}.png" for number in (6, 7, 8)], {6, 7, 8}),
    ],
)
def test_what_is_forgotten_was_never_there(tmp_path, project, lines, absent):
    root = build(tmp_path / "asked", project)
    (done,) = forgotten(root, *lines)
    assert contents(root) == contents(build(tmp_path / "never", project, absent))
    assert done["samples"] == len(absent) and done["traces_left"] == 0
    assert done["removed"]["data/selected/links.parquet"] == len(absent)
    records = Records(root / "data/records")
    records.check()
    assert records.facts["captions_sha256"] == file_sha256(root / "data/captions/captions.parquet") or absent == {7}
    listed = OptOut.read(str(root / LIST))
    assert listed == OptOut.parse("\n".join(lines) + "\n", "") and not list((root / "work").rglob("plan.json"))
    (report,) = (root / "reports").glob("forget-*.json")
    shown = {name: value for name, value in done.items() if name != "date"}
    assert read_json(report)["requests"] == [shown] and "example/p" not in report.read_text()


def test_of_records_in_a_store_what_is_forgotten_leaves_the_store_and_the_cache(tmp_path, project, monkeypatch):
    monkeypatch.setenv("RAPHAEL_CACHE_DIR", str(tmp_path / "cache"))
    root, never = build(tmp_path / "asked", project), build(tmp_path / "never", project, {2, 5})
    records, disk = root / "data/records", tmp_path / "disk"
    ship = Shipping(f"file://{disk}", records)
    for name in Records(records).manifest["files"]:
        ship(name)
    ship.publish(FORM)
    Records(records).check()  # all of it is in the cache now
    (done,) = forgotten(root, "art.example")
    assert done["traces_left"] == 0
    fresh, truth = Records(records), Records(never / "data/records")
    fresh.check()
    assert fresh.keys == truth.keys and fresh.manifest["files"] == truth.manifest["files"]
    stay = {entry["sha256"] for entry in fresh.manifest["files"].values()}
    assert {path.name for path in (disk / "records/objects").iterdir()} == stay
    assert [path.name for path in (disk / "records/manifests").iterdir()] == [f"{fresh.sha256}.json"]
    assert {path.name for path in (tmp_path / "cache/shards").iterdir()} <= {*stay, ".lock"}
    assert forgotten(root, "art.example")[0]["traces_left"] == 0


def test_killed_at_any_rename_and_started_again_it_ends_the_same(tmp_path, project, monkeypatch):
    whole = build(tmp_path / "whole", project)
    steps = 0
    rename = os.replace

    def counted(source, target):
        nonlocal steps
        steps += 1
        rename(source, target)

    monkeypatch.setattr(os, "replace", counted)
    (expected,) = forgotten(whole, "art.example")
    assert steps > 8
    for last in range(1, steps, 5):
        root, left = build(tmp_path / str(last), project), last

        def dying(source, target):
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            rename(source, target)

        monkeypatch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            forgotten(root, "art.example")
        monkeypatch.setattr(os, "replace", rename)
        (done,) = forgotten(root, "art.example")
        assert done == expected and contents(root) == contents(whole), f"killed before rename {last}"
        assert (root / LIST).read_text() == "art.example\n"


def test_killed_between_the_old_records_and_the_new_it_finds_the_new(tmp_path, project, monkeypatch):
    root = build(tmp_path / "asked", project)

    monkeypatch.setattr(forget_files, "shutil", type("Shutil", (), {"rmtree": staticmethod(_dying_when_records)}))
    with pytest.raises(KeyboardInterrupt):
        forgotten(root, "art.example")
    monkeypatch.undo()
    assert not (root / "data/records/manifest.json").exists()
    assert len(forgotten(root)) == 1, "what a killed run left is finished without asking again"
    assert contents(root) == contents(build(tmp_path / "never", project, {2, 5}))


def _dying_when_records(path, ignore_errors=False):
    if Path(path) == Path("data/records"):
        (Path(path) / "manifest.json").unlink()
        raise KeyboardInterrupt


def test_traces_that_the_tables_do_not_explain_are_found_and_stop_it(tmp_path, project):
    root = build(tmp_path, project)
    (root / "data/notes.bin").write_bytes(b"\0\1see http://art.example/p/2.png\0")
    with pytest.raises(StageError, match=r"data/notes.bin: holds what is to be forgotten .* delete it"):
        forgotten(root, "art.example")
    (root / "data/notes.bin").write_bytes(b"\0\1 000000002 \0")
    with pytest.raises(StageError, match="notes.bin"):
        forgotten(root)
    (root / "data/notes.bin").write_bytes(b"\0\1 1000000002 \0")
    assert forgotten(root)[0]["traces_left"] == 0


def test_the_pages_show_nothing_of_it_any_more(tmp_path, project):
    """The report's images of what was dropped lose those, the data card goes and is made anew by its command."""
    root = build(tmp_path, project)
    (root / "reports").mkdir(exist_ok=True)
    cards = [{"key": f"{number:09d}", "uri": "data:", "caption": "c"} for number in (2, 3, 5)]
    shown = {"filter": {"too small": cards, "unlike": [cards[0]]}, "captions": {"no words": [cards[1]]}}
    (root / "reports/dropped.json").write_text(json.dumps(shown))
    for page in ("data_card.html", "data_card.json"):
        (root / "reports" / page).write_text("000000002")
    forgotten(root, "art.example")
    left = {"filter": {"too small": [cards[1]]}, "captions": {"no words": [cards[1]]}}
    assert read_json(root / "reports/dropped.json") == left
    assert not list((root / "reports").glob("data_card*"))


def test_a_second_request_of_the_day_is_added_and_caches_and_examples_leave(tmp_path, project):
    root = build(tmp_path, project)
    (root / "work/encode/abc").mkdir(parents=True)
    (root / "reports").mkdir()
    examples = [{"key": f"{number:09d}", "before": "x"} for number in (2, 3)]
    (root / "reports/captions.json").write_text(json.dumps({"stage": "captions", "examples": examples}))
    forgotten(root, "art.example")
    assert not (root / "work/encode").exists()
    assert [example["key"] for example in read_json(root / "reports/captions.json")["examples"]] == ["000000003"]
    forgotten(root, "http://nobody.example/x.png")
    (report,) = (root / "reports").glob("forget-*.json")
    assert [entry["samples"] for entry in read_json(report)["requests"]] == [2, 0]
    assert (root / LIST).read_text() == "art.example\nhttp://nobody.example/x.png\n"


def test_what_it_cannot_do_is_one_line(tmp_path, project, capsys):
    root = build(tmp_path, project)
    with pytest.raises(StageError, match="got no url, domain or list entry"):
        forgotten(root)
    write_params(root, project, filter={"opt_out": ""})
    assert forget.main(["--params", str(root / "params.yaml"), "--url", "http://a.example/"]) == 1
    assert 'filter.opt_out: got ""' in capsys.readouterr().err
    assert forget.main(["--params", str(root / "params.yaml"), "--url", "a.example"]) == 1
    assert "--url: got 'a.example'" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["download", "encode", "train"])
def test_nothing_is_forgotten_under_a_running_stage_and_all_of_it_afterwards(tmp_path, project, capsys, stage):
    root = build(tmp_path, project)
    before = {path: path.read_bytes() for path in (root / "data").rglob("*") if path.is_file()}
    asked = ["--params", str(root / "params.yaml"), "--domain", "art.example"]
    with only_run(stage, root):
        assert forget.main(asked) == 1
    assert f"another run of {stage} is going on in this workspace" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (root / "data").rglob("*") if path.is_file()} == before
    assert forget.main(asked) == 0 and "nothing of them is left" in capsys.readouterr().out


def test_only_a_newly_named_list_is_no_reason_to_leave_a_stage_uncommitted():
    lock = {"params": {"params.yaml": {"filter": {"opt_out": "", "min": 1}, "seed": 0}}}
    params = [{"changed deps": {"params.yaml": {"filter": "modified"}}}]
    same = {"filter": {"opt_out": LIST, "min": 1}, "seed": 0}
    assert forget_dvc._only_opt_out(params, lock, same)
    assert not forget_dvc._only_opt_out(params, lock, {**same, "seed": 1})
    assert not forget_dvc._only_opt_out(params, lock, {**same, "filter": {"opt_out": LIST, "min": 2}})
    assert not forget_dvc._only_opt_out([{"changed deps": {"x.py": "modified"}}], lock, same)
    assert not forget_dvc._only_opt_out(["changed command"], lock, same)


@pytest.mark.slow
def test_dvc_holds_the_stages_for_up_to_date_afterwards(tmp_path, project):
    """The real DVC, by the real command; a stage whose code was edited before stays out of date."""
    root = build(tmp_path, project)
    stages = {}
    for name, out in (("select", "data/selected"), ("download", "data/shards"), ("encode", "data/records")):
        (root / f"do_{name}.py").write_text("")
        stages[name] = {"cmd": f"python do_{name}.py", "deps": [f"do_{name}.py"], "outs": [out]}
    stages["train"] = {"cmd": "python train.py", "deps": ["data/records"], "outs": ["model"]}
    (root / "model").write_text("learnt")
    (root / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    (root / ".dvc").mkdir()
    (root / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    dvc = [sys.executable, "-m", "dvc"]
    first = subprocess.run([*dvc, "commit", "--force"], cwd=root, capture_output=True, text=True)
    assert not first.returncode, first.stderr
    (root / "do_download.py").write_text("# edited")
    (done,) = forgotten(root, "art.example")
    assert done["committed_to_dvc"] == ["select", "encode"] and done["left_out_of_date"] == ["download"]
    said = subprocess.run([*dvc, "status", "--json"], cwd=root, check=True, capture_output=True, text=True).stdout
    assert set(json.loads(said[said.find("{") :])) == {"download", "train"}
