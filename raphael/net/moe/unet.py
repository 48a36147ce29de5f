"""RAPHAEL's U-Net: the U-Net with the paper's blocks, and what can be asked of its gates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from raphael.base.config.preset import RaphaelUNetConfig
from raphael.net.condition import Condition
from raphael.net.memory import TextMemory
from raphael.net.moe.block import GateNoise, MixtureInput, RaphaelBlock
from raphael.net.moe.experts import ExpertBank
from raphael.net.moe.gate import Routing
from raphael.net.unet import UNet, UNetOutput


class RaphaelUNet(UNet):
    config: RaphaelUNetConfig

    def __init__(self, config: RaphaelUNetConfig):
        super().__init__(config, RaphaelBlock)

    def forward(
        self,
        x: Tensor,  # (B, C, h, w)
        t: Tensor,  # (B,) timesteps, 0 to T-1, any real
        condition: Condition,
        *,
        gate_noise: GateNoise | None = None,
        collect: bool = False,
    ) -> UNetOutput:
        """As `UNet.forward`. With mean_over="all_tokens" the mask is ignored: padding is attended to and counted.

        The edge heads run in training and when collecting: sampling needs neither.
        """
        self._check(x, t, condition)
        last_token = None if condition.mask is None else condition.mask.sum(1).clamp(min=1) - 1
        read = self._read(x, t, replace(condition, mask=self._attended(condition.mask)))
        given = MixtureInput(**read, collect=collect, gate_noise=gate_noise, last_token=last_token)
        return self._run(x, condition, given)

    @contextlib.contextmanager
    def remembering(self) -> Iterator[TextMemory]:
        """Also the routes of the texts are computed once, and the experts' weights cast once."""
        outer = self._memory
        banks = [module for module in self.modules() if isinstance(module, ExpertBank)]
        with super().remembering() as memory:
            for bank in banks:
                bank.remember(True)
            try:
                yield memory
            finally:
                for bank in banks:
                    bank.remember(outer is not None)

    def refined(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().refined(tokens, self._attended(mask))

    @torch.no_grad()
    def space_routes(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Which space expert every token takes: tokens (B, N, context_dim) -> (blocks, B, N) int64, without noise.

        A route depends on the text alone, not on the image nor on the timestep: on the token's encoding, with
        `text_layers` on the whole caption's, whose padding mask (B, N) names. (0, B, N) where the preset has no
        Space-MoE.
        """
        tokens = self.refined(tokens, mask)
        gates = [block.space_moe.gate for block in self.transformer_blocks() if block.space_moe is not None]
        none = torch.empty(0, *tokens.shape[:2], dtype=torch.int64, device=tokens.device)
        return torch.stack([gate.route(tokens) for gate in gates]) if gates else none

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

    def _attended(self, mask: Tensor | None) -> Tensor | None:
        return None if self.config.mean_over == "all_tokens" else mask
