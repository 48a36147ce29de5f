"""Models that were trained for a sweep: over numbers of experts, T_c and alpha, from the workspaces of an ablation.

A figure takes workspaces that differ in its number and in the seed, and in nothing else of network, training and data.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.sweep_plan import Model
from raphael.stage import read_json, write_json
from raphael.strict import read_yaml

if TYPE_CHECKING:
    from raphael.generate.pipeline import RaphaelPipeline

SPEED_REPEATS = 5
NUMBERS = {  # of each figure over trained models: what the number is called
    "space_experts": "space experts",
    "time_experts": "time experts",
    "edge_max_timestep": "T_c",
    "mask_threshold": "alpha",
}
NOT_THE_SUBJECT = {"sample_prompts", "num_sample_prompts", "num_workers", "use_gpu", "seed", "edge_max_timestep"}


@dataclass(frozen=True)
class Trained:
    """A workspace's model. numbers: of each figure; rest: everything else that could make a difference, as text."""

    model: Model
    seed: int
    numbers: dict[str, float]
    rest: str

    @classmethod
    def read(cls, workspace: Path) -> Trained:
        model, meta = (
            Model.read(workspace / "models" / "raphael"),
            read_json(workspace / "models" / "raphael" / "meta.json"),
        )
        train = read_yaml(workspace / "params.yaml")["train"]
        unet = dict(model.unet)
        numbers = {"edge_max_timestep": float(train["edge_max_timestep"])}
        numbers["mask_threshold"] = float(unet.pop("mask_threshold"))
        for kind in ("space", "time"):
            layer, count = unet.pop(f"{kind}_layer"), unet.pop(f"num_{kind}_experts")
            numbers[f"{kind}_experts"] = 0.0 if layer == "none" else float(count)
            unet[f"{kind}_layer"] = "dense" if layer == "dense" else "moe or none"
        rest = {
            "unet": unet,
            "diffusion": meta["diffusion"],
            "data": meta.get("records_sha256"),
            "images": meta["images_seen"],
            "train": {name: value for name, value in train.items() if name not in NOT_THE_SUBJECT},
        }
        return cls(model, int(train["seed"]), numbers, json.dumps(rest, sort_keys=True))


def series_over(trained: list[Trained], number: str) -> dict[str, dict[float, list[Trained]]]:
    """{what is held fixed, in words: {number: the models of its seeds}}, only where there are two numbers or more."""
    groups: dict[tuple, dict[float, list[Trained]]] = {}
    for one in trained:
        fixed = tuple((name, value) for name, value in sorted(one.numbers.items()) if name != number)
        groups.setdefault((fixed, one.rest), {}).setdefault(one.numbers[number], []).append(one)
    found: dict[str, dict[float, list[Trained]]] = {}
    names: Counter[str] = Counter()
    for (fixed, _), series in groups.items():
        if len(series) > 1:
            name = ", ".join(f"{NUMBERS[key]} {value:g}" for key, value in fixed)
            names[name] += 1
            found[name if names[name] == 1 else f"{name} ({names[name]})"] = dict(sorted(series.items()))
    return found


def steps_per_s(
    model: Model, steps: int, home: Path, load: Callable[[Path], RaphaelPipeline], repeats: int = SPEED_REPEATS
) -> float:
    """Steps of DDIM a second for one picture whose prompt fills the context, so that every space expert can be needed
    (the paper's measure of cost). The median of `repeats`; measured once a machine.
    """
    import torch

    machine = f"{platform.machine()} {os.cpu_count()} {torch.get_num_threads()} {torch.cuda.is_available()}"
    file = home / "speed" / f"{model.sha256[:24]}.json"
    if file.is_file() and (known := read_json(file))["machine"] == machine and known["steps"] == steps:
        return known["steps_per_s"]
    pipeline = load(model.folder)
    pipeline.sampler = "ddim"
    prompt = " ".join(["a red circle left of a blue star and a green square on yellow"] * 8)
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        started = time.perf_counter()
        pipeline(prompt, num_inference_steps=steps, guidance_scale=1.0, output_type="np")
        times.append(time.perf_counter() - started)
    rate = round(steps / statistics.median(times[1:]), 4)
    write_json(file, {"machine": machine, "steps": steps, "steps_per_s": rate})
    return rate
