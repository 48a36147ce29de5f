"""The stage `source`: four kinds of lists in, LAION's columns and held-out prompts out."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.source import publish, scenes
from data_pipeline.source import stage as source
from raphael.base.config.params import Config, load_config
from raphael.base.stage import Stage, StageError, file_sha256

LAION = ["URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "punsafe", "pwatermark", "AESTHETIC_SCORE"]
FILES = ("choosing.json", "metadata.parquet", "probe.npz", "prompts.json", "site.zip", "truth.parquet")


def settings(project: Path, num_rows: int = 300, **changes) -> Config:
    config = load_config(project / "params.yaml")
    drawn = replace(config.source.scenes, num_rows=num_rows, num_heldout_prompts=5, bad_share=0.4, num_probe_scenes=3)
    return replace(config, source=replace(config.source, scenes=drawn, **changes))


def run(config: Config, root: Path) -> dict:
    root.mkdir(exist_ok=True)
    with contextlib.chdir(root):
        source.run(config, Stage("source", root))
    return json.loads((root / "reports/source.json").read_text())


def rows_of(root: Path, name: str = "metadata") -> list[dict]:
    return pq.read_table(root / f"data/source/{name}.parquet").to_pylist()


def prompts_of(root: Path) -> list[dict]:
    return json.loads((root / "data/source/prompts.json").read_text())["prompts"]


@pytest.fixture(scope="module")
def published(tmp_path_factory, project) -> tuple[Config, Path, dict]:
    root = tmp_path_factory.mktemp("published")
    config = settings(project)
    return config, root, run(config, root)


# ---- scenes --------------------------------------------------------------------------------------------------------


def test_the_drawn_list_has_laions_columns_and_accounts_for_every_row(published):
    config, root, report = published
    rows, truths = rows_of(root), rows_of(root, "truth")
    assert list(rows[0]) == LAION
    assert report["total"] == report["kept"] == len(rows) == len(truths) == 300
    faulty = {name: entry["rows"] for name, entry in report["published_with_a_fault"].items()}
    assert report["good"] + sum(faulty.values()) == 300 and sum(faulty.values()) == 120
    assert faulty == {name: sum(truth["fault"] == name for truth in truths) for name in publish.KINDS}
    assert all(faulty.values())
    assert all(row["URL"].startswith("http://scenes.invalid/") for row in rows)


def test_every_fault_is_what_its_name_says(published):
    _, root, _ = published
    rows, truths = rows_of(root), rows_of(root, "truth")
    with zipfile.ZipFile(root / "data/source/site.zip") as site:
        behaviours = json.loads(site.read("behaviours.json"))
        bodies = {name: site.read(name) for name in site.namelist()}
    good = {truth["url"] for truth in truths if not truth["fault"]}
    good_bodies = {bodies[url.split("/", 3)[3]] for url in good}
    for row, truth in zip(rows, truths, strict=True):
        path, fault = row["URL"].split("/", 3)[3], truth["fault"]
        body = bodies.get(path)
        assert (body is None) == (fault == "missing")
        assert (behaviours.get(path) == fault) == (fault in ("stall", "cut"))
        assert (row["URL"] in good) == (fault in ("", "same_url"))
        assert (body in good_bodies) == (fault in ("", "same_url", "same_picture"))
        if fault not in ("missing", "not_an_image", "truncated"):
            with Image.open(io.BytesIO(body)) as image:
                image.load()
                assert image.size == (row["WIDTH"], row["HEIGHT"])
                assert (image.size[0] < 48) == (fault == "tiny") and (image.size[0] > 2.5 * image.size[1]) == (
                    fault == "banner"
                )
        if fault == "truncated":
            with pytest.raises(OSError), Image.open(io.BytesIO(body)) as image:
                image.load()
        scores = [row[name] for name in LAION[4:]]
        assert (None in scores) == (fault == "no_score")
        if None not in scores:
            assert (row["AESTHETIC_SCORE"] < 4.7) == (fault == "low_score")
            assert (row["pwatermark"] >= 0.5) == (fault == "watermark") and (row["punsafe"] >= 0.5) == (
                fault == "unsafe"
            )
        assert (row["TEXT"] == truth["caption"]) == (not fault.endswith("_caption"))


def test_two_runs_leave_the_same_bytes(published, tmp_path):
    config, root, report = published
    assert run(config, tmp_path / "again") == report
    for name in FILES:
        assert file_sha256(root / "data/source" / name) == file_sha256(tmp_path / "again/data/source" / name), name


def test_a_killed_run_resumes_and_ends_in_the_same_bytes(published, tmp_path, project):
    config, _, _ = published
    text = (project / "params.yaml").read_text()
    for old, new in (("num_rows: 9000", "num_rows: 510"), ("num_heldout_prompts: 200", "num_heldout_prompts: 5")):
        assert old in text
        text = text.replace(old, new)
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "params.yaml").write_text(text)
    command = [sys.executable, "-m", "data_pipeline.source"]
    environment = os.environ | {"PYTHONPATH": str(project)}
    child = subprocess.Popen(
        command, cwd=tmp_path / "killed", start_new_session=True, env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("killed/work/source/*/pieces/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "killed/data").exists() and not (tmp_path / "killed/reports").exists()
    for name in ("killed", "whole"):
        subprocess.run(command, cwd=tmp_path / name, check=True, env=environment, capture_output=True)
    for name in FILES:
        hashes = [file_sha256(tmp_path / where / "data/source" / name) for where in ("killed", "whole")]
        assert hashes[0] == hashes[1], name


def test_the_truth_of_a_row_is_the_truth_of_its_scene(published):
    config, root, _ = published
    for truth in rows_of(root, "truth")[:60]:
        if truth["fault"] not in ("same_url", "same_picture"):
            asked = config.source.scenes
            sides = asked.min_side_px, asked.max_side_px
            scene = scenes.scene_of_row(config.seed, truth["id"], sides, asked.heldout_share, vars(asked.shares))
            assert [item["shape"] for item in json.loads(truth["truth"])["objects"]] in (
                [thing.shape for thing in scene.things], [thing.shape for thing in reversed(scene.things)],
            )  # fmt: skip


def test_prompts_are_held_out_of_the_rows(published):
    config, root, _ = published
    prompts = prompts_of(root)
    assert [prompt["suite"] for prompt in prompts] == [suite for suite in scenes.SUITES for _ in range(5)]
    assert not {prompt["prompt"] for prompt in prompts} & {row["TEXT"] for row in rows_of(root)}


@pytest.mark.parametrize("num_rows, bad_share", [(1, 0.9), (7, 0.3), (1000, 0.15), (50, 0.0)])
def test_the_share_of_bad_rows_is_met_to_the_row(num_rows, bad_share):
    names = publish.faults(0, num_rows, bad_share)
    assert len(names) == num_rows and names[0] is None
    assert sum(name is not None for name in names) == min(round(num_rows * bad_share), num_rows - 1)


# ---- local photographs ---------------------------------------------------------------------------------------------


def write_image(path: Path, size=(40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 30)).save(path)


def coco_like(root: Path) -> None:
    for split, number in (("train2017", 3), ("val2017", 2)):
        images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(number + 1)]  # the last has no file
        notes = [
            {"id": 10 * i + k, "image_id": i, "caption": f"{split}  picture {i}\n told {k}"}
            for i in range(number + 1)
            for k in (1, 0)
        ]
        (root / f"captions_{split}.json").parent.mkdir(parents=True, exist_ok=True)
        (root / f"captions_{split}.json").write_text(json.dumps({"images": images, "annotations": notes}))
        for i in range(number):
            write_image(root / split / f"{i:012d}.jpg", (40 + i, 30))


def test_coco_gives_a_row_per_caption_and_prompts_from_the_validation_images(project, tmp_path):
    coco_like(tmp_path / "coco")
    report = run(settings(project, kind="coco", path=str(tmp_path / "coco")), tmp_path / "ws")
    rows = rows_of(tmp_path / "ws")
    assert list(rows[0]) == LAION and len(rows) == 6 and report["dropped"] == {"picture not in the folder": 2}
    assert rows[0]["TEXT"] == "train2017 picture 0 told 0" and (rows[2]["WIDTH"], rows[2]["HEIGHT"]) == (41, 30)
    assert rows[0]["URL"] == "http://scenes.invalid/train2017/000000000000.jpg" and rows[0]["AESTHETIC_SCORE"] is None
    assert [(item["prompt"], item["reference"]) for item in prompts_of(tmp_path / "ws")] == [
        ("val2017 picture 0 told 0", "val2017/000000000000.jpg"),
        ("val2017 picture 1 told 0", "val2017/000000000001.jpg"),
    ]  # fmt: skip
    assert not (tmp_path / "ws/data/source/site.zip").exists()
    assert str(tmp_path) not in (tmp_path / "ws/data/source/prompts.json").read_text()


def test_real_coco_photographs_become_rows_and_prompts(project, shared_data, tmp_path):
    report = run(settings(project, kind="coco", path=str(shared_data / "coco")), tmp_path / "ws")
    assert report["total"] == report["kept"] == 400
    prompts = prompts_of(tmp_path / "ws")
    assert len(prompts) == 200 and all(item["reference"].startswith("val2017/") for item in prompts)


def test_a_folder_gives_captions_beside_its_images_and_holds_a_tenth_out(project, tmp_path):
    for number in range(20):
        write_image(tmp_path / f"in/sub dir/a_red-boat {number}.png")
        (tmp_path / f"in/sub dir/a_red-boat {number}.txt").write_text(f"boat {number}\n\nat sea {number}\n")
    (tmp_path / "in/broken.jpg").write_bytes(b"no picture")
    (tmp_path / "in/broken.txt").write_text("no picture")
    write_image(tmp_path / "in/empty.png")
    (tmp_path / "in/empty.txt").write_text("\n")
    write_image(tmp_path / "in/silent.png")
    report = run(settings(project, kind="folder", path=str(tmp_path / "in")), tmp_path / "ws")
    rows = rows_of(tmp_path / "ws")
    prompts = prompts_of(tmp_path / "ws")
    held = {item["reference"] for item in prompts}
    assert report["total"] == 43 and report["dropped"]["no caption"] == 2 and len(prompts) == 2
    assert report["dropped"].get("not a readable picture", 0) + ("broken.jpg" in held) == 1
    assert report["dropped"]["held out for evaluation"] == sum(1 if name == "broken.jpg" else 2 for name in held)
    assert not {row["TEXT"] for row in rows} & {item["prompt"] for item in prompts}
    assert all(" " not in row["URL"] for row in rows) and list(rows[0]) == LAION


def test_repeats_are_a_column_of_the_list_and_of_no_other(project, tmp_path):
    for folder in ("10_dog", "1_cat"):
        write_image(tmp_path / f"in/{folder}/a.png")
    report = run(settings(project, kind="folder", path=str(tmp_path / "in")), tmp_path / "ws")
    assert [(row["TEXT"], row["repeats"]) for row in rows_of(tmp_path / "ws")] == [("dog", 10), ("cat", 1)] or [
        (row["TEXT"], row["repeats"]) for row in rows_of(tmp_path / "ws")
    ] == [("cat", 1), ("dog", 10)]
    assert report["repeats"] == {"10_dog": 10, "1_cat": 1}


def test_images_without_captions_are_one_line_that_says_what_was_looked_for(project, tmp_path):
    write_image(tmp_path / "in/0.png")
    said = (
        r"no image with a caption found \(1 no caption\); expected images, each with a .txt or .caption of the same "
        "name, or metadata.jsonl.*file_name and text; source.captions: file_name takes"
    )
    with pytest.raises(StageError, match=said):
        run(settings(project, kind="folder", path=str(tmp_path / "in")), tmp_path / "ws")


# ---- lists ---------------------------------------------------------------------------------------------------------


def test_a_csv_with_a_byte_order_mark_and_line_breaks_keeps_its_columns(project, tmp_path):
    lines = ["url,caption,aesthetic_score"] + [
        f'http://x.example/{i}.jpg,"boat {i}\nat sea",{5 + i / 100}' for i in range(40)
    ]
    (tmp_path / "list.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    report = run(settings(project, kind="csv", path=str(tmp_path / "list.csv")), tmp_path / "ws")
    rows = rows_of(tmp_path / "ws")
    assert list(rows[0]) == ["url", "caption", "aesthetic_score"] and rows[0]["caption"] == "boat 0\nat sea"
    assert report["total"] == 40 and report["dropped"] == {"held out for evaluation": 4} and len(rows) == 36
    assert [item["prompt"] for item in prompts_of(tmp_path / "ws")] == [f"boat {i}\nat sea" for i in range(36, 40)]


def test_several_parquet_files_become_one_list_and_held_out_captions_are_in_no_row(project, tmp_path):
    for part in range(2):
        number = 50
        table = pa.table({
            "URL": [f"http://x.example/{part}/{i}.jpg" for i in range(number)],
            "TEXT": ["the same boat" if i % 10 == 9 else f"boat {part} {i}" for i in range(number)],
        })  # fmt: skip
        pq.write_table(table, tmp_path / f"part-{part}.parquet")
    config = settings(project, kind="parquet", path=str(tmp_path / "part-*.parquet"))
    report = run(config, tmp_path / "ws")
    texts, prompts = (
        [row["TEXT"] for row in rows_of(tmp_path / "ws")],
        {item["prompt"] for item in prompts_of(tmp_path / "ws")},
    )
    assert "the same boat" in prompts and len(prompts) == 10 and not prompts & set(texts)
    assert report["total"] == 100 and report["kept"] == len(texts) == 100 - 9 - 10
    few = run(replace(config, source=replace(config.source, max_rows=30)), tmp_path / "few")
    assert few["total"] == 30


@pytest.mark.parametrize("kind, path, message", [
    ("coco", "", "source.path: got '', expected a folder"),
    ("coco", "empty", "got no captions_train2017"),
    ("folder", "empty", "no image with a caption found"),
    ("folder", "nowhere", "expected a folder"),
    ("csv", "nowhere.csv", "expected a .csv file"),
    ("csv", "columns.csv", "expected one for the url"),
    ("parquet", "broken.parquet", "broken.parquet: "),
])  # fmt: skip
def test_what_is_wrong_with_a_path_is_said_in_one_line_and_nothing_is_left(project, tmp_path, kind, path, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "columns.csv").write_text("a,b\n1,2\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    config = settings(project, kind=kind, path=str(tmp_path / path) if path else "")
    with pytest.raises(StageError) as error:
        run(config, tmp_path / "ws")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ws/data").exists() and not (tmp_path / "ws/reports").exists()


def test_json_lines_are_a_list_like_any_other(tmp_path, project, shared_data):
    """COYO's preview: other column names, every value a text."""
    file = shared_data / "laion" / "coyo_preview_rows.jsonl"
    config = settings(project, kind="jsonl", path=str(file))
    report = run(config, tmp_path / "w")
    assert report["total"] == 7 == report["kept"] + report["dropped"].get("held out for evaluation", 0)
    assert rows_of(tmp_path / "w")[0]["url"].startswith("https://")


