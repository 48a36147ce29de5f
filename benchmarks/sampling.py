"""Seconds to draw one image's latents beside diffusers: DDIM in 50 steps, DPM-Solver++(2M) in 20, guidance 7.5.

Both branches of guidance in one batch. Theirs: the loop of a diffusers pipeline over its UNet2DConditionModel and its
DDIMScheduler or DPMSolverMultistepScheduler. Ours: generate_latents (raphael/diffusion/sampling.py), which the stage
generate calls. The network is the `sd` preset's with half the widths (160-320-640-640, context 77 x 1024), so that a
CPU is done in minutes; latent 32 x 32 (images of 256 px); plain GEGLU feed-forwards on both sides. All steps are
measured.

like for like   both float32, contiguous, eager; both bf16 (autocast over float32 weights), channels_last, eager
as shipped      ours at precision "auto", channels_last; theirs float32, contiguous, eager, as diffusers loads it.
                "auto" is params.yaml's generate.precision. from_pretrained leaves the U-Net contiguous: its own row.

All take turns in one process, best of the turns. The text encoder and the decoder are not measured. Weights are random:
what is drawn means nothing. Writes results/sampling-<device>-<yyyymm>.json, unless --quick.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from _machine import judged, keep
from _peers import Ours, Theirs, config_of, dense, fill, make_inputs
from torch import Tensor

from raphael.base.config.preset import RaphaelUNetConfig, load_preset
from raphael.base.precision import autocast, native_bf16
from raphael.diffusion.prediction import prediction_of
from raphael.diffusion.sampling import Parts, Sampling, generate_latents
from raphael.diffusion.schedule import Schedule
from raphael.net.condition import Condition

HALF = (160, 320, 640, 640)
GUIDANCE = 7.5
SOLVERS = {"ddim": 50, "dpmpp_2m": 20}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def our_drawing(net: Ours, context: Tensor, latent: int) -> Callable[[str, int, str], Tensor]:
    """(solver, steps, precision) -> latents (1, C, h, w). context (2, N, D): a prompt's, and the empty one's."""
    preset = load_preset("sd")
    mask = torch.ones(1, context.shape[1], dtype=torch.bool)
    texts = {"a prompt": context[:1], "": context[1:]}

    def encode(prompts: list[str]) -> Condition:
        return Condition(torch.cat([texts[text] for text in prompts]), mask.expand(len(prompts), -1))

    shape = (net.net.config.latent_channels, latent, latent)
    parts = Parts(net.net, Schedule(preset.diffusion), prediction_of(preset.diffusion), encode, lambda x: x, shape)

    def draw(solver: str, steps: int, precision: str) -> Tensor:
        settings = Sampling(solver, steps, GUIDANCE, precision)
        return generate_latents(parts, ["a prompt"], [(0, 0)], settings)

    return draw


def their_drawing(net: Theirs, context: Tensor, latent: int) -> Callable[[str, int, str], Tensor]:
    """The same with diffusers' parts."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    diffusion = load_preset("sd").diffusion
    schedule = {
        "num_train_timesteps": diffusion.num_steps,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "beta_schedule": diffusion.schedule,
        "timestep_spacing": "trailing",  # ours
    }
    channels = net.net.config.in_channels

    @torch.inference_mode()
    def draw(solver: str, steps: int, precision: str) -> Tensor:
        if solver == "ddim":
            scheduler = DDIMScheduler(**schedule, clip_sample=False)
        else:
            scheduler = DPMSolverMultistepScheduler(**schedule, algorithm_type="dpmsolver++", solver_order=2)
        scheduler.set_timesteps(steps)
        latents = torch.randn(1, channels, latent, latent, generator=torch.Generator().manual_seed(0))
        latents = latents * scheduler.init_noise_sigma
        with autocast(precision, "cpu"):
            for t in scheduler.timesteps:
                both = scheduler.scale_model_input(torch.cat([latents, latents]), t)
                conditional, unconditional = net(both, t, context).float().chunk(2)
                guided = unconditional + GUIDANCE * (conditional - unconditional)
                latents = scheduler.step(guided, t, latents).prev_sample
        return latents

    return draw


