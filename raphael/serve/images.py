"""Images on their way in and out: uploads, decoded by the guarded reader within bounds, and PNGs that say how they were
made."""

from __future__ import annotations

import base64
import binascii
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from raphael.base.images.colours import as_seen
from raphael.base.images.fit import fit, read_image
from raphael.base.stage import StageError
from raphael.serve.bodies import PART_PX
from raphael.serve.door.problems import Problem

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 4096 * 4096  # of an upload: 50 MB once it is decoded


def read_upload(text: str, field: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """base64 or a data URI -> uint8 (H, W, 3). size: (height, width) that it is scaled and cropped to; None: its own.

    Raises Problem that names the field: no base64, not one of PNG, JPEG and WebP, broken, or larger than MAX_PIXELS by
    its header, before anything of it is decoded.
    """

    def prepare(image: Image.Image) -> np.ndarray:
        if image.width * image.height > MAX_PIXELS or max(image.size) > 4 * PART_PX:
            got = f"{image.width} x {image.height} px"
            raise Problem(422, f"{field}: got {got}, expected at most {MAX_PIXELS:,} pixels", field)
        seen = as_seen(image)
        return np.asarray(seen) if size is None else fit(seen, *size)

    try:
        return read_image(io.BytesIO(_decoded(text)), prepare, "expected a PNG, JPEG or WebP", field)
    except StageError as error:
        raise Problem(422, str(error), field) from None
    except binascii.Error:
        raise Problem(422, f"{field}: not base64, expected an image as base64 or a data URI", field) from None


def upload_size(text: str, field: str) -> tuple[int, int]:
    """(width, height) by its header. Raises Problem."""
    try:
        return read_image(io.BytesIO(_decoded(text)), lambda image: image.size, "expected a PNG, JPEG or WebP", field)
    except (StageError, binascii.Error) as error:
        raise Problem(422, str(error), field) from None


def white(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> (H, W) bool: rather white."""
    return pixels.mean(2) >= 128


def png(pixels: Any, info: Any = None) -> bytes:
    """uint8 (H, W, 3) or (H, W) or a PIL image -> PNG. info: of raphael/generate/metadata.py."""
    from PIL import Image

    image, stream = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels), io.BytesIO()
    image.save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def data_uri(png_bytes: bytes) -> str:
    return f"data:image/png;base64,{b64(png_bytes)}"


def _decoded(text: str) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    return base64.b64decode(text, validate=True)
