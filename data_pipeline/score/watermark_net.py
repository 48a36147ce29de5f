"""The watermark detector: a small convolutional network that says where, and from that whether.

It is fully convolutional, sees images at their own shape with a short side of at most 256 px, and besides colour what
is left when the neighbourhood's mean is taken away: marks are thin and faint, photographs are neither. It is taught
place by place (data_pipeline/tools/watermark_model.py), and an image's score is the soft maximum of its places; no
layer judges whole images, because yes and no alone taught nothing. In a file: safetensors whose metadata hold form
and sizes; scores are moved so that 0.5 is the threshold chosen on photographs of their own, and `filter.max_watermark:
0.5` means that threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raphael.base.stage import StageError

if TYPE_CHECKING:
    from PIL import Image

FORM = "raphael-watermark/2"
MAX_SHORT_PX = 256
STRIDE = 8  # pixels a place of the map
WIDTHS = (32, 48, 64)
BATCH = 32


def _block(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _mean(x: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(x, side, 1, side // 2, count_include_pad=False)


class WatermarkNet(nn.Module):
    """`net(images) -> (logits (B,), map of logits (B, H/8, W/8))`. images: uint8 (B,3,H,W), sides multiples of 8."""

    def __init__(self, widths: Sequence[int] = WIDTHS):
        super().__init__()
        a, b, c = widths
        self.widths = tuple(widths)
        half = (_block(5 * 4, a), _block(a, a))
        quarter = (_block(a, b, 2), _block(b, b))
        eighth = (_block(b, c, 2), _block(c, c, dilation=2), _block(c, c, dilation=4))
        self.body = nn.Sequential(*half, *quarter, *eighth)
        self.place = nn.Conv2d(c, 1, 1)
        nn.init.constant_(self.place.bias, -2.0)  # most places have no mark
        self.register_buffer("sharpness", torch.ones(()))  # of the soft maximum: 0 the mean, large the maximum
        self.register_buffer("shift", torch.zeros(()))  # taken from the logits: what is chosen as threshold becomes 0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.float().div(127.5).sub(1)
        grey = x.mean(1, keepdim=True)
        residual = grey - _mean(grey, 5)
        local = residual / (_mean(residual.square(), 17) + 1e-3).sqrt()
        x = torch.cat([x, 4 * residual, local.clamp(-4, 4)], 1)
        x = F.pixel_unshuffle(x, 2)  # (B, 20, H/2, W/2): as fine as full resolution at a quarter of the places
        places = self.place(self.body(x.contiguous(memory_format=torch.channels_last)))[:, 0].float()
        return self.image(places), places

    def image(self, places: Tensor) -> Tensor:
        """The map's soft maximum, (1/k) log mean exp(k x) for sharpness k: a stamp's few places count as a veil's
        many faint ones."""
        flat = places.flatten(1)
        k = self.sharpness
        return (torch.logsumexp(k * flat, 1) - math.log(flat.shape[1])) / k - self.shift


class WatermarkModel:
    """`scores(images) -> float64 (n,)` from 0 to 1, 0.5 at the chosen threshold."""

    def __init__(self, net: WatermarkNet, device: str | torch.device = "cpu"):
        self.net = net.eval().requires_grad_(False).to(device)
        self.device = device

    def scores(self, images: Sequence[Image.Image]) -> np.ndarray:
        return 1 / (1 + np.exp(-self.logits(images)))

    def logits(self, images: Sequence[Image.Image]) -> np.ndarray:
        """float64 (n,), 0 at the threshold."""
        return self.of_maps(self.maps(images))

    def of_maps(self, maps: Sequence[Tensor]) -> np.ndarray:
        """The images' logits, float64 (n,), of their maps (h, w)."""
        return np.array([float(self.net.image(places[None].to(self.device))) for places in maps])

    @torch.no_grad()
    def maps(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Of each image its places' logits (H/8, W/8). Images of one size go through together."""
        fitted = [sized(image) for image in images]
        out: list[Tensor] = [torch.empty(0)] * len(fitted)
        by_size: dict[tuple[int, ...], list[int]] = {}
        for number, pixels in enumerate(fitted):
            by_size.setdefault(pixels.shape, []).append(number)
        for numbers in by_size.values():
            for start in range(0, len(numbers), BATCH):
                part = numbers[start : start + BATCH]
                pixels = torch.from_numpy(np.stack([fitted[number] for number in part])).to(self.device)
                for number, places in zip(part, self.net(pixels.permute(0, 3, 1, 2))[1].cpu(), strict=True):
                    out[number] = places
        return out

    def save(self, file: Path) -> None:
        """Equal weights give equal bytes."""
        from safetensors.torch import save_file

        file.parent.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.cpu().contiguous() for name, tensor in self.net.state_dict().items()}
        widths = ",".join(map(str, self.net.widths))
        save_file(state, file, {"format": FORM, "widths": widths, "max_short_px": str(MAX_SHORT_PX)})


def load_watermark(path: str | Path, device: str | torch.device = "cpu") -> WatermarkModel:
    """The detector in a safetensors file that `save` wrote. Raises StageError, one line, for any other file."""
    from safetensors import SafetensorError, safe_open

    make = "make one: python -m data_pipeline.tools.watermark_model --pictures DIR --out FILE.safetensors"
    if Path(path).suffix != ".safetensors":
        raise StageError(f"{path}: expected a .safetensors file, the only kind that is read; {make}")
    try:
        with safe_open(str(path), "pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != FORM or facts.get("max_short_px") != str(MAX_SHORT_PX):
                raise StageError(f"{path}: got format {facts.get('format')!r}, expected {FORM!r}; {make}")
            net = WatermarkNet([int(width) for width in facts["widths"].split(",")])
            net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise StageError(f"{path}: not a watermark detector ({' '.join(str(error).split())[:120]}); {make}") from None
    return WatermarkModel(net, device)


def sized(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3): the whole image, short side at most 256 px and never enlarged, sides multiples of 8."""
    from PIL import Image

    scale = min(1.0, MAX_SHORT_PX / min(image.size))
    width, height = (max(1, round(side * scale / STRIDE)) * STRIDE for side in image.size)
    image = image.convert("RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


def loss(logits: Tensor, places: Tensor, marked: Tensor, masks: Tensor) -> Tensor:
    """Cross entropy of the places, and a little of the images. marked (B,): 0 or 1. masks (B, H/8, W/8): 1 where the
    mark is seen, 0 where none is, NaN where it was drawn but cannot be seen: those places are not judged."""
    known = torch.isfinite(masks)
    each = F.binary_cross_entropy_with_logits(places, masks.nan_to_num(), reduction="none")
    return each[known].mean() + 0.1 * F.binary_cross_entropy_with_logits(logits, marked)
