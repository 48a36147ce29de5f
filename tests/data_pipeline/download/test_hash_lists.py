"""Images on a hash list are refused for the bytes that came and for what is seen, and nothing of them is stored."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from attacks.images import encoded
from PIL import Image, ImageFilter

from data_pipeline.common.hashes.lists import ON_LIST, HashLists
from data_pipeline.download import shards
from data_pipeline.download import stage as download
from data_pipeline.download.decoder import Guard, Limits
from raphael.base.config.params import load_config
from raphael.base.stage import Stage, StageError

SETTINGS = {
    "image_size": 64, "resize_mode": "keep_ratio", "resize_only_if_bigger": True, "upscale_interpolation": "lanczos",
    "downscale_interpolation": "area", "encode_quality": 6, "encode_format": "png", "max_image_area": 50e6,
}  # fmt: skip


def picture(number: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A smooth one, as photographs are at the scale of a perceptual hash; each another."""
    noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def written(folder: Path, *lines: str, name: str = "list.txt") -> str:
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


MD5, SHA256, PHASH = "0" * 31 + "a", "0" * 63 + "b", "0" * 15 + "c"


def test_entries_of_every_form_are_read_and_two_lists_are_one(tmp_path):
    first = written(tmp_path, "# of a hotline", MD5.upper(), f"sha256:{SHA256}", "", name="a")
    second = written(tmp_path, f"md5:{MD5}  # again", f"phash:{PHASH}", SHA256, name="b")
    lists = HashLists.read((first, second))
    assert (lists.md5, lists.sha256, lists.phash) == ({MD5}, {SHA256}, {PHASH})
    assert lists.summary() == {"phash": 1, "md5": 1, "sha256": 1}
    assert HashLists.read((second, first)).fingerprint == lists.fingerprint != HashLists.read((first,)).fingerprint
    assert HashLists.read(()).fingerprint == ""


@pytest.mark.parametrize(
    "entry", ["md5:" + SHA256, "sha1:" + "0" * 40, "0" * 40, "0" * 31 + "g", "md5:", "http://a.example/x.jpg"]
)
def test_an_entry_of_no_known_kind_stops_everything(tmp_path, entry):
    with pytest.raises(StageError, match="list.txt:2: got .*expected md5:, sha256: or phash:") as caught:
        HashLists.read((written(tmp_path, MD5, entry),))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("lines", "said"), [(None, "No such file"), (["# nothing yet"], "got no entry")])
def test_a_list_that_is_absent_or_empty_stops_everything(tmp_path, lines, said):
    path = written(tmp_path, *lines) if lines else str(tmp_path / "absent")
    with pytest.raises(StageError, match=said):
        HashLists.read((path,))


def altered(image: Image.Image) -> dict[str, bytes]:
    """What becomes of an image on its way through the web."""
    return {
        "itself": encoded(image, "PNG"),
        "as a JPEG of low quality": encoded(image, "JPEG", quality=40),
        "half as large": encoded(image.resize((48, 40)), "PNG"),
        "blurred": encoded(image.filter(ImageFilter.GaussianBlur(1.5)), "WEBP"),
        "without colours": encoded(image.convert("L"), "PNG"),
        "with another margin of transparency": encoded(image.convert("RGBA"), "PNG"),
    }


def test_what_looks_like_an_entry_is_refused_by_the_decoder_and_what_does_not_is_stored(tmp_path):
    """The entry is made by imagehash itself. Truth: its own distance."""
    entry = imagehash.phash(picture(1))
    limits = Limits(10**6, 10**9, 20, (written(tmp_path, f"phash:{entry}"),), 6)
    guard = Guard(limits, SETTINGS)
    try:
        for how, body in altered(picture(1)).items():
            assert imagehash.phash(Image.open(io.BytesIO(body))) - entry <= 6, how
            *nothing, error = guard.decode(body)
            assert nothing == [None] * 5 and error == ON_LIST, how
        assert shards.reason_of("failed_to_resize", ON_LIST) == ON_LIST
        for number in range(2, 12):
            assert imagehash.phash(picture(number)) - entry > 6
            assert guard.decode(encoded(picture(number), "JPEG"))[-1] is None
    finally:
        guard.close()


