"""One sheet for a generated image: the image, the edges that each block predicts, where each word attends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from raphael.encoders.edges.detectors import edge_map
from raphael.evaluate.report.figures import heat_overlay

if TYPE_CHECKING:
    from PIL import Image

    from raphael.summary.insight import Insight

PAPER, INK, SOFT = "#faf8f4", "#211d18", "#6d655b"
TILE_PX, GAP_PX, MARGIN_PX, LABEL_PX, TITLE_PX = 128, 10, 28, 20, 40
COLUMNS = 8
MAX_WORDS = 32


def inside_sheet(image: np.ndarray, prompt: str, insight: Insight, row: int) -> Image.Image:
    """image uint8 (H, W, 3), the insight's row-th -> RGB.

    A block's edges are probabilities, 0 black and 1 white, pixel by pixel as predicted; beside them lie Sobel's of the
    finished image, at the size of the largest map. A word's attention is the mean over the blocks with the largest
    map, scaled to its own maximum and smoothed; 32 words at most.
    """
    side = insight.edges.shape[1:]
    tiles = [(image, "the image"), (edge_map(image[None], side)[0], "Sobel, of the image")]
    for index, edges in enumerate(insight.block_edges, 1):
        height, width = edges[row].shape
        tiles.append((_grey(edges[row]), f"block {index}, {height} x {width}"))
    if not insight.block_edges:
        tiles.append((np.zeros(side, np.uint8), "no edge heads"))
    shown = [place for place, word in enumerate(insight.words[row]) if word][:MAX_WORDS]
    enlarged = np.asarray(_tile(image))
    words = [(heat_overlay(enlarged, insight.attention[row, i]), insight.words[row][i]) for i in shown]
    sections = [
        (f"Predicted edges, seen at timestep {insight.timestep}", tiles),
        ("Where each word attends, blocks with the largest map", words),
    ]
    return _lay_out(prompt, sections)


def _lay_out(title: str, sections: list[tuple[str, list[tuple[np.ndarray, str]]]]) -> Image.Image:
    from PIL import Image, ImageDraw, ImageFont

    small, medium, large = (ImageFont.load_default(size=size) for size in (12, 15, 21))
    columns = min(COLUMNS, max(len(tiles) for _, tiles in sections))
    step_x, step_y = TILE_PX + GAP_PX, TILE_PX + LABEL_PX + GAP_PX
    rows = [-(-len(tiles) // columns) for _, tiles in sections]
    width = 2 * MARGIN_PX + columns * step_x - GAP_PX
    height = 2 * MARGIN_PX + TITLE_PX + sum(TITLE_PX + count * step_y for count in rows) - GAP_PX
    sheet = Image.new("RGB", (width, height), PAPER)
    draw, y = ImageDraw.Draw(sheet), MARGIN_PX
    draw.text((MARGIN_PX, y - 4), _fitted(draw, title, large, width - 2 * MARGIN_PX), fill=INK, font=large)
    y += TITLE_PX
    for (name, tiles), count in zip(sections, rows, strict=True):
        draw.text((MARGIN_PX, y), name, fill=SOFT, font=medium)
        y += TITLE_PX - 8
        for index, (tile, label) in enumerate(tiles):
            left, top = MARGIN_PX + index % columns * step_x, y + index // columns * step_y
            sheet.paste(_tile(tile), (left, top))
            label = _fitted(draw, label, small, TILE_PX)
            draw.text((left, top + TILE_PX + 3), label, fill=INK, font=small)
        y += count * step_y + 8
    return sheet


def _tile(pixels: np.ndarray) -> Image.Image:
    """Enlarged to fit a tile, pixels kept square, on its middle."""
    from PIL import Image

    image = Image.fromarray(pixels).convert("RGB")
    scale = TILE_PX / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    tile = Image.new("RGB", (TILE_PX, TILE_PX), PAPER)
    tile.paste(image.resize(size, kind), ((TILE_PX - size[0]) // 2, (TILE_PX - size[1]) // 2))
    return tile


def _grey(probability: np.ndarray) -> np.ndarray:
    return np.uint8(np.round(np.clip(probability, 0, 1) * 255))


def _fitted(draw: Any, text: str, font: Any, width: int) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(f"{text} …", font=font) > width:
        text = text[:-1]
    return f"{text} …"
