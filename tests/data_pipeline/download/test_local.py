"""Images that lie here become shards by the same decoder, to the same bytes as through the loopback, and each that is
none has its reason."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from attacks.images import encoded
from PIL import Image
from truth.image_modes import cases
from truth.own_images import bodies, in_parquet, in_tar, settings, sidecars

from data_pipeline.download import stage as download
from data_pipeline.select import stage as select
from data_pipeline.source import stage as source
from raphael.base.stage import Stage, StageError

HERE = {"processes": 1, "shard_rows": 4, "local_host": "mine.invalid"}


def made(config, root: Path, stages=(source, select, download)) -> dict:
    """The report of the last stage."""
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(root):
        for stage in stages:
            name = stage.__name__.split(".")[1]
            stage.run(config, Stage(name, root))
    return json.loads((root / f"reports/{name}.json").read_text())


def with_download(config, **changes):
    return dataclasses.replace(config, download=dataclasses.replace(config.download, **{**HERE, **changes}))


def rows_of(root: Path) -> list[dict]:
    return [row for path in sorted((root / "data/shards").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def content(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "data/shards").iterdir())}


@pytest.mark.parametrize("kind", ["folder", "pictures", "webdataset"])
def test_each_image_is_in_a_shard_with_its_caption(project, tmp_path, kind):
    place = {
        "folder": lambda: sidecars(tmp_path / "in"),
        "pictures": lambda: in_parquet(tmp_path / "in/a.parquet"),
        "webdataset": lambda: in_tar(tmp_path / "in/a.tar"),
    }[kind]()
    report = made(with_download(settings(project, kind, place)), tmp_path / "ws")
    assert (report["total"], report["kept"], report["dropped"], report["shards"]) == (6, 6, {}, 2)
    rows = rows_of(tmp_path / "ws")
    assert [row["caption"] for row in rows] == [caption for _, caption, _ in bodies(6)]
    assert [row["key"] for row in rows] == [f"{10 * shard + i:09d}" for shard, n in ((0, 4), (1, 2)) for i in range(n)]
    assert {(row["width"], row["height"]) for row in rows} == {(80, 72)}
    with tarfile.open(tmp_path / "ws/data/shards/00001.tar") as tar:
        assert tar.getnames() == [f"00000001{i}.{end}" for i in range(2) for end in ("png", "txt", "json")]
    assert not (tmp_path / "ws/work/download").exists() or not any((tmp_path / "ws/work/download").iterdir())


def test_a_run_that_was_stopped_goes_on_with_the_next_shard_to_the_same_bytes(project, tmp_path, monkeypatch):
    config = with_download(settings(project, "folder", sidecars(tmp_path / "in", 10)))
    made(with_download(config, processes=2), tmp_path / "whole")  # two decoders, the same bytes
    from data_pipeline.download import local

    real, written = local.write_shard, []

    def stops(out, shard, rows):
        if shard == 1 and 1 not in written:
            written.append(shard)
            raise KeyboardInterrupt
        written.append(shard)
        return real(out, shard, rows)

    monkeypatch.setattr(local, "write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        made(config, tmp_path / "stopped")
    report = made(config, tmp_path / "stopped", (download,))
    assert written == [0, 1, 1, 2]
    assert content(tmp_path / "stopped") == content(tmp_path / "whole") and report["kept"] == report["total"]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_shard_that_a_power_cut_left_short_is_packed_again_and_no_other(
    project, tmp_path, monkeypatch, share, capsys
):
    config = with_download(settings(project, "folder", sidecars(tmp_path / "in", 10)))
    from data_pipeline.download import local

    def stops(self, finished, out, known=None):
        raise KeyboardInterrupt

    made(config, tmp_path, (source, select))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Stage, "publish", stops)
        made(config, tmp_path, (download,))
    (work,) = (tmp_path / "work/download").glob("*/shards")
    packed = {path.name: path.read_bytes() for path in work.iterdir()}
    for name in ("00000.parquet", "00001.tar"):
        (work / name).write_bytes(packed[name][: int(share * len(packed[name]))])
    real, written = local.write_shard, []
    monkeypatch.setattr(local, "write_shard", lambda *given: written.append(given[1]) or real(*given))
    made(config, tmp_path, (download,))
    assert written == [0, 1] and content(tmp_path) == packed
    said = capsys.readouterr().err
    assert all(f"{work / name}: damaged" in said for name in ("00000.parquet", "00001.tar"))


def test_what_is_no_usable_image_is_dropped_by_its_reason(project, tmp_path):
    root = sidecars(tmp_path / "in", 2)
    body = bodies(1)[0][2]
    frames = [Image.new("RGB", (70, 70), colour) for colour in ("red", "blue")]
    bad = {
        "cut.png": body[:-30],
        "animated.png": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "first.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "large.png": encoded(Image.new("1", (1000, 1000)), "PNG"),
        "old.bmp": encoded(frames[0], "BMP"),
        "text.jpg": b"this is a text",
    }
    for number, (name, data) in enumerate(bad.items()):
        (root / name).write_bytes(data)
        (root / name).with_suffix(".txt").write_text(f"bad one {number}")
    config = with_download(settings(project, "folder", root), max_pixels=500_000)
    report = made(config, tmp_path / "ws")
    kept = {row["url"].rsplit("/", 1)[1]: row for row in rows_of(tmp_path / "ws")}
    source_report = json.loads((tmp_path / "ws/reports/source.json").read_text())
    assert source_report["dropped"] == {"not a readable picture": 1}  # the text
    assert {name: row["reason"] for name, row in kept.items()} == {
        "image_00.png": None, "image_01.png": None, "first.gif": None, "cut.png": "truncated",
        "animated.png": "not a picture", "large.png": "too many pixels", "old.bmp": "not a picture",
    }  # fmt: skip
    assert report["dropped"] == {"not a picture": 2, "too many pixels": 1, "truncated": 1} and report["kept"] == 3
    with (
        tarfile.open(tmp_path / "ws/data/shards/00000.tar") as tar,
        Image.open(tar.extractfile(f"{kept['first.gif']['key']}.png")) as first,
    ):
        assert first.convert("RGB").getpixel((5, 5)) == (255, 0, 0)


def test_images_of_every_mode_are_stored_as_they_are_seen(project, tmp_path):
    import numpy as np
    from truth.image_modes import in_quarters

    known = cases()
    for number, case in enumerate(known):
        suffix = {b"\x89P": "png", b"\xff\xd8": "jpg", b"RI": "webp"}[case.body[:2]]
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/{number:03d}.{suffix}").write_bytes(case.body)
        (tmp_path / f"in/{number:03d}.txt").write_text(f"case {number}")
    config = with_download(settings(project, "folder", tmp_path / "in"), shard_rows=1000, image_size_px=64)
    config = dataclasses.replace(config, source=dataclasses.replace(config.source, max_heldout_prompts=1))
    report = made(config, tmp_path / "ws")
    assert report["dropped"] == {}
    rows = {row["key"]: int(row["caption"].split()[1]) for row in rows_of(tmp_path / "ws")}
    with tarfile.open(tmp_path / "ws/data/shards/00000.tar") as tar:
        for key, number in rows.items():
            with Image.open(tar.extractfile(f"{key}.png")) as image:
                seen = in_quarters(np.asarray(image.convert("RGB")))
            assert np.abs(seen - known[number].seen).max() <= known[number].loss, known[number].name
    assert len(rows) == len(known) - 1  # one is held out


def test_a_hash_list_and_an_owners_no_hold_here_too(project, tmp_path):
    import hashlib

    root = sidecars(tmp_path / "in", 3)
    bytes_of = [body for _, _, body in bodies(3)]
    (tmp_path / "list.txt").write_text(f"sha256:{hashlib.sha256(bytes_of[0]).hexdigest()}\n")
    (tmp_path / "no.txt").write_text(f"sha256:{hashlib.sha256(bytes_of[1]).hexdigest()}\n")
    config = with_download(settings(project, "folder", root), hash_lists=(str(tmp_path / "list.txt"),))
    config = dataclasses.replace(config, filter=dataclasses.replace(config.filter, opt_out=str(tmp_path / "no.txt")))
    assert made(config, tmp_path / "ws")["dropped"] == {"on a hash list": 1, "opted out": 1}


def test_nothing_that_can_be_used_is_one_line_with_the_reasons(project, tmp_path):
    root = sidecars(tmp_path / "in", 3)
    for name, _, body in bodies(3):
        (root / f"{name}.png").write_bytes(body[:-30])
    with pytest.raises(StageError, match="none of 3 images can be used: 3 truncated"):
        made(with_download(settings(project, "folder", root)), tmp_path / "ws")


@pytest.mark.slow
def test_the_shards_are_those_that_img2dataset_makes_of_the_same_images_over_the_loopback(
    project, tmp_path, monkeypatch
):
    root = sidecars(tmp_path / "in", 9)
    for number, case in enumerate(cases()):
        suffix = {b"\x89P": "png", b"\xff\xd8": "jpg", b"RI": "webp"}[case.body[:2]]
        (root / f"case_{number:03d}.{suffix}").write_bytes(case.body)
        (root / f"case_{number:03d}.txt").write_text(f"case {number}")
    (root / "image_03.png").write_bytes(bodies(9)[3][2][:-30])
    for form in ("png", "jpg"):
        config = with_download(settings(project, "folder", root), shard_rows=7, encode_format=form, deadline_s=60.0)
        config = dataclasses.replace(config, download=dataclasses.replace(config.download, timeout_s=20.0))
        made(config, tmp_path / f"direct-{form}")
        listed = dataclasses.replace(config, source=dataclasses.replace(config.source, kind="csv"))
        monkeypatch.setattr("data_pipeline.download.serve_images.site_of", lambda config: root)
        made(config, tmp_path / f"loop-{form}", (source, select))
        made(listed, tmp_path / f"loop-{form}", (download,))
        assert content(tmp_path / f"direct-{form}") == content(tmp_path / f"loop-{form}")
