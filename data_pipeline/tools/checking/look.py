"""One image of a collection looked at once: whether it would be taken, what it is, and a small form of it."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass, field

from PIL import Image

from data_pipeline.common.places import IMAGE_FORMATS
from data_pipeline.gateway.bodies import BodyLimits
from data_pipeline.local_images.collection import NOT_HERE, UNREADABLE
from raphael.base.images.colours import UnknownColours, as_seen

SMALL_PX = 128  # of the small form's longer side
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange the sides


@dataclass(frozen=True)
class Looked:
    """reason: why the image is left out, "" where it is taken. noticed: what is unusual about it and how it is handled,
    by the names of docs/data.md. width, height: as it is seen. small: RGB, None where there is none."""

    reason: str
    sha256: str = ""
    width: int = 0
    height: int = 0
    noticed: tuple[str, ...] = ()
    small: Image.Image | None = field(default=None, repr=False)


def look(body: bytes | None, limits: BodyLimits, by_header: bool) -> Looked:
    """As `source` and `download` would judge it; decoded at an eighth where the format can (JPEG), whole else.

    by_header: whether `source` reads the headers of this kind of collection, before `download` judges the bytes.
    """
    if body is None:
        return Looked(NOT_HERE)
    digest = hashlib.sha256(body).hexdigest()
    unreadable = UNREADABLE if by_header else limits.refuses(body) or "undecodable"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
        try:
            image = Image.open(io.BytesIO(body), formats=IMAGE_FORMATS)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return Looked(unreadable, digest)
        if reason := limits.refuses(body):
            return Looked(reason, digest)
        noticed = _noticed(image, body)
        width, height = image.size[::-1] if _orientation(image) in TURNED else image.size
        try:
            image.draft(None, (SMALL_PX, SMALL_PX))
            small = as_seen(image)
            small.thumbnail((SMALL_PX, SMALL_PX))
        except UnknownColours:
            return Looked("unknown colours", digest, width, height, noticed)
        except (OSError, SyntaxError, ValueError):
            return Looked("undecodable", digest, width, height, noticed)
    return Looked("", digest, width, height, noticed, small)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # broken EXIF: Pillow raises of many kinds here
        return 1


def _noticed(image: Image.Image, body: bytes) -> tuple[str, ...]:
    is_deep = image.mode.startswith("I") or (image.format == "PNG" and body[24] == 16)
    marks = {
        "turned by EXIF": _orientation(image) not in (0, 1),
        "animated, first frame": getattr(image, "is_animated", False) and image.format in ("GIF", "WEBP", "PNG"),
        "CMYK": image.mode == "CMYK",
        "palette": image.mode in ("P", "PA"),
        "16 bits": is_deep,
        "transparent, over white": image.has_transparency_data,
        "grey": image.mode in ("1", "L", "LA"),
        "colour profile": "icc_profile" in image.info,
    }
    return tuple(name for name, is_so in marks.items() if is_so)
