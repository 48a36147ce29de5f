"""What `inspect` (raphael/summary/inside.py) saw, small enough to be sent: base64, maps at each block's own size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from raphael.edit.words import text_encoder_of, words_of
from raphael.serve.images import b64, png

if TYPE_CHECKING:
    from raphael.generate.pipeline import Pipeline
    from raphael.summary.inside import Inside

MOST_STEPS = 30  # that are sent: of more, evenly spread ones


def answer(pipeline: Pipeline, inside: Inside) -> dict[str, Any]:
    """words: the prompt's, each with its tokens first .. last (one past the last); arrays are by token."""
    total = len(inside.sigmas)
    shown = sorted({round(at) for at in np.linspace(0, total - 1, min(total, MOST_STEPS))})
    words = words_of(text_encoder_of(pipeline), inside.prompt)
    spans = zip(words.words, words.spans, strict=True)
    return {
        "prompt": inside.prompt,
        "tokens": inside.words,
        "words": [{"text": word, "first": first, "last": last} for word, (first, last) in spans],
        "steps": [
            {
                "step": step,
                "sigma": float(inside.sigmas[step]) if math.isfinite(inside.sigmas[step]) else None,
                "timestep": float(inside.timesteps[step]),
                "x0": b64(png(inside.x0[step])),
            }
            for step in shown
        ],
        "image": b64(png(inside.image)),
        "blocks": _blocks(pipeline, inside, shown),
    }


def _blocks(pipeline: Pipeline, inside: Inside, shown: list[int]) -> list[dict[str, Any]]:
    """One for each transformer block in the order of the forward pass; what a block has not is null."""
    modules = pipeline.unet.transformer_blocks()
    config, told = pipeline.unet.config, []
    seen = {"space_moe": 0, "time_moe": 0, "edge_head": 0}  # of each, how many blocks before this one have it

    def place(index: int, part: str) -> int | None:
        """Where this block stands among those that have the part."""
        if getattr(modules[index], part, None) is None:
            return None
        seen[part] += 1
        return seen[part] - 1

    for index in range(inside.cross.shape[1]):
        own = _own_size(inside, index)
        space, time, edge = (place(index, part) for part in seen)
        told.append(
            {
                "name": f"block {index + 1}",
                "height": own[0],
                "width": own[1],
                # (S, h, w, N) -> (S, N, h, w)
                "cross": scaled(np.moveaxis(_small(inside.cross[shown, index], own), -1, 1)),
                "edges": None if edge is None else scaled(_small(inside.edges[shown, edge], own), 1.0),
                "masks": None
                if space is None
                else scaled(np.moveaxis(_small(inside.masks[shown, space], own), -1, 1), 1.0),
                "space": None if space is None else inside.space_routes[space].tolist(),
                "time": None if time is None else inside.time_routes[time][shown].tolist(),
                "num_space": getattr(config, "num_space_experts", None) if space is not None else None,
                "num_time": getattr(config, "num_time_experts", None) if time is not None else None,
            }
        )
    return told


def scaled(values: np.ndarray, largest: float | None = None) -> dict[str, Any]:
    """{"shape", "max", "data"}: data is uint8 in base64, in C order; a value is data / 255 max."""
    most = float(values.max()) if largest is None else largest
    whole = np.rint(255 * values.astype(np.float32) / max(most, 1e-12)).clip(0, 255).astype(np.uint8)
    return {"shape": list(values.shape), "max": most, "data": b64(np.ascontiguousarray(whole).tobytes())}


def _own_size(inside: Inside, index: int) -> tuple[int, int]:
    """(height, width) of a block's maps, of its number of pixels and the largest map's proportions."""
    height, width = inside.cross.shape[2:4]
    factor = (height * width / inside.self_attention[index].shape[1]) ** 0.5
    return round(height / factor), round(width / factor)


def _small(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(S, h, w, ...) that was enlarged pixel by pixel -> (S, *size, ...): one of each pixel's copies."""
    rows = [(2 * row + 1) * maps.shape[1] // (2 * size[0]) for row in range(size[0])]
    columns = [(2 * column + 1) * maps.shape[2] // (2 * size[1]) for column in range(size[1])]
    return maps[:, rows][:, :, columns]
