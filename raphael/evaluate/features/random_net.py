"""A feature network without weights to fetch: convolutions drawn once from a fixed seed, the same on every machine.

Networks of random weights tell sets of images apart well enough to compare generators of data that no pretrained
network knows (Naeem et al. 2020, arXiv 2002.09797, section 3.3: 64 dimensions). Nothing in it means anything: its
distance is named `fd_random64_<n>` and compares with its like alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

DIM = 64
CHANNELS = (3, 32, 64, 128)
SEED = 20_020_979


class RandomNet(nn.Module):
    """uint8 images (B, H, W, 3), best of at least 16 px a side -> (B, 64) float32.

    Mean and deviation of every channel after each of three convolutions of stride 2, projected onto DIM orthonormal
    directions: blind to where a thing is, not to what it looks like.
    """

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(SEED)
        pairs = list(zip(CHANNELS[:-1], CHANNELS[1:], strict=True))
        for index, (into, out) in enumerate(pairs):
            weight = rng.standard_normal((out, into, 3, 3)) * np.sqrt(2 / (9 * into))  # He: variance is kept by a ReLU
            self.register_buffer(f"weight{index}", torch.from_numpy(weight.astype(np.float32)))
        wide = 2 * sum(out for _, out in pairs)
        directions = np.linalg.qr(rng.standard_normal((wide, DIM)))[0]
        self.register_buffer("directions", torch.from_numpy(directions.astype(np.float32)))
        self.layers = len(pairs)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        x = images.to(self.directions.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)
        told = []
        for index in range(self.layers):
            x = nn.functional.relu(nn.functional.conv2d(x, getattr(self, f"weight{index}"), stride=2, padding=1))
            mean = x.mean((2, 3))
            told += [mean, x.flatten(2).std(2) if x[0, 0].numel() > 1 else torch.zeros_like(mean)]  # of one pixel none
        return torch.cat(told, 1) @ self.directions
