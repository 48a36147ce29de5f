"""Images that OpenCV would decode to other colours than they have, decoded otherwise; in the decoder's child.

img2dataset's resizer takes pixels as OpenCV gives them: 16 bits as if they were 8 (white), values of another profile as
sRGB (Adobe RGB: 10 levels on average), no orientation, transparent grey as opaque. Such images are
decoded by Pillow instead; all others as ever, to the same bytes.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.common.hashes.lists import ON_LIST

if TYPE_CHECKING:
    from PIL import Image

    from data_pipeline.common.hashes.lists import HashLists

UNKNOWN = "unknown colours"
TOO_LARGE = "the image has more pixels than CV_IO_MAX_IMAGE_PIXELS"  # OpenCV's own words


class CorrectedCv2:
    """OpenCV as img2dataset's resizer uses it. max_pixels: of what Pillow decodes; OpenCV has its limit by itself.

    lists, bits: images that look like an entry are refused by the error ON_LIST, before anything of them is encoded.
    """

    def __init__(self, cv2: Any, max_pixels: int, lists: HashLists | None = None, bits: int = 0):
        self.cv2, self.max_pixels, self.lists, self.bits = cv2, max_pixels, lists, bits

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cv2, name)

    def imdecode(self, body: np.ndarray, flags: int) -> np.ndarray | None:
        """uint8 (H, W) or (H, W, 3 or 4), blue first; None where it cannot be decoded. Raises ValueError with
        UNKNOWN, TOO_LARGE or ON_LIST."""
        image = special(body.tobytes(), self.max_pixels)
        if image is None:
            image = self.cv2.imdecode(body, flags)
        if image is not None and image.dtype != np.uint8:  # 16 bits that Pillow does not open
            raise ValueError(f"{UNKNOWN}: got {image.dtype}")
        if image is not None and self.lists is not None and self.lists.phash:
            from data_pipeline.common.hashes.phash import phashes

            if self.lists.has_phash(phashes([_as_rgb(image)]), self.bits):
                raise ValueError(ON_LIST)
        return image


def _as_rgb(image: np.ndarray) -> Image.Image:
    """What a person sees of OpenCV's pixels."""
    from PIL import Image

    from raphael.base.images.colours import to_rgb

    if image.ndim == 2:
        return Image.fromarray(image)
    return to_rgb(Image.fromarray(np.ascontiguousarray(image[..., [2, 1, 0, *range(3, image.shape[2])]])))


def special(body: bytes, max_pixels: int) -> np.ndarray | None:
    """uint8 (H, W, 3), blue first, of an image that OpenCV would decode to other colours; None for all others."""
    from PIL import Image

    from raphael.base.images.colours import UnknownColours, as_seen, is_plain

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
        try:
            image = Image.open(io.BytesIO(body), formats=("PNG", "JPEG", "WEBP"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return None  # OpenCV may know more
        is_deep = image.format == "PNG" and body[24] == 16
        if is_plain(image) and not is_deep:
            return None
        if image.width * image.height > max_pixels:
            raise ValueError(TOO_LARGE)
        try:
            return np.ascontiguousarray(np.asarray(as_seen(image))[..., ::-1])
        except UnknownColours as error:
            raise ValueError(f"{UNKNOWN}: {error}") from None
