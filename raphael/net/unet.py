"""The denoiser: Stable Diffusion's U-Net shape with RAPHAEL's transformer blocks (arXiv 2305.18295, figure 3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raphael.net.attention import AttentionBias, AttentionEdit, AttentionSite, CrossAttention, SelfAttention
from raphael.net.edge import EdgeHead
from raphael.net.experts import ExpertBank
from raphael.net.layers import Downsample, FeedForward, ResBlock, TimeEmbedding, Upsample
from raphael.net.memory import BlockText, TextMemory
from raphael.net.moe import Routing, SpaceMoE, TimeMoE, check_context_mask
from raphael.preset import UNetConfig


@dataclass
class GateNoise:
    """Standard normal noise of all gates, drawn by the caller: a function of the sample, not of the rank."""

    space: Tensor  # (B, blocks, N, K_space)
    time: Tensor  # (B, blocks, K_time)


@dataclass
class BlockOutput:
    """What one transformer block shows besides its features."""

    edge_logits: Tensor | None  # (B, 1, h, w), in training or when collected; None where the preset has no edge heads
    space: Routing | None  # None where the layer is not a mixture
    time: Routing | None
    attention: Tensor | None  # (B, h*w, N), the heads joined as mask_source says; only when collected
    height: int
    width: int


@dataclass
class UNetOutput:
    prediction: Tensor  # (B, C, h, w): eps or v, as the diffusion config says
    blocks: list[BlockOutput] = field(default_factory=list)  # in the order of the forward pass


@dataclass
class Conditioning:
    """What every block reads."""

    time: Tensor  # (B, time_dim), what the time gates read: the timestep alone
    embedding: Tensor  # (B, time_dim), what the res-blocks read: the timestep, with pooled_text also the caption
    context: Tensor  # (B, N, context_dim)
    context_mask: Tensor | None  # (B, N) bool; None: all tokens count
    gate_noise: GateNoise | None = None
    collect: bool = False
    bias: AttentionBias | None = None
    edit: AttentionEdit | None = None
    last_token: Tensor | None = None  # (B,) position of each caption's closing token; None: the last one
    texts: list[BlockText] | None = None  # by block, where they are remembered


class RaphaelBlock(nn.Module):
    """h += self-attention; h += cross-attention; h += Time-MoE; h += Space-MoE, each behind a LayerNorm per pixel.

    The order is the paper's (section 3.1); residuals and norms are ours (docs/decisions.md): the paper writes none.
    Either mixture may be a plain feed-forward instead, or nothing (time_layer, space_layer): the arms of an ablation.
    """

    recompute = False  # in training keep the block's input alone and compute the rest again in the backward

    def __init__(self, config: UNetConfig, dim: int, time_dim: int, index: int):
        super().__init__()
        self.index = index
        self.norm_in = nn.GroupNorm(config.norm_groups, dim, eps=1e-6 if config.proj_in else 1e-5)
        self.proj_in = nn.Conv2d(dim, dim, 1) if config.proj_in else None
        norms = [True, True, config.moe_norm, config.moe_norm]
        self.norms = nn.ModuleList(nn.LayerNorm(dim) if norm else nn.Identity() for norm in norms)
        head_dim = dim // config.num_heads if config.num_heads else config.head_dim
        self.self_attention = SelfAttention(dim, head_dim)
        self.cross_attention = CrossAttention(dim, config.context_dim, head_dim, config.mask_source)
        gate = {
            "expansion": config.expansion,
            "gate_hidden": config.gate_hidden,
            "gate_noise": config.gate_noise,
            "gate_gradient": config.gate_gradient,
        }
        self.time_moe = self.space_moe = self.edge_head = None
        if config.time_layer == "moe":
            self.time_moe = TimeMoE(dim, time_dim, config.num_time_experts, **gate)
        if config.space_layer == "moe":
            self.space_moe = SpaceMoE(
                dim, config.context_dim, config.num_space_experts, mask_threshold=config.mask_threshold, **gate
            )
        for moe in (self.time_moe, self.space_moe) if config.expert_activation == "geglu" else ():
            if moe is not None:
                moe.experts = ExpertBank(dim, moe.gate.num_experts, config.expansion, "geglu")
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

    def forward(
        self,
        x: Tensor,  # (B, D, h, w)
        cond: Conditioning,
    ) -> tuple[Tensor, BlockOutput]:  # (B, D, h, w)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, cond, use_reentrant=False)
        return self._forward(x, cond)

    def _forward(self, x: Tensor, cond: Conditioning) -> tuple[Tensor, BlockOutput]:
        _, _, height, width = x.shape
        noise = cond.gate_noise
        text = cond.texts[self.index] if cond.texts is not None else None
        h = self.norm_in(x) if self.proj_in is None else self.proj_in(self.norm_in(x))
        h = h.flatten(2).mT.contiguous()  # (B, P, D); a copy only where x is not channels_last
        site = AttentionSite("self", self.index, height, width)
        h = h + self.self_attention(self.norms[0](h), site, cond.edit)
        site = AttentionSite("cross", self.index, height, width)
        learn_edges = self.edge_head is not None and (self.training or cond.collect)
        term, attention = self.cross_attention(
            self.norms[1](h),
            cond.context,
            cond.context_mask,
            site,
            cond.bias,
            cond.edit,
            text and text.keys_values,
            need_map=self.space_moe is not None or learn_edges or cond.collect,
        )
        h = h + term
        time = space = None
        if self.time_moe is not None:
            term, time = self.time_moe(self.norms[2](h), cond.time, noise=noise and noise.time[:, self.index])
            h = h + term if self.residual else term
        elif self.time_dense is not None:
            h = h + self.time_dense(self.norms[2](h))
        if self.space_moe is not None:
            term, space = self.space_moe(
                self.norms[3](h),
                cond.context,
                attention,
                cond.context_mask,
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
            edges = self.edge_head(self._edge_maps(attention, cond), height, width)
        return out, BlockOutput(edges, space, time, attention if cond.collect else None, height, width)

    def _edge_maps(self, attention: Tensor, cond: Conditioning) -> Tensor:
        """(B, P, N), or (B, P, 1), the closing token's, times N: the head multiplies by its number of inputs."""
        if self.edge_tokens == "all":
            return attention
        B, _, N = attention.shape
        last = torch.full((B,), N - 1, device=attention.device) if cond.last_token is None else cond.last_token
        return N * attention[torch.arange(B, device=attention.device), :, last].unsqueeze(-1)

    def read_text(self, context: Tensor) -> BlockText:
        """What this block makes of context (B, N, C) whatever the picture and the timestep are."""
        choice = None if self.space_moe is None else self.space_moe.gate(context)
        return BlockText(self.cross_attention.keys_values(context), choice)

    def text_weights(self) -> list[Tensor]:
        gate = [] if self.space_moe is None else [self.space_moe.gate.balance_bias, *self.space_moe.gate.parameters()]
        return [self.cross_attention.kv.weight, *gate]


