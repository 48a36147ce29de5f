import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.common.caption_rows import CaptionRows
from data_pipeline.encode.labels import read_labels
from raphael.base.config.data import EncodeConfig
from raphael.base.stage import StageError

# key, shard, row of the list, caption; the list has rows that were dropped on the way
IMAGES = (
    ("000000000", "00000.tar", 1, "A red Circle on blue"),
    ("000000002", "00000.tar", 3, "a square, flat design"),
    ("000010000", "00001.tar", 4, "three circles"),
    ("000010001", "00001.tar", 6, "a circle left of a square"),
    ("000010003", "00001.tar", 7, "one green circle"),
    ("000010004", "00001.tar", 9, "a blue square."),
)
COLUMNS = {
    "URL": [f"http://x/{row}" for row in range(10)],
    "TEXT": ["text"] * 10,
    "class": ["cat", " dog ", None, "cat", "", "x", "dog", "cat", "x", "owl"],
    "number": [7, 10, 7, 7, 10, 7, 7, 10, 7, None],
    "one": ["cat"] * 10,
    "boxes": [[1, 2]] * 10,
}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("data/source", "data/captions", "data/shards"):
        (tmp_path / folder).mkdir(parents=True)
    pq.write_table(pa.table(COLUMNS), "data/source/metadata.parquet")
    for shard in ("00000", "00001"):
        mine = [image for image in IMAGES if image[1] == f"{shard}.tar"]
        table = pa.table({"key": [image[0] for image in mine][::-1], "id": [image[2] for image in mine][::-1]})
        pq.write_table(table, f"data/shards/{shard}.parquet")
    table = pa.Table.from_pylist([{"key": key, "shard": shard, "caption": text} for key, shard, _, text in IMAGES])
    pq.write_table(table, "data/captions/captions.parquet")
    return CaptionRows(tmp_path / "data/captions/captions.parquet")


def settings(**given):
    return EncodeConfig(4, "sobel", "", 0.3, fields=("pixels", "label"), **given)


def test_a_caption_in_which_the_pattern_is_found_once_has_that_class_and_others_have_none(rows):
    labels = read_labels(settings(label_pattern=r"\b(circle|square)\b"), rows)
    assert labels.classes == ("circle", "square")
    assert labels.values.dtype == np.int32 and labels.values.tolist() == [0, 1, -1, -1, 0, 1]
    assert labels.facts()["label"] == {
        "from": r"captions, \b(circle|square)\b", "classes": ["circle", "square"], "counts": [2, 2], "without": 2,
    }  # fmt: skip


def test_without_a_group_all_that_is_found_names_the_class(rows):
    assert read_labels(settings(label_pattern="circle|square"), rows).values.tolist() == [0, 1, 0, -1, 0, 1]


def test_a_column_of_the_list_labels_the_rows_that_are_left_by_their_place_in_it(rows):
    labels = read_labels(settings(label_column="class"), rows)
    # rows 1, 3, 4, 6, 7, 9 of the list; "x" belongs to rows that were dropped, so it is no class
    assert labels.classes == ("cat", "dog", "owl") and labels.values.tolist() == [1, 0, -1, 1, 0, 2]


def test_numbers_are_classes_in_the_order_of_their_size(rows):
    labels = read_labels(settings(label_column="number"), rows)
    assert labels.classes == ("7", "10") and labels.values.tolist() == [1, 0, 1, 0, 1, -1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label_column": "klass"}, "got 'klass', expected a column of data/source/metadata.parquet: URL, TEXT, class"),
        ({"label_column": "one"}, r"label_column: got 1 classes \('cat'\) for 6 of 6 images.*; columns: URL, TEXT"),
        ({"label_column": "URL"}, "got 6 classes .* for 6 of 6 images, expected two or more, of several"),
        ({"label_column": "boxes"}, "got 'boxes' of type list"),
        ({"label_pattern": "hexagon"}, r"label_pattern: got 0 classes \(none\) for 0 of 6 images"),
        ({"label_pattern": "three"}, r"label_pattern: got 1 classes \('three'\) for 1 of 6 images"),
    ],
)  # fmt: skip
def test_what_gives_no_classes_is_one_line_that_says_what_there_is(rows, given, message):
    with pytest.raises(StageError, match=message) as caught:
        read_labels(settings(**given), rows)
    assert "\n" not in str(caught.value)


def test_rows_of_another_list_are_noticed(rows):
    pq.write_table(pa.table({"class": ["cat", "dog"]}), "data/source/metadata.parquet")
    with pytest.raises(StageError, match="rows of another list"):
        read_labels(settings(label_column="class"), rows)
    pq.write_table(pa.table({"key": ["000010000"], "id": [4]}), "data/shards/00001.parquet")
    pq.write_table(pa.table(COLUMNS), "data/source/metadata.parquet")
    with pytest.raises(StageError, match="got the key 000010001, which shard 00001.tar has not"):
        read_labels(settings(label_column="class"), rows)


def test_scenes_of_one_object_are_labelled_by_its_shape_and_all_others_are_not(tmp_path):
    """The pattern of docs/data.md over the captions of a corpus, held against what was drawn."""
    import random
    import re
    from pathlib import Path

    from data_pipeline.source import scene_captions, scenes

    page = (Path(__file__).parents[3] / "docs/data.md").read_text(encoding="utf-8")
    (pattern,) = re.findall(r"`'(\\b\(circle.*?)'`", page)
    drawn = [scenes.scene_of_row(0, row, (64, 64), 0.12, scenes.LAYOUT_SHARES) for row in range(600)]
    captions = [scene_captions.caption(scene, random.Random(row))[0] for row, scene in enumerate(drawn)]
    rows = [{"key": f"{row:09d}", "shard": "00000.tar", "caption": text} for row, text in enumerate(captions)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "captions.parquet")
    labels = read_labels(settings(label_pattern=pattern), CaptionRows(tmp_path / "captions.parquet"))
    assert labels.classes == tuple(sorted(scenes.SHAPES))
    truth = [scene.things[0].shape if len(scene.things) == 1 else None for scene in drawn]
    assert [labels.classes[label] if label >= 0 else None for label in labels.values] == truth
    assert 50 < truth.count(None) < 200
