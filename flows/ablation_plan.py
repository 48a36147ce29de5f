"""What an ablation is: a file of arms and seeds, and the workspace of each of its cases.

A case is one arm with one seed of training. It is a workspace like any other (flows/workspace.py); all cases share one
DVC cache, so that data and encoders are made once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows import settings
from flows.workspace import make_workspace
from raphael.preset import load_preset
from raphael.strict import ConfigError, load, read_yaml, to_dict

PLAN = Path(__file__).with_name("ablation.yaml")


@dataclass(frozen=True)
class Arm:
    about: str
    unet: tuple[str, ...]  # FIELD=VALUE of the preset's unet
    params: tuple[str, ...]  # KEY=VALUE of params.yaml


@dataclass(frozen=True)
class Plan:
    """flows/ablation.yaml"""

    about: str
    preset: str
    seeds: tuple[int, ...]
    params: tuple[str, ...]
    arms: dict[str, Arm]

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < max(2, len(self.seeds)):
            raise ValueError(f"seeds: got {list(self.seeds)}, expected two or more different ones: one has no spread")
        if len(self.arms) < 2:
            raise ValueError(f"arms: got {', '.join(self.arms) or 'none'}, expected two or more")

    @property
    def sha256(self) -> str:
        return hashlib.sha256(repr(to_dict(self)).encode()).hexdigest()

    @property
    def baseline(self) -> str:
        """The arm that others are compared with."""
        return next(iter(self.arms))


@dataclass(frozen=True)
class Case:
    arm: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}"


def load_plan(file: Path = PLAN) -> Plan:
    """Raises ConfigError, one line."""
    return load(Plan, read_yaml(file), str(file))


def cases_of(plan: Plan, home: Path) -> list[Case]:
    """Seed by seed, so that an ablation cut short has all arms for the seeds that it has."""
    return [Case(arm, seed, home / f"{arm}-{seed}") for seed in plan.seeds for arm in plan.arms]


def make_case(plan: Plan, case: Case, common: dict[str, Any]) -> None:
    """Make or refresh a case's workspace. common: settings of all cases that the plan does not name."""
    arm = plan.arms[case.arm]
    changes = {**common, **settings.parse(list(plan.params)), "train.seed": case.seed, "model.preset": plan.preset}
    text = preset_text(plan, case.arm)  # raises before anything is made
    make_workspace(case.folder, [], {**changes, **settings.parse(list(arm.params))}, cache=case.folder.parent / "cache")
    # DVC depends on the preset's file by its name, whose text is the arm's in the arm's own workspace
    file = case.folder / "raphael" / "presets" / f"{plan.preset}.yaml"
    if file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


def preset_text(plan: Plan, arm: str) -> str:
    """The plan's preset with the arm's changes of `unet`, as a file. Raises ConfigError where it would not load."""
    import yaml

    preset, changes = load_preset(plan.preset), settings.parse(list(plan.arms[arm].unet))
    if unknown := set(changes) - set(to_dict(preset.unet)):
        raise ConfigError(f"arms.{arm}.unet: unknown field {', '.join(sorted(unknown))} (see raphael/preset.py)")
    data = to_dict(preset)
    data["unet"] |= changes
    changed = replace(preset, unet=load(type(preset.unet), data["unet"], f"arms.{arm}", "unet"))
    return yaml.safe_dump(to_dict(changed), sort_keys=False)
