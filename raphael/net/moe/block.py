"""RAPHAEL's transformer block (arXiv 2305.18295, figure 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raphael.base.config.preset import RaphaelUNetConfig
from raphael.net.attention import CrossAttention, SelfAttention
from raphael.net.block import Block, BlockInput, BlockOutput, BlockPlace
from raphael.net.condition import AttentionSite
from raphael.net.layers import FeedForward
from raphael.net.memory import BlockText
from raphael.net.moe.edge import EdgeHead
from raphael.net.moe.mixtures import Choice, GatedSpaceMoE, GatedTimeMoE, Routing, SpaceMoE, TimeMoE
from raphael.net.text_layers import Positions


@dataclass
class GateNoise:
    """Standard normal noise of all gates, drawn by the caller: a function of the sample, not of the rank."""

    space: Tensor  # (B, blocks, N, K_space)
    time: Tensor  # (B, blocks, K_time)


@dataclass(kw_only=True)
class MixtureInput(BlockInput):
    gate_noise: GateNoise | None = None
    last_token: Tensor | None = None  # (B,) position of each caption's closing token; None: the last one


@dataclass(kw_only=True)
class MixtureOutput(BlockOutput):
    edge_logits: Tensor | None  # (B, 1, h, w), in training or when collected; None where the preset has no edge heads
    space: Routing | None  # None where the layer is not a mixture
    time: Routing | None


@dataclass(frozen=True)
class MixtureText(BlockText):
    choice: Choice | None  # of the space gate; None: no Space-MoE


class RaphaelBlock(Block):
    """h += self-attention; h += cross-attention; h += Time-MoE; h += Space-MoE, each behind a LayerNorm per pixel.

    The order is the paper's (section 3.1); residuals and norms are ours (docs/decisions/model.md): it writes none.
    Either mixture may be a plain feed-forward instead, or nothing (time_layer, space_layer): the arms of an ablation.
    """

    def __init__(self, config: RaphaelUNetConfig, place: BlockPlace):
        super().__init__(place)
        dim = place.dim
        self.norm_in = nn.GroupNorm(config.norm_groups, dim, eps=1e-6 if config.proj_in else 1e-5)
        self.proj_in = nn.Conv2d(dim, dim, 1) if config.proj_in else None
        norms = [True, True, config.moe_norm, config.moe_norm]
        self.norms = nn.ModuleList(nn.LayerNorm(dim) if norm else nn.Identity() for norm in norms)
        learned = config.positions == "learned"
        self.positions = Positions(dim, max(1, config.positions_side >> place.level)) if learned else None
        head_dim = config.head_width(dim)
        self.self_attention = SelfAttention(dim, head_dim)
        self.cross_attention = CrossAttention(dim, config.context_dim, head_dim, config.mask_source)
        gate = {
            "expansion": config.expansion,
            "gate_hidden": config.gate_hidden,
            "gate_noise": config.gate_noise,
            "gate_gradient": config.gate_gradient,
        }
        self.time_moe = self.space_moe = self.edge_head = None
        gated = config.expert_activation == "geglu"
        if config.time_layer == "moe":
            self.time_moe = (GatedTimeMoE if gated else TimeMoE)(dim, place.time_dim, config.num_time_experts, **gate)
        if config.space_layer == "moe":
            self.space_moe = (GatedSpaceMoE if gated else SpaceMoE)(
                dim, config.context_dim, config.num_space_experts, mask_threshold=config.mask_threshold, **gate
            )
        dense = [
            FeedForward(dim, config.dense_expansion, config.dense_activation) if layer == "dense" else None
            for layer in (config.time_layer, config.space_layer)
        ]
        self.time_dense, self.space_dense = dense
        self.residual = config.moe_residual
        self.edge_tokens = config.edge_tokens
        if config.edge_tokens != "none":
            edge_inputs = config.context_length if config.edge_tokens == "all" else 1
            self.edge_head = EdgeHead(edge_inputs, config.edge_channels, config.edge_layers)
        self.out = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def attend(
        self,
        x: Tensor,  # (B, D, h, w)
        given: MixtureInput,
    ) -> tuple[Tensor, MixtureOutput]:  # (B, D, h, w)
        _, _, height, width = x.shape
        noise = given.gate_noise
        text = given.texts[self.index] if given.texts is not None else None
        h = self.norm_in(x) if self.proj_in is None else self.proj_in(self.norm_in(x))
        h = h.flatten(2).mT.contiguous()  # (B, P, D); a copy only where x is not channels_last
        site = AttentionSite("self", self.index, height, width)
        h = h + self.self_attention(self._placed(self.norms[0](h), height, width), site, given.hooks)
        site = AttentionSite("cross", self.index, height, width)
        learn_edges = self.edge_head is not None and (self.training or given.collect)
        term, attention = self.cross_attention(
            self._placed(self.norms[1](h), height, width),
            given.tokens,
            given.mask,
            site,
            given.hooks,
            text and text.keys_values,
            need_map=self.space_moe is not None or learn_edges or given.collect,
        )
        h = h + term
        time = space = None
        if self.time_moe is not None:
            term, time = self.time_moe(self.norms[2](h), given.time, noise=noise and noise.time[:, self.index])
            h = h + term if self.residual else term
        elif self.time_dense is not None:
            h = h + self.time_dense(self.norms[2](h))
        if self.space_moe is not None:
            term, space = self.space_moe(
                self.norms[3](h),
                given.tokens,
                attention,
                given.mask,
                noise=noise and noise.space[:, self.index],
                choice=text and text.choice,
            )
            h = h + term if self.residual else term
        elif self.space_dense is not None:
            h = h + self.space_dense(self.norms[3](h))
        h = h.mT.unflatten(2, (height, width))
        out = x + self.out(h.contiguous() if x.is_contiguous() else h)
        edges = None
        if learn_edges:
            edges = self.edge_head(self._edge_maps(attention, given), height, width)
        shown = attention if given.collect else None
        return out, MixtureOutput(
            edge_logits=edges, space=space, time=time, attention=shown, height=height, width=width
        )

    def _placed(self, h: Tensor, height: int, width: int) -> Tensor:
        """What an attention reads: h (B, P, D), with the vectors of the places where the preset has them."""
        return h if self.positions is None else self.positions(h, height, width)

    def _edge_maps(self, attention: Tensor, given: MixtureInput) -> Tensor:
        """(B, P, N), or (B, P, 1), the closing token's, times N: the head multiplies by its number of inputs."""
        if self.edge_tokens == "all":
            return attention
        B, _, N = attention.shape
        last = torch.full((B,), N - 1, device=attention.device) if given.last_token is None else given.last_token
        return N * attention[torch.arange(B, device=attention.device), :, last].unsqueeze(-1)

    def read_text(self, tokens: Tensor) -> MixtureText:
        choice = None if self.space_moe is None else self.space_moe.gate(tokens)
        return MixtureText(self.cross_attention.keys_values(tokens), choice)

    def text_weights(self) -> list[Tensor]:
        gate = [] if self.space_moe is None else [self.space_moe.gate.balance_bias, *self.space_moe.gate.parameters()]
        return [self.cross_attention.kv.weight, *gate]
