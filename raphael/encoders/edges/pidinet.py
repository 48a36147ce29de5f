"""PiDiNet, a learned edge detector of 0.7 million parameters (Su et al., arXiv 2108.07009), as plain convolutions.

Its pixel-difference convolutions multiply differences of pixels instead of pixels. A difference is linear too, so each
is a plain convolution with another kernel (section 3.1 of the paper): the published checkpoints hold the weights of the
differences, and `plain_kernel` turns them. The layout is read off the names and shapes in those files
(github.com/hellozhuo/pidinet, trained_models, research use), so that a state dict loads strictly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raphael.base.precision import without_tf32
from raphael.encoders.pretrained import PretrainedError

Difference = Literal["cv", "cd", "ad", "rd"]

# which difference each of the 16 convolutions takes, first to last: not in the files; the published order, "CARV" x 4
KINDS: tuple[Difference, ...] = ("cd", "ad", "rd", "cv") * 4
STAGES = (3, 4, 4, 4)  # blocks at full, 1/2, 1/4 and 1/8 resolution
DILATIONS = (5, 7, 9, 11)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in [0, 1]: as it was trained
# neighbours of a 3x3 kernel's pixels in reading order, one step back clockwise round the centre; 4 is the centre itself
COUNTER_CLOCKWISE = (3, 0, 1, 6, 4, 2, 7, 8, 5)
SMALLEST_PX = 8  # three halvings
RING, INNER = (0, 2, 4, 10, 14, 20, 22, 24), (6, 7, 8, 11, 13, 16, 17, 18)  # of a 5x5 kernel: ends of eight rays


def plain_kernel(kind: Difference, weight: Tensor) -> Tensor:
    """Weights of a pixel-difference convolution (O, I, 3, 3) -> the kernel of the plain convolution that equals it.

    cv: sum w_i x_i; cd: sum w_i (x_i - x_centre); ad: sum w_i (x_i - x_next), next clockwise; rd: over the eight rays
    of a 5x5 window, sum w_i (x_outer - x_inner), kernel (O, I, 5, 5). Of rd the first weight is unused: the published
    code stores the rays at places 1 to 8, in reading order. Raises ValueError.
    """
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected (O, I, 3, 3)")
    flat = weight.flatten(2)
    if kind == "cv":
        return weight
    if kind == "cd":
        plain = flat.clone()
        plain[..., 4] -= flat.sum(-1)
    elif kind == "ad":
        plain = flat - flat[..., COUNTER_CLOCKWISE]
    elif kind == "rd":
        plain = flat.new_zeros(*flat.shape[:2], 25)
        plain[..., RING], plain[..., INNER] = flat[..., 1:], -flat[..., 1:]
        return plain.unflatten(2, (5, 5))
    else:
        raise ValueError(f"difference: got {kind!r}, expected cv, cd, ad or rd")
    return plain.view_as(weight)


class Block(nn.Module):
    """A depthwise difference convolution and a pointwise one beside the identity; halves: at half the resolution."""

    def __init__(self, kind: Difference, channels_in: int, channels: int, halves: bool):
        super().__init__()
        self.shortcut = nn.Conv2d(channels_in, channels, 1) if halves else None
        self.conv1 = _plain(kind, channels_in, channels_in, groups=channels_in)
        self.conv2 = nn.Conv2d(channels_in, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is None:
            return x + self.conv2(torch.relu(self.conv1(x)))
        x = F.max_pool2d(x, 2)
        return self.shortcut(x) + self.conv2(torch.relu(self.conv1(x)))


class Dilation(nn.Module):
    """Four dilated convolutions side by side over few channels (section 3.2, CDCM)."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 1)
        for number, step in enumerate(DILATIONS, 1):
            conv = nn.Conv2d(channels, channels, 3, padding=step, dilation=step, bias=False)
            self.add_module(f"conv2_{number}", conv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(torch.relu(x))
        return sum(self.get_submodule(f"conv2_{number}")(x) for number in range(1, len(DILATIONS) + 1))


class Attention(nn.Module):
    """A share of each pixel to keep (section 3.2, CSAM)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4, 1)
        self.conv2 = nn.Conv2d(4, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv2(self.conv1(torch.relu(x))))


class Reduce(nn.Module):
    """To one map."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class PiDiNet(nn.Module):
    """width: channels of the first stage (60, in the tiny one 20); narrow: of what each stage tells (24; 8)."""

    def __init__(self, width: int, narrow: int):
        super().__init__()
        widths = (width, 2 * width, 4 * width, 4 * width)
        self.init_block = _plain(KINDS[0], 3, width)
        kinds, before = iter(KINDS[1:]), width
        for stage, (count, channels) in enumerate(zip(STAGES, widths, strict=True), 1):
            for number in range(1, count + 1):
                halves = stage > 1 and number == 1
                self.add_module(f"block{stage}_{number}", Block(next(kinds), before, channels, halves))
                before = channels
        self.dilations = nn.ModuleList(Dilation(channels, narrow) for channels in widths)
        self.attentions = nn.ModuleList(Attention(narrow) for _ in widths)
        self.conv_reduces = nn.ModuleList(Reduce(narrow) for _ in widths)
        self.classifier = nn.Conv2d(len(widths), 1, 1)

    def forward(
        self,
        x: Tensor,  # (B, 3, H, W) normalised, H and W at least 8
    ) -> Tensor:  # (B, 1, H, W) logits of an edge
        size, maps = x.shape[-2:], []
        x = self.init_block(x)
        for stage, count in enumerate(STAGES, 1):
            for number in range(1, count + 1):
                x = self.get_submodule(f"block{stage}_{number}")(x)
            told = self.conv_reduces[stage - 1](self.attentions[stage - 1](self.dilations[stage - 1](x)))
            maps.append(F.interpolate(told, size, mode="bilinear", align_corners=False))
        return self.classifier(torch.cat(maps, 1))


def load_pidinet(path: str | Path) -> PiDiNet:
    """The network of a published checkpoint (table5_pidinet.pth, -small, -tiny), converted. Raises PretrainedError."""
    expected = "a checkpoint of github.com/hellozhuo/pidinet such as table5_pidinet.pth; set encode.edge_weights"
    path = Path(path).expanduser()
    if not path.is_file():
        raise PretrainedError(
            f"the edge detector pidinet: got {str(path)!r}, which is no file here; expected {expected}"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        state = {name.removeprefix("module."): value.float() for name, value in loaded["state_dict"].items()}
        network = PiDiNet(len(state["init_block.weight"]), state["conv_reduces.0.conv.weight"].shape[1])
        for name, kind in zip(_difference_weights(), KINDS, strict=True):
            state[name] = plain_kernel(kind, state[name])
        network.load_state_dict(state)
    except Exception as error:  # a file that is no checkpoint fails in many ways: unpickling, missing keys, shapes
        reason = " ".join(str(error).split())[:160]
        raise PretrainedError(
            f"the edge detector pidinet: {path}: cannot be loaded ({reason}); expected {expected}"
        ) from None
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def edge_probability(network: PiDiNet, images: np.ndarray) -> np.ndarray:
    """Images uint8 (B, H, W, 3) -> float32 (B, H, W) in [0, 1]. Raises ValueError for a side below 8 px.

    Borders are padded with zeros, ImageNet's mean colour, as it was trained: continuing a photograph beyond its borders
    shows streaks there that the network takes for edges (0.73 against 0.43 along the border of one of COCO's).
    """
    if min(images.shape[1:3]) < SMALLEST_PX:
        raise ValueError(
            f"pidinet: got images of {images.shape[1]} x {images.shape[2]} px, expected at least {SMALLEST_PX}"
        )
    device = network.classifier.weight.device
    x = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float() / 255
    x = (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(DEVIATION).view(3, 1, 1)
    with without_tf32():
        return torch.sigmoid(network(x)[:, 0]).cpu().numpy()


def _difference_weights() -> list[str]:
    """Names of the weights of the difference convolutions, first to last."""
    blocks = [(stage, number) for stage, count in enumerate(STAGES, 1) for number in range(1, count + 1)]
    return ["init_block.weight"] + [f"block{stage}_{number}.conv1.weight" for stage, number in blocks]


def _plain(kind: Difference, channels_in: int, channels: int, groups: int = 1) -> nn.Conv2d:
    side = 5 if kind == "rd" else 3
    return nn.Conv2d(channels_in, channels, side, padding=side // 2, groups=groups, bias=False)
