"""A header says what decoding would cost."""

import io

import pytest
from PIL import Image

from data_pipeline.gateway import image_header


@pytest.mark.parametrize(("mode", "kind", "expected"), [
    ("L", "png", 1), ("RGB", "png", 4), ("RGBA", "png", 4), ("LA", "png", 4), ("P", "png", 4), ("I;16", "png", 2),
    ("L", "jpeg", 1), ("RGB", "jpeg", 3), ("CMYK", "jpeg", 4),
])  # fmt: skip
def test_a_header_tells_how_many_bytes_an_image_will_take(mode, kind, expected):
    stream = io.BytesIO()
    Image.new(mode, (30, 20)).save(stream, kind)
    assert image_header.read_header(stream.getvalue()).decoded_bytes == 600 * expected
