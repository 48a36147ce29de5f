"""One checkout of this project, asked by lines for training steps and samplings: the side of benchmarks/seams.py.

Run in the checkout to be measured, which may be older than the house: its modules are imported from where they stood.
Reads "step" or "sample"; answers with one line of JSON, the seconds and what was computed.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

Work = Callable[[], tuple[float, float]]  # (seconds, a number of what was computed)
HOUSE = Path("raphael/base").is_dir()  # before it, modules lay flat
BATCH, TOKENS, STEPS, GUIDANCE = 16, 32, 15, 4.0
LOSS = {
    "latents": "mean", "caption_drop": 0.1, "edge_weight": 0.1, "edge_block_weights": (), "edge_max_timestep": 500,
    "focal_alpha": 0.5, "focal_gamma": 2.0, "edge_resolution": "map", "balance": "switch", "balance_weight": 0.001,
    "balance_rate": 0.001, "noise_offset": 0.0, "timestep_shift": 2.0, "min_snr_gamma": 0.0,
}  # fmt: skip


def of(here: str, before: str) -> Any:
    """What stands at module.name here, or stood there before."""
    module, name = (here if HOUSE else before).rsplit(".", 1)
    return getattr(import_module(module), name)


def settings() -> Any:
    """The loss's settings, the same on both sides."""
    if HOUSE:
        return of("raphael.objectives.denoising_settings.DenoisingSettings", "")(**LOSS)
    from dataclasses import replace

    whole = of("", "raphael.config.load_config")("params.yaml")
    return replace(whole.train, **LOSS)


def network(preset: Any) -> Any:
    """The same weights on both sides."""
    torch.manual_seed(0)
    unet = of("raphael.net.moe.unet.RaphaelUNet", "raphael.net.unet.UNet")(preset.unet)
    for parameter in unet.parameters():  # what begins at zero would hide half of the work from the comparison of bits
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return unet.to(memory_format=torch.channels_last)


def text_encoder(width: int) -> Callable[[torch.Tensor], Any]:
    """Token ids -> a condition: rows of a table."""
    condition = of("raphael.net.condition.Condition", "raphael.diffusion.denoiser.TextCondition")
    table = torch.randn(1000, width, generator=torch.Generator().manual_seed(1))
    return lambda ids: condition(table[ids], ids > 0)


def stepping(preset: Any) -> Work:
    """A training step."""
    unet, channels = network(preset), preset.unet.latent_channels
    objective_of = of(
        "raphael.objectives.denoising.DenoisingObjective", "raphael.objectives.denoising.DenoisingObjective"
    )
    scale = of("raphael.objectives.denoising.LatentScale", "raphael.objectives.denoising.LatentScale")(1.0)
    encode, empty = text_encoder(preset.unet.context_dim), torch.ones(TOKENS, dtype=torch.long)
    objective = objective_of(unet, encode, empty, preset.diffusion, settings(), scale)
    rng_of = of("raphael.base.randomness.SampleRng", "raphael.randomness.SampleRng")
    autocast = of("raphael.base.precision.autocast", "raphael.precision.autocast")
    drawn = np.random.default_rng(0)
    batch = {
        "moments": torch.from_numpy(drawn.standard_normal((BATCH, 2 * channels, 16, 16)).astype(np.float32)),
        "token_ids": torch.from_numpy(drawn.integers(1, 1000, (BATCH, TOKENS))),
        "edges": torch.from_numpy(drawn.integers(0, 256, (BATCH, 16, 16)).astype(np.uint8)),
    }
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    numbers = itertools.count()

    def step() -> tuple[float, float]:
        unet.train()
        rng = rng_of(0, next(numbers), range(BATCH))
        began_s = time.perf_counter()
        with autocast("auto", "cpu"):
            losses = objective(batch, rng)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began_s, losses["loss"].item()

    return step


def sampling(preset: Any) -> Work:
    """A batch of images' latents."""
    prediction, encode = preset.diffusion.prediction, text_encoder(preset.unet.context_dim)
    if HOUSE:
        prediction = of("raphael.diffusion.prediction.prediction_of", "")(preset.diffusion)
    schedule = of("raphael.diffusion.schedule.Schedule", "raphael.diffusion.schedule.Schedule")(preset.diffusion)

    def texts(prompts: list[str]) -> Any:
        return encode(torch.tensor([[1 + len(text)] * TOKENS for text in prompts]))

    parts_of = of("raphael.diffusion.sampling.Parts", "raphael.sampling.Parts")
    shape = (preset.unet.latent_channels, 16, 16)
    parts = parts_of(network(preset).eval(), schedule, prediction, texts, lambda x: x, shape)
    how = of("raphael.diffusion.sampling.Sampling", "raphael.sampling.Sampling")
    draw = of("raphael.diffusion.sampling.generate_latents", "raphael.sampling.draw_latents")

    def sample() -> tuple[float, float]:
        began_s = time.perf_counter()
        latents = draw(parts, ["a"] * BATCH, [(0, i) for i in range(BATCH)], how("dpmpp_2m", STEPS, GUIDANCE, "auto"))
        return time.perf_counter() - began_s, float(latents.double().abs().sum())

    return sample


def main() -> None:
    torch.set_num_threads(1)
    preset = of("raphael.base.config.preset.load_preset", "raphael.preset.load_preset")("tiny")
    calls = {"step": stepping(preset), "sample": sampling(preset)}
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, value = calls[line.strip()]()
        print(json.dumps({"seconds": seconds, "value": value}), flush=True)


if __name__ == "__main__":
    main()
