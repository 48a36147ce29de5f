"""Which size an image is trained at: the bucket nearest in aspect ratio, for images are not all square.

RAPHAEL trains at nine sizes and crops to none fixed (arXiv 2305.18295, section 4, footnote). `picture.sizes_px` in
params.yaml names the sizes of a training; the sets below are for copying there.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

Size = tuple[int, int]  # (height, width) in px

# The paper's nine, multiples of 64 = 8 (autoencoder) x 8 (three halvings of the U-Net), of about 640 x 640 px.
RAPHAEL_PX: tuple[Size, ...] = (
    (448, 832), (512, 768), (512, 704), (640, 640), (576, 640), (640, 576), (704, 512), (768, 512), (832, 448),
)  # fmt: skip
# Nine of about 256 x 256 px, multiples of 32, for the preset small, whose U-Net halves twice. The square comes first.
AREA_256_PX: tuple[Size, ...] = (
    (256, 256), (192, 352), (192, 288), (224, 288), (224, 256), (256, 224), (288, 224), (288, 192), (352, 192),
)  # fmt: skip
# Three for tests of every part, multiples of 8: the preset tiny-debug.
DEBUG_PX: tuple[Size, ...] = ((32, 32), (24, 40), (40, 24))


def nearest_size(height: int, width: int, sizes: Sequence[Sequence[int]]) -> int:
    """Index of the size whose height/width is nearest to the image's on a logarithmic scale; of equals the first.

    |log a - log b| grows with max(a/b, b/a), which is compared in whole numbers: a tie is a tie, whatever log rounds.
    """
    return min(range(len(sizes)), key=lambda index: _distance(height, width, *sizes[index]))


def _distance(height: int, width: int, bucket_height: int, bucket_width: int) -> Fraction:
    tall, wide = height * bucket_width, width * bucket_height
    return Fraction(max(tall, wide), min(tall, wide))


def size_name(size: Sequence[int]) -> str:
    """Height first, "64x96": what a bucket is called in files and reports."""
    return f"{size[0]}x{size[1]}"
