"""What an image's header claims is what OpenCV decodes, or it is refused: made attacks, and 20,000 mutations."""

from __future__ import annotations

import io
import random
from collections import Counter

import cv2
import numpy as np
import pytest
from attacks import images
from attacks.decoded_sizes import DEAD, TOO_LARGE, decoded_sizes
from PIL import Image

from data_pipeline.gateway.image_header import MAX_SCANS, Header, NotAnImage, TooManyScans, is_complete, read_header

MAX_PIXELS = 1 << 17
MUTATIONS = 20_000


def claimed(data: bytes) -> Header | None:
    """What the gateway believes of a whole body; None where it refuses it."""
    try:
        header = read_header(data)
        return header if header and is_complete(header, data) else None
    except NotAnImage:
        return None


def test_every_harmless_form_of_every_format_passes_with_the_size_that_is_decoded():
    files = [data for each in images.harmless().values() for data in each]
    for data, decoded in zip(files, decoded_sizes(files, MAX_PIXELS), strict=True):
        header = claimed(data)
        assert header and decoded[:2] == (header.width_px, header.height_px) == (26, 18)
        assert decoded[2] <= header.decoded_bytes


def test_no_mutated_image_decodes_to_another_size_than_its_header_claims():
    rng, files = random.Random(20261129), images.harmless()
    cases = [images.mutated(rng, files) for _ in range(MUTATIONS)]
    believed = [(name, data, header) for name, data in cases if (header := claimed(data))]
    believed = [case for case in believed if case[2].width_px * case[2].height_px <= MAX_PIXELS]
    sizes = decoded_sizes([data for _, data, _ in believed], MAX_PIXELS)
    wrong = []
    decoded = Counter()
    for (name, data, header), size in zip(believed, sizes, strict=True):
        if (
            size in (TOO_LARGE, DEAD)
            or size
            and (size[:2] != (header.width_px, header.height_px) or size[2] > header.decoded_bytes)
        ):
            wrong.append((name, header, size, data[:80].hex()))
        decoded[header.format] += size is not None
    assert not wrong, wrong[:5]
    assert all(decoded[kind] > 250 for kind in files), decoded  # the mutations are not all refused or broken


def test_mutations_find_the_size_that_hides_in_what_was_taken_for_a_segment():
    """The reader before took any FF for the beginning of a segment: the fuzz test has to see that."""
    rng, files = random.Random(1), {"jpeg": images.harmless()["jpeg"]}
    cases = [data for _, data in (images.mutated(rng, files) for _ in range(3000))]
    claims = [credulous(data) for data in cases]
    sizes = decoded_sizes(cases, MAX_PIXELS)
    fooled = [
        1 for size, claim in zip(sizes, claims, strict=True) if claim and isinstance(size, tuple) and size[:2] != claim
    ]
    assert len(fooled) >= 3


def credulous(data: bytes) -> tuple[int, int] | None:
    """(width, height) of the first frame by segments' lengths alone, whatever their markers are."""
    position = 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        if data[position + 1] in (0xC0, 0xC1, 0xC2):
            height, width = (int.from_bytes(data[start : start + 2], "big") for start in (position + 5, position + 7))
            return width, height
        position += 2 + max(int.from_bytes(data[position + 2 : position + 4], "big"), 2)
    return None


@pytest.mark.parametrize("filler", [b"\xff\x00", b"\xff\x02", b"\xff\xbf", b"\xff\xd0", b"\xff\x01", b"AB", b"\0\0"])
def test_a_frame_hidden_from_the_header_reader_is_refused(filler, monkeypatch):
    attack = images.hidden_frame_jpeg(filler)
    assert len(attack) < 1500
    assert claimed(attack) is None
    with pytest.raises(NotAnImage):
        read_header(attack)


def test_the_hidden_frame_is_what_opencv_and_pillow_read(monkeypatch):
    attack = images.hidden_frame_jpeg()
    assert credulous(attack) == (64, 64)
    assert decoded_sizes([attack], 32000 * 32000 - 1) == [TOO_LARGE]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert Image.open(io.BytesIO(attack)).size == (32000, 32000)


def test_scans_are_counted_before_they_are_decoded():
    attack = images.many_scans_jpeg()
    assert len(attack) < 25_000 and cv2.imdecode(np.frombuffer(attack, np.uint8), cv2.IMREAD_UNCHANGED) is not None
    with pytest.raises(TooManyScans):
        claimed_or_raised(attack)
    assert claimed_or_raised(images.many_scans_jpeg(num_scans=MAX_SCANS // 2))


def claimed_or_raised(data: bytes) -> bool:
    return is_complete(read_header(data), data)


def test_a_second_frame_is_refused_and_bytes_behind_the_end_are_not():
    whole = images.encoded(Image.new("RGB", (30, 20)), "JPEG")
    frame = whole[whole.index(b"\xff\xc0") :][:19]
    scan = whole.index(b"\xff\xda")
    with pytest.raises(NotAnImage, match="second frame"):
        claimed_or_raised(whole[:scan] + frame + whole[scan:])
    preview = images.many_scans_jpeg(num_scans=200)  # cameras put previews there, of any form
    for more in (b"\0" * 9, preview, frame, b"\xff\x00\xff\xd8"):
        assert claimed_or_raised(whole + more)
        assert decoded_sizes([whole + more], MAX_PIXELS)[0][:2] == (30, 20)


def test_an_end_marker_in_a_preview_does_not_make_a_cut_image_whole():
    thumbnail = images.encoded(Image.new("RGB", (8, 8)), "JPEG")
    whole = images.encoded(Image.new("RGB", (30, 20)), "JPEG", exif=b"Exif\0\0" + thumbnail)
    assert claimed_or_raised(whole) and not claimed_or_raised(whole[:-2])
    frame, segment = whole.index(b"\xff\xc0", 700), b"\xff\xe2" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    late = whole[: frame + 19] + segment + whole[frame + 19 :]
    assert claimed_or_raised(late) and not claimed_or_raised(late[:-2])


def test_animated_and_twice_begun_pngs_are_refused():
    whole = images.encoded(Image.new("RGB", (30, 20)), "PNG")
    head = whole[8:33]
    for attack in (images.animated_png(), whole[:33] + head + whole[33:], whole[:33] + bytes(12) + whole[33:]):
        with pytest.raises(NotAnImage):
            claimed_or_raised(attack)


@pytest.mark.parametrize("piece", [b"\xff", b"\xff\xd0", b"\xff\xe0\0\2", b"\xff\xfe\0\3\xff"])
def test_a_megabyte_that_says_nothing_is_read_in_an_instant(piece):
    import time

    body = b"\xff\xd8\xff" + piece * ((1 << 20) // len(piece))
    started_s = time.process_time()
    for end in range(1 << 16, len(body), 1 << 16):  # as the gateway asks, piece by piece
        try:
            assert read_header(body[:end]) is None
        except NotAnImage:
            break
    assert time.process_time() - started_s < 0.2
