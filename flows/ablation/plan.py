"""What an ablation is: a file of arms and seeds, and the workspace of each of its cases.

A case is one arm with one seed of training. It is a workspace like any other (flows/workspace/folder.py); all cases
share one DVC cache, so that data and encoders are made once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.arms import cases
from flows.arms.cases import Case
from flows.workspace import settings
from flows.workspace.folder import make_workspace, overlays_of
from raphael.base.config.preset import NO_PRESET
from raphael.base.config.systems import DEFAULT, find_system
from raphael.base.strict import later, load, read_yaml, to_dict

PLAN = Path(__file__).resolve().parents[1] / "plans" / "ablation.yaml"

BESIDE = ("timestep_loss",)  # measured beside what the system's own evaluation measures


@dataclass(frozen=True)
class Arm:
    about: str
    unet: tuple[str, ...]  # FIELD=VALUE of the network's settings, where the system has a unet
    params: tuple[str, ...]  # KEY=VALUE of params.yaml


@dataclass(frozen=True)
class AblationPlan:
    """flows/plans/ablation.yaml"""

    about: str
    preset: str  # none: of a system whose settings all stand in params.NAME.yaml
    seeds: tuple[int, ...]
    params: tuple[str, ...]
    arms: dict[str, Arm]
    system: str = later(DEFAULT)

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < max(2, len(self.seeds)):
            raise ValueError(f"seeds: got {list(self.seeds)}, expected two or more different ones: one has no spread")
        find_system(self.system, "system")
        if len(self.arms) < 2:
            raise ValueError(f"arms: got {', '.join(self.arms) or 'none'}, expected two or more")

    @property
    def sha256(self) -> str:
        return hashlib.sha256(repr(to_dict(self)).encode()).hexdigest()

    @property
    def baseline(self) -> str:
        """The arm that others are compared with."""
        return next(iter(self.arms))


def load_plan(file: Path = PLAN) -> AblationPlan:
    """Raises ConfigError, one line."""
    return load(AblationPlan, read_yaml(file), str(file))


def cases_of(plan: AblationPlan, home: Path) -> list[Case]:
    """Seed by seed, so that an ablation cut short has all arms for the seeds that it has."""
    return [Case(arm, seed, home / f"{arm}-{seed}") for seed in plan.seeds for arm in plan.arms]


def make_case(plan: AblationPlan, case: Case, common: dict[str, Any]) -> None:
    """Make or refresh a case's workspace. common: settings of all cases that the plan does not name."""
    arm = plan.arms[case.arm]
    changes = {**common, **settings.parse(list(plan.params)), "train.seed": case.seed, "model.preset": plan.preset}
    changes |= settings.parse(list(arm.params))
    changes["evaluate.metrics"] = list(dict.fromkeys([*BESIDE, *changes.get("evaluate.metrics", ())]))
    text = preset_text(plan, case.arm) if plan.preset != NO_PRESET else ""  # raises before anything is made
    if not text:
        changes |= network_changes(plan, case.arm)
    make_workspace(case.folder, overlays_of(plan.system), changes, cache=case.folder.parent / "cache")
    cases.put_preset(case.folder, plan.preset, text)


def network_changes(plan: AblationPlan, arm: str) -> dict[str, Any]:
    """The arm's changes of `unet` as settings of a system without presets. Raises ConfigError for unknown fields."""
    return cases.network_changes(plan.system, plan.arms[arm].unet, f"arms.{arm}.unet")


def preset_text(plan: AblationPlan, arm: str) -> str:
    """The plan's preset with the arm's changes of `unet`, as a file. Raises ConfigError where it would not load."""
    return cases.preset_text(plan.system, plan.preset, plan.arms[arm].unet, f"arms.{arm}.unet")
