"""There is one reader of image files, and it lets through nothing that is not a whole image of a known format."""

from __future__ import annotations

import ast
import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raphael.base.images.fit import FORMATS, fit, read_image
from raphael.base.images.sizes import least_short_side, must_grow, nearest_sizes
from raphael.base.stage import StageError

PROJECT = Path(__file__).resolve().parents[2]
SOME = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)


def encoded(form: str, **more) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(SOME).save(stream, form, **more)
    return stream.getvalue()


@pytest.mark.parametrize("form", FORMATS)
def test_an_image_of_a_known_format_is_read_from_a_file_and_from_memory(tmp_path, form):
    (tmp_path / "image.png").write_bytes(body := encoded(form, lossless=True) if form == "WEBP" else encoded(form))
    from_file, from_memory = read_image(tmp_path / "image.png"), read_image(io.BytesIO(body))
    assert np.array_equal(from_file, from_memory) and from_file.shape == (40, 30, 3)
    assert form == "JPEG" or np.array_equal(from_file, SOME)


@pytest.mark.parametrize("form", ["BMP", "GIF", "TIFF", "PPM"])
def test_what_a_name_promises_does_not_open_another_decoder(tmp_path, form):
    (tmp_path / "image.png").write_bytes(encoded(form))
    with pytest.raises(StageError, match="image.png: not a whole image .*; draw it again$"):
        read_image(tmp_path / "image.png", again="draw it again")


@pytest.mark.parametrize("form", FORMATS)
def test_a_truncated_image_is_an_error_that_names_it_wherever_it_is_cut(form):
    body = encoded(form)
    for length in (0, 5, len(body) // 2):
        with pytest.raises(StageError, match="^shard: 7.png: not a whole image"):
            read_image(io.BytesIO(body[:length]), name="shard: 7.png")


def test_an_image_beyond_the_bound_is_not_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(StageError, match="not a whole image"):
        read_image(io.BytesIO(encoded("PNG")), lambda image: pytest.fail("it reached the decoder"))


def test_nobody_in_raphael_or_flows_opens_images_by_another_way():
    found = []
    for room in ("raphael", "flows"):
        for file in sorted((PROJECT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open"):
                    found.append(f"{file.relative_to(PROJECT)}:{node.lineno}")
    assert {place.partition(":")[0] for place in found} == {"raphael/base/images/fit.py"}, found


NINE_PX = ((448, 832), (512, 768), (512, 704), (640, 640), (576, 640), (640, 576), (704, 512), (768, 512), (832, 448))


def box_of(image, height, width):
    """The box that `fit` asks Pillow for, with nothing resized."""
    boxes = []

    def resize(size, way, box):
        boxes.append(box)
        return Image.new("RGB", size)

    class Spy:
        convert = staticmethod(lambda mode: Spy)

    Spy.width, Spy.height, Spy.resize = *image, staticmethod(resize)
    fit(Spy, height, width)
    return boxes[0]


def test_the_box_of_every_size_of_image_lies_in_it_at_the_nine_buckets_and_moved_by_nothing_else():
    """Widths and heights of photographs at 9 buckets: some began at -1e-14 once, which Pillow refuses."""
    outside, sides = 0, [*range(427, 460), 480, 500, 512, 533, 600, *range(612, 660), 683, 768, 1024, 1365]
    for height, width in NINE_PX:
        for tall in sides:
            for wide in sides:
                scale = max(width / wide, height / tall)
                plain = (wide - width / scale) / 2, (tall - height / scale) / 2
                outside += min(plain) < 0
                left, top, right, bottom = box_of((wide, tall), height, width)
                assert 0 <= left < right <= wide and 0 <= top < bottom <= tall, (tall, wide, height, width)
                assert left == max(0, plain[0]) and top == max(0, plain[1])
                fills = width * tall >= height * wide  # the whole width, or the whole height
                whole = (wide, height * wide / width) if fills else (width * tall / height, tall)
                assert abs((right - left) - whole[0]) < 1e-9 and abs((bottom - top) - whole[1]) < 1e-9
    assert outside > 100  # sizes that the clamp is for


@pytest.mark.parametrize("size", NINE_PX)
def test_an_image_whose_box_began_outside_it_is_fitted(size):
    height, width = size
    for wide, tall in ((640, 427), (427, 640), (640, 640), (500, 333), (612, 612), (width, height)):
        image = Image.fromarray(np.full((tall, wide, 3), 77, np.uint8))
        assert (fit(image, height, width) == 77).all()


def test_by_area_a_pixel_is_the_mean_of_what_it_covers_and_enlarging_is_as_ever():
    large = np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8)
    means = large.astype(float).reshape(8, 3, 12, 3, 3).mean((1, 3))
    assert np.abs(fit(Image.fromarray(large), 8, 12, area=True) - means).max() <= 1  # rounded along each axis
    assert np.abs(fit(Image.fromarray(large), 8, 12) - means).max() > 5
    assert np.array_equal(fit(Image.fromarray(large), 48, 72, area=True), fit(Image.fromarray(large), 48, 72))
    assert np.array_equal(fit(Image.fromarray(large), 24, 36, area=True), large)


def test_padded_a_small_image_keeps_its_pixels_in_the_middle_of_white_and_a_large_one_is_as_ever():
    small = np.random.default_rng(1).integers(0, 200, (10, 30, 3), np.uint8)
    padded = fit(Image.fromarray(small), 16, 20, pad=True)  # too low, and too wide by 10: cropped on both sides
    assert np.array_equal(padded[3:13], small[:, 5:25])
    assert (padded[:3] == 255).all() and (padded[13:] == 255).all()
    large = Image.fromarray(np.tile(small, (3, 2, 1)))
    assert np.array_equal(fit(large, 16, 20, pad=True), fit(large, 16, 20))


def test_an_image_must_grow_where_fitting_it_scales_it_up():
    draw = np.random.default_rng(2)
    heights, widths = draw.integers(40, 130, (2, 400))
    sizes = ((64, 64), (48, 96), (96, 48), (64, 80))

    def distance(place: int, size: tuple[int, int]) -> Fraction:
        tall, wide = int(heights[place]) * size[1], int(widths[place]) * size[0]
        return Fraction(max(tall, wide), min(tall, wide))

    nearest = [min(range(4), key=lambda index: distance(place, sizes[index])) for place in range(400)]
    assert nearest_sizes(heights, widths, sizes).tolist() == nearest
    scales = [max(sizes[n][0] / h, sizes[n][1] / w) for n, h, w in zip(nearest, heights, widths, strict=True)]
    assert must_grow(heights, widths, sizes).tolist() == [scale > 1 for scale in scales]
    assert 50 < sum(scale > 1 for scale in scales) < 350


@pytest.mark.parametrize(
    ("sizes", "short"),
    [(((64, 64),), 64), (((32, 48),), 48), (((64, 64), (48, 96), (96, 48)), 68), (tuple(NINE_PX), 640)],
)
def test_short_sides_that_are_brought_down_so_far_never_have_to_grow_again(sizes, short):
    assert least_short_side(sizes, 2.5) == short
    ratios = np.exp(np.linspace(np.log(0.4), np.log(2.5), 4001))
    for side, grows in ((short, False), (short - 2, True)):
        heights = np.maximum(side, side / ratios).round()
        widths = np.maximum(side, side * ratios).round()
        assert must_grow(heights, widths, sizes).any() == grows
