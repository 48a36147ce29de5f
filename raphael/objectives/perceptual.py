"""LPIPS, the perceptual distance of images (Zhang et al. 2018, arXiv 1801.03924), on VGG-16.

    d(x, y) = sum_l mean_{h,w} w_l . ( f_l(x) / |f_l(x)| - f_l(y) / |f_l(y)| )^2

f_l: the activations after relu1_2, 2_2, 3_3, 4_3, 5_3; w_l >= 0: learned on people's judgements. Nothing is downloaded:
the backbone is torchvision's vgg16 (`vgg16-397923af.pth`), the heads are the LPIPS authors' `v0.1/vgg.pth`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

SLICES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # widths of VGG-16's convolutions
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's, for images in [-1, 1]
SMALLEST_PX = 16  # four poolings
BACKBONE_FROM = "torchvision's vgg16 (vgg16-397923af.pth of download.pytorch.org/models)"
HEADS_FROM = "vgg.pth of lpips/weights/v0.1 in richzhang/PerceptualSimilarity"


def _leave_out(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


class Lpips(nn.Module):
    """images x, y (B, 3, H, W) in [-1, 1], sides of 16 px and more -> distances (B,) in float32, gradients included.

    Its weights are frozen. Raises ValueError for other shapes.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = [3]
        self.slices = nn.ModuleList()
        for number, slice_widths in enumerate(SLICES):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
            for width in slice_widths:
                layers += [nn.Conv2d(widths[-1], width, 3, padding=1), nn.ReLU()]
                widths.append(width)
            self.slices.append(nn.Sequential(*layers))
        self.heads = nn.ParameterList(torch.zeros(slice_widths[-1]) for slice_widths in SLICES)
        self.requires_grad_(False)
        self.register_state_dict_post_hook(_leave_out)  # its files are at hand: a checkpoint need not repeat them

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < SMALLEST_PX:
            raise ValueError(
                f"got images of shapes {tuple(x.shape)} and {tuple(y.shape)}, expected both (B, 3, H, W), sides of "
                f"at least {SMALLEST_PX}"
            )
        both = torch.cat([x, y])
        both = (both - both.new_tensor(MEAN).view(3, 1, 1)) / both.new_tensor(DEVIATION).view(3, 1, 1)
        distance = x.new_zeros(len(x), dtype=torch.float32)
        for layers, head in zip(self.slices, self.heads, strict=True):
            both = layers(both)
            f_x, f_y = (part / (part.square().sum(1, keepdim=True).sqrt() + 1e-10) for part in both.float().chunk(2))
            distance = distance + ((f_x - f_y).square() * head.view(-1, 1, 1)).sum(1).mean(dim=(1, 2))
        return distance


def load_lpips(backbone: str | Path, heads: str | Path) -> Lpips:
    """From the two files, read without unpickling objects. Raises ValueError, one line, for any other."""
    lpips = Lpips()
    convolutions = [layer for layers in lpips.slices for layer in layers if isinstance(layer, nn.Conv2d)]
    features = _read(backbone, BACKBONE_FROM)
    names = sorted(
        (name for name in features if name.startswith("features.")), key=lambda name: int(name.split(".")[1])
    )
    stored = [features[name] for name in names if name.endswith("weight")]
    biases = [features[name] for name in names if name.endswith("bias")]
    if [tuple(w.shape) for w in stored] != [tuple(c.weight.shape) for c in convolutions] or len(biases) != len(stored):
        raise ValueError(f"{backbone}: got no VGG-16, expected {BACKBONE_FROM}")
    lines = [value.flatten() for name, value in sorted(_read(heads, HEADS_FROM).items()) if name.startswith("lin")]
    if [tuple(line.shape) for line in lines] != [tuple(head.shape) for head in lpips.heads]:
        raise ValueError(f"{heads}: got no heads of VGG-16, expected {HEADS_FROM}")
    with torch.no_grad():
        for convolution, weight, bias in zip(convolutions, stored, biases, strict=True):
            convolution.weight.copy_(weight)
            convolution.bias.copy_(bias)
        for head, line in zip(lpips.heads, lines, strict=True):
            head.copy_(line)
    return lpips


def _read(path: str | Path, expected: str) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    except Exception as error:  # a file that is no checkpoint fails in many ways
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: cannot be read ({reason}); expected {expected}") from None
