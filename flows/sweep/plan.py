"""What a sweep is: a file of settings to try, and its points: a checkpoint with one setting and one seed each."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from flows.workspace import settings
from raphael.base.config.consent import trust_settings
from raphael.base.config.params import Config, GenerateConfig, load_config
from raphael.base.config.systems import System, find_system, system_of
from raphael.base.stage import StageError, file_sha256, read_json
from raphael.base.strict import ConfigError, Range, later, load, read_yaml, to_dict
from raphael.evaluate.catalogue import nearest
from raphael.pretrained.find import find_pipeline

PLAN = Path(__file__).resolve().parents[1] / "plans" / "sweep.yaml"
HOW_MANY = ("batch_size", "images_per_prompt")  # of `generate`: nothing of an image depends on them


@dataclass(frozen=True)
class SweepPlan:
    """flows/plans/sweep.yaml"""

    about: str
    checkpoint: str
    prompts: str
    num_prompts: Annotated[int, Range(2)]
    seeds: tuple[int, ...]
    generate: tuple[str, ...]  # KEY=VALUE of params.yaml's generate
    guidance_scale: tuple[Annotated[float, Range(0)], ...]
    knobs: dict[str, tuple[float, ...]]  # of the model's system (raphael/base/config/studied.py): name -> values
    workspaces: str  # a folder of workspaces with models trained for the figures of experts and T_c; "": none
    speed_steps: Annotated[int, Range(1)]
    keep_pictures: bool
    metrics: tuple[str, ...] = later(())  # beside those of the sweep protocol, by their names in the catalogue

    def __post_init__(self) -> None:
        lists = {"seeds": self.seeds, "guidance_scale": self.guidance_scale}
        for name, values in {**lists, **{f"knobs.{name}": values for name, values in self.knobs.items()}}.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: got {list(values)}, expected different ones: a repeated point adds nothing")
        if not self.seeds:
            raise ValueError("seeds: got none, expected one or more")
        if any(not line.startswith("generate.") or "images_per_prompt" in line for line in self.generate):
            raise ValueError("generate: expected KEY=VALUE of params.yaml's generate; num_prompts says how many")

    @property
    def sha256(self) -> str:
        return hashlib.sha256(repr(to_dict(self)).encode()).hexdigest()


@dataclass(frozen=True)
class Model:
    """A checkpoint to sample with, and of its meta.json what is asked of it."""

    folder: Path
    sha256: str  # of everything that generates: the network and what the model carries along
    meta: dict[str, Any]
    size_px: tuple[int, int]  # height, width of its images
    checkpoint: str = ""  # the model's own identity: the name that images.json, reports and MLflow know it by

    @property
    def system(self) -> System:
        return find_system(system_of(self.meta), f"{self.folder}: meta.json: system")

    @property
    def unet(self) -> dict[str, Any]:
        return self.meta.get("unet", {})

    @property
    def knobs(self) -> dict[str, float]:
        """What its network was trained with of the numbers that may be changed while sampling."""
        knobs = self.system.studied.knobs
        return {name: float(self.unet[name]) for name, knob in knobs.items() if not knob.absent(self.unet)}

    @classmethod
    def read(cls, folder: Path) -> Model:
        """Raises StageError for a folder that is no pipeline."""
        from raphael.base.checkpoint.folder import META
        from raphael.base.integrity.contents import model_sha256

        folder = find_pipeline(folder)
        meta, lines = read_json(folder / META), [checkpoint := model_sha256(folder)]
        for part in find_system(system_of(meta), f"{folder}: meta.json: system").carries:
            files = sorted(path for path in (folder / part).rglob("*") if path.is_file())
            lines += [f"{path.relative_to(folder)} {file_sha256(path)}" for path in files]
        sha256 = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        from raphael.generate.pipeline import default_size

        return cls(folder, sha256, meta, default_size(meta["picture"]), checkpoint)


@dataclass(frozen=True)
class SweepPoint:
    model: Model
    generate: GenerateConfig  # guidance and seed among it
    knobs: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        known, guidance = self.model.system.studied.knobs, self.generate.guidance_scale
        turned = "".join(f"{known[name].figure}{value:g}-" for name, value in self.knobs.items())
        return f"{self.model.checkpoint[:6]}-guidance{guidance:g}-{turned}seed{self.generate.seed}"

    def key(self, measured_by: str) -> str:
        """What the result depends on: weights, settings, seed, and prompts and measure (`measured_by`, their hash)."""
        setting = {name: value for name, value in to_dict(self.generate).items() if name not in HOW_MANY}
        facts = [self.model.sha256, setting, *self.knobs.values(), measured_by]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def load_plan(file: Path = PLAN) -> SweepPlan:
    """Raises ConfigError, one line."""
    return load(SweepPlan, read_yaml(file), str(file))


def config_of(plan: SweepPlan, params: Path) -> Config:
    """params.yaml with the plan's settings of sampling. Raises ConfigError where they do not load."""
    import yaml

    config, changes = load_config(params), settings.parse(list(plan.generate))
    trust_settings(config)
    data = yaml.safe_load(settings.merged(params, changes))
    return replace(config, generate=load(GenerateConfig, data["generate"], "generate of the plan", "generate"))


