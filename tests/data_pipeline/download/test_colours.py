"""Images of every mode show the colours that a person sees, in the downloads and in whatever reads images later."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from attacks.images import encoded
from PIL import Image
from truth.image_modes import QUARTERS, adobe_profile, cases, deep_png, in_quarters, spread

from data_pipeline.download import decoder, shards
from data_pipeline.download.colours import UNKNOWN, special
from data_pipeline.download.decoder import Guard, Limits
from raphael.base.images.colours import UnknownColours, as_seen, to_rgb
from raphael.base.images.fit import read_image
from raphael.evaluate.features.image_folder import Preparation, read_prepared

SETTINGS = {
    "image_size": 48, "resize_mode": "keep_ratio", "resize_only_if_bigger": True, "upscale_interpolation": "lanczos",
    "downscale_interpolation": "area", "encode_quality": 6, "encode_format": "png", "max_image_area": 50e6,
}  # fmt: skip
JPG = {**SETTINGS, "encode_quality": 98, "encode_format": "jpg"}
ALL = {case.name: case for case in cases()}
LIMITS = Limits(max_pixels=1_000_000, memory_bytes=500_000_000, processor_s=20)
PLAIN = [name for name, case in ALL.items() if special(case.body, 10**6) is None]


@pytest.fixture(scope="module")
def resizers():
    return {name: decoder.resizer(settings, LIMITS) for name, settings in (("png", SETTINGS), ("jpg", JPG))}


def pixels_of(answer) -> np.ndarray:
    body, *_, error = answer
    assert error is None, error
    with Image.open(io.BytesIO(body)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("form", ["png", "jpg"])
@pytest.mark.parametrize("name", ALL)
def test_a_download_shows_the_colours_that_are_seen(name, form, resizers):
    case, answer = ALL[name], resizers[form](io.BytesIO(ALL[name].body))
    assert answer[1:5] == (48, 48, 64, 64)
    assert np.abs(in_quarters(pixels_of(answer)) - case.seen).max() <= case.loss + (2 if form == "jpg" else 0)


def test_the_decoders_child_answers_as_the_resizer_in_this_process_does(resizers):
    guard = Guard(LIMITS, SETTINGS)
    try:
        for case in ALL.values():
            assert guard.decode(case.body) == resizers["png"](io.BytesIO(case.body)), case.name
    finally:
        guard.close()


@pytest.mark.parametrize("name", ALL)
def test_readers_of_shards_and_of_folders_show_the_same(name, tmp_path):
    case = ALL[name]
    read = read_image(io.BytesIO(case.body))
    assert read.shape == (64, 64, 3) and np.abs(in_quarters(read) - case.seen).max() <= case.loss
    (tmp_path / "image.png").write_bytes(case.body)
    measured = read_prepared(tmp_path / "image.png", Preparation("none", 0))  # profiles: as the peers, not obeyed
    assert np.abs(in_quarters(measured) - case.stored).max() <= case.loss


def test_opencv_by_itself_gets_these_wrong_and_the_others_are_still_decoded_by_it():
    """So that the table shows what was wrong, and nothing else changes its bytes."""
    wrong = set()
    for case in ALL.values():
        image = cv2.imdecode(np.frombuffer(case.body, np.uint8), cv2.IMREAD_UNCHANGED)
        image = image.clip(0, 255)
        if image.ndim == 3 and image.shape[-1] == 4:  # as img2dataset does
            opacity = image[..., 3:] / 255
            image = image[..., :3] * opacity + 255 * (1 - opacity)
        image = image[..., ::-1] if image.ndim == 3 else np.repeat(image[..., None], 3, -1)
        if np.abs(in_quarters(image) - case.seen).max() > case.loss:
            wrong.add(case.name)
    assert len(wrong) > 30 and not wrong & set(PLAIN)
    assert {"RGB PNG", "RGB JPEG", "RGB WEBP", "L PNG", "L JPEG", "1 PNG", "P PNG", "RGBA PNG", "LA PNG"} <= set(PLAIN)
    assert {"RGB PNG in sRGB", "RGB PNG, broken profile", "RGB JPEG, orientation 1"} <= set(PLAIN)


def test_a_gif_is_decoded_by_opencv_and_its_transparency_is_white(resizers):
    palette = Image.fromarray(spread(QUARTERS)).quantize(4, dither=0)
    body = encoded(palette, "GIF", transparency=palette.getpixel((0, 0)))
    seen = QUARTERS.copy()
    seen[0, 0] = 255
    assert np.abs(in_quarters(pixels_of(resizers["png"](io.BytesIO(body)))) - seen).max() <= 1


def test_sixteen_bits_that_pillow_does_not_open_are_refused_and_counted(resizers, monkeypatch):
    body = deep_png(spread(QUARTERS * 257, np.uint16))
    monkeypatch.setattr("data_pipeline.download.colours.special", lambda *_: None)
    *nothing, error = resizers["png"](io.BytesIO(body))
    assert nothing == [None] * 5 and error == f"{UNKNOWN}: got uint16"
    assert shards.reason_of("failed_to_resize", error) == UNKNOWN


@pytest.mark.parametrize("mode", ["F", "HSV", "LAB", "YCbCr"])
def test_a_mode_whose_colours_are_not_known_is_refused_by_name(mode):
    with pytest.raises(UnknownColours, match=f"got an image of mode {mode}, expected one of 1, L"):
        as_seen(Image.new(mode, (4, 4)))


def test_an_image_past_the_limit_of_pixels_is_refused_before_it_is_decoded(monkeypatch):
    body = encoded(Image.new("RGB", (300, 40)), "PNG", icc_profile=adobe_profile())
    assert special(body, 12_000) is not None
    monkeypatch.setattr("raphael.base.images.colours.to_rgb", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError) as caught:
        special(body, 11_999)
    assert shards.reason_of("failed_to_resize", str(caught.value)) == "too many pixels"


def test_a_cut_image_that_needs_pillow_is_undecodable(resizers):
    body = ALL["RGB JPEG in Adobe RGB"].body
    *nothing, error = resizers["png"](io.BytesIO(body[: len(body) * 3 // 4]))
    assert nothing == [None] * 5 and shards.reason_of("failed_to_resize", error) == "undecodable"


def test_an_image_without_orientation_and_profile_keeps_its_bytes():
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    assert np.array_equal(np.asarray(as_seen(Image.fromarray(noise))), noise)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(noise[..., 0]))), np.repeat(noise[..., :1], 3, -1))
