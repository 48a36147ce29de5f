"""What `raphael data check` says would be used is what the stages use, reason by reason."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from attacks.images import encoded
from PIL import Image
from truth.own_images import bodies, in_parquet, in_tar, settings, sidecars

from data_pipeline.common.hashes.phash import phashes
from data_pipeline.tools.checking import check as checking
from data_pipeline.tools.checking.summary import alike
from raphael.base.stage import Stage

STAGES = ("source", "select", "download", "filter", "captions")


def of_every_fault(root: Path) -> Path:
    """Four good images, and one of most reasons."""
    sidecars(root, 4)
    body = bodies(1)[0][2]
    small, long = Image.new("RGB", (60, 50), "red"), Image.new("RGB", (700, 70), "red")
    more = {
        "text.jpg": (b"no image at all", "a text"),
        "cut.png": (body[:-30], "cut in the middle"),
        "small.png": (encoded(small, "PNG"), "a small one"),
        "tiny.png": (encoded(Image.new("RGB", (20, 20)), "PNG"), "a tiny one"),
        "long.png": (encoded(long, "PNG"), "a long one"),
        "same.png": (body, "the same again"),
        "short.png": (encoded(Image.new("RGB", (70, 70), "blue"), "PNG"), "a"),
        "mail.png": (encoded(Image.new("RGB", (70, 70), "green"), "PNG"), "someone@example.com"),
        "large.png": (encoded(Image.new("1", (2000, 2000)), "PNG"), "a large one"),
        "empty.png": (b"", "an empty one"),
        "silent.png": (body, None),
    }
    for name, (data, caption) in more.items():
        (root / name).write_bytes(data)
        if caption is not None:
            (root / name).with_suffix(".txt").write_text(caption)
    (root / "image_00.txt").write_text("first caption\nsecond caption\nfirst caption\n")
    return root


def limited(config):
    download = dataclasses.replace(config.download, max_pixels=1_000_000)
    return dataclasses.replace(config, download=download)


def through_the_stages(config, root: Path) -> tuple[int, Counter]:
    """(rows kept by the last stage, what all of them dropped)."""
    root.mkdir()
    dropped: Counter[str] = Counter()
    with contextlib.chdir(root):
        for name in STAGES:
            importlib.import_module(f"data_pipeline.{name}.stage").run(config, Stage(name, root))
            report = json.loads((root / f"reports/{name}.json").read_text())
            dropped.update(report["dropped"])
    return report["kept"], dropped


@pytest.mark.parametrize("kind", ["folder", "pictures", "webdataset"])
def test_the_counts_are_those_of_the_stages(project, tmp_path, kind):
    place = {
        "folder": lambda: of_every_fault(tmp_path / "in"),
        "pictures": lambda: in_parquet(tmp_path / "in/a.parquet", 7),
        "webdataset": lambda: in_tar(tmp_path / "in/a.tar", 7, "json"),
    }[kind]()
    config = limited(settings(project, kind, place, max_heldout_prompts=0))
    found, sheet = checking.check(config)
    kept, dropped = through_the_stages(config, tmp_path / "ws")
    assert (found["used"], found["dropped"]) == (kept, dict(sorted(dropped.items())))
    assert found["total"] == kept + dropped.total() and sheet.size[0] > 100


def test_each_fault_has_its_reason(project, tmp_path):
    found, _ = checking.check(limited(settings(project, "folder", of_every_fault(tmp_path / "in"))))
    assert found["dropped"] == {
        "another caption of a kept url": 1, "caption too short": 1, "duplicate picture": 1, "duplicate url": 1,
        "no caption": 1, "no words": 1, "not a readable picture": 2, "smaller than its size": 1,
        "too long and narrow": 1, "too many pixels": 1, "too small": 1, "truncated": 1,
    }  # fmt: skip
    assert found["used"] == 4 and found["total"] == 17
    assert found["examples"]["duplicate picture"] == ["same.png"] and found["buckets"] == {"64x64": 4}
    captions = found["captions_of_used"]
    assert captions["number"] == captions["different"] == 4 and captions["words"]["least"] == 2


def test_what_is_unusual_and_how_it_is_handled_is_counted(project, tmp_path):
    root = sidecars(tmp_path, 1)
    frame = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 70, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    unusual = {
        "turned.jpg": encoded(Image.new("RGB", (70, 90), "red"), "JPEG", exif=turned),
        "inks.jpg": encoded(frame.convert("CMYK"), "JPEG"),
        "palette.png": encoded(frame.quantize(9), "PNG"),
        "grey.png": encoded(frame.convert("L"), "PNG"),
        "deep.png": encoded(Image.fromarray(np.zeros((70, 70), np.uint16)), "PNG"),
        "clear.png": encoded(frame.convert("RGBA"), "PNG"),
        "moving.gif": encoded(frame.convert("P"), "GIF", save_all=True, append_images=[frame.rotate(90).convert("P")]),
    }
    for number, (name, body) in enumerate(unusual.items()):
        (root / name).write_bytes(body)
        (root / name).with_suffix(".txt").write_text(f"unusual one {number}")
    found, _ = checking.check(settings(project, "folder", root))
    assert found["used"] == 8, found["dropped"]
    assert found["handled"] == {
        "16 bits": 1, "CMYK": 1, "animated, first frame": 1, "grey": 1, "palette": 2, "transparent, over white": 1,
        "turned by EXIF": 1,
    }  # fmt: skip


def test_images_that_look_alike_are_found_as_by_comparing_all_with_all(monkeypatch):
    monkeypatch.setattr("data_pipeline.tools.checking.summary.BLOCK", 7)
    draw = np.random.default_rng(3)
    hashes = draw.integers(0, 2**63, 40).astype(np.uint64)
    for copy, original, bits in ((9, 2, 0b1), (20, 9, 0b1110), (33, 5, 0), (39, 38, 0b11111)):
        hashes[copy] = hashes[original] ^ np.uint64(bits)
    near = [
        next((i for i in range(j) if bin(int(hashes[i]) ^ int(hashes[j])).count("1") <= 4), None) for j in range(40)
    ]
    found = alike([str(place) for place in range(40)], hashes)
    pairs = [[str(i), str(j)] for j, i in enumerate(near) if i is not None]
    assert found["look_like_an_earlier_one"] == len(pairs) == 3 and found["pairs"] == pairs


def test_a_shrunk_copy_looks_like_its_original(project, tmp_path):
    noise = np.random.default_rng(4).integers(0, 255, (12, 12, 3), np.uint8)
    image = Image.fromarray(noise).resize((240, 240), Image.Resampling.BICUBIC)
    for name, copy in (("a", image), ("b", image.resize((160, 160)))):
        copy.save(tmp_path / f"{name}.jpg", quality=90)
        (tmp_path / f"{name}.txt").write_text(f"image {name}")
    assert np.bitwise_count(np.bitwise_xor(*phashes([image, image.resize((160, 160))]))) <= 4
    found, _ = checking.check(settings(project, "folder", tmp_path))
    assert found["duplicates"]["pairs"] == [["a.jpg", "b.jpg"]]


def test_the_command_prints_json_alone_and_leaves_both_files(tmp_path, project):
    sidecars(tmp_path / "in", 5)
    command = [sys.executable, "-m", "raphael.cli", "data", "check", str(tmp_path / "in"), "--json"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out"), "--size", "32x48"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["used"] == 5 and found["dropped"] == {} and found["buckets"] == {"32x48": 5}
    assert json.loads((tmp_path / "out/check.json").read_text()) == found
    with Image.open(tmp_path / "out/contact.png") as sheet:
        assert sheet.width > 5 * 128
    wrong = subprocess.run([*command, "--size", "32"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "--size: got '32', expected height x width in px" in wrong.stderr
