"""Folders of images: captions beside them, in metadata files, in kohya's folders; and what is said where none is."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from truth.own_images import bodies, found, settings, sidecars, with_metadata

from data_pipeline.local_images.kinds import open_collection
from raphael.base.stage import StageError

TOLD = {name: caption for name, caption, _ in bodies(6)}


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_a_caption_stands_beside_its_image(project, tmp_path, suffix):
    captions, dropped, facts = found(settings(project, "folder", sidecars(tmp_path, suffix=suffix)))
    assert captions == {f"{name}.png": caption for name, caption in TOLD.items()}
    assert not dropped and facts == {"captions": "sidecar"}


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_a_metadata_file_names_images_below_its_own_folder(project, tmp_path, form):
    captions, dropped, facts = found(settings(project, "folder", with_metadata(tmp_path, form=form)))
    assert captions == {f"train/{name}.png": caption for name, caption in TOLD.items()}
    assert not dropped and facts == {"captions": "metadata"}


def test_metadata_and_files_that_do_not_meet_are_counted_by_reason(project, tmp_path):
    with_metadata(tmp_path)
    file = tmp_path / "train/metadata.jsonl"
    more = [{"file_name": "gone.png", "text": "gone"}, {"file_name": "../../x.png", "text": "outside"}]
    more += [{"file_name": "image_00.png", "text": "a second caption"}]
    file.write_text(file.read_text() + "".join(json.dumps(row) + "\n" for row in more))
    (tmp_path / "unlisted.png").write_bytes(bodies(1)[0][2])
    collection, dropped = open_collection(settings(project, "folder", tmp_path).source), Counter()
    rows = collection.find(dropped).rows
    assert [row.caption for row in rows if row.name == "train/image_00.png"] == [TOLD["image_00"], "a second caption"]
    assert len(rows) == 7
    assert {reason: count for reason, count in dropped.items() if count} == {
        "picture not in the folder": 1, "leads out of the folder": 1, "not in the metadata file": 1,
    }  # fmt: skip


def test_captions_lie_in_the_column_that_is_named(project, tmp_path):
    with_metadata(tmp_path, text="beschreibung")
    with pytest.raises(StageError, match="got columns file_name, beschreibung, expected one of TEXT, text, caption"):
        found(settings(project, "folder", tmp_path))
    captions, _, _ = found(settings(project, "folder", tmp_path, caption_column="beschreibung"))
    assert captions["train/image_03.png"] == TOLD["image_03"]


def test_file_names_are_captions_only_where_that_is_asked_for(project, tmp_path):
    for name, _, body in bodies(3):
        (tmp_path / f"a_red-boat {name}.png").write_bytes(body)
    captions, dropped, _ = found(settings(project, "folder", tmp_path))
    assert not captions and dropped == {"no caption": 3}
    captions, _, _ = found(settings(project, "folder", tmp_path, captions="file_name"))
    assert captions["a_red-boat image_01.png"] == "a red boat image 01"


def test_kohyas_folders_say_how_often_and_what_is_on_images_without_a_caption(project, tmp_path):
    sidecars(tmp_path / "10_sks dog", 2, ".caption")
    (tmp_path / "10_sks dog/image_01.caption").unlink()
    sidecars(tmp_path / "3_dog", 1)
    collection, dropped = open_collection(settings(project, "folder", tmp_path).source), Counter()
    listed = collection.find(dropped)
    told = {row.name: (row.caption, row.repeats) for row in listed.rows}
    assert told == {
        "10_sks dog/image_00.png": (TOLD["image_00"], 10),
        "10_sks dog/image_01.png": ("sks dog", 10),
        "3_dog/image_00.png": (TOLD["image_00"], 3),
    }
    assert listed.facts["repeats"] == {"10_sks dog": 10, "3_dog": 3}


@pytest.mark.parametrize("place", ["2019_holidays/a.png", "a.png", "sub/10_dog/a.png"])
def test_other_folders_have_no_repeats(project, tmp_path, place):
    sidecars(tmp_path / "10_sks dog", 2)
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bodies(1)[0][2])
    path.with_suffix(".txt").write_text("a word")
    listed = open_collection(settings(project, "folder", tmp_path).source).find(Counter())
    assert {row.repeats for row in listed.rows} == {1} and "repeats" not in listed.facts


def test_no_name_leads_out_of_the_folder(project, tmp_path):
    sidecars(tmp_path / "in")
    (tmp_path / "out.png").write_bytes(b"secret")
    (tmp_path / "in/link.png").symlink_to(tmp_path / "out.png")
    collection = open_collection(settings(project, "folder", tmp_path / "in").source)
    assert collection.body("image_00.png") == bodies(1)[0][2]
    for name in ("../out.png", "link.png", "image_00.txt", "absent.png", "a\0.png"):
        assert collection.body(name) is None, name


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 7: not JSON"),
        ("[1]", "line 7: got list, expected one object a line"),
        ('{"file_name": 3, "text": "x"}', "row 7: got file_name 3, expected the name of an image"),
        (
            '{"file_name": "http://a.example/1.png", "text": "x"}',
            "row 7: got a link.*source.kind jsonl, csv or parquet",
        ),
    ],
)
def test_a_broken_row_is_one_line_with_its_number(project, tmp_path, line, said):
    file = with_metadata(tmp_path) / "train/metadata.jsonl"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(StageError, match=said):
        found(settings(project, "folder", tmp_path))


def test_metadata_that_is_asked_for_and_absent_is_one_line(project, tmp_path):
    with pytest.raises(StageError, match="got none of metadata.jsonl, metadata.csv, metadata.parquet"):
        found(settings(project, "folder", sidecars(tmp_path), captions="metadata"))
