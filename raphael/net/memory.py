"""What the network makes of a text, kept while sampling: it is the same at every step.

The refined tokens (`text_layers`), the keys and values of a cross-attention and a gate's choices by words read the
text alone, neither the image nor the timestep. A memory holds those of the last batch of texts; it is exact, because
it is asked for by content and by the version of the weights, and begun anew wherever sampling begins
(`UNet.remembering`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BlockText:
    """One block's view of a batch of texts."""

    keys_values: tuple[Tensor, Tensor]  # each (B, H, N, D/H)


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
        self._mask: Tensor | None = None
        self._refined: Tensor | None = None
        self._texts: list[BlockText] = []

    def read(
        self,
        blocks: list[TextReader],
        context: Tensor,
        context_mask: Tensor | None = None,
        refiner: nn.Module | None = None,
    ) -> tuple[Tensor, list[BlockText]]:
        """The refined context, and every block's view of it, in the order of `blocks`. Without gradients.

        context (B, N, C), context_mask (B, N) bool or None. Without a refiner the context is its own refined one, and
        the mask does not matter.
        """
        own = () if refiner is None else tuple(refiner.parameters())
        weights = weights_version([*own, *(weight for block in blocks for weight in block.text_weights())])
        key = (weights, context.dtype, autocast_state(context.device.type), [id(block) for block in blocks])
        mask = None if refiner is None else context_mask
        # compared by value, 77 x 1024 numbers a text: whoever joins texts anew at every step is served too
        same = _equal(self._context, context) and _equal(self._mask, mask)
        if not (same and weights is not None and key == self._key):
            self._texts = []  # the old ones go before the new ones come
            self._refined = context.detach().clone() if refiner is None else refiner(context, mask)
            self._texts = [block.read_text(self._refined) for block in blocks]
            self._key, self._context = key, context.detach().clone()
            self._mask = None if mask is None else mask.clone()
            self.computed += 1
        return self._refined, self._texts


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one, other)


def weights_version(parameters: Iterable[Tensor]) -> tuple[Any, ...] | None:
    """Equal as long as the values are: place, count of writes, type. None for tensors that do not count writes.

    Blind to writes that nobody counts: of fused optimizers (seen with AdamW(fused=True)), through `.data`, by a raw
    pointer. So whoever keeps something by it forgets it where sampling begins (`UNet.remembering`), and no optimizer
    steps while it lasts.
    """
    parameters = list(parameters)
    if any(parameter.is_inference() for parameter in parameters):
        return None
    return tuple((p.data_ptr(), p._version, p.dtype, str(p.device)) for p in parameters)


def autocast_state(device_type: str) -> tuple[bool, torch.dtype] | None:
    """What decides in which type a product is computed."""
    if not torch.is_autocast_enabled(device_type):
        return None
    return True, torch.get_autocast_dtype(device_type)
