"""Generating and measuring the points of a sweep. A point's result is a JSON file named by a hash of all it depends on.

    <home>/points/<key>.json        the result; while it is there nothing is generated again
    <home>/grids/<key>.png          the first images, for MLflow
    <home>/points/<key>/pictures/   unfinished images, each whole or absent; removed with the result written
    <home>/reference/<key>.npy      features of the training images that distances are to

Killed at any moment, the same sweep resumes: within a point, block by block.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flows.sweep.plan import Model, SweepPoint
from raphael.base.config.params import Config
from raphael.base.files import written_whole
from raphael.base.integrity.pieces import Pieces
from raphael.base.stage import StageError, device_of, file_sha256, read_json, write_json
from raphael.base.strict import to_dict
from raphael.evaluate.catalogue import metric_of, metrics_named
from raphael.evaluate.features.image_folder import Preparation, read_prepared
from raphael.evaluate.findings import GRID_IMAGES, first_images
from raphael.evaluate.metric import Found, Number, measure
from raphael.evaluate.subject import FIELD, Pair, Rows, Subject

if TYPE_CHECKING:
    from raphael.evaluate.features.spaces import Network
    from raphael.evaluate.metrics.frechet import Features
    from raphael.evaluate.protocols.protocol import Protocol
    from raphael.generate.pipeline import RaphaelPipeline

AS_IT_IS = Preparation("none", 0)
SCORES = ("clip_score", "class_accuracy", "precision_recall")  # the first that is measured is what distances stand over


class Measure:
    """By the sweep protocol of the model's system: its metrics under the names of reports/evaluate.json.

    One network scores all points, whichever model generated them: of a model by texts the scoring CLIP of the settings,
    else `model`'s own. more: metrics beside the protocol's.
    """

    def __init__(
        self,
        config: Config,
        root: Path,
        home: Path,
        model: Model,
        prompts: list[dict[str, Any]],
        more: tuple[str, ...] = (),
    ):
        self.config, self.root, self.home, self.model, self.prompts = config, root, home, model, prompts
        self.more = tuple(name for name in more if name not in self.protocol.metrics)
        metrics_named(self.more, "metrics of the plan")  # an unknown one is said before anything is generated

    @cached_property
    def identity(self) -> str:
        """A hash of the prompts, the networks and the reference, known without loading any of them."""
        from raphael.evaluate.protocols.prompts import list_sha256

        evaluate, weights = self.config.evaluate, self.config.evaluate.fid_inception_weights
        facts = [
            list_sha256(self.prompts),
            evaluate.scoring_clip or self.model.sha256,
            file_sha256(weights) if weights else "",
            self.reference,
            *([self.protocol.identity] if self.protocol.networks else []),  # sweep/v1 came before there were others
            *([list(self.more)] if self.more else []),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @cached_property
    def reference(self) -> str:
        """A hash of the training images that distances are to: which, how many, of which size, fitted how."""
        captions = file_sha256(self.root / "data" / "captions" / "captions.parquet")
        facts = [captions, self.config.evaluate.max_reference_images, self.model.size_px]
        facts += ["area"] if self.config.autoencoder.is_pixels else []
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @cached_property
    def networks(self) -> list[Network]:
        """The protocol's; where it names none, Inception's, if its weights are given, and the CLIP's. Figures show the
        first."""
        from raphael.evaluate.features.spaces import RANDOM, open_network
        from raphael.evaluate.protocols.workspace import OPENED, clip_network

        wanted, device = self.protocol.networks or OPENED, device_of(self.config)
        weights, key = self.config.evaluate.fid_inception_weights, "evaluate.fid_inception_weights"
        found = [open_network(f"inception:{weights}", key, device)] if weights and "inception" in wanted else []
        found += [clip_network(self.config, self.model.folder)] if "clip" in wanted else []
        return [*found, *([open_network(RANDOM, device=device)] if RANDOM in wanted else [])]

    @cached_property
    def statistics(self) -> list[Features]:
        return [rows.statistics() for rows in self.references]

    @cached_property
    def protocol(self) -> Protocol:
        from raphael.evaluate.protocols.protocol import sweep_protocol

        return sweep_protocol(self.model.system.name)

    @cached_property
    def references(self) -> list[Rows]:
        """The training images in each network's features, which are computed once and kept."""
        return [Rows(self._reference_rows(network)) for network in self.networks]

    def _reference_rows(self, network: Network) -> np.ndarray:
        from raphael.evaluate.features.references import reference_images

        key = hashlib.sha256(f"{self.reference} {network.network}".encode()).hexdigest()[:24]
        file = self.home / "reference" / f"{key}.npy"
        pieces = Pieces(self.home, "sweep")
        if not pieces.has(file):
            data, limit = self.root / "data", self.config.evaluate.max_reference_images
            captions = data / "captions" / "captions.parquet"
            area = self.config.autoencoder.is_pixels
            rows = network.rows(reference_images(data / "shards", captions, limit, *self.model.size_px, area))
            file.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(file) as temporary:
                np.save(temporary, rows)
            pieces.add(file)
        return np.load(file, allow_pickle=False)

    def __call__(self, images: Callable[[], Iterator[np.ndarray]]) -> dict[str, Any]:
        """-> {protocol, n, n_reference, networks, metrics}; with the scene reader's accuracies where prompts have a
        truth."""
        wanted = (*self.protocol.metrics, *self.more)
        found = measure(metrics_named(wanted, self.protocol.identity), Point(self, images))
        shown = [number for number in found.numbers if number.value is not None and metric_of(number.name)]
        score = score_of(found, shown)
        interval = [score.low, score.high] if score.low is not None else [score.value, score.value]
        return {
            "protocol": self.protocol.identity,
            "n": len(self.prompts),
            "n_reference": self.references[0].count,
            "reference": self.reference[:16],
            "networks": {network.name: network.network for network in self.networks},
            "distance": self.networks[0].metric(len(self.prompts)),
            "score": score.name,
            "score_interval": [round(end, 6) for end in interval],
            "metrics": {number.name: round(number.value, 6) for number in shown},
        }