def test_a_line_that_is_no_json_object_is_one_clear_line(tmp_path, project):
    (tmp_path / "list.jsonl").write_text('{"url": "http://a.example/1", "text": "a cat"}\n[1]\n')
    with pytest.raises(StageError, match="list.jsonl: got a line that is no JSON object"):
        run(settings(project, kind="jsonl", path=str(tmp_path / "list.jsonl")), tmp_path / "w")


def test_a_list_may_lie_at_any_address_that_fsspec_knows(tmp_path, project):
    import fsspec

    rows = [{"URL": f"http://a.example/{number}", "TEXT": f"caption {number}"} for number in range(40)]
    memory = fsspec.filesystem("memory")
    for part in range(2):
        with memory.open(f"/lists/part-{part}.parquet", "wb") as file:
            pq.write_table(pa.Table.from_pylist(rows[20 * part : 20 * part + 20]), file)
    for name, address in {"folder": "memory://lists", "pattern": "memory://lists/part-*.parquet"}.items():
        run(settings(project, kind="parquet", path=address), tmp_path / name)
        assert rows_of(tmp_path / name) == rows[:36]  # four are held out
    with pytest.raises(StageError, match="source.path: nowhere://lists: "):
        run(settings(project, kind="parquet", path="nowhere://lists"), tmp_path / "none")
