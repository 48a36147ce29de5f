"""What is measured: images, what they were asked to show, and what stands beside them, made when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from raphael.base.strict import Range
from raphael.evaluate.metrics.frechet import Features

if TYPE_CHECKING:
    from raphael.base.probe_set import ProbeSet
    from raphael.evaluate.features.cache import CachedFeatures
    from raphael.evaluate.features.spaces import Network
    from raphael.evaluate.scenes.reader import SceneReading

PROMPTS, TRUTH, LABELS = "prompts", "truth", "labels"  # of every image, in images.json
FEATURES, REFERENCE, CLIP = "features", "reference", "clip"  # a feature network; the other side; one that reads texts
HEAD = "aesthetic_head"  # of LAION, on the CLIP's embeddings
SCENES, MODEL = "probe_scenes", "model"  # drawn scenes with their truth; the pipeline that generated
TEXT_MODEL = "text_model"  # a MODEL of latents by texts: it has its autoencoder and its text encoder with it
CAPTION_MODEL = "caption_model"  # a MODEL that is told captions, of whatever it diffuses
NEEDS = (PROMPTS, TRUTH, LABELS, FEATURES, REFERENCE, CLIP, HEAD, SCENES, MODEL, TEXT_MODEL, CAPTION_MODEL)
Entry = dict[str, Any]  # of images.json: prompt, suite; truth, label and seed where they are known


@dataclass(frozen=True)
class Kid:
    subsets: Annotated[int, Range(1)] = 100
    subset_size: Annotated[int, Range(2)] = 1000  # or the smaller set, where that is less
    seed: int = 2020


@dataclass(frozen=True)
class Rules:
    """What a protocol fixes about its metrics. clip_norm: embeddings are of unit norm to float32's digits, or are
    normalised once more in float64."""

    clip_prefix: str = ""
    clip_norm: Literal["float32", "float64"] = "float64"
    kid: Kid = field(default_factory=Kid)


@dataclass(frozen=True)
class Pieces:
    """Long work, cut into what one process computes at a time, so that whoever measures may deal it out.

    count(subject): how many. compute(subject, i): the i-th, of values that JSON keeps (a float with every bit); it is
    the same whatever was computed before it, here or in another process.
    """

    count: Callable[[Subject], int]
    compute: Callable[[Subject, int], Any]


@dataclass(frozen=True)
class Rows:
    """Features of one set by one network in memory, float32 (count, D); CachedFeatures are the same on disk."""

    rows: np.ndarray

    @property
    def count(self) -> int:
        return len(self.rows)

    def array(self) -> np.ndarray:
        return self.rows

    def statistics(self) -> Features:
        """Raises ValueError for NaN or infinity."""
        return Features(self.rows.shape[1]).update(self.rows)


@dataclass(frozen=True)
class Pair:
    """The features of the images by one network, and of what they are compared with. reference: that in words.

    theirs_statistics: of a reference that many are compared with, taken once.
    """

    network: Network
    ours: Rows | CachedFeatures
    theirs: Rows | CachedFeatures | None = None
    reference: str = ""
    theirs_statistics: Features | None = None


class Subject:
    """entries: of images.json, one an image; [] where nothing tells what was asked for. prompts: one an image, or
    None. tick: called with the number of images read."""

    def __init__(
        self,
        rules: Rules,
        entries: Sequence[Entry],
        prompts: list[str] | None,
        tick: Callable[[int], None] = lambda n: None,
    ):
        self.rules, self.entries, self.prompts, self.tick = rules, list(entries), prompts, tick
        self._texts: dict[str, np.ndarray] = {}
        self._kept: dict[str, Any] = {}

    def missing(self, need: str) -> str:
        """Why a need of NEEDS is not there and what makes it, "" where it is there."""
        return self.why_absent(need) if not self.has(need) else ""

    def has(self, need: str) -> bool:
        if need == PROMPTS:
            return self.prompts is not None
        if need in (TRUTH, LABELS):
            return any(entry.get(FIELD[need]) for entry in self.entries)
        if need == FEATURES:
            return bool(self.pairs)
        if need == REFERENCE:
            return any(pair.theirs is not None for pair in self.pairs)
        if need == CLIP:
            return bool(self.clips)
        return False

    def why_absent(self, need: str) -> str:
        return ABSENT[need]

    @property
    def pairs(self) -> list[Pair]:
        """The images' features by every network that is there."""
        return []

    @property
    def clips(self) -> list[Pair]:
        return [pair for pair in self.pairs if pair.network.embed_texts is not None]

    def texts(self, network: Network) -> np.ndarray:
        """The prompts' embeddings by a CLIP, (n, D); made once."""
        if network.name not in self._texts:
            assert network.embed_texts is not None and self.prompts is not None
            prompts = [self.rules.clip_prefix + prompt for prompt in self.prompts]
            self._texts[network.name] = network.embed_texts(prompts)
        return self._texts[network.name]

    def images(self) -> Iterator[np.ndarray]:
        """uint8 (H, W, 3) each, in order; as often as asked."""
        raise NotImplementedError

    def images_at(self, rows: slice) -> list[np.ndarray]:
        return list(islice(self.images(), rows.start, rows.stop))

    @cached_property
    def readings(self) -> list[SceneReading]:
        """What the scene reader sees in each image."""
        return self.read_scenes(self.tick)

    def read_scenes(self, tick: Callable[[int], None]) -> list[SceneReading]:
        from raphael.evaluate.scenes.reader import read_scene

        found = []
        for image in self.images():
            found.append(read_scene(image))
            tick(1)
        return found

    @cached_property
    def scenes(self) -> ProbeSet:
        """Drawn held-out scenes with their truth (SCENES)."""
        raise NotImplementedError

    @cached_property
    def pipeline(self) -> Any:
        """The model that generated the images (MODEL, TEXT_MODEL)."""
        raise NotImplementedError

    def head(self) -> Any:
        """LAION's aesthetic head (HEAD)."""
        raise NotImplementedError

    def counts(self) -> dict[str, int]:
        """How many the instruments take, by the names of the settings: num_probe, num_knockout_images, num_swaps."""
        return {}

    def computed(self, name: str, pieces: Pieces) -> list[Any]:
        """All of them, in order. name: what the bar calls them."""
        count, found = pieces.count(self), []
        with self.progress(count, name) as bar:
            for number in range(count):
                found.append(pieces.compute(self, number))
                bar.update(1)
        return found

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What pieces have in common: made once in each process."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def progress(self, total: int, unit: str) -> Any:
        """A context manager whose value has `update(n)`: the bar of a metric that computes for long."""
        return _Silent()

    @property
    def device(self) -> Any:
        return "cpu"


FIELD = {TRUTH: "truth", LABELS: "label"}
ABSENT = {
    PROMPTS: "no prompts: neither images.json nor --prompts",
    TRUTH: "images.json has no truth per image: the stage source writes it of drawn scenes alone",
    LABELS: "images.json has no label per image: prompts of a class-conditional model have one",
    FEATURES: "no feature network: give --features, or evaluate.scoring_clip in params.yaml",
    REFERENCE: "no reference images: the stage captions lists those of a workspace; give --reference beside --images",
    CLIP: "no CLIP among the networks: give --features, or evaluate.scoring_clip in params.yaml",
    HEAD: "no aesthetic head: name LAION's weights in evaluate.aesthetic_head (a V2 head reads ViT-L/14)",
    SCENES: "data/source/probe.npz is not there: the stage source writes it of drawn scenes alone",
    MODEL: "no model beside the images: the stage train makes models/raphael; run evaluate in its workspace",
}
ABSENT[TEXT_MODEL] = ABSENT[CAPTION_MODEL] = ABSENT[MODEL]


class _Silent:
    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        pass
