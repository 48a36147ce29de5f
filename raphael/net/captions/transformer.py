"""Token ids -> vectors, by layers that nothing has taught before.

Letters of the shape suffixes: B samples, N tokens, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raphael.base.config.unet import CaptionConfig
from raphael.net.text_layers import TextLayer

# At the start. With CLIP's 0.02 the first layer's output, of order 1, would drown which word stands where.
TOKEN_STD, PLACE_STD = 0.6, 0.2


class CaptionTransformer(nn.Module):
    """x_n = tokens[id_n] + places_n at a real token, padding_n at any other place; pre-norm layers in which every
    place reads every place, padding too; a LayerNorm (the release's `xf_padding` and `xf_final_ln`).

    So what stands at padding is no part of the result, and nothing flows back to it: the learned vectors of these
    places stand there instead. A caption without a token, which is what the unconditional network is told, is
    padding alone.

    known: the token ids (V - 1,), rising, that have a vector of their own, of the V of `config.vocabulary`; all others
    share the last. A tokenizer for all texts knows 49,408 tokens, and captions of a small world use a few hundred.
    None: 0 to V - 2.
    """

    def __init__(self, config: CaptionConfig, length: int, width: int, known: Tensor | None = None):
        super().__init__()
        rows = config.vocabulary
        if rows < 2:
            raise ValueError(f"vocabulary: got {rows}, expected 2 or more: a token and all others")
        self.length = length
        self.register_buffer("known", torch.arange(rows - 1) if known is None else known.long().clone())
        if len(self.known) != rows - 1:
            raise ValueError(f"known: got {len(self.known)} token ids, expected {rows - 1}, vocabulary less one")
        self.tokens = nn.Embedding(rows, width)
        self.places = nn.Parameter(torch.empty(length, width))
        self.padding = nn.Parameter(torch.empty(length, width))
        self.layers = nn.ModuleList(TextLayer(width, config.head_dim) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=TOKEN_STD)
        for rows_NC in (self.places, self.padding):
            nn.init.normal_(rows_NC, std=PLACE_STD)

    def forward(
        self,
        ids: Tensor,  # (B, N) int64
        mask_BN: Tensor,  # bool, True on real tokens
    ) -> Tensor:  # (B, N, C)
        """Raises ValueError for ids of another length."""
        if ids.dim() != 2 or ids.shape[1] != self.length:
            raise ValueError(f"ids: got shape {tuple(ids.shape)}, expected (B, {self.length})")
        exact = self.norm.weight.dtype  # float32 where the matrices are kept in bfloat16
        x_BNC = self.tokens(self.rows_of(ids)).to(exact) + self.places.to(exact)
        x_BNC = torch.where(mask_BN[..., None], x_BNC, self.padding.to(exact))
        for layer in self.layers:
            x_BNC = layer(x_BNC, None)
        return self.norm(x_BNC)

    def rows_of(self, ids: Tensor) -> Tensor:
        """Which row of the table each id has, the last where it is not known; (B, N) both."""
        rows = torch.searchsorted(self.known, ids).clamp(max=len(self.known) - 1)
        return torch.where(self.known[rows] == ids, rows, len(self.known))
