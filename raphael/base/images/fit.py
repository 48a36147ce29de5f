"""An image as it is read from a disk, and as networks see it: as it is looked at, scaled and cropped to their size.
One function for those that are trained on, and for those that generated ones are compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

import numpy as np

from raphael.base.images.colours import as_seen
from raphael.base.stage import StageError

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")
FORMATS = ("PNG", "JPEG", "WEBP")  # no other decoder of Pillow's is ever reached


def pixels(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3), as it is seen."""
    return np.asarray(as_seen(image))


def read_image(
    source: str | Path | IO[bytes],
    prepare: Callable[[Image.Image], T] = pixels,
    again: str = "make it again",
    name: str = "",
) -> T:
    """What `prepare` makes of an image; it gets the image before it is decoded, so that it can refuse one by its size.

    name: of the source in messages, where it is no path. Raises StageError, which ends in `again`, what to do, where
    the image is missing, truncated, broken, none of FORMATS or large beyond Pillow's bound on decompression bombs.
    """
    from PIL import Image

    name = name or str(source)
    try:
        with Image.open(source, formats=FORMATS) as image:
            return prepare(image)
    except FileNotFoundError:
        raise StageError(f"{name}: no such image; {again}") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:
        raise StageError(f"{name}: not a whole image ({error}); {again}") from None


def is_whole(path: Path) -> bool:
    """Whether a PNG of ours is there to its end, its checksums fitting; nothing is decoded."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def fit(image: Image.Image, height: int, width: int, area: bool = False, pad: bool = False) -> np.ndarray:
    """RGB image -> uint8 (height, width, 3): scaled (bicubic, antialiased) to cover it, cropped to the middle.

    area: a pixel is the plain mean of what it covers, for models of pixels: bicubic overshoots at edges, which an
    autoencoder smooths and a model of pixels would learn. Images that have to grow are bicubic all the same.
    pad: these do not grow, they stand on white, in the middle, cropped where one side is too long.
    """
    from PIL import Image

    if pad and (image.height < height or image.width < width):
        canvas = Image.new("RGB", (width, height), "white")
        canvas.paste(image.convert("RGB"), ((width - image.width) // 2, (height - image.height) // 2))
        return np.asarray(canvas)
    scale = max(width / image.width, height / image.height)
    crop_width, crop_height = width / scale, height / scale
    # in floats a side that fits exactly can begin at -1e-14, which Pillow refuses
    left, top = max(0.0, (image.width - crop_width) / 2), max(0.0, (image.height - crop_height) / 2)
    box = (left, top, min(left + crop_width, image.width), min(top + crop_height, image.height))
    way = Image.Resampling.BOX if area and scale < 1 else Image.Resampling.BICUBIC
    return np.asarray(image.convert("RGB").resize((width, height), way, box=box))


def told_sizes(
    original: tuple[int, int], stored: tuple[int, int], size: tuple[int, int], pad: bool = False
) -> list[int]:
    """What a network that is told sizes (SDXL, arXiv 2307.01952, section 2.2) reads of an image that `fit` brings to
    `size`: height and width as it was found, px of the scaled image that are cut off above and to the left, `size`.

    original: before any scaling; stored: of the image that `fit` gets; (height, width) each.
    """
    (stored_height, stored_width), (height, width) = stored, size
    if pad and (stored_height < height or stored_width < width):
        above, left = max(0, stored_height - height) // 2, max(0, stored_width - width) // 2
        return [*original, above, left, height, width]
    scale = max(width / stored_width, height / stored_height)
    above, left = round((stored_height * scale - height) / 2), round((stored_width * scale - width) / 2)
    return [*original, above, left, height, width]
