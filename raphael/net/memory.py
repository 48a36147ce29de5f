"""What the blocks make of a text, kept while drawing: it is the same at every step.

The keys and values of a cross-attention and the choices of a space gate read the text alone, neither the picture nor
the timestep. A memory holds those of the last batch of texts; it is exact, because it is asked for by content and by
the version of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from raphael.net.experts import autocast_state, weights_version


@dataclass(frozen=True)
class BlockText:
    """One block's view of a batch of texts."""

    keys_values: tuple[Tensor, Tensor]  # each (B, H, N, D/H)
    choice: tuple[Tensor, Tensor, Tensor] | None  # of the space gate: expert, probability, weight; None: no Space-MoE


class TextReader(Protocol):
    """A transformer block."""

    def read_text(self, context: Tensor) -> BlockText: ...

    def text_weights(self) -> Iterable[Tensor]:
        """Parameters and buffers that `read_text` reads."""


class TextMemory:
    """The texts of the last batch. Bytes: blocks x B x N x 2 D numbers (sd, two texts: 33 MB in float32)."""

    def __init__(self) -> None:
        self.computed = 0  # batches of texts that were read, for tests and the curious
        self._key: tuple[Any, ...] | None = None
        self._context: Tensor | None = None
        self._texts: list[BlockText] = []

    def read(self, blocks: list[TextReader], context: Tensor) -> list[BlockText]:
        """Every block's view of context (B, N, C), in the order of `blocks`. Without gradients."""
        weights = weights_version(weight for block in blocks for weight in block.text_weights())
        key = (weights, context.dtype, autocast_state(context.device.type), [id(block) for block in blocks])
        # compared by value, 77 x 1024 numbers a text: whoever joins texts anew at every step is served too
        same = self._context is not None and self._context.shape == context.shape
        if not (same and weights is not None and key == self._key and torch.equal(self._context, context)):
            self._texts = []  # the old ones go before the new ones come
            self._texts = [block.read_text(context) for block in blocks]
            self._key, self._context = key, context.detach().clone()
            self.computed += 1
        return self._texts
