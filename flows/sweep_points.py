"""Drawing and measuring the points of a sweep. A point's result is a JSON file named by a hash of all it depends on.

    <home>/points/<key>.json        the result; while it is there nothing is drawn again
    <home>/grids/<key>.png          the first pictures, for MLflow
    <home>/points/<key>/pictures/   unfinished pictures, each whole or absent; removed with the result written
    <home>/reference/<key>.npy      features of the training pictures that distances are to

Killed at any moment, the same sweep goes on: within a point, block by block.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flows.sweep_plan import Model, Point
from raphael.config import Config
from raphael.evaluate.features import FeatureSpace
from raphael.evaluate.findings import GRID_PICTURES, first_pictures
from raphael.evaluate.frechet import Features
from raphael.evaluate.picture_folder import Preparation, read_picture
from raphael.stage import file_sha256, read_json, write_json
from raphael.strict import to_dict

if TYPE_CHECKING:
    from raphael.generate.pipeline import RaphaelPipeline

AS_IT_IS = Preparation("none", 0)


class Measure:
    """Frechet distance to the training pictures and CLIP score, under the names of reports/evaluate.json.

    One network scores all points, whichever model drew them: the scoring CLIP of the settings, else `model`'s own.
    """

    def __init__(self, config: Config, root: Path, home: Path, model: Model, prompts: list[dict[str, Any]]):
        self.config, self.root, self.home, self.model, self.prompts = config, root, home, model, prompts

    @cached_property
    def identity(self) -> str:
        """A hash of the prompts, the networks and the reference, known without loading any of them."""
        from raphael.evaluate.prompts import list_sha256

        evaluate, weights = self.config.evaluate, self.config.evaluate.fid_inception_weights
        facts = [
            list_sha256(self.prompts),
            evaluate.scoring_clip or self.model.sha256,
            file_sha256(weights) if weights else "",
            self.reference,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @cached_property
    def reference(self) -> str:
        """A hash of the training pictures that distances are to: which, how many, of which size."""
        captions = file_sha256(self.root / "data" / "captions" / "captions.parquet")
        facts = [captions, self.config.evaluate.max_reference_images, self.model.size_px]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @cached_property
    def scorer(self) -> Any:
        from raphael.encoders.image import load_clip

        return load_clip(self.config.evaluate.scoring_clip or self.model.folder / "text_encoder")

    @cached_property
    def spaces(self) -> list[FeatureSpace]:
        """The CLIP's, and Inception's before it where its weights are given: the first is the one that is drawn."""
        from raphael.evaluate.features import inception_space, network_sha256

        weights = self.config.evaluate.fid_inception_weights
        found = [inception_space(weights)] if weights else []
        sha256 = network_sha256(self.scorer.model)
        return [*found, FeatureSpace(f"fd_clip{self.suffix}", self._embed_images, sha256)]

    @property
    def suffix(self) -> str:
        return "" if self.config.evaluate.scoring_clip else "_self"

    def _embed_images(self, batch: np.ndarray) -> np.ndarray:
        return np.asarray(self.scorer.embed_images(batch))

    @cached_property
    def references(self) -> list[Features]:
        """Statistics of the training pictures in each space; their features are computed once and kept."""
        return [statistics_of(self._reference_rows(space)) for space in self.spaces]

    def _reference_rows(self, space: FeatureSpace) -> np.ndarray:
        from raphael.evaluate.references import reference_pictures

        key = hashlib.sha256(f"{self.reference} {space.network}".encode()).hexdigest()[:24]
        file = self.home / "reference" / f"{key}.npy"
        if not file.is_file():
            data, limit = self.root / "data", self.config.evaluate.max_reference_images
            captions = data / "captions" / "captions.parquet"
            pictures = reference_pictures(data / "shards", captions, limit, *self.model.size_px)
            _, rows = space.statistics(pictures)
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".{key}.{os.getpid()}.npy")
            np.save(temporary, rows)
            os.replace(temporary, file)
        return np.load(file, allow_pickle=False)

    def __call__(self, pictures: Callable[[], Iterator[np.ndarray]]) -> dict[str, Any]:
        """-> {n, n_reference, networks, metrics}; with the scene reader's accuracies where prompts have a truth."""
        from raphael.evaluate.attributes import read_scene, score
        from raphael.evaluate.clip_score import clip_score
        from raphael.evaluate.intervals import bootstrap_mean

        metrics: dict[str, float] = {}
        n = len(self.prompts)
        for space, real in zip(self.spaces, self.references, strict=True):
            ours, features = space.statistics(pictures())
            metrics[space.metric(n)] = round(ours.distance(real), 6)
        name = f"clip_score{self.suffix}"
        texts = np.asarray(self.scorer.embed_texts([entry["prompt"] for entry in self.prompts]))
        metrics[name] = round(clip_score(features, texts), 6)
        cosines = (np.asarray(features, np.float64) * np.asarray(texts, np.float64)).sum(1)
        low, high = bootstrap_mean(cosines, [entry["prompt"] for entry in self.prompts])
        if all(entry.get("truth") for entry in self.prompts):
            facts = score(self.prompts, [read_scene(picture) for picture in pictures()])
            metrics |= {key: value for key, value in facts.items() if key.endswith("_accuracy") and value is not None}
        return {
            "n": n,
            "n_reference": self.references[0].count,
            "reference": self.reference[:16],
            "networks": {space.name: space.network for space in self.spaces},
            "distance": self.spaces[0].metric(n),
            "score": name,
            "score_interval": [round(low, 6), round(high, 6)],
            "metrics": metrics,
        }


