"""Captions as what the network is told, for systems whose records hold the frozen encoder's tokens: computed once, by
the stage encode, and not at every step.

A caption that is dropped for classifier-free guidance, and the empty one, has no token at all: attention reads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raphael.base.records import TEXT, TEXT_MASK
from raphael.net.condition import Condition

FIELDS = (TEXT, TEXT_MASK)  # of the records


def told(batch: Mapping[str, Tensor], dropped: Tensor | None) -> Condition:
    """Of a batch of records. dropped (B,) bool: these are told no caption; None: none are dropped."""
    mask = batch[TEXT_MASK].bool()
    if dropped is not None:
        mask = mask & ~dropped[:, None]
    return Condition(batch[TEXT].float(), mask)


def encoded(encoder: Any, texts: list[str], device: torch.device | str = "cpu") -> Condition:
    """Of prompts, by the text encoder itself."""
    encoding = encoder.encode(encoder.tokenize(texts).to(device))
    said = torch.tensor([bool(text) for text in texts], device=encoding.mask.device)
    return Condition(encoding.context, encoding.mask & said[:, None])
