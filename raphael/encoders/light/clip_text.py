"""open_clip's text tower and tokenizer without open_clip: its package imports timm and torchvision for the images."""

from __future__ import annotations

import importlib.util
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

KNOWN = {"context_length", "vocab_size", "width", "heads", "layers"}
TABLE = "token_embedding.weight"
ALONE = "raphael.encoders.light.open_clip_tokenizer"  # in sys.modules


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        parts = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        read = self.ln_1(x)
        x = x + self.attn(read, read, read, need_weights=False, attn_mask=attn_mask.to(x.dtype))[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, attn_mask)
        return x


class TextTower(nn.Module):
    """The text half of open_clip's CLIP, by its names. Attention is causal."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        text = settings["text_cfg"]
        width, length = text["width"], text["context_length"]
        empty = torch.empty(text["vocab_size"], width)  # drawn on "meta" it would import sympy: 1.2 s
        self.token_embedding = nn.Embedding(*empty.shape, _weight=empty)
        self.positional_embedding = nn.Parameter(torch.empty(length, width))
        self.transformer = Blocks(width, text["heads"], text["layers"])
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, settings["embed_dim"]))
        mask = torch.full((length, length), float("-inf"), device="cpu").triu_(1)
        self.register_buffer("attn_mask", mask, persistent=False)


def text_tower(settings: dict[str, Any], tensors: dict[str, Tensor]) -> TextTower | None:
    """The tower of a CLIP of those settings, its weights among `tensors`; None where it is one for open_clip.

    Raises RuntimeError where the weights do not fit.
    """
    if set(settings) != {"embed_dim", "vision_cfg", "text_cfg"} or set(settings["text_cfg"]) != KNOWN:
        return None
    with torch.device("meta"):
        tower = TextTower(settings)
    own = {name: tensors[name].float() for name in tower.state_dict() if name in tensors}
    tower.load_state_dict(own, assign=True)
    return tower


def tokenizer_module() -> ModuleType:
    """open_clip/tokenizer.py, which needs nothing of its package; the package's own where it is imported already."""
    for name in ("open_clip.tokenizer", ALONE):
        if name in sys.modules:
            return sys.modules[name]
    package = importlib.util.find_spec("open_clip")  # finds it, does not run it
    assert package is not None and package.submodule_search_locations, "open_clip is not installed"
    file = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location(ALONE, file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[ALONE] = module
    spec.loader.exec_module(module)
    return module
