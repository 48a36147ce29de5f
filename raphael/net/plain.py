"""A plain transformer block, without mixtures: what DDPM, GLIDE and Imagen need of attention."""

from __future__ import annotations

from torch import Tensor, nn

from raphael.base.config.unet import PlainUNetConfig
from raphael.net.attention import CrossAttention, JointAttention, SelfAttention
from raphael.net.block import Block, BlockInput, BlockOutput, BlockPlace
from raphael.net.condition import AttentionSite
from raphael.net.layers import FeedForward
from raphael.net.memory import BlockText


class PlainBlock(Block):
    """x + out(h), with h = norm x; h += self-attention; h += cross-attention; h += feed-forward, each behind a
    LayerNorm per pixel. `out` begins at zero. Cross-attention is there where the network reads text (context_dim),
    self-attention unless `self_attention` is false, the feed-forward where `expansion` is above 0: with self-attention
    alone it is DDPM's block but for the inner residual. With `joined_text` self- and cross-attention are one, whose map
    is not shown.
    """

    def __init__(self, config: PlainUNetConfig, place: BlockPlace):
        super().__init__(place)
        dim, head_dim = place.dim, config.head_width(place.dim)
        self.norm_in = nn.GroupNorm(config.norm_groups, dim)
        self.self_attention = self.cross_attention = self.feed_forward = None
        self.joined = config.joined_text
        if self.joined:
            self.norm_self = nn.LayerNorm(dim)
            self.self_attention = JointAttention(dim, config.context_dim, head_dim)
        elif config.self_attention:
            self.norm_self, self.self_attention = nn.LayerNorm(dim), SelfAttention(dim, head_dim)
        if config.context_dim and not self.joined:
            self.norm_cross = nn.LayerNorm(dim)
            self.cross_attention = CrossAttention(dim, config.context_dim, head_dim)
        if config.expansion:
            self.norm_forward = nn.LayerNorm(dim)
            self.feed_forward = FeedForward(dim, config.expansion, config.activation)
        self.out = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def attend(
        self,
        x: Tensor,  # (B, D, h, w)
        given: BlockInput,
    ) -> tuple[Tensor, BlockOutput]:  # (B, D, h, w)
        _, _, height, width = x.shape
        h = self.norm_in(x).flatten(2).mT.contiguous()  # (B, P, D); a copy only where x is not channels_last
        text = given.texts[self.index] if given.texts is not None else None
        if self.joined:
            told = given.tokens, given.mask, given.hooks, text and text.keys_values
            h = h + self.self_attention(self.norm_self(h), *told)
        elif self.self_attention is not None:
            site = AttentionSite("self", self.index, height, width)
            h = h + self.self_attention(self.norm_self(h), site, given.hooks)
        attention = None
        if self.cross_attention is not None:
            term, attention = self.cross_attention(
                self.norm_cross(h),
                given.tokens,
                given.mask,
                AttentionSite("cross", self.index, height, width),
                given.hooks,
                text and text.keys_values,
                need_map=given.collect,
            )
            h = h + term
        if self.feed_forward is not None:
            h = h + self.feed_forward(self.norm_forward(h))
        h = h.mT.unflatten(2, (height, width))
        out = x + self.out(h.contiguous() if x.is_contiguous() else h)
        return out, BlockOutput(attention=attention, height=height, width=width)

    def read_text(self, tokens: Tensor) -> BlockText:
        return BlockText(self._reader.keys_values(tokens))

    def text_weights(self) -> list[Tensor]:
        return [self._reader.kv.weight]

    @property
    def _reader(self) -> CrossAttention | JointAttention:
        """What makes keys and values of the text."""
        return self.self_attention if self.joined else self.cross_attention
