"""What the comparison of the systems is: a file of arms, one number of floating-point operations for all of them, and
the workspace of each case.

An arm is a system with the settings of params.NAME.yaml and what it changes of them. How many images it sees follows
from its own counted cost (`step_flops` of raphael/systems/NAME/training.py), part by part by the parts' shares.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from flows.arms.cases import Case, network_changes, preset_text, put_preset
from flows.workspace import settings
from flows.workspace.folder import PROJECT, make_workspace, overlays_of
from raphael.base.config.params import Config, load_config
from raphael.base.config.preset import NO_PRESET, Share
from raphael.base.config.systems import find_system
from raphael.base.strict import ConfigError, Range, flatten, later, load, read_yaml, to_dict
from raphael.evaluate.protocols.protocol import load_protocol
from raphael.systems import module_of
from raphael.systems.job import loop_of

PLAN = Path(__file__).resolve().parents[1] / "plans" / "systems.yaml"
LAYOUT = r"\b(left of|right of|above|(?<!written )below|under)\b"  # captions that say who is where (params.scenes.yaml)
RECIPE = {  # what docs/learning.md found; each arm says in words which of it it gets
    "text_layers": "layers that refine the text",
    "places": "learned places",
    "terminal_snr": "zero terminal SNR",
    "noisiest_first": "the noisiest steps on relations first",
}
ALIKE = ("seed", "source", "select", "download", "score", "filter", "captions", "picture", "evaluate")  # of all arms


@dataclass(frozen=True)
class Recipe:
    """In words, for the page: what the arm gets of RECIPE, or why not."""

    text_layers: str
    places: str
    terminal_snr: str
    noisiest_first: str


@dataclass(frozen=True)
class Arm:
    """preset: of model.preset, where the system has presets. unet: FIELD=VALUE of the network. params: KEY=VALUE.

    seeds: instead of the plan's, of what is claimed different. first: share of its images that come first in the
    order of learning; the settings' phase is that long. found: in words, what it is good and bad at, after the fact.
    """

    system: str
    about: str
    recipe: Recipe
    preset: str = later("")
    unet: tuple[str, ...] = later(())
    params: tuple[str, ...] = later(())
    seeds: tuple[int, ...] = later(())
    first: Share = later(0.0)
    found: str = later("")


@dataclass(frozen=True)
class SystemsPlan:
    """flows/plans/systems.yaml. flop: of the training of each case's networks, all parts together. shared: settings of
    all arms, over their overlays."""

    about: str
    flop: Annotated[float, Range(1)]
    seeds: tuple[int, ...]
    protocol: str
    shared: dict[str, Any]
    arms: dict[str, Arm]
    num_shown: int = later(24)  # prompts whose images stand side by side

    def __post_init__(self) -> None:
        if len(self.arms) < 2:
            raise ValueError(f"arms: got {', '.join(self.arms) or 'none'}, expected two or more")
        if not self.seeds:
            raise ValueError("seeds: got none, expected one or more")
        load_protocol(self.protocol, where="protocol")
        for name, arm in self.arms.items():
            find_system(arm.system, f"arms.{name}.system")
            overlays_of(arm.system)

    @property
    def sha256(self) -> str:
        """Of what is run: what was found, in words, is no part of it."""
        told = replace(self, arms={name: replace(arm, found="") for name, arm in self.arms.items()})
        return hashlib.sha256(repr(to_dict(told)).encode()).hexdigest()

    @property
    def baseline(self) -> str:
        """The arm that others are compared with."""
        return next(iter(self.arms))


@dataclass(frozen=True)
class Budget:
    """Of one case. flop: really spent, by whole batches. parts: images of each."""

    num_images: int
    batch_size: int
    flop_per_image: float
    parts: dict[str, int]

    @property
    def flop(self) -> float:
        return self.num_images * self.flop_per_image


def load_plan(file: Path = PLAN) -> SystemsPlan:
    """Raises ConfigError, one line."""
    return load(SystemsPlan, read_yaml(file), str(file))


def cases_of(plan: SystemsPlan, home: Path) -> list[Case]:
    """Seed by seed, so that a comparison cut short has all arms for the seeds that it has."""
    seeds = list(dict.fromkeys([*plan.seeds, *(seed for arm in plan.arms.values() for seed in arm.seeds)]))
    pairs = [(name, seed) for seed in seeds for name, arm in plan.arms.items() if seed in (arm.seeds or plan.seeds)]
    return [Case(arm, seed, home / f"{arm}-{seed}") for arm, seed in pairs]


def budget_of(flop: float, config: Config) -> Budget:
    """The images whose training costs `flop` most nearly, in whole batches. Raises ConfigError for too few.

    step_flops is the mean over the parts by their shares, and the loop gives each part that share of the images.
    """
    system, loop = find_system(config.model.system), config.train.loop
    count = getattr(module_of(system.name, "training"), "step_flops", None)
    if count is None:
        raise ConfigError(f"arms: system {system.name}: its training.py has no step_flops(config), which counts a step")
    each = float(count(config))
    images = round(flop / each / loop.batch_size) * loop.batch_size
    if images < loop.batch_size * len(system.parts):
        raise ConfigError(
            f"flop: got {flop:.3g}, {flop / each:.1f} images of {system.name} at {each:.3g} each; expected at least "
            f"{each * loop.batch_size * len(system.parts):.3g}, a batch for each of its parts"
        )
    whole = replace(loop, num_images=images, warmup_images=0, ema_start_images=0, decay_images=0, schedule="constant")
    return Budget(
        images, loop.batch_size, each, {part.name: loop_of(whole, part.share).num_images for part in system.parts}
    )


def changes_of(plan: SystemsPlan, name: str) -> dict[str, Any]:
    """Of an arm over its overlay: the shared settings, then its own. Raises ConfigError for what does not parse."""
    arm = plan.arms[name]
    changes = {**flatten(plan.shared), "evaluate.protocol": plan.protocol}
    changes |= {"model.preset": arm.preset} if arm.preset else {}
    changes |= settings.parse(list(arm.params))
    if arm.preset in ("", NO_PRESET):
        changes |= network_changes(arm.system, arm.unet, f"arms.{name}.unet")
    return changes


def text_of(plan: SystemsPlan, name: str) -> str:
    """The arm's own preset as a file, "" where it is as it ships."""
    arm = plan.arms[name]
    if arm.preset in ("", NO_PRESET) or not arm.unet:
        return ""
    return preset_text(arm.system, arm.preset, arm.unet, f"arms.{name}.unet")


