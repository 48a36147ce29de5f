"""A grid of images with captions, as one image."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

GRID_WIDTH_PX = 160  # of a captioned tile: small images are enlarged to it, so that a caption has room
CAPTION_PX, CAPTION_LINES = 13, 3


def grid_tiles(grid: np.ndarray, count: int, columns: int, margin_px: int = 4) -> list[np.ndarray]:
    """The images of a captioned grid of `image_grid`, without their captions: uint8 (h, w, 3) each, as enlarged there.

    grid: uint8 (H, W, 3). Raises ValueError where it is no grid of so many images.
    """
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    (cell_h, over_h), (cell_w, over_w) = (
        divmod(side - margin_px, cells) for side, cells in zip(grid.shape[:2], (rows, columns), strict=True)
    )
    height, width = cell_h - margin_px - (CAPTION_LINES * CAPTION_PX + margin_px), cell_w - margin_px
    if over_h or over_w or min(height, width) < 1:
        raise ValueError(f"got a grid of {grid.shape[1]} x {grid.shape[0]} px, expected {count} images in {columns}")
    places = [(margin_px + i // columns * cell_h, margin_px + i % columns * cell_w) for i in range(count)]
    return [grid[y : y + height, x : x + width] for y, x in places]


def image_grid(images: Sequence[Any], columns: int, captions: Sequence[str] = (), margin_px: int = 4) -> Any:
    """Lay images (uint8 (H, W, 3) arrays or PIL images of one size) out as a grid -> PIL.Image, RGB, white ground.

    captions: up to three lines below each image; images are then enlarged by a whole factor to about 160 px.
    """
    from PIL import Image, ImageDraw, ImageFont

    tiles = [image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)) for image in images]
    if not tiles:
        raise ValueError("got no images for a grid, expected at least one")
    scale = max(1, round(GRID_WIDTH_PX / tiles[0].width)) if captions else 1
    width, height = (scale * side for side in tiles[0].size)
    text_px = CAPTION_LINES * CAPTION_PX + margin_px if captions else 0
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    cell_w, cell_h = width + margin_px, height + text_px + margin_px
    grid = Image.new("RGB", (columns * cell_w + margin_px, rows * cell_h + margin_px), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=11)
    for i, tile in enumerate(tiles):
        x, y = margin_px + (i % columns) * cell_w, margin_px + (i // columns) * cell_h
        grid.paste(tile.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if i < len(captions):
            for line, text in enumerate(_wrapped(captions[i], width, font)):
                draw.text((x, y + height + line * CAPTION_PX), text, fill="black", font=font)
    return grid


def _wrapped(caption: str, width: int, font: Any) -> list[str]:
    """At most CAPTION_LINES lines that fit into `width` px; letters differ in width, so lines are measured."""
    for chars in range(max(1, len(caption)), 0, -1):
        lines = textwrap.wrap(caption, chars, max_lines=CAPTION_LINES, placeholder=" …"[:chars])
        if all(font.getlength(line) <= width for line in lines):
            return lines
    return []
