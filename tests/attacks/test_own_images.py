"""A folder, a table, a tar, a COCO of images that somebody sent, for `raphael data check` and `caption` and `source`.

Every file of each is damaged and made to lie; what lies outside of the folder is neither read nor told.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from attacks import images
from attacks.hostile_files import damaged, ended_in_a_line, hostile_json, kind, write
from PIL import Image
from truth.image_workspace import add_member
from truth.own_images import bodies, found, in_parquet, in_tar, settings, sidecars, with_metadata

from data_pipeline.gateway.bodies import BodyLimits
from data_pipeline.local_images.kinds import open_collection
from data_pipeline.tools.checking.check import main as check_main
from raphael.base.stage import Stage, one_clear_line

TARGET = "raphael data check"


def coco(root: Path) -> Path:
    (root / "train2017").mkdir(parents=True)
    about: dict = {"images": [], "annotations": []}
    for number, (name, caption, body) in enumerate(bodies(3)):
        (root / "train2017" / f"{name}.png").write_bytes(body)
        about["images"].append({"id": number, "file_name": f"{name}.png"})
        about["annotations"].append({"id": number, "image_id": number, "caption": caption})
    (root / "captions_train2017.json").write_text(json.dumps(about))
    return root


FORMS: dict[str, Callable[[Path], Path]] = {
    "sidecars": lambda root: sidecars(root, 2),
    "metadata.jsonl": lambda root: with_metadata(root, 2, "jsonl"),
    "metadata.csv": lambda root: with_metadata(root, 2, "csv"),
    "metadata.parquet": lambda root: with_metadata(root, 2, "parquet"),
    "a parquet file": lambda root: in_parquet(root / "a.parquet", 3),
    "a tar": lambda root: in_tar(root / "a.tar", 2, "json"),
    "COCO": coco,
}


def checked(place: Path, out: Path) -> Callable[[], int]:
    return lambda: check_main([str(place), "--size", "64x64", "--out", str(out)])


@pytest.mark.parametrize("form", FORMS)
def test_every_file_of_a_collection_may_be_damaged(form, tmp_path, capsys, tried):
    place = FORMS[form](tmp_path / "in")
    act = checked(place, tmp_path / "out")
    assert ended_in_a_line(act, capsys) == "taken"
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    seen = set()
    for path in files:
        flips = 2 if path.suffix in seen else 40 if path.suffix not in (".png", ".txt") else 10
        seen.add(path.suffix)
        whole = path.read_bytes()
        cases = [*damaged(whole, random.Random(path.name), flips)]
        if path.suffix == ".json":
            cases += hostile_json(whole.decode(), random.Random(1), 80)
        if path.suffix == ".jsonl":
            line = whole.decode().splitlines()[0]
            cases += [(what, f"{text}\n") for what, text in hostile_json(line, random.Random(2), 80)]
        for what, content in cases:
            write(path, content)
            try:
                tried(TARGET, form, f"{path.suffix}: {kind(what)}", ended_in_a_line(act, capsys))
            except BaseException as error:
                raise AssertionError(f"{path.name}: {what}") from error
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/../../secret", "a\0b", "x" * 300, "\udcff", "..", ""]
)
@pytest.mark.parametrize("form", ["metadata.jsonl", "COCO", "a tar"])
def test_a_name_leads_nowhere_outside(form, name, tmp_path, capsys, tried):
    (tmp_path / "secret.png").write_bytes(bodies(1)[0][2])
    name = name + ".png" if "etc" not in name else name
    place = tmp_path / "in"
    if form == "metadata.jsonl":
        write(
            with_metadata(place, 2) / "train/metadata.jsonl", json.dumps({"file_name": name, "text": "a text"}) + "\n"
        )
    elif form == "COCO":
        about = {
            "images": [{"id": 1, "file_name": name}],
            "annotations": [{"id": 1, "image_id": 1, "caption": "a b c"}],
        }
        (coco(place) / "captions_train2017.json").write_text(json.dumps(about))
    else:
        with tarfile.open(in_tar(place / "a.tar", 0), "w", errors="surrogateescape") as tar:
            link = tarfile.TarInfo("a.png")
            link.type, link.linkname = tarfile.SYMTYPE, name.replace("\0", "")
            tar.addfile(link)
            add_member(tar, "a.txt", b"a caption of it")
            add_member(tar, name.replace("\0", "") or "z", b"not an image")
    before = {path for path in tmp_path.rglob("*")}
    outcome = ended_in_a_line(checked(place, tmp_path / "out"), capsys)
    assert outcome == "refused in a line", "it used something"
    new = {path for path in tmp_path.rglob("*")} - before
    assert all(tmp_path / "out" in (path, *path.parents) for path in new)
    tried(TARGET, form, f"a name such as {name[:20]!r}", outcome)


def test_a_link_tells_nothing_of_what_it_leads_to(project, tmp_path, tried):
    """An archive can hold links: neither the image nor the caption that they lead to becomes a row."""
    secret = tmp_path / "secrets"
    sidecars(secret, 2)
    (secret / "key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    (secret / "rows.jsonl").write_text(json.dumps({"file_name": "image_00.png", "text": "a secret caption"}) + "\n")
    root = sidecars(tmp_path / "in", 2)
    (root / "image_01.txt").unlink()
    (root / "image_01.txt").symlink_to(secret / "key")
    (root / "linked.png").symlink_to(secret / "image_01.png")
    (root / "linked.txt").write_text("an image of somebody else's")
    rows, _, _ = found(settings(project, "folder", root))
    assert rows == {"image_00.png": "a red square on green, number 0", "linked.png": "an image of somebody else's"}
    collection = open_collection(settings(project, "folder", root).source)
    assert collection.body("linked.png") is None and collection.body("image_00.png")
    with pytest.raises(OSError):
        collection.size("linked.png")
    tried(TARGET, "a folder", "a caption that is a link to a key", "not read")
    (root / "metadata.jsonl").symlink_to(secret / "rows.jsonl")
    with contextlib.suppress(Exception):
        rows, _, _ = found(settings(project, "folder", root))
    assert "a secret caption" not in rows.values()
    tried(TARGET, "a folder", "a metadata file that is a link", "not read")
    (root / "metadata.jsonl").unlink()
    (root / "linked.png").unlink()
    (root / "loop").symlink_to(root)
    assert len(found(settings(project, "folder", root))[0]) == 1
    os.mkfifo(root / "image_02.png")
    os.mkfifo(root / "image_00.caption")
    assert len(found(settings(project, "folder", root))[0]) == 1
    tried(TARGET, "a folder", "loops of links, pipes for files", "passed over")


def sparse_tar(path: Path, logical: int) -> Path:
    """GNU's old form of a member with holes: a kilobyte that says it is `logical` bytes."""
    head = tarfile.TarInfo("a.png")
    head.size, head.type = 512, tarfile.GNUTYPE_SPARSE
    block = bytearray(head.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0%011o\0" % (0, 512)
    block[483:495] = b"\x80" + logical.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    with open(path, "wb") as file:
        file.write(block + bytes(512))
        caption = io.BytesIO()
        with tarfile.open(fileobj=caption, mode="w") as tar:
            add_member(tar, "a.txt", b"a caption of it")
        file.write(caption.getvalue())
    return path


def test_what_says_that_it_is_huge_costs_no_memory(tmp_path, capsys, tried):
    """Two gigabytes of holes as an image or as a caption, in a folder and in a tar."""
    root, size = sidecars(tmp_path / "in", 1), 2 << 30
    for name in ("huge.png", "huge.txt", "image_00.caption", "plain.txt"):
        with open(root / name, "wb") as file:
            file.truncate(size)
    (root / "plain.png").write_bytes(bodies(2)[1][2])
    (tmp_path / "tar").mkdir()
    tar = sparse_tar(tmp_path / "tar/a.tar", size)
    with tarfile.open(tar) as opened:
        assert opened.getmember("a.png").size == size, "the attack is none"
    for place, expected in ((root, "taken"), (tar, "refused in a line")):
        tracemalloc.start()
        assert ended_in_a_line(checked(place, tmp_path / "out"), capsys) == expected
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 300 << 20, f"{place}: {peak:,} bytes"
        tried(TARGET, "a folder" if place == root else "a tar", "two gigabytes of holes", expected)


LIMITS = BodyLimits(20 << 20, 1 << 26, 1 << 28)
AT_THE_DOOR = {
    "TIFF": b"II*\0\x08\0\0\0" + bytes(64),
    "TIFF, the other way round": b"MM\0*\0\0\0\x08" + bytes(64),
    "BigTIFF": b"II+\0\x08\0\0\0\x10" + bytes(64),
    "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(64),
    "HEIF": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>fetch("http://127.0.0.1")</script></svg>',
    "SVG of entities": b'<!DOCTYPE s [<!ENTITY a "aaaaaaaaaa">]><svg>&a;</svg>' + bytes(32),
    "JPEG XL": b"\xff\x0a" + bytes(64),
    "JPEG XL in a box": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(64),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64),
    "BMP": b"BM" + struct.pack("<IHHI", 1 << 30, 0, 0, 54) + struct.pack("<IiiHH", 40, 60000, 60000, 1, 24) + bytes(64),
    "ICO": b"\0\0\1\0\1\0" + bytes(64),
    "PSD": b"8BPS\0\1" + bytes(64),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "PDF": b"%PDF-1.7\n" + bytes(64),
    "PNM": b"P6\n60000 60000\n255\n" + bytes(64),
    "OpenEXR": b"v/1\x01" + bytes(64),
    "Radiance": b"#?RADIANCE\n" + bytes(64),
    "Sun raster": b"Y\xa6j\x95" + bytes(64),
    "DDS": b"DDS |\0\0\0" + bytes(128),
    "HTML": b"<!doctype html><script>alert(1)</script>" + bytes(32),
}