class UNet(nn.Module):
    """conv in; per level res-blocks (+ transformer blocks) and a downsample; middle; the mirror with skips; out."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.num_blocks = 0
        self._memory: TextMemory | None = None
        channels, time_dim = config.channels, 4 * config.channels[0]
        self.time_embedding = TimeEmbedding(channels[0], time_dim)
        if config.pooled_text:
            self.text_embedding = nn.Linear(2 * config.context_dim, time_dim)
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)

        self.down, skips, width = nn.ModuleList(), [channels[0]], channels[0]
        for level, level_width in enumerate(channels):
            for _ in range(config.res_blocks):
                self.down.append(self._unit(width, level_width, time_dim, level))
                width = level_width
                skips.append(width)
            if level < len(channels) - 1:
                self.down.append(Downsample(width))
                skips.append(width)

        self.middle_in = ResBlock(width, width, time_dim, config.norm_groups)
        self.middle = self._block(width, time_dim)
        self.middle_out = ResBlock(width, width, time_dim, config.norm_groups)

        self.up = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(channels))):
            for _ in range(config.res_blocks + 1):
                self.up.append(self._unit(width + skips.pop(), level_width, time_dim, level))
                width = level_width
            if level > 0:
                self.up.append(Upsample(width))
        assert not skips

        self.norm_out = nn.GroupNorm(config.norm_groups, width)
        self.conv_out = nn.Conv2d(width, config.latent_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self,
        x: Tensor,  # (B, C, h, w)
        t: Tensor,  # (B,) timesteps, 0 to T-1, any real
        context: Tensor,  # (B, N, context_dim)
        context_mask: Tensor | None = None,  # (B, N) bool, True on real tokens
        *,
        gate_noise: GateNoise | None = None,
        collect: bool = False,
        bias: AttentionBias | None = None,
        edit: AttentionEdit | None = None,
    ) -> UNetOutput:
        """Predict eps or v. With mean_over="all_tokens" the mask is ignored: padding is attended to and counted.

        collect keeps the attention maps. The edge heads run in training and when collecting: sampling needs neither.
        Raises ValueError on a latent the U-Net cannot halve often enough, or a context of another size. A NaN in a
        sample's latent, timestep or counted tokens makes that sample's prediction NaN, and no other's.
        """
        self._check(x, t, context, context_mask)
        last_token = None if context_mask is None else context_mask.sum(1).clamp(min=1) - 1
        if self.config.mean_over == "all_tokens":
            context_mask = None
        context = context.to(x.dtype)
        time = self.time_embedding(t)
        embedding = time + self._pooled(context, context_mask) if self.config.pooled_text else time
        cond = Conditioning(time, embedding, context, context_mask, gate_noise, collect, bias, edit, last_token)
        if self._memory is not None and not self.training and not torch.is_grad_enabled():
            cond.texts = self._memory.read(self.transformer_blocks(), context)
        blocks: list[BlockOutput] = []
        h = self.conv_in(x)
        skips = [h]
        for module in self.down:
            h = self._run_unit(module, h, cond, blocks)
            skips.append(h)
        h = self.middle_in(h, cond.embedding)
        h, block = self.middle(h, cond)
        blocks.append(block)
        h = self.middle_out(h, cond.embedding)
        for module in self.up:
            if not isinstance(module, Upsample):
                h = torch.cat([h, skips.pop()], dim=1)
            h = self._run_unit(module, h, cond, blocks)
        return UNetOutput(self.conv_out(nn.functional.silu(self.norm_out(h))), blocks)

    @contextlib.contextmanager
    def remembering(self) -> Iterator[TextMemory]:
        """Inside, without gradients and in eval mode, keys, values and routes of the texts are computed once, and the
        experts' weights cast once."""
        outer, self._memory = self._memory, TextMemory()
        banks = [module for module in self.modules() if isinstance(module, ExpertBank)] if outer is None else []
        for bank in banks:
            bank.keep_casts(True)
        try:
            yield self._memory
        finally:
            self._memory = outer
            for bank in banks:
                bank.keep_casts(False)

    def transformer_blocks(self) -> list[RaphaelBlock]:
        """All blocks in the order of the forward pass."""
        found = [module for module in self.modules() if isinstance(module, RaphaelBlock)]
        return sorted(found, key=lambda block: block.index)

    @torch.no_grad()
    def space_routes(self, context: Tensor) -> Tensor:
        """Which space expert every token takes: context (B, N, context_dim) -> (blocks, B, N) int64, without noise.

        A route depends on the token's encoding alone, not on the picture nor on the timestep. (0, B, N) where
        the preset has no Space-MoE.
        """
        gates = [block.space_moe.gate for block in self.transformer_blocks() if block.space_moe is not None]
        none = torch.empty(0, *context.shape[:2], dtype=torch.int64, device=context.device)
        return torch.stack([gate.route(context) for gate in gates]) if gates else none

    @torch.no_grad()
    def time_routes(self, t: Tensor) -> Tensor:
        """Which time expert every timestep takes: t (T,) -> (blocks, T) int64; (0, T) without Time-MoE. No noise."""
        embedding = self.time_embedding(t)
        gates = [block.time_moe.gate for block in self.transformer_blocks() if block.time_moe is not None]
        none = torch.empty(0, len(t), dtype=torch.int64, device=t.device)
        return torch.stack([gate.route(embedding) for gate in gates]) if gates else none

    def time_balance_loss(self, t: Tensor) -> Tensor:
        """Switch's balance loss K sum_k f_k P_k of the time gates over the timesteps t (T,), mean over blocks, scalar.

        Over a fixed set of timesteps and not over the batch's, so that it does not depend on how a batch is split.
        """
        embedding = self.time_embedding(t)
        losses = []
        for block in self.transformer_blocks():
            probability = block.time_moe.gate.logits(embedding).softmax(-1)
            expert = (probability.detach() + block.time_moe.gate.balance_bias).argmax(-1)
            everyone = torch.ones_like(expert, dtype=torch.bool)
            losses.append(Routing(expert[None], probability[None], everyone[None]).balance_loss().mean())
        return torch.stack(losses).mean()

    def attention_maps_px(self, height: int, width: int) -> list[tuple[int, int]]:
        """(height, width) of every block's map for a latent of that size, in the order of the forward pass."""
        last = len(self.config.channels) - 1
        down = [level for level in range(last + 1) if level in self.config.attention_levels]
        levels = [level for level in down for _ in range(self.config.res_blocks)] + [last]
        levels += [level for level in reversed(down) for _ in range(self.config.res_blocks + 1)]
        return [(height >> level, width >> level) for level in levels]

    def _unit(self, in_width: int, width: int, time_dim: int, level: int) -> nn.ModuleList:
        unit = nn.ModuleList([ResBlock(in_width, width, time_dim, self.config.norm_groups)])
        if level in self.config.attention_levels:
            unit.append(self._block(width, time_dim))
        return unit

    def _block(self, dim: int, time_dim: int) -> RaphaelBlock:
        block = RaphaelBlock(self.config, dim, time_dim, self.num_blocks)
        self.num_blocks += 1
        return block

    @staticmethod
    def _run_unit(module: nn.Module, h: Tensor, cond: Conditioning, blocks: list[BlockOutput]) -> Tensor:
        if not isinstance(module, nn.ModuleList):
            return module(h)
        h = module[0](h, cond.embedding)
        for block in module[1:]:
            h, output = block(h, cond)
            blocks.append(output)
        return h

    def _pooled(self, context: Tensor, context_mask: Tensor | None) -> Tensor:
        """The mean token and the last real one, which in a causal encoder has read the whole caption."""
        if context_mask is None:
            context_mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        count = context_mask.sum(1).clamp(min=1)
        mean = torch.einsum("bn,bnc->bc", context_mask.to(context) / count.unsqueeze(1), context)
        last = context[torch.arange(len(context), device=context.device), count - 1]
        return self.text_embedding(torch.cat([mean, last], dim=-1))

    def _check(self, x: Tensor, t: Tensor, context: Tensor, context_mask: Tensor | None) -> None:
        factor = 2 ** (len(self.config.channels) - 1)
        if x.dim() != 4 or x.shape[1] != self.config.latent_channels or x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected (B, {self.config.latent_channels}, h, w) "
                f"with h and w multiples of {factor}"
            )
        want = (self.config.context_length, self.config.context_dim)
        if tuple(context.shape) != (len(x), *want):
            raise ValueError(
                f"context: got shape {tuple(context.shape)}, expected (B, {want[0]}, {want[1]})"
                f" with B {len(x)}, as x has"
            )
        if tuple(t.shape) != (len(x),):
            raise ValueError(f"t: got shape {tuple(t.shape)}, expected (B,) = ({len(x)},)")
        check_context_mask(context_mask, context)
