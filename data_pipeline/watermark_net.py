"""The watermark detector: a small convolutional network that says where, and from that whether.

The whole picture is squeezed to one square, so that corners stay in sight and stored sizes do not matter. It is taught
place by place (data_pipeline/watermark_model.py), because 150 photographs are too few to find out from yes and no alone
what a watermark is. In a file: safetensors whose metadata hold the form and the sizes; scores are moved so that 0.5 is
the threshold chosen on photographs of their own, and `filter.max_watermark: 0.5` means that threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raphael.stage import StageError

if TYPE_CHECKING:
    from PIL import Image

FORM = "raphael-watermark/1"
SIDE_PX = 192
STRIDE = 8  # pixels a place of the map
WIDTHS = (16, 32, 64, 96)
BATCH = 32


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class WatermarkNet(nn.Module):
    """`net(images) -> (logits (B,), map of logits (B, side/8, side/8))`. images: uint8 (B,3,side,side)."""

    def __init__(self, widths: Sequence[int] = WIDTHS):
        super().__init__()
        a, b, c, d = widths
        self.widths = tuple(widths)
        self.fine = nn.Sequential(_block(3, a, 2), _block(a, b, 2), _block(b, b), _block(b, c, 2), _block(c, c))
        self.place = nn.Conv2d(c, 1, 1)
        self.coarse = nn.Sequential(_block(c + 1, d, 2), _block(d, d))
        self.verdict = nn.Linear(2 * d + 2, 1)
        self.register_buffer("shift", torch.zeros(()))  # taken from the logits: what is chosen as threshold becomes 0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.float().div(127.5).sub(1)
        x = self.fine(x.contiguous(memory_format=torch.channels_last))  # (B, c, side/8, side/8)
        places = self.place(x)  # (B, 1, side/8, side/8)
        deep = self.coarse(torch.cat([x, places], 1))  # (B, d, side/16, side/16)
        pooled = [part.flatten(2) for part in (deep, places)]
        # the strongest place finds a stamp, the mean finds what is faint and everywhere
        both = [part.amax(2) for part in pooled] + [part.mean(2) for part in pooled]
        return self.verdict(torch.cat(both, 1))[:, 0].float() - self.shift, places[:, 0].float()


class WatermarkModel:
    """`scores(pictures) -> float64 (n,)` from 0 to 1, 0.5 at the chosen threshold."""

    def __init__(self, net: WatermarkNet, device: str | torch.device = "cpu"):
        self.net = net.eval().requires_grad_(False).to(device)
        self.device = device

    @torch.no_grad()
    def scores(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        parts = []
        for start in range(0, len(pictures), BATCH):
            pixels = np.stack([squeezed(picture) for picture in pictures[start : start + BATCH]])
            logits = self.net(torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2))[0]
            parts.append(logits.double().sigmoid().cpu().numpy())
        return np.concatenate(parts) if parts else np.empty(0)

    def save(self, file: Path) -> None:
        """Equal weights give equal bytes."""
        from safetensors.torch import save_file

        file.parent.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.cpu().contiguous() for name, tensor in self.net.state_dict().items()}
        widths = ",".join(map(str, self.net.widths))
        save_file(state, file, {"format": FORM, "widths": widths, "side_px": str(SIDE_PX)})


def load_watermark(path: str | Path, device: str | torch.device = "cpu") -> WatermarkModel:
    """The detector in a safetensors file that `save` wrote. Raises StageError, one line, for any other file."""
    from safetensors import SafetensorError, safe_open

    make = "make one: python -m data_pipeline.watermark_model --pictures DIR --out FILE.safetensors"
    if Path(path).suffix != ".safetensors":
        raise StageError(f"{path}: expected a .safetensors file, the only kind that is read; {make}")
    try:
        with safe_open(str(path), "pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != FORM or facts.get("side_px") != str(SIDE_PX):
                raise StageError(f"{path}: got format {facts.get('format')!r}, expected {FORM!r}; {make}")
            net = WatermarkNet([int(width) for width in facts["widths"].split(",")])
            net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise StageError(f"{path}: not a watermark detector ({' '.join(str(error).split())[:120]}); {make}") from None
    return WatermarkModel(net, device)


def squeezed(picture: Image.Image) -> np.ndarray:
    """uint8 (side, side, 3): the whole picture, its shape given up, so that no corner is cut off."""
    from PIL import Image

    if picture.size != (SIDE_PX, SIDE_PX):
        picture = picture.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)
    return np.asarray(picture.convert("RGB"))


def loss(logits: Tensor, places: Tensor, marked: Tensor, masks: Tensor) -> Tensor:
    """Cross entropy of the verdicts, marked (B,) 0 or 1, and of the places, masks (B, side/8, side/8) 0 or 1.

    Places with a mark are a tenth of all: they count four times.
    """
    whether = F.binary_cross_entropy_with_logits(logits, marked)
    return whether + F.binary_cross_entropy_with_logits(places, masks, pos_weight=torch.tensor(4.0))
