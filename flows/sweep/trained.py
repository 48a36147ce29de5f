"""Models that were trained for a sweep, over the numbers that their system names, from the workspaces of an ablation.

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
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from flows.sweep.plan import Model
from raphael.base.config.studied import Studied
from raphael.base.config.systems import System
from raphael.base.stage import read_json, write_json
from raphael.base.strict import read_yaml

if TYPE_CHECKING:
    from raphael.generate.pipeline import RaphaelPipeline

SPEED_REPEATS = 5
NOT_THE_SUBJECT = {"sample_prompts", "num_sample_prompts", "num_workers", "use_gpu", "seed", "settings"}


@dataclass(frozen=True)
class Trained:
    """A workspace's model. numbers: of each figure; rest: everything else that could make a difference, as text."""

    model: Model
    seed: int
    numbers: dict[str, float]
    rest: str

    @classmethod
    def read(cls, workspace: Path, system: System) -> Trained | None:
        """None for a model of another system."""
        model = Model.read(workspace / "models" / "raphael")
        if model.system.name != system.name:
            return None
        train = read_yaml(workspace / "params.yaml")["train"]
        # a workspace from before train.settings has them beside the rest
        own = {item.name: train.pop(item.name) for item in fields(system.training) if item.name in train}
        numbers, rest = system.studied.read(model.unet, {**own, **train.get("settings", {})})
        rest |= {
            "diffusion": model.meta.get("diffusion"),
            "data": model.meta.get("records_sha256"),
            "images": model.meta["images_seen"],
            "train": {name: value for name, value in train.items() if name not in NOT_THE_SUBJECT},
        }
        return cls(model, int(train["seed"]), numbers, json.dumps(rest, sort_keys=True))


def series_over(trained: list[Trained], number: str, studied: Studied) -> dict[str, dict[float, list[Trained]]]:
    """{what is held fixed, in words: {number: the models of its seeds}}, only where there are two numbers or more."""
    groups: dict[tuple, dict[float, list[Trained]]] = {}
    for one in trained:
        fixed = tuple((name, value) for name, value in sorted(one.numbers.items()) if name != number)
        groups.setdefault((fixed, one.rest), {}).setdefault(one.numbers[number], []).append(one)
    found: dict[str, dict[float, list[Trained]]] = {}
    names: Counter[str] = Counter()
    for (fixed, _), series in groups.items():
        if len(series) > 1:
            name = ", ".join(f"{studied.numbers[key][1]} {value:g}" for key, value in fixed)
            names[name] += 1
            found[name if names[name] == 1 else f"{name} ({names[name]})"] = dict(sorted(series.items()))
    return found


def steps_per_s(
    model: Model, steps: int, home: Path, load: Callable[..., RaphaelPipeline], device: str = "cpu"
) -> float:
    """Steps of DDIM a second for one image, by the prompt that its system times models by. The median of SPEED_REPEATS;
    measured once a machine and kind of device."""
    import torch

    machine = f"{platform.machine()} {os.cpu_count()} {torch.get_num_threads()} {device != 'cpu'}"
    file = home / "speed" / f"{model.sha256[:24]}.json"
    if file.is_file() and (known := read_json(file))["machine"] == machine and known["steps"] == steps:
        return known["steps_per_s"]
    pipeline = load(model.folder, device=device)
    pipeline.sampler = "ddim"
    prompt, times = model.system.studied.prompt or model.system.asked, []
    for _ in range(SPEED_REPEATS + 1):  # the first one warms up
        started = time.perf_counter()
        pipeline(prompt, num_inference_steps=steps, guidance_scale=1.0, output_type="np")
        times.append(time.perf_counter() - started)
    rate = round(steps / statistics.median(times[1:]), 4)
    write_json(file, {"machine": machine, "steps": steps, "steps_per_s": rate})
    return rate
