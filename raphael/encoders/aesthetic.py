"""LAION's aesthetic scores from CLIP embeddings, and how alike an image and its caption are.

V1 is a linear map (LAION-AI/aesthetic-predictor), V2 the MLP behind `aesthetics_v2_*`, whose scale "aesthetic >= 4.7"
is meant on (christophschuhmann/improved-aesthetic-predictor: CLIP ViT-L/14). Their weights are pickles: they are read
by torch's restricted reader, which builds tensors and nothing else, and only shapes that are a head's are accepted.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING

from raphael.base.stage import StageError

if TYPE_CHECKING:
    import torch

V2_WIDTHS = (768, 1024, 128, 64, 16, 1)


class AestheticHead:
    """`head(embeddings (n, d)) -> scores (n,)`, float32. version: "v1" or "v2"; they are different scales."""

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]]):
        self.layers = layers  # (out, in) weights and (out,) biases; dropout between them is of the training
        self.version = "v1" if len(layers) == 1 else "v2"
        self.width = layers[0][0].shape[1]

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Raises ValueError for embeddings of another CLIP. They are brought to unit length, as both were trained."""
        import torch.nn.functional as F

        if embeddings.ndim != 2 or embeddings.shape[1] != self.width:
            raise ValueError(f"got embeddings of shape {tuple(embeddings.shape)}, expected (n, {self.width})")
        x = F.normalize(embeddings.float(), dim=1)
        for weight, bias in self.layers:
            x = F.linear(x, weight, bias)
        return x[:, 0]


def load_head(path: str | Path, device: str = "cpu") -> AestheticHead:
    """A head from a .pth or .safetensors file, on a device. Raises StageError where the file is no aesthetic head."""
    try:
        tensors = _read(Path(path))
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        detail = " ".join(str(error).split())[:120]
        raise StageError(f"{path}: not readable as tensors alone ({detail}); take the published weights") from None
    shapes = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in tensors.items()}
    if set(shapes) == {"weight", "bias"} and len(shapes["weight"]) == 2 and shapes["weight"][0] == 1:
        names = [""]
    else:
        names = [f"layers.{number}." for number in (0, 2, 4, 6, 7)]  # what lies between is dropout
        expected = {}
        for name, wide, narrow in zip(names, V2_WIDTHS[:-1], V2_WIDTHS[1:], strict=True):
            expected |= {f"{name}weight": (narrow, wide), f"{name}bias": (narrow,)}
        if shapes != expected:
            raise StageError(f"{path}: got tensors {', '.join(sorted(shapes)[:6])}, expected those of a V1 or V2 head")
    pairs = [(tensors[f"{name}weight"], tensors[f"{name}bias"]) for name in names]
    return AestheticHead([(weight.float().to(device), bias.float().to(device)) for weight, bias in pairs])


def _read(path: Path) -> dict[str, torch.Tensor]:
    import torch

    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def similarity(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Cosine of CLIP embeddings, row by row: (n, d), (n, d) -> (n,), -1 to 1."""
    import torch.nn.functional as F

    if image.shape != text.shape or image.ndim != 2:
        raise ValueError(f"got shapes {tuple(image.shape)} and {tuple(text.shape)}, expected two of the same (n, d)")
    return F.cosine_similarity(image.float(), text.float(), dim=1)