def tiff() -> bytes:
    return images.encoded(Image.new("RGB", (64, 64), "red"), "TIFF")


@pytest.mark.parametrize("name", [*AT_THE_DOOR, "a whole TIFF"])
def test_at_the_door_no_other_format_is_taken_for_an_image(name, tmp_path, capsys, tried):
    """By the gateway's reader of headers and by the check, whatever the file's name says."""
    body = AT_THE_DOOR.get(name) or tiff()
    assert LIMITS.refuses(body) == "not a picture"
    tried("the gateway", "another format", name, "not a picture")
    (tmp_path / "in").mkdir()
    for suffix in (".png", ".jpg", ".webp", ".gif"):
        (tmp_path / f"in/a{suffix}").write_bytes(body)
    (tmp_path / "in/a.txt").write_text("a caption of it")
    assert ended_in_a_line(checked(tmp_path / "in", tmp_path / "out"), capsys) == "refused in a line"
    told = json.loads((tmp_path / "out/check.json").read_text())
    assert told["used"] == 0 and set(told["dropped"]) <= {"not a readable picture", "not a picture"}
    tried(TARGET, "another format", name, "not a picture")


def test_source_reads_a_hostile_folder_as_the_check_does(project, tmp_path, capsys):
    root = sidecars(tmp_path / "in", 2)
    for number, body in enumerate(AT_THE_DOOR.values()):
        (root / f"door_{number}.png").write_bytes(body)
        (root / f"door_{number}.txt").write_text("a caption")
    from data_pipeline.source import stage

    (tmp_path / "ws").mkdir()
    with contextlib.chdir(tmp_path / "ws"), one_clear_line("source") as outcome:
        stage.run(settings(project, "folder", root, max_heldout_prompts=0), Stage("source", tmp_path / "ws"))
    assert outcome.status == 0
    report = json.loads((tmp_path / "ws/reports/source.json").read_text())
    assert report["total"] == 2 + len(AT_THE_DOOR)