def budgets(plan: SystemsPlan) -> dict[str, Budget]:
    """Of every arm. Raises ConfigError for an arm that does not load, and where arms would not have the same data."""
    found, alike = {}, {}
    for name in plan.arms:
        with tempfile.TemporaryDirectory() as folder:
            config = _held(plan, name, Path(folder))
            found[name] = budget_of(plan.flop, config)
        for section in ALIKE:
            value = getattr(config, section)
            said = flatten(to_dict(value), section) if hasattr(value, "__dataclass_fields__") else {section: value}
            for key, got in said.items():
                first, before = alike.setdefault(key, (name, got))
                if before != got:
                    raise ConfigError(
                        f"arms.{name}: {key}: got {got!r}, and {before!r} of {first}, expected the same of all arms: "
                        "they are compared on the same data by the same measure; set it in `shared`"
                    )
    return found


def _held(plan: SystemsPlan, name: str, folder: Path) -> Config:
    """The arm's settings, its preset's text in `folder`."""
    overlays = [settings.flat(file) for file in overlays_of(plan.arms[name].system)]
    file = folder / "params.yaml"
    try:
        file.write_text(settings.merged(PROJECT / "params.yaml", *overlays, changes_of(plan, name)), encoding="utf-8")
        config = load_config(file)
    except ConfigError as error:
        raise ConfigError(f"arms.{name}: {str(error).replace(str(file), 'params.yaml')}") from None
    if not (text := text_of(plan, name)):
        return config
    preset = folder / f"{plan.arms[name].preset}.yaml"
    preset.write_text(text, encoding="utf-8")
    return replace(config, model=replace(config.model, preset=str(preset)))


def make_case(plan: SystemsPlan, case: Case, budget: Budget, common: dict[str, Any]) -> None:
    """Make or refresh a case's workspace. common: settings of all cases that the plan does not name."""
    arm = plan.arms[case.arm]
    changes = {**common, **changes_of(plan, case.arm), "train.seed": case.seed}
    changes["train.loop.num_images"] = budget.num_images
    if arm.first:
        changes["train.settings.phases"] = phases(plan, case.arm, budget)
    make_workspace(case.folder, overlays_of(arm.system), changes, cache=case.folder.parent / "cache")
    put_preset(case.folder, arm.preset, text_of(plan, case.arm))


def phases(plan: SystemsPlan, name: str, budget: Budget) -> list[dict[str, Any]]:
    """The order of learning of docs/learning.md, as long as the arm's share of its images. Raises ConfigError for a
    system whose training has none."""
    arm = plan.arms[name]
    if "phases" not in find_system(arm.system).training.__dataclass_fields__:
        raise ConfigError(f"arms.{name}.first: got {arm.first:g}, expected 0: {arm.system} has no order of learning")
    until = max(1, round(arm.first * budget.num_images / budget.batch_size)) * budget.batch_size
    return [{"until_images": until, "timesteps": [0.9, 1.0], "timestep_shift": 1.0, "captions": LAYOUT}]