@pytest.mark.parametrize(("bits", "refused"), [(9, False), (10, True)])
def test_as_many_bits_may_differ_as_the_setting_says(bits, refused, tmp_path):
    from data_pipeline.common.hashes.phash import phashes

    (value,) = phashes([picture(1)])
    entry = f"{int(value) ^ 0b1111100000_1111100000:016x}"  # ten bits
    lists = HashLists.read((written(tmp_path, entry),))
    assert lists.has_phash(phashes([picture(1)]), bits) == refused


LISTED = {1: "md5", 2: "sha256", 3: "phash", 4: "owner"}
ROWS = 7


@pytest.fixture(scope="module")
def downloaded(project, tmp_path_factory) -> Path:
    """A download of seven images of which three are on lists and one is an owner's who said no by its md5."""
    folder = tmp_path_factory.mktemp("listed")
    (folder / "site").mkdir()
    bodies = [encoded(picture(row), "JPEG", quality=90) for row in range(ROWS)]
    for row, body in enumerate(bodies):
        (folder / "site" / f"{row}.jpg").write_bytes(body)
    lines = [hashlib.md5(bodies[1]).hexdigest(), f"sha256:{hashlib.sha256(bodies[2]).hexdigest()}"]
    hashes = written(folder, f"phash:{imagehash.phash(picture(3).resize((40, 40)))}", name="phashes.txt")
    (folder / "no.txt").write_text(f"md5:{hashlib.md5(bodies[4]).hexdigest()}\n")
    (folder / "data/selected").mkdir(parents=True)
    links = {
        "id": range(ROWS),
        "url": [f"http://scenes.invalid/{row}.jpg" for row in range(ROWS)],
        "caption": [f"picture {row}" for row in range(ROWS)],
    }
    pq.write_table(pa.table(links), folder / "data/selected/links.parquet")
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["download"].update(shard_rows=ROWS, timeout_s=10.0, deadline_s=20.0, stall_s=300.0)
    params["download"]["hash_lists"] = [written(folder, *lines, name="bytes.txt"), hashes]
    params["filter"]["opt_out"] = str(folder / "no.txt")
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    patch = pytest.MonkeyPatch()
    with patch.context() as at:
        at.chdir(folder)
        at.setattr("data_pipeline.download.serve_images.site_of", lambda config: folder / "site")
        download.run(load_config(folder / "params.yaml"), Stage("download", folder))
    return folder


def test_a_download_counts_what_is_on_a_list_and_keeps_the_rest(downloaded):
    report = json.loads((downloaded / "reports/download.json").read_text())
    assert (report["total"], report["kept"]) == (ROWS, ROWS - len(LISTED))
    assert report["dropped"] == {ON_LIST: 3, "opted out": 1}
    assert report["hash_lists"] == {"phash": 1, "md5": 1, "sha256": 1}
    rows = pq.read_table(downloaded / "data/shards/00000.parquet").to_pylist()
    reasons = [ON_LIST, ON_LIST, ON_LIST, "opted out"]
    assert [row["reason"] for row in rows] == [None, *reasons, None, None]
    assert rows[1]["url"] == "http://scenes.invalid/1.jpg"  # whom it has to be reported by


def test_nothing_of_a_listed_image_lies_in_the_workspace(downloaded):
    stored = [path for part in ("data/shards", "work", "reports") for path in (downloaded / part).rglob("*")]
    stored = {path: path.read_bytes() for path in stored if path.is_file()}
    for row in range(ROWS):
        body = (downloaded / "site" / f"{row}.jpg").read_bytes()
        key = f"{row:09d}.png".encode()
        is_there = any(key in content for path, content in stored.items() if path.suffix == ".tar")
        assert is_there == (row not in LISTED) and not any(body[100:400] in content for content in stored.values())


def test_another_list_is_other_work_and_none_is_the_work_from_before(project, tmp_path):
    config = load_config(project / "params.yaml")
    assert download.Refused.of(config).fingerprint == []
    import dataclasses

    fingerprints = []
    for entry in (MD5, SHA256):
        lists = (written(tmp_path, entry),)
        listed = dataclasses.replace(config, download=dataclasses.replace(config.download, hash_lists=lists))
        fingerprints.append(download.Refused.of(listed).fingerprint)
    assert fingerprints[0] != fingerprints[1] and all(fingerprints)
