"""The models that a server opened when it started: nothing else is ever read from a disk on a request's word."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from raphael.base.checkpoint.folder import Stored
from raphael.base.config.sampling import LongPrompts
from raphael.base.config.systems import find_system, system_of
from raphael.base.tracking.registered import REGISTRY, registered_folder
from raphael.generate.pipeline import RaphaelPipeline, default_size
from raphael.pretrained.find import DEFAULT, find_pipeline, names
from raphael.serve.edits import edits_of
from raphael.serve.info import ModelInfo

if TYPE_CHECKING:
    from raphael.generate.pipeline import Pipeline

TIMES_TRAINED = 4  # of the largest side that a model was trained at: what may be asked for, at most
MAX_SIDE_PX = 1024
EXAMPLES = Path(__file__).with_name("examples.json")
MOST_EXAMPLES = 8


@dataclass
class Served:
    """A model in memory. A pipeline is not safe for threads: one thread uses all of them, one after the other."""

    info: ModelInfo
    pipeline: Pipeline


def open_models(checkpoints: Sequence[str], device: Any, precision: str = "fp32") -> dict[str, Served]:
    """Models by id: of a name that comes with the package its name, of a folder the folder's, of models:/NAME@ALIAS
    NAME@ALIAS. The first is the default. Raises StageError for what is none."""
    opened: dict[str, Served] = {}
    for checkpoint in checkpoints:
        folder = registered_folder(checkpoint) if checkpoint.startswith(REGISTRY) else find_pipeline(checkpoint)
        name = free = checkpoint.removeprefix(REGISTRY) if checkpoint.startswith(REGISTRY) else folder.resolve().name
        number = 2
        while free in opened:
            free, number = f"{name}-{number}", number + 1
        pipeline = RaphaelPipeline.from_pretrained(folder, device=device)
        pipeline.precision = precision
        opened[free] = Served(info_of(free, pipeline, folder), pipeline)
    return opened


def info_of(name: str, pipeline: Pipeline, folder: Path) -> ModelInfo:
    height, width = default_size(pipeline.meta["picture"])
    sides = [side for size in pipeline.meta["picture"].get("sizes_px", [(height, width)]) for side in size]
    most = max(max(sides), min(MAX_SIDE_PX, TIMES_TRAINED * max(sides)))
    return ModelInfo(
        name,
        pipeline.system,
        pipeline.identity,
        (height, width),
        pipeline.multiple_px,
        most - most % pipeline.multiple_px,
        pipeline.defaults,
        edits_of(pipeline),
        pipeline.can_look_inside,
        getattr(pipeline, "classes", None),
        getattr(pipeline.unet.config, "context_length", 0) or None,
        examples_of(pipeline, folder),
        sum(parameter.numel() for module in pipeline.modules for parameter in module.parameters()),
        long_prompts_of(pipeline),
    )


def long_prompts_of(pipeline: Pipeline) -> tuple[str, ...]:
    """The ways in which it reads a prompt that is longer than its context."""

    def reads(way: str) -> bool:
        try:
            pipeline.reader(replace(pipeline.defaults, long_prompts=way))
        except ValueError:
            return False
        return True

    return tuple(way for way in get_args(LongPrompts) if reads(way))


def examples_of(pipeline: Pipeline, folder: Path) -> tuple[dict[str, Any], ...]:
    """Prompts and seeds to begin with: chosen ones (examples.json, by the model's identity), classes, or what the
    system names."""
    chosen = json.loads(EXAMPLES.read_text(encoding="utf-8")) if EXAMPLES.is_file() else {}
    if found := chosen.get(pipeline.identity):
        return tuple(found)
    if classes := getattr(pipeline, "classes", ()):
        return tuple({"prompt": name, "seed": 0} for name in classes[:MOST_EXAMPLES])
    return ({"prompt": find_system(system_of(Stored(folder).meta)).asked, "seed": 0},)


def default_checkpoints(first: Path) -> list[str]:
    """The default model's folder, and the one that comes with the package beside it, to compare with."""
    ours = [DEFAULT] if DEFAULT in names() and first.resolve() != find_pipeline(DEFAULT).resolve() else []
    return [str(first), *ours]
