"""What an ablation is: a file of arms and seeds, and the workspace of each of its cases.

A case is one arm with one seed of training. It is a workspace like any other (flows/workspace/folder.py); all cases
share one DVC cache, so that data and encoders are made once.
"""

from __future__ import annotations

import hashlib
import typing
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flows.workspace import settings
from flows.workspace.folder import make_workspace, overlays_of
from raphael.base.config.preset import NO_PRESET, load_preset
from raphael.base.config.systems import DEFAULT, find_system
from raphael.base.strict import ConfigError, later, load, read_yaml, to_dict
from raphael.evaluate.catalogue import nearest

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


@dataclass(frozen=True)
class Case:
    arm: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}"


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
    # DVC depends on the preset's file by its name, whose text is the arm's in the arm's own workspace
    file = case.folder / "raphael" / "presets" / f"{plan.preset}.yaml"
    if text and file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


def network_changes(plan: AblationPlan, arm: str) -> dict[str, Any]:
    """The arm's changes of `unet` as settings of a system without presets. Raises ConfigError for unknown fields."""
    if not (changes := settings.parse(list(plan.arms[arm].unet))):
        return {}
    kind = typing.get_type_hints(find_system(plan.system).settings).get("unet")
    if kind is None:
        raise ConfigError(f"arms.{arm}.unet: got {', '.join(changes)}, expected none: {plan.system} has no unet")
    _refuse_unknown(f"arms.{arm}.unet", changes, {field.name for field in fields(kind)})
    return {f"model.settings.unet.{name}": value for name, value in changes.items()}


def preset_text(plan: AblationPlan, arm: str) -> str:
    """The plan's preset with the arm's changes of `unet`, as a file. Raises ConfigError where it would not load."""
    import yaml

    system = find_system(plan.system)
    preset, changes = load_preset(plan.preset, system.settings), settings.parse(list(plan.arms[arm].unet))
    _refuse_unknown(f"arms.{arm}.unet", changes, {field.name for field in fields(preset.unet)})
    data = to_dict(preset)
    data["unet"] |= changes
    changed = replace(preset, unet=load(type(preset.unet), data["unet"], f"arms.{arm}", "unet"))
    return yaml.safe_dump(to_dict(changed), sort_keys=False)


def _refuse_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(f"{where}: unknown field {unknown[0]}, {nearest(unknown[0], known)}")