STRANGER = """
from pathlib import Path
Path({mark!r}).touch()
class Any: pass
"""


@pytest.mark.parametrize("kind_of_model", ["stranger", "blip"])
def test_a_captioning_model_runs_no_code_of_its_folder_and_asks_nobody(
    kind_of_model, tmp_path, capsys, monkeypatch, tried
):
    """transformers asks on the terminal whether to run a folder's code, unless it is told."""
    import builtins

    from data_pipeline.tools.captioning import main as caption_main

    root, folder = sidecars(tmp_path / "in", 1), tmp_path / "model"
    (root / "image_00.txt").unlink()
    folder.mkdir()
    names = ("AutoConfig", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer", "AutoModelForImageTextToText")
    said = {"model_type": kind_of_model, "auto_map": {name: "code.Any" for name in names}}
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps(said))
    (folder / "code.py").write_text(STRANGER.format(mark=str(tmp_path / "ran")))
    asked: list[object] = []
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "y")
    outcome = ended_in_a_line(lambda: caption_main([str(root), "--model", str(folder)]), capsys)
    assert outcome == "refused in a line" and not asked and not (tmp_path / "ran").exists()
    tried("raphael data caption", "a model of the type " + kind_of_model, "code in its folder", "not run, nobody asked")


@pytest.mark.parametrize("name", ["many scans", "a hidden frame"])
def test_what_hurts_a_decoder_is_not_captioned(name, tmp_path, monkeypatch, tried):
    from data_pipeline.tools import captioning

    body = images.many_scans_jpeg() if name == "many scans" else images.hidden_frame_jpeg()
    (tmp_path / "a.jpg").write_bytes(body)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was opened"))
    assert captioning._opened(tmp_path / "a.jpg") is None
    tried("raphael data caption", "an image", name, "passed over")
