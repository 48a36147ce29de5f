"""What a pipeline's call returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL import Image

    from raphael.summary.insight import Insight


@dataclass
class PipelineOutput:
    # "pil"; "np": float32 (n, H, W, 3) in [0, 1]; "pt": the same (n, 3, H, W); "latent": what was diffused (n, C, h, w)
    images: list[Image.Image] | np.ndarray | torch.Tensor
    scores: list[float] | None = field(default=None)  # of `best_of`: cosines, one an image, and which of all it was
    indices: list[int] | None = field(default=None)
    insight: Insight | None = field(default=None)  # attention maps, edge maps and routes; with collect=True


def as_type(output_type: str, latents: torch.Tensor, decoded: list[np.ndarray]) -> list[Image.Image] | Any:
    """Of "np" and "pt" numbers in [0, 1], each one of an image's 256 levels."""
    if output_type == "latent":
        return latents
    pixels = np.concatenate(decoded)
    if output_type == "pt":
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    if output_type == "np":
        return pixels.astype(np.float32) / 255
    from PIL import Image

    return [Image.fromarray(image) for image in pixels]
