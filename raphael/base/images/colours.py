"""An image of any kind as a screen shows it: turned as it is looked at, 8 bits of red, green and blue in sRGB, what is
transparent over white. Imports nothing but Pillow and numpy: foreign images are decoded where little else is."""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

GREY = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I")  # I: 16 bits in 32, as some versions of Pillow open them
MODES = (*GREY, "P", "PA", "RGB", "RGBA", "CMYK")
MAX_PROFILE_BYTES = 1 << 21  # of CMYK printers: 0.5 to 1.9 MB
AS_SRGB = 2  # levels of 255 by which a profile may differ from sRGB and count as it: rounding of tables is 1


class UnknownColours(ValueError):
    """Pixels of a kind whose colours are not known."""


def upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says that it is looked at. Broken EXIF says nothing."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return image


def as_seen(image: Image.Image) -> Image.Image:
    """`to_rgb` of `upright`. An RGB image without orientation and profile stays as it is, to the byte."""
    return to_rgb(upright(image))


def is_plain(image: Image.Image) -> bool:
    """Whether any decoder gives what `as_seen` does, as far as the header tells: 8 bits of grey, a palette or RGB(A),
    upright, in sRGB or of no known profile. (Pillow opens PNGs of 16 bits and several channels as ones of 8.)"""
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"):
        return False
    if image.mode in ("1", "L") and "transparency" in image.info:  # a transparent grey, which OpenCV shows
        return False
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # broken EXIF: Pillow raises of many kinds here
        orientation = 1
    mode = "L" if image.mode in GREY else "CMYK" if image.mode == "CMYK" else "RGB"
    has_profile = _transform(*_profile_of(image, mode)) is not None
    return orientation in (0, 1) and not has_profile


def to_rgb(image: Image.Image, profiles: bool = True) -> Image.Image:
    """An RGB image of 8 bits. profiles: whether an ICC profile is obeyed, else values are taken for sRGB as they are.

    16 bits: v / 257, rounded, since 65535 is white. A profile that is broken, or of another kind of colours than the
    image, says nothing, as in browsers; CMYK then becomes (1 - c)(1 - k). Raises UnknownColours for other modes.
    """
    from PIL import Image

    if image.mode not in MODES:
        raise UnknownColours(f"got an image of mode {image.mode}, expected one of {', '.join(MODES)}")
    colours, alpha = _parted(image)
    transform = _transform(*_profile_of(image, colours.mode)) if profiles else None
    if transform is None:
        rgb = colours.convert("RGB")
    else:
        from PIL import ImageCms

        rgb = ImageCms.applyTransform(colours, transform)
    return rgb if alpha is None else Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)


def _parted(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """(L, RGB or CMYK; L or None): colours and opacity."""
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.uint32)
        clear = image.info.get("transparency")
        alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)) if clear is not None else None
        return Image.fromarray(((values.clip(0, 65535) + 128) // 257).astype(np.uint8)), alpha
    if image.mode == "CMYK":
        return image, None
    if not image.has_transparency_data:
        return image.convert("L" if image.mode in GREY else "RGB"), None
    whole = image.convert("RGBA")
    alpha = whole.getchannel("A")
    # Pillow's convert("L") weighs the channels; of a grey image they are equal, and one of them is the grey
    return whole.getchannel("R") if image.mode in GREY else whole.convert("RGB"), alpha


def _profile_of(image: Image.Image, mode: str) -> tuple[bytes, str]:
    profile = image.info.get("icc_profile") or b""
    return (profile, mode) if len(profile) <= MAX_PROFILE_BYTES else (b"", mode)


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> Any:
    """From the profile's colours of that mode to sRGB; None where that changes nothing, or the profile is unusable."""
    from PIL import Image, ImageCms

    if not profile:
        return None
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space.strip() != {"L": "GRAY"}.get(mode, mode):
            return None
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError):
        return None
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, 9 if mode == "RGB" else 256).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3) if mode == "RGB" else levels[None]
    before = Image.fromarray(cube)
    change = np.asarray(ImageCms.applyTransform(before, transform)).astype(int) - np.asarray(before.convert("RGB"))
    return transform if np.abs(change).max() > AS_SRGB else None
