"""A U-Net with the text transformer that is trained with it: one network, which is told token ids."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from raphael.base.config.unet import CaptionConfig, UNetConfig
from raphael.net.block import Block, BlockFactory
from raphael.net.captions.transformer import CaptionTransformer
from raphael.net.condition import Condition
from raphael.net.unet import UNet, UNetOutput

Kept = tuple[Tensor, Tensor, Tensor]  # ids, mask, and what the transformer made of them


def of_ids(ids: Tensor, mask: Tensor) -> Condition:
    """What a Captioned is told: ids (B, N) of whole numbers, as tokens of width 1; mask (B, N) bool, True on real
    tokens: none of a dropped caption's."""
    return Condition(ids.long()[..., None], mask)


class Captioned(nn.Module):
    """The transformer's tokens are the context of every attention of the U-Net, padding included; the last token is
    added to the timestep's embedding (GLIDE, arXiv 2112.10741, section 4.1).

    config: as a caller sees it, of a network that reads tokens of width 1 and no vector. known: of CaptionTransformer.
    """

    def __init__(self, unet: UNetConfig, text: CaptionConfig, block: BlockFactory, known: Tensor | None = None):
        super().__init__()
        if unet.vector_dim != unet.context_dim:
            got = f"{unet.vector_dim} with context_dim {unet.context_dim}"
            raise ValueError(f"vector_dim: got {got}, expected one number: the vector is a token")
        self.text = CaptionTransformer(text, unet.context_length, unet.context_dim, known)
        self.unet = UNet(unet, block)
        self.config = replace(unet, context_dim=1, vector_dim=0)
        self._remembers, self._kept = False, None

    def forward(
        self,
        x: Tensor,  # (B, C, h, w)
        t: Tensor,  # (B,) timesteps
        condition: Condition,  # of `of_ids`, and what else the U-Net reads
        *,
        collect: bool = False,
    ) -> UNetOutput:
        return self.unet(x, t, self.read(condition), collect=collect)

    def read(self, condition: Condition) -> Condition:
        """What the U-Net is told. Raises ValueError for a condition that is no token ids."""
        ids = condition.tokens
        if ids is None or ids.is_floating_point() or ids.shape[2] != 1:
            got = "none" if ids is None else f"{ids.dtype} {tuple(ids.shape)}"
            raise ValueError(f"tokens: got {got}, expected token ids, int64 (B, {self.text.length}, 1)")
        ids, mask = ids[..., 0], condition.mask
        tokens = self._tokens(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask)
        return replace(condition, tokens=tokens, mask=None, vector=tokens[:, -1])

    def _tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        if not self._remembers or self.training or torch.is_grad_enabled():
            return self.text(ids, mask)
        kept: Kept | None = self._kept
        if kept is None or not (_equal(kept[0], ids) and _equal(kept[1], mask)):
            self._kept = kept = ids.clone(), mask.clone(), self.text(ids, mask)
        return kept[2]

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """As UNet's: inside, without gradients and in eval mode, a batch of texts is read once, not at every step."""
        outer, self._remembers, self._kept = self._remembers, True, None
        try:
            with self.unet.remembering():
                yield
        finally:
            self._remembers, self._kept = outer, None

    def transformer_blocks(self) -> list[Block]:
        return self.unet.transformer_blocks()

    @property
    def num_blocks(self) -> int:
        return self.unet.num_blocks


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
