"""Images inside parquet files and tars: the same captions and bytes as in a folder, and what is no image said."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from truth.own_images import bodies, found, in_parquet, in_tar, settings, sidecars, with_metadata

from data_pipeline.local_images.collection import address_of, name_of
from data_pipeline.local_images.kinds import kind_of, open_collection
from raphael.base.stage import StageError


def read_all(config) -> list[tuple[str, bytes | None]]:
    """(caption, bytes) in the order of the collection."""
    collection = open_collection(config.source)
    rows = collection.find(Counter()).rows
    read = [(row.caption, collection.body(row.name)) for row in rows]
    collection.close()
    return read


FORMS = {
    "pictures": in_parquet,
    "plain bytes": lambda file, count: in_parquet(file, count, plain=True),
    "webdataset": in_tar,
    "json": lambda file, count: in_tar(file, count, "json"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_image_comes_out_as_it_went_in_with_its_caption(project, tmp_path, form):
    kind = "webdataset" if form in ("webdataset", "json") else "pictures"
    suffix = ".tar" if kind == "webdataset" else ".parquet"
    for part in range(2):  # called alike, in two folders
        FORMS[form](tmp_path / f"part{part}" / f"train{suffix}", 6)
    whole = [(caption, body) for _, caption, body in bodies(6)]
    assert read_all(settings(project, kind, tmp_path)) == whole + whole
    assert read_all(settings(project, kind, tmp_path / f"part0/train{suffix}")) == whole


def test_images_are_asked_for_again_in_any_order(project, tmp_path):
    collection = open_collection(settings(project, "pictures", in_parquet(tmp_path / "a.parquet", 6)).source)
    names = [row.name for row in collection.find(Counter()).rows]
    assert names[0] == "a.parquet/image/0"
    for place in (4, 1, 5, 5, 0):
        assert collection.body(names[place]) == bodies(6)[place][2]
    assert collection.body("a.parquet/image/99") is None and collection.body("b.parquet/image/0") is None


def test_parquet_is_streamed_from_any_address(project, tmp_path):
    file = in_parquet(tmp_path / "a.parquet", 5)
    with fsspec.open("memory://own/train-00000.parquet", "wb") as remote:
        remote.write(file.read_bytes())
    config = settings(project, "pictures", Path("x"))
    from dataclasses import replace

    remote = replace(config, source=replace(config.source, path="memory://own"))
    assert read_all(remote) == [(caption, body) for _, caption, body in bodies(5)]


def test_columns_are_chosen_by_name(project, tmp_path):
    file = in_parquet(tmp_path / "a.parquet", 3, image="foto", text="worte")
    chosen = settings(project, "pictures", file, image_column="foto", caption_column="worte")
    captions, _, facts = found(chosen)
    assert len(captions) == 3 and facts["columns"] == {"image": "foto", "caption": "worte"}
    with pytest.raises(StageError, match="got columns foto, worte, expected one of TEXT"):
        found(settings(project, "pictures", file))


def test_links_are_no_images_and_the_kind_for_them_is_named(project, tmp_path):
    pq.write_table(pa.table({"image": ["http://a.example/1.png"], "text": ["a"]}), tmp_path / "a.parquet")
    said = r"image \(string\), text \(string\), expected one that holds images.*a list of links is source.kind parquet"
    with pytest.raises(StageError, match=said):
        found(settings(project, "pictures", tmp_path / "a.parquet"))
    with pytest.raises(StageError, match=said):
        kind_of(tmp_path)


def test_rows_without_caption_or_bytes_are_counted(project, tmp_path):
    rows = [
        {"image": {"bytes": b"x", "path": None}, "text": None},
        {"image": {"bytes": None, "path": "there.png"}, "text": "only a path"},
        {"image": None, "text": "nothing"},
    ]
    kind = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("text", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, kind), tmp_path / "a.parquet")
    config = settings(project, "pictures", tmp_path)
    assert found(config)[1] == {"no caption": 1}
    assert read_all(config) == [("only a path", None), ("nothing", None)]


def test_a_tar_that_ends_early_is_one_line(project, tmp_path):
    file = in_tar(tmp_path / "a.tar", 6)
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(StageError, match="a.tar"):
        read_all(settings(project, "webdataset", tmp_path))


def test_the_kind_is_seen(tmp_path):
    assert kind_of(sidecars(tmp_path / "beside")) == "folder"
    assert kind_of(with_metadata(tmp_path / "listed", form="parquet")) == "folder"
    assert kind_of(in_parquet(tmp_path / "data/a.parquet")) == kind_of(tmp_path / "data") == "pictures"
    assert kind_of(in_tar(tmp_path / "tars/a.tar")) == kind_of(tmp_path / "tars") == "webdataset"
    (tmp_path / "beside/captions_train2017_x.json").write_text("{}")
    assert kind_of(tmp_path / "beside") == "coco"
    (tmp_path / "empty").mkdir()
    for place, said in (("empty", "no image in it; expected a folder"), ("nowhere", "no such file or folder")):
        with pytest.raises(StageError, match=said):
            kind_of(tmp_path / place)


@pytest.mark.parametrize("name", ["a b/ü#1?.png", "train.parquet/image/17", "00000.tar/100%.jpg"])
def test_an_address_gives_its_name_back(name):
    assert name_of(address_of("coco.invalid", name)) == name and " " not in address_of("", name)
