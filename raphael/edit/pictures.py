"""Figures of what `inspect` found, as images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raphael.base.images.grid import image_grid
from raphael.encoders.edges.detectors import edge_map
from raphael.evaluate.report.figures import heat_overlay
from raphael.summary.inside import Inside

if TYPE_CHECKING:
    from PIL import Image

SHOWN_STEPS = 5
EXPERTS = (
    (216, 84, 74),
    (70, 120, 200),
    (90, 165, 90),
    (220, 170, 60),
    (140, 90, 170),
    (80, 170, 175),
    (120, 120, 120),
)
FRAME = (110, 110, 110)
LARGE = 2  # times the image, so that maps lie on it smoothly


def write_figures(inside: Inside, folder: Path) -> list[Path]:
    """words.png, levels.png, self.png, inside.png, forming.webp, and the arrays (`Inside.save`)."""
    made = {"words": by_word(inside), "levels": by_level(inside), "self": self_maps(inside), "inside": paths(inside)}
    files = inside.save(folder)
    for name, figure in made.items():
        figure.save(folder / f"{name}.png", optimize=True)
        files.append(folder / f"{name}.png")
    return [*files, forming(inside, folder / "forming.webp")]


def by_word(inside: Inside) -> Image.Image:
    """Where each word is looked at, mean over steps and blocks (prompt-to-prompt, arXiv 2208.01626, figure 5)."""
    maps = inside.cross.mean((0, 1))
    tiles = [_heat(inside.image, maps[..., place]) for place in range(len(inside.words))]
    return image_grid([_large(inside.image), *tiles], 8, [inside.prompt, *inside.words])


def by_level(inside: Inside) -> Image.Image:
    """Cross-attention by noise level, a row a level from noise to clean (eDiff-I, arXiv 2211.01324, figure 3).

    A column a word; the tokens that open and close the text are the ones that say nothing: the share of attention that
    each gets stands below it.
    """
    tiles, captions = [], []
    for step in _shown(inside):
        maps = inside.cross[step].mean(0)
        tiles.append(_large(inside.x0[step]))
        captions.append(f"timestep {inside.timesteps[step]:.0f}")
        for place, word in enumerate(inside.words):
            tiles.append(_heat(inside.x0[step], maps[..., place]))
            captions.append(f"{word} {100 * maps[..., place].mean():.0f} %")
    return image_grid(tiles, 1 + len(inside.words), captions)


def self_maps(inside: Inside) -> Image.Image:
    """Self-attention of the last block by noise level: what is looked at by each of five places of the image."""
    block = inside.self_attention[-1]
    height, width = _size_of(block.shape[1], inside)
    places = [(1, 1), (1, width - 2), (height // 2, width // 2), (height - 2, 1), (height - 2, width - 2)]
    tiles, captions = [], []
    for step in _shown(inside):
        for y, x in places:
            tiles.append(_heat(inside.x0[step], block[step, y * width + x].reshape(height, width)))
            captions.append(f"from row {y}, column {x}, timestep {inside.timesteps[step]:.0f}")
    return image_grid(tiles, len(places), captions)


def paths(inside: Inside) -> Image.Image:
    """At the last step: edges that blocks predict beside Sobel's of the image; attention to words, regions, experts.

    A word's attention is the mean over blocks; its region is white where its expert acts in the last block; its path is
    a stripe a block, a colour an expert. Tiles are framed: white ones vanish on the sheet.
    """
    edges = [np.uint8(255 * edge) for edge in inside.edges[-1]] if inside.edges.shape[1] else []
    sobel = edge_map(inside.image[None], inside.image.shape[:2])[0]
    tiles = [_large(inside.image), _rgb(sobel), *[_rgb(edge) for edge in edges]]
    captions = ["image", "its edges (Sobel)", *[f"edges of head {index + 1}" for index in range(len(edges))]]
    kinds = 1 + bool(inside.masks.shape[1]) + bool(len(inside.space_routes))
    columns = kinds * (8 // kinds)  # a word's tiles stand in one row
    side = tiles[0].shape[:2]
    empty = -len(tiles) % columns
    for place, word in enumerate(inside.words):
        tiles.append(_heat(inside.image, inside.cross[-1].mean(0)[..., place]))
        captions.append(f"{word}: attention")
        if inside.masks.shape[1]:
            tiles.append(_rgb(np.uint8(255 * inside.masks[-1, -1, ..., place])))
            captions.append(f"{word}: region")
        if len(inside.space_routes):
            tiles.append(_stripes(inside.space_routes[:, place]))
            captions.append(f"{word}: experts {' '.join(map(str, inside.space_routes[:, place]))}")
    framed, first = [_framed(_sized(tile, side)) for tile in tiles], 2 + len(edges)
    blank = [np.full((*side, 3), 255, np.uint8)] * empty
    captions[first:first] = [""] * empty
    return image_grid([*framed[:first], *blank, *framed[first:]], columns, captions)


def forming(inside: Inside, path: Path) -> Path:
    """The image as it forms: a lossless WebP, a frame a step, of which the last is the image; plays in a browser."""
    from PIL import Image

    frames = [Image.fromarray(_large(frame)) for frame in [*inside.x0[:-1], inside.image]]
    times = [150] * (len(frames) - 1) + [1500]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0, lossless=True)
    return path


def _shown(inside: Inside) -> list[int]:
    """Steps, from noise to clean, spread evenly."""
    return sorted({round(at) for at in np.linspace(0, len(inside.sigmas) - 1, SHOWN_STEPS)})


def _size_of(pixels: int, inside: Inside) -> tuple[int, int]:
    """(height, width) of a map of so many pixels and the image's proportions."""
    height, width = inside.cross.shape[2:4]
    factor = (height * width / pixels) ** 0.5
    return round(height / factor), round(width / factor)


def _heat(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """Scaled to the map's own maximum, as heat maps are shown."""
    return heat_overlay(_large(image), attention / max(float(attention.max()), 1e-12))


def _large(image: np.ndarray) -> np.ndarray:
    return image.repeat(LARGE, 0).repeat(LARGE, 1)


def _rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, 2)


def _stripes(experts: np.ndarray) -> np.ndarray:
    return np.array([[EXPERTS[expert % len(EXPERTS)] for expert in experts]], np.uint8)


def _framed(tile: np.ndarray) -> np.ndarray:
    """The outermost pixels in grey."""
    framed = np.full_like(tile, FRAME)
    framed[1:-1, 1:-1] = tile[1:-1, 1:-1]
    return framed


def _sized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.NEAREST))