def score_of(found: Found, shown: list[Number]) -> Number:
    """Of how well the images are what was asked for: by the first of SCORES. Raises StageError where there is none."""
    for metric in SCORES:
        names = found.by_metric.get(metric, ())
        if numbers := [number for number in shown if number.name in names]:
            return numbers[0]
    reasons = "; ".join(dict.fromkeys(found.absent.values()))
    raise StageError(f"sweep: none of {', '.join(SCORES)} could be measured, expected one: {reasons}")


class Point(Subject):
    """The images of one point, held against what all points have in common."""

    def __init__(self, of: Measure, images: Callable[[], Iterator[np.ndarray]]):
        super().__init__(of.protocol.rules, of.prompts, [entry["prompt"] for entry in of.prompts])
        self.of, self.images = of, images  # type: ignore[method-assign]

    def has(self, need: str) -> bool:
        field = FIELD.get(need)
        return all(entry.get(field) for entry in self.entries) if field else super().has(need)

    @cached_property
    def pairs(self) -> list[Pair]:
        sides = zip(self.of.networks, self.of.references, self.of.statistics, strict=True)
        return [Pair(n, Rows(n.rows(self.images())), theirs, "", known) for n, theirs, known in sides]


@dataclass
class Sweeper:
    """Generates what has no result yet. generated: images generated by this process."""

    config: Config
    home: Path
    measure: Measure
    keep_pictures: bool = False
    generated: int = 0
    loaded: tuple[str, RaphaelPipeline] | None = None

    def result_file(self, point: SweepPoint) -> Path:
        return self.home / "points" / f"{point.key(self.measure.identity)}.json"

    def grid_file(self, point: SweepPoint) -> Path:
        return self.home / "grids" / self.result_file(point).with_suffix(".png").name

    def __call__(self, point: SweepPoint) -> dict[str, Any]:
        """The point's result, read or made."""
        file = self.result_file(point)
        if not file.is_file():
            write_json(file, self._make(point, file.with_suffix("") / "pictures"))
            if not self.keep_pictures:
                shutil.rmtree(file.with_suffix(""))
        return read_json(file)

    def _make(self, point: SweepPoint, folder: Path) -> dict[str, Any]:
        files = self._generate(point, folder)
        result = self.measure(lambda: (read_prepared(file, AS_IT_IS) for file in files))
        grid = self.grid_file(point)
        grid.parent.mkdir(parents=True, exist_ok=True)
        first_images([read_prepared(file, AS_IT_IS) for file in files[:GRID_IMAGES]]).save(grid)
        return {
            "model": point.model.sha256[:16],
            "knobs": point.knobs,
            "settings": to_dict(point.generate),
            **result,
        }

    def _generate(self, point: SweepPoint, folder: Path) -> list[Path]:
        from raphael.generate.stage import generate_block

        folder.mkdir(parents=True, exist_ok=True)
        # without a prompt's own seed, which would be the same for every seed of the sweep
        prompts = [entry["prompt"] for entry in self.measure.prompts]
        jobs = [{"prompt": text, "file": f"{index:05d}.png", "index": index} for index, text in enumerate(prompts)]
        size, config = point.generate.batch_size, replace(self.config, generate=point.generate)
        for start in range(0, len(jobs), size):
            block = jobs[start : start + size]
            if not all((folder / job["file"]).is_file() for job in block):
                generate_block(self._pipeline(point), block, config, folder)
                self.generated += len(block)
        return [folder / job["file"] for job in jobs]

    def _pipeline(self, point: SweepPoint) -> RaphaelPipeline:
        from raphael.generate.pipeline import RaphaelPipeline

        if self.loaded is None or self.loaded[0] != point.model.sha256:
            pipeline = RaphaelPipeline.from_pretrained(point.model.folder, device=device_of(self.config))
            self.loaded = (point.model.sha256, pipeline)
        for name, value in point.knobs.items():
            self.loaded[1].turn(name, value)
        return self.loaded[1]
