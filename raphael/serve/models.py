"""The models that a server opened when it started: nothing else is ever read from a disk on a request's word.

Those that were named stay in memory. Those that were found beside them (every pipeline folder under models/) share a
bound: one that has not been asked for the longest is let go, and read again when it is.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from raphael.base.checkpoint.folder import Stored
from raphael.base.config.sampling import LongPrompts
from raphael.base.config.systems import find_system, system_of
from raphael.base.stage import StageError
from raphael.base.tracking.registered import REGISTRY, registered_folder
from raphael.generate.pipeline import RaphaelPipeline, default_size
from raphael.pretrained.find import DEFAULT, MANIFEST, META, TRAINED, find_pipeline, names
from raphael.serve.door.problems import Problem
from raphael.serve.edits import edits_of
from raphael.serve.info import ModelInfo

if TYPE_CHECKING:
    from raphael.generate.pipeline import Pipeline

TIMES_TRAINED = 4  # of the largest side that a model was trained at: what may be asked for, at most
MAX_SIDE_PX = 1024
EXAMPLES = Path(__file__).with_name("examples.json")
MOST_EXAMPLES = 8
MOST_FOUND = 8  # folders that nobody named: each is read once before the server is ready
ROOM_BYTES = 2 << 30  # of their weights at one time


class Shelf:
    """Pipelines that may be let go: as many as `room` bytes of weights hold, and the one that is used in any case."""

    def __init__(self, room: int = ROOM_BYTES):
        self.room = room
        self.held: OrderedDict[str, Pipeline] = OrderedDict()  # by id, the one used last at the end

    def take(self, name: str, read: Callable[[], Pipeline]) -> Pipeline:
        pipeline = self.held.pop(name, None) or read()
        self.held[name] = pipeline
        while len(self.held) > 1 and sum(map(bytes_of, self.held.values())) > self.room:
            self.held.popitem(last=False)
            gc.collect()  # modules and hooks hold each other
        return pipeline


@dataclass
class Served:
    """A model: in memory, or, of a shelf, read when it is asked for. A pipeline is not safe for threads: one thread
    uses all of them, one after the other."""

    info: ModelInfo
    read: Callable[[], Pipeline]
    shelf: Shelf

    @property
    def pipeline(self) -> Pipeline:
        """Raises Problem where its folder no longer holds what it did when the server started."""
        return self.shelf.take(self.info.id, self._again)

    @property
    def here(self) -> bool:
        """Whether it is in memory."""
        return self.info.id in self.shelf.held

    def _again(self) -> Pipeline:
        try:
            pipeline = self.read()
        except (StageError, OSError) as error:
            raise Problem(503, f"model: {self.info.id} cannot be read any more: {error}", "model") from None
        if pipeline.identity != self.info.identity:
            raise Problem(503, f"model: {self.info.id} is another one by now; start the server anew", "model")
        return pipeline


def open_models(
    checkpoints: Sequence[str], device: Any, precision: str = "fp32", found: Sequence[Path] = ()
) -> dict[str, Served]:
    """Models by id: of a name that comes with the package its name, of a folder the folder's, of models:/NAME@ALIAS
    NAME@ALIAS. The first is the default.

    found: folders that nobody named, which share a bound in memory; one that is no model is left out with a word.
    Raises StageError for what was named and is none.
    """
    opened: dict[str, Served] = {}
    named, shelf = Shelf(sys.maxsize), Shelf()
    for checkpoint in checkpoints:
        folder = registered_folder(checkpoint) if checkpoint.startswith(REGISTRY) else find_pipeline(checkpoint)
        # not resolved: where DVC or a workspace links to a folder, its name is the link's
        name = checkpoint.removeprefix(REGISTRY) if checkpoint.startswith(REGISTRY) else name_of(folder)
        _open(opened, _free(name, opened), folder, named, device, precision)
    for folder in found:
        try:
            _open(opened, _free(name_of(folder), opened), folder, shelf, device, precision)
        except Exception as error:  # whatever lies there: nobody asked for it, and the others are to be served
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            print(f"raphael serve: {folder} is left out: {reason}", file=sys.stderr, flush=True)
    return opened


def _open(opened: dict[str, Served], name: str, folder: Path, shelf: Shelf, device: Any, precision: str) -> None:
    def read() -> Pipeline:
        pipeline = RaphaelPipeline.from_pretrained(folder, device=device)
        pipeline.precision = precision
        return pipeline

    pipeline = read()
    info = info_of(name, pipeline, folder)
    opened[name] = Served(info, read, shelf)
    shelf.take(name, lambda: pipeline)


def _free(name: str, taken: dict[str, Served]) -> str:
    free, number = name, 2
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free


def name_of(folder: Path) -> str:
    return Path(os.path.abspath(folder)).name


def bytes_of(pipeline: Pipeline) -> int:
    """Of its weights."""
    parameters = (parameter for module in pipeline.modules for parameter in module.parameters())
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


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
        "upsampler" in pipeline.components,
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


def found_folders(named: Sequence[str], root: Path = TRAINED.parent) -> list[Path]:
    """Pipeline folders in `root` beside those that were named, by name; MOST_FOUND of them, of more it is told."""
    known = {find_pipeline(name).resolve() for name in named}
    there = sorted(path.parent for path in root.glob(f"[!.]*/{META}") if (path.parent / MANIFEST).is_file())
    found = [folder for folder in there if folder.resolve() not in known]
    if left := found[MOST_FOUND:]:
        names = ", ".join(folder.name for folder in left)
        word = f"expected at most {MOST_FOUND} beside those that are named, left out: {names}; name them: --checkpoint"
        print(f"raphael serve: {root}: got {len(found)} models, {word}", file=sys.stderr, flush=True)
    return found[:MOST_FOUND]