def ways(config: RaphaelUNetConfig, latent: int) -> dict[tuple[str, str, str], Callable[[str, int], Tensor]]:
    """(who, precision, layout) -> (solver, steps) -> latents. Each network exists once and changes its layout."""
    nets = {"ours": fill(Ours(config)).eval(), "theirs": fill(Theirs(config)).eval()}
    _, _, context = make_inputs(config, 2, latent)
    drawings = {"ours": our_drawing(nets["ours"], context, latent)}
    drawings["theirs"] = their_drawing(nets["theirs"], context, latent)
    fast = "bf16" if native_bf16("cpu") else "fp32"  # what "auto" is here
    wanted = [
        ("ours", "fp32", "contiguous"),
        ("theirs", "fp32", "contiguous"),
        ("ours", "bf16", "channels_last"),
        ("theirs", "bf16", "channels_last"),
        ("ours", fast, "channels_last"),
        ("ours", fast, "contiguous"),
    ]

    def way(who: str, precision: str, layout: str) -> Callable[[str, int], Tensor]:
        def draw(solver: str, steps: int) -> Tensor:
            nets[who].to(memory_format=LAYOUTS[layout])
            return drawings[who](solver, steps, precision)

        return draw

    return {key: way(*key) for key in dict.fromkeys(wanted)}


def measure(config: RaphaelUNetConfig, latent: int, solvers: dict[str, int], turns: int) -> list[dict[str, Any]]:
    best: dict[tuple[str, ...], float] = {}
    drawing = ways(config, latent)
    for draw in drawing.values():
        draw("ddim", 1)  # to warm up
    for turn in range(turns):
        for solver, steps in solvers.items():
            for key, draw in drawing.items():
                started = time.perf_counter()
                drawn = draw(solver, steps)
                taken = time.perf_counter() - started
                assert torch.isfinite(drawn).all(), f"{key}: latents that are not finite, {solver}"
                best[solver, *key] = min(taken, best.get((solver, *key), taken))
        print(f"turn {turn + 1} of {turns}", flush=True)
    return [
        {
            "solver": solver,
            "steps": solvers[solver],
            "who": who,
            "precision": precision,
            "layout": layout,
            "mode": "eager",
            "seconds": round(value, 4),
        }
        for (solver, who, precision, layout), value in best.items()
    ]


def summary_of(rows: list[dict[str, Any]], solvers: dict[str, int], shape: str) -> list[dict[str, Any]]:
    found = {(row["solver"], row["who"], row["precision"], row["layout"]): row["seconds"] for row in rows}
    fast = "bf16" if native_bf16("cpu") else "fp32"
    summary = []
    for solver, steps in solvers.items():
        start = f"{solver} {steps} steps, {shape}"

        def add(case: str, ours: tuple[str, str], theirs: tuple[str, str], target: str, solver=solver, start=start):
            values = found[solver, "ours", *ours], found[solver, "theirs", *theirs]
            summary.append(judged(f"{start}, {case}", *values, "s", target))

        plain, quick = ("fp32", "contiguous"), ("bf16", "channels_last")
        add("like for like, fp32 contiguous eager", plain, plain, "<= 1.0")
        add("like for like, bf16 channels_last eager", quick, quick, "<= 1.0")
        against = "peer fp32 contiguous eager"
        add(f"ours {fast} (auto) channels_last eager, {against}", (fast, "channels_last"), plain, "<= 0.5")
        if fast != "fp32":
            add(f"ours {fast} (auto) contiguous eager, {against}", (fast, "contiguous"), plain, "<= 0.5")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the preset sd-debug, three steps: does it run at all")
    parser.add_argument("--turns", type=int, default=2)
    arguments = parser.parse_args()
    quick = arguments.quick
    config = dense(config_of("sd-debug") if quick else config_of("sd", channels=HALF))
    latent, solvers = (8, dict.fromkeys(SOLVERS, 3)) if quick else (32, SOLVERS)
    shape = f"{'-'.join(map(str, config.channels))} latent {latent}"
    rows = measure(config, latent, solvers, 1 if quick else arguments.turns)
    summary = summary_of(rows, solvers, shape)
    for row in summary:
        print(f"{row['case']:<110} {row['ours']:>8} {row['peer']:>8} s  {row['ratio']:.3f} {row['target']}")
    if not quick:
        keep("sampling", rows, summary, shape=shape, guidance_scale=GUIDANCE)


if __name__ == "__main__":
    main()
