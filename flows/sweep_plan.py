"""What a sweep is: a file of settings to try, and its points: a checkpoint drawn with one setting and one seed each."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from flows import settings
from raphael.config import Config, GenerateConfig, load_config
from raphael.preset import Share
from raphael.stage import StageError, file_sha256, read_json
from raphael.strict import ConfigError, Range, load, read_yaml, to_dict

PLAN = Path(__file__).with_name("sweep.yaml")
MEASURED_WITH = ("sampler", "steps", "eta", "guidance_interval", "threshold", "threshold_percentile", "threshold_bound")


@dataclass(frozen=True)
class Plan:
    """flows/sweep.yaml"""

    about: str
    checkpoint: str
    prompts: str
    num_prompts: Annotated[int, Range(2)]
    seeds: tuple[int, ...]
    generate: tuple[str, ...]  # KEY=VALUE of params.yaml's generate
    guidance_scale: tuple[Annotated[float, Range(0)], ...]
    mask_threshold: tuple[Share, ...]  # alpha, changed while drawing
    workspaces: str  # a folder of workspaces with models trained for the figures of experts and T_c; "": none
    speed_steps: Annotated[int, Range(1)]
    keep_pictures: bool

    def __post_init__(self) -> None:
        for name in ("seeds", "guidance_scale", "mask_threshold"):
            values = getattr(self, name)
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
    """A checkpoint to draw with, and of its meta.json what is asked of it."""

    folder: Path
    sha256: str  # of everything that draws: network, autoencoder, text encoder
    unet: dict[str, Any]
    size_px: tuple[int, int]  # height, width of its pictures
    checkpoint: str = ""  # sha256 of the network alone: the name that images.json, reports and MLflow know it by

    @property
    def mask_threshold(self) -> float:
        return float(self.unet["mask_threshold"])

    @classmethod
    def read(cls, folder: Path) -> Model:
        """Raises StageError for a folder that is no pipeline."""
        from raphael.checkpoint import META, checkpoint_sha256

        if not folder.is_dir():
            raise StageError(
                f"{folder}: no such folder; expected a trained pipeline (run the stage train, or dvc pull)"
            )
        lines = [checkpoint := checkpoint_sha256(folder)]
        for part in ("autoencoder", "text_encoder"):
            files = sorted(path for path in (folder / part).rglob("*") if path.is_file())
            lines += [f"{path.relative_to(folder)} {file_sha256(path)}" for path in files]
        sha256 = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        from raphael.generate.pipeline import drawn_size

        meta = read_json(folder / META)
        return cls(folder, sha256, meta["unet"], drawn_size(meta["picture"]), checkpoint)


@dataclass(frozen=True)
class Point:
    model: Model
    generate: GenerateConfig  # guidance and seed among it
    mask_threshold: float

    @property
    def name(self) -> str:
        guidance, seed = self.generate.guidance_scale, self.generate.seed
        return f"{self.model.checkpoint[:6]}-guidance{guidance:g}-alpha{self.mask_threshold:g}-seed{seed}"

    def key(self, measured_by: str) -> str:
        """What the result depends on: weights, settings, seed, and prompts and measure (`measured_by`, their hash)."""
        setting = {
            name: getattr(self.generate, name) for name in (*MEASURED_WITH, "guidance_scale", "seed", "precision")
        }
        facts = [self.model.sha256, setting, self.mask_threshold, measured_by]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def load_plan(file: Path = PLAN) -> Plan:
    """Raises ConfigError, one line."""
    return load(Plan, read_yaml(file), str(file))


def config_of(plan: Plan, params: Path) -> Config:
    """params.yaml with the plan's settings of drawing. Raises ConfigError where they do not load."""
    import yaml

    config, changes = load_config(params), settings.parse(list(plan.generate))
    data = yaml.safe_load(settings.merged(params, changes))
    return replace(config, generate=load(GenerateConfig, data["generate"], "generate of the plan", "generate"))


def chosen_prompts(plan: Plan, file: Path) -> list[dict[str, Any]]:
    """num_prompts of them, evenly spread over the file. Raises StageError where there are fewer."""
    entries = read_json(file).get("prompts") or []
    if len(entries) < plan.num_prompts:
        raise StageError(f"{file}: got {len(entries)} prompts, expected at least {plan.num_prompts} (num_prompts)")
    return [entries[index * len(entries) // plan.num_prompts] for index in range(plan.num_prompts)]


def guidance_points(plan: Plan, model: Model, config: Config) -> dict[float, list[Point]]:
    """guidance weight -> a point a seed."""
    return {scale: points_at(plan, model, config, scale) for scale in plan.guidance_scale}


def alpha_points(plan: Plan, model: Model, config: Config) -> dict[float, list[Point]]:
    """alpha -> a point a seed, at the guidance of the settings."""
    scale = config.generate.guidance_scale
    return {alpha: points_at(plan, model, config, scale, alpha) for alpha in plan.mask_threshold}


def points_at(plan: Plan, model: Model, config: Config, scale: float, alpha: float | None = None) -> list[Point]:
    """alpha None: the model's own."""
    threshold = model.mask_threshold if alpha is None else alpha
    return [
        Point(model, replace(config.generate, guidance_scale=scale, seed=seed, images_per_prompt=1), threshold)
        for seed in plan.seeds
    ]


def workspaces_of(plan: Plan, root: Path) -> list[Path]:
    """Workspaces with a trained model. Raises ConfigError for a folder without any."""
    if not plan.workspaces:
        return []
    folder = root / plan.workspaces
    found = sorted(path.parents[2] for path in folder.glob("*/models/raphael/meta.json"))
    if not found:
        raise ConfigError(f"workspaces: got {plan.workspaces}, expected a folder of workspaces with models/raphael")
    return found
