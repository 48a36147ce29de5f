"""RAPHAEL's training objective, L = L_denoise + L_edge (+ balance): arXiv 2305.18295, section 3.2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raphael.base.config.preset import DiffusionConfig, UNetConfig
from raphael.base.randomness import SampleRng
from raphael.base.records import EDGES, MOMENTS, PHASE, PIXELS, SIZES, TEXT, TEXT_MASK, TOKEN_IDS
from raphael.base.strict import to_dict
from raphael.diffusion.noise import noise_of
from raphael.diffusion.prediction import Prediction, prediction_of, training_pair
from raphael.net.condition import Condition
from raphael.net.inputs import known_picture
from raphael.net.latents import moments_of, sample_latents
from raphael.net.moe.block import GateNoise, MixtureOutput
from raphael.net.moe.edge import focal_loss
from raphael.net.moe.unet import RaphaelUNet
from raphael.net.unet import UNetOutput
from raphael.objectives.denoising_settings import DenoisingSettings
from raphael.objectives.holes import known_masks
from raphael.objectives.timesteps import by_quarter, shifted

BALANCE_TIMESTEPS = 64  # of the grid on which the time gates' balance is judged


@dataclass(frozen=True)
class LatentScale:
    """How raw VAE means become latents of unit variance: (mean - shift) * factor."""

    factor: float
    shift: float = 0.0


class DenoisingObjective(nn.Module):
    """batch -> named losses.

    encode_text: token ids (B, N) int64 -> Condition; frozen, run without gradient. empty_tokens (N,): the caption
    that replaces a dropped one. Latent noise, timestep, noise, caption drop and gate noise are drawn from the rng, so
    they are functions of (seed, epoch, sample index) and not of the rank or the batch.
    """

    def __init__(
        self,
        unet: RaphaelUNet,
        encode_text: Callable[[Tensor], Condition],
        empty_tokens: Tensor,
        diffusion: DiffusionConfig,
        config: DenoisingSettings,
        scale: LatentScale,
    ):
        super().__init__()
        if config.edge_weight and unet.config.edge_tokens == "none":
            raise ValueError(f"edge_weight: got {config.edge_weight:g}, expected 0: the preset has no edge heads")
        if config.edge_block_weights and len(config.edge_block_weights) != unet.num_blocks:
            got = len(config.edge_block_weights)
            raise ValueError(f"edge_block_weights: got {got} numbers, expected {unet.num_blocks}, one for each block")
        self.unet = unet
        self.encode_text = encode_text
        self._empty: Condition | None = None  # of the empty caption, where records hold the others' encodings
        self.register_buffer("empty_tokens", empty_tokens.long(), persistent=False)
        self.schedule = noise_of(diffusion)
        self.prediction = prediction_of(diffusion)
        self.config = config
        self.scale = scale
        plain = to_dict(config)
        losses = {item.name: plain[item.name] for item in fields(DenoisingSettings)}
        self.settings = {**losses, "diffusion": to_dict(diffusion), "scale": to_dict(scale)}  # a checkpoint keeps them
        grid = torch.linspace(0, diffusion.num_steps - 1, BALANCE_TIMESTEPS)
        self.register_buffer("balance_timesteps", grid, persistent=False)

    def forward(self, batch: dict[str, Tensor], rng: SampleRng) -> dict[str, Tensor]:
        """batch: moments (B, 2C, h, w) or pixels, token_ids (B, N), edges (B, E, F) uint8 where it has edge heads;
        phase (B,) where there are phases; text (B, N, D) and text_mask where the stage encode has read the captions:
        then the text encoder has nothing to do.

        Returns "loss" (the weighted sum, what is minimised), "denoise", "edge", "balance" and, detached, "denoise_t"
        (the unweighted square error in each quarter of the timesteps, the cleanest first), the load of every expert,
        the cover of every block and the entropy of both kinds of gates.
        """
        moments = moments_of(batch)
        B, C, h, w = len(moments), moments.shape[1] // 2, *moments.shape[2:]
        device = moments.device
        drawn = rng.normal("latent", (C, h, w)).to(device) if self.config.latents == "sample" else None
        x0 = sample_latents(moments, self.scale.factor, self.scale.shift, drawn)
        t = self._timesteps(rng.uniform("timestep"), batch.get(PHASE)).to(device)
        noise = rng.normal("noise", (C, h, w)).to(device)
        if self.config.noise_offset:  # an image's mean brightness is then noised, too, and has to be learned
            noise = noise + self.config.noise_offset * rng.normal("noise_offset", (C, 1, 1)).to(device)
        dropped = (rng.uniform("caption_drop") < self.config.caption_drop).to(device)
        with torch.no_grad():
            text = self._with_picture(self._told(batch, dropped), x0, rng)

        x_t, target = training_pair(self.prediction, self.schedule, x0, noise, t)
        gate_noise = self._gate_noise(rng, text.tokens)
        output = self.unet(x_t, t, text, gate_noise=gate_noise, collect=not self.unet.training)
        losses = {
            "denoise": self._denoise_loss(output.prediction.float(), target, t),
            "edge": self._edge_loss(output.blocks, batch.get(EDGES), t),
            "balance": self._balance_loss(output),
        }
        if self.training and self.config.balance == "loss_free":
            self._rebalance(output.blocks)
        weights = {"denoise": 1.0, "edge": self.config.edge_weight, "balance": self.config.balance_weight}
        loss = sum(weights[name] * value for name, value in losses.items())
        assert B == len(t)
        errors = by_quarter(output.prediction, target, t, self.schedule.num_steps)
        return {"loss": loss, **losses, **errors, **_expert_statistics(output.blocks)}

    @torch.no_grad()
    def heldout(self, batch: dict[str, Tensor], rng: SampleRng, place: Tensor) -> Tensor:
        """(B,) mean square error per element of each sample at the timestep of `place`, (B,) in [0, 1).

        Nothing is drawn but the noise and an inpainting network's holes, nothing dropped, nothing weighted. Call it in
        eval mode.
        """
        moments = moments_of(batch)
        x0 = sample_latents(moments, self.scale.factor, self.scale.shift, None)
        t = self.schedule.timesteps(place).to(moments.device)
        noise = rng.normal("noise", x0.shape[1:]).to(moments.device)
        text = self._with_picture(self._told(batch, None), x0, rng)
        x_t, target = training_pair(self.prediction, self.schedule, x0, noise, t)
        prediction = self.unet(x_t, t, text).prediction
        return (prediction.float() - target).square().flatten(1).mean(1)

    def _told(self, batch: dict[str, Tensor], dropped: Tensor | None) -> Condition:
        """As `_text`; a network that knows sizes is also told the images' (B, 6), with a dropped caption, too."""
        text = self._text(batch, dropped)
        return replace(text, vector=batch[SIZES].float()) if self.unet.config.size_px else text

    def _text(self, batch: dict[str, Tensor], dropped: Tensor | None) -> Condition:
        """What the captions say, of those dropped (B,) bool what the empty one says; None: none are."""
        if TEXT not in batch:
            tokens = batch[TOKEN_IDS].long()
            if dropped is not None:
                tokens = torch.where(dropped[:, None], self.empty_tokens, tokens)
            return self.encode_text(tokens)
        read, mask = batch[TEXT].float(), batch[TEXT_MASK].bool()
        if dropped is not None:
            if self._empty is None:
                self._empty = self.encode_text(self.empty_tokens[None])
            read = torch.where(dropped[:, None, None], self._empty.tokens, read)
            mask = torch.where(dropped[:, None], self._empty.mask, mask)
        return Condition(read, mask)

    def _with_picture(self, text: Condition, x0: Tensor, rng: SampleRng) -> Condition:
        """An inpainting network is also shown what is left of x0 (B, C, h, w) around holes."""
        if not self.unet.config.inpainting:
            return text
        known = known_masks(rng, *x0.shape[2:]).to(x0.device)
        return replace(text, picture=known_picture(x0, known))

    def _timesteps(self, u: Tensor, phase: Tensor | None) -> Tensor:
        """u (B,) uniform in [0, 1) -> timesteps (B,), spread as the sample's phase (B,) asks, or as the settings."""
        places = shifted(u, self.config.timestep_shift)
        if phase is not None:
            for number, settings in enumerate(self.config.phases):
                low, high = settings.timesteps
                inside = low + (high - low) * shifted(u, settings.timestep_shift)
                places = torch.where(phase.to(u.device) == number, inside, places)
        return self.schedule.timesteps(places)

    def _denoise_loss(self, prediction: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """The mean square per element, each sample's times its weight. (B, C, h, w) twice, t (B,) -> scalar."""
        gamma = self.config.min_snr_gamma
        if gamma == 0:
            return F.mse_loss(prediction, target)
        weights = min_snr_weights(self.schedule.alpha_bar_at(t), gamma, self.prediction)
        return (weights.to(target) * (prediction - target).square().flatten(1).mean(1)).mean()

    def _gate_noise(self, rng: SampleRng, text: Tensor) -> GateNoise | None:
        config, blocks = self.unet.config, self.unet.num_blocks
        if not self.unet.training or config.gate_noise == 0:
            return None
        space = rng.normal("space_gate", (blocks, text.shape[1], config.num_space_experts))
        time = rng.normal("time_gate", (blocks, config.num_time_experts))
        return GateNoise(space.to(text.device), time.to(text.device))

    def _edge_loss(self, blocks: list[MixtureOutput], edges: Tensor | None, t: Tensor) -> Tensor:
        """sum over samples with t <= T_c of (focal, mean over pixels, mean over blocks), divided by the batch size.

        edge_block_weights multiply the blocks' terms inside their mean: 0 leaves a block out, others stay as they were.
        Dividing by the batch and not by the number of samples below T_c keeps it finite and independent of the split.
        """
        if self.unet.config.edge_tokens == "none":
            return torch.zeros((), device=t.device)
        target = edges.float().unsqueeze(1) / 255.0
        per_block = []
        for block in blocks:
            logits, at_block = block.edge_logits, target
            if self.config.edge_resolution == "map":
                at_block = F.adaptive_max_pool2d(target, (block.height, block.width))  # thin edges survive a maximum
            elif logits.shape != target.shape:
                logits = F.interpolate(logits.float(), target.shape[-2:], mode="bilinear", align_corners=False)
            loss = focal_loss(logits, at_block, self.config.focal_alpha, self.config.focal_gamma)
            per_block.append(loss.mean(dim=(1, 2, 3)))
        terms = torch.stack(per_block)  # (blocks, B)
        if self.config.edge_block_weights:
            terms = terms * terms.new_tensor(self.config.edge_block_weights).unsqueeze(1)
        per_sample = terms.mean(0)
        return (per_sample * (t <= self.config.edge_max_timestep)).sum() / len(t)

    def _balance_loss(self, output: UNetOutput) -> Tensor:
        """Switch's loss of the space gates and of the time gates, each the mean over blocks, where they are."""
        loss, config = output.prediction.new_zeros((), dtype=torch.float32), self.unet.config
        if self.config.balance != "switch" or self.config.balance_weight == 0:
            return loss
        if config.space_layer == "moe":
            loss = loss + torch.stack([block.space.balance_loss().mean() for block in output.blocks]).mean()
        if config.time_layer == "moe":
            loss = loss + self.unet.time_balance_loss(self.balance_timesteps)
        return loss

    @torch.no_grad()
    def _rebalance(self, blocks: list[MixtureOutput]) -> None:
        """Move every gate's bias by the loads of this step (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

        Space gates: the tokens of the whole batch, over all workers (whole numbers, so that their sum is exact); time
        gates: a fixed grid of timesteps. The biases are buffers: saved with the weights, equal on every worker.
        """
        config, rate = self.unet.config, self.config.balance_rate
        if config.space_layer == "moe":
            counts = torch.stack([block.space.counts() for block in blocks])
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(counts)
            for block, space in zip(self.unet.transformer_blocks(), counts, strict=True):
                block.space_moe.gate.rebalance(space, rate)
        if config.time_layer == "moe":
            times = self.unet.time_routes(self.balance_timesteps)
            for block, time in zip(self.unet.transformer_blocks(), times, strict=True):
                count = torch.bincount(time, minlength=config.num_time_experts).float()
                block.time_moe.gate.rebalance(count, rate)


def needed_fields(unet: UNetConfig) -> tuple[str | tuple[str, ...], ...]:
    """The fields of the records that DenoisingObjective reads; of a tuple any one."""
    edges = () if unet.edge_tokens == "none" else (EDGES,)
    return ((MOMENTS, PIXELS), TOKEN_IDS, *edges, *((SIZES,) if unet.size_px else ()))


def min_snr_weights(alpha_bar: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Weights (B,) of the square error of samples at alpha_bar (B,), Min-SNR-gamma (arXiv 2303.09556).

    On x_0 the weight is min(SNR, gamma), SNR = alpha_bar / (1 - alpha_bar). The square errors of eps and v are SNR and
    SNR + 1 times that of x_0, so theirs is divided by it, and others' by their own. At SNR = 0 (zero terminal SNR) the
    formula gives 0 and the timestep that sampling begins with would never be learned: it counts 1 there.
    """
    snr = alpha_bar / (1 - alpha_bar)
    weights = snr.clamp(max=gamma) / prediction.error_of_x0(snr)
    return torch.where(alpha_bar == 0, 1.0, weights)


@torch.no_grad()
def _expert_statistics(blocks: list[MixtureOutput]) -> dict[str, Tensor]:
    statistics = {}
    for kind in ("space", "time"):
        routings = [getattr(block, kind) for block in blocks if getattr(block, kind) is not None]
        if routings:
            statistics[f"gate_entropy/{kind}"] = torch.stack([routing.entropy().mean() for routing in routings]).mean()
    for index, block in enumerate(blocks):
        if block.space is not None:
            statistics[f"cover/block{index:02d}"] = block.space.cover.mean()
        for kind, routing in (("space", block.space), ("time", block.time)):
            if routing is None:
                continue
            for k, share in enumerate(routing.load()):
                statistics[f"{kind}_load/block{index:02d}_expert{k}"] = share
    return statistics