def check_knobs(plan: SweepPlan, model: Model) -> None:
    """Raises ConfigError for a number that the model's system has not, or that it cannot have."""
    known = model.system.studied.knobs
    for name, values in plan.knobs.items():
        if (knob := known.get(name)) is None:
            what = nearest(name, known) if known else "expected none: it has nothing that may be changed while sampling"
            raise ConfigError(f"knobs: got {name!r} for a model of the system {model.system.name}, {what}")
        for value in values:
            if not knob.low <= value <= knob.high:
                raise ConfigError(f"knobs.{name}: got {value:g}, expected {Range(knob.low, knob.high)}")


def chosen_prompts(plan: SweepPlan, model: Model, file: Path) -> list[dict[str, Any]]:
    """What a point's images are asked for: num_prompts of the file's, evenly spread over it; of a system with prompts
    of its own, such as classes, these in turn. Raises StageError where there are too few."""
    listed = read_json(file)
    entries = (asked := model.system.prompts(model.meta, listed)).get("prompts") or []
    if entries and asked is not listed:
        return [entries[index % len(entries)] for index in range(plan.num_prompts)]
    if len(entries) < plan.num_prompts:
        raise StageError(f"{file}: got {len(entries)} prompts, expected at least {plan.num_prompts} (num_prompts)")
    return [entries[index * len(entries) // plan.num_prompts] for index in range(plan.num_prompts)]


def guidance_points(plan: SweepPlan, model: Model, config: Config) -> dict[float, list[SweepPoint]]:
    """guidance weight -> a point a seed."""
    return {scale: points_at(plan, model, config, scale) for scale in plan.guidance_scale}


def knob_points(plan: SweepPlan, model: Model, config: Config, name: str) -> dict[float, list[SweepPoint]]:
    """value of the knob -> a point a seed, at the guidance of the settings."""
    scale = config.generate.guidance_scale
    return {value: points_at(plan, model, config, scale, {name: value}) for value in plan.knobs.get(name, ())}


def points_at(
    plan: SweepPlan, model: Model, config: Config, scale: float, turned: dict[str, float] | None = None
) -> list[SweepPoint]:
    """turned: knobs at other values than the model's own."""
    knobs = {**model.knobs, **(turned or {})}
    return [
        SweepPoint(model, replace(config.generate, guidance_scale=scale, seed=seed, images_per_prompt=1), knobs)
        for seed in plan.seeds
    ]


def workspaces_of(plan: SweepPlan, root: Path) -> list[Path]:
    """Workspaces with a trained model, of any system. Raises ConfigError for a folder without any."""
    if not plan.workspaces:
        return []
    folder = root / plan.workspaces
    found = sorted(path.parents[2] for path in folder.glob("*/models/raphael/meta.json"))
    if not found:
        raise ConfigError(f"workspaces: got {plan.workspaces}, expected a folder of workspaces with models/raphael")
    return found