def statistics_of(rows: np.ndarray) -> Features:
    return Features(rows.shape[1]).update(rows)


@dataclass
class Sweeper:
    """Draws what has no result yet. drawn: pictures drawn by this process."""

    config: Config
    home: Path
    measure: Measure
    keep_pictures: bool = False
    drawn: int = 0
    loaded: tuple[str, RaphaelPipeline] | None = None

    def result_file(self, point: Point) -> Path:
        return self.home / "points" / f"{point.key(self.measure.identity)}.json"

    def grid_file(self, point: Point) -> Path:
        return self.home / "grids" / self.result_file(point).with_suffix(".png").name

    def __call__(self, point: Point) -> dict[str, Any]:
        """The point's result, read or made."""
        file = self.result_file(point)
        if not file.is_file():
            write_json(file, self._make(point, file.with_suffix("") / "pictures"))
            if not self.keep_pictures:
                shutil.rmtree(file.with_suffix(""))
        return read_json(file)

    def _make(self, point: Point, folder: Path) -> dict[str, Any]:
        files = self._draw(point, folder)
        result = self.measure(lambda: (read_picture(file, AS_IT_IS) for file in files))
        grid = self.grid_file(point)
        grid.parent.mkdir(parents=True, exist_ok=True)
        first_pictures([read_picture(file, AS_IT_IS) for file in files[:GRID_PICTURES]]).save(grid)
        return {
            "model": point.model.sha256[:16],
            "mask_threshold": point.mask_threshold,
            "settings": to_dict(point.generate),
            **result,
        }

    def _draw(self, point: Point, folder: Path) -> list[Path]:
        from raphael.generate.__main__ import draw_block

        folder.mkdir(parents=True, exist_ok=True)
        # without a prompt's own seed, which would be the same for every seed of the sweep
        prompts = [entry["prompt"] for entry in self.measure.prompts]
        jobs = [{"prompt": text, "file": f"{index:05d}.png", "index": index} for index, text in enumerate(prompts)]
        size, config = point.generate.batch_size, replace(self.config, generate=point.generate)
        for start in range(0, len(jobs), size):
            block = jobs[start : start + size]
            if not all((folder / job["file"]).is_file() for job in block):
                draw_block(self._pipeline(point), block, config, folder)
                self.drawn += len(block)
        return [folder / job["file"] for job in jobs]

    def _pipeline(self, point: Point) -> RaphaelPipeline:
        from raphael.generate.pipeline import RaphaelPipeline

        if self.loaded is None or self.loaded[0] != point.model.sha256:
            self.loaded = (point.model.sha256, RaphaelPipeline.from_pretrained(point.model.folder))
        set_mask_threshold(self.loaded[1], point.mask_threshold)
        return self.loaded[1]


def set_mask_threshold(pipeline: RaphaelPipeline, alpha: float) -> None:
    """Give every Space-MoE another alpha; its weights stay those that another alpha was trained with."""
    from raphael.net.moe import SpaceMoE

    for module in pipeline.unet.modules():
        if isinstance(module, SpaceMoE):
            module.mask_threshold = alpha
