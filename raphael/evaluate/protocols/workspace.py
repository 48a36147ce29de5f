"""A workspace's generated images as the subject of the stage evaluate: its training images, its model, its scenes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raphael.base.config.params import Config
from raphael.base.config.systems import find_system, system_of
from raphael.base.images.fit import read_image
from raphael.base.probe_set import PROBE
from raphael.base.stage import Stage, StageError, device_of
from raphael.evaluate.catalogue import metrics_named
from raphael.evaluate.features.spaces import RANDOM, Network, open_network
from raphael.evaluate.protocols.dealt import PIECES, READ, deal, processes_for
from raphael.evaluate.protocols.protocol import Protocol, meta_of
from raphael.evaluate.scenes.readings import READINGS, reading_of
from raphael.evaluate.subject import (
    CAPTION_MODEL,
    CLIP,
    HEAD,
    LABELS,
    MODEL,
    SCENES,
    TEXT_MODEL,
    TRUTH,
    Entry,
    Pair,
    Pieces,
    Rows,
    Subject,
)

if TYPE_CHECKING:
    from raphael.base.probe_set import ProbeSet

SHARDS = Path("data/shards")
CAPTIONS = Path("data/captions/captions.parquet")
DRAWN = Path("data/source") / PROBE
TEXT_PARTS = {"autoencoder", "text_encoder"}  # of a TEXT_MODEL
OPENED = ("inception", "clip")  # where a protocol names no network: those that the settings have
AGAIN = "delete it and run the stage generate again"


@dataclass(frozen=True)
class ImageFiles:
    """The generated images of `folder`, read when they are asked for: uint8 (H, W, 3) by number, or a list by slice."""

    folder: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, slice):
            return [read_image(self.folder / name, again=AGAIN) for name in self.names[rows]]
        return read_image(self.folder / self.names[rows], again=AGAIN)


class Workspace(Subject):
    """Features are held in memory. model: the pipeline's folder; drawn: the probe's scenes. unfinished: a folder for
    these very images, model and settings, in which other processes may leave what they computed (protocols/dealt.py);
    None: this one computes everything."""

    def __init__(
        self,
        config: Config,
        stage: Stage,
        protocol: Protocol,
        entries: list[Entry],
        images: Sequence[np.ndarray] | ImageFiles,
        model: Path,
        unfinished: Path | None = None,
    ):
        super().__init__(protocol.rules, entries, [entry["prompt"] for entry in entries])
        self.config, self.stage, self.protocol = config, stage, protocol
        self._images, self.model, self.drawn, self.unfinished = images, model, DRAWN, unfinished
        self._no_clip = ""

    def has(self, need: str) -> bool:
        if need == SCENES:
            return self.drawn.is_file()
        if need == MODEL:
            return (self.model / "meta.json").is_file()
        if need == TEXT_MODEL:
            return self.has(MODEL) and set(find_system(self.system).carries) >= TEXT_PARTS
        if need == CAPTION_MODEL:
            return self.has(MODEL) and find_system(self.system).told == "captions"
        if need == HEAD:
            return bool(self.config.evaluate.aesthetic_head)
        return super().has(need)

    def why_absent(self, need: str) -> str:
        if need == SCENES:
            return f"{self.drawn} is not there: the stage source writes it of drawn scenes alone"
        if need == TEXT_MODEL and self.has(MODEL):
            return f"{self.model} is of the system {self.system}, which has no text encoder; this asks a model by texts"
        if need == CAPTION_MODEL and self.has(MODEL):
            return f"{self.model} is of the system {self.system}, which is told no captions; this asks a model by them"
        return self._no_clip if need == CLIP and self._no_clip else super().why_absent(need)

    @property
    def system(self) -> str:
        return system_of(meta_of(self.model))

    def images(self) -> Iterator[np.ndarray]:
        return iter(self._images)

    def images_at(self, rows: slice) -> list[np.ndarray]:
        return list(self._images[rows])

    @cached_property
    def readings(self) -> list[Any]:
        return [reading_of(told) for piece in self.computed(READ, READINGS) for told in piece]

    def computed(self, name: str, pieces: Pieces) -> list[Any]:
        return self.dealt[name] if name in self.dealt else super().computed(name, pieces)

    @cached_property
    def dealt(self) -> dict[str, list[Any]]:
        """What others computed of the protocol's metrics, by name; nothing where this process is enough."""
        if self.unfinished is None:
            return {}
        asked = [metric for metric in metrics_named(self.protocol.metrics) if metric.pieces is not None]
        names = [metric.name for metric in asked if not any(map(self.missing, metric.needs))]
        if self.has(TRUTH) or self.has(LABELS):
            names.append(READ)
        counts = {name: PIECES[name].count(self) for name in names}
        if processes_for(sum(counts.values()), str(self.device)) == 1:
            return {}
        again = partial(Workspace, self.config, self.stage, self.protocol, self.entries, self._images, self.model)
        return deal(again, counts, self.stage, self.unfinished)

    @cached_property
    def networks(self) -> list[Network]:
        """Those of the protocol; one that the settings lack is left out."""
        found, wanted = [], self.protocol.networks or OPENED
        weights, device = self.config.evaluate.fid_inception_weights, device_of(self.config)
        if "inception" in wanted and weights:
            found.append(open_network(f"inception:{weights}", "evaluate.fid_inception_weights", device))
        if "clip" in wanted:
            clip, self._no_clip = scoring_clip(self.config, self.model)
            found += [clip] if clip else []
        if RANDOM in wanted:
            found.append(open_network(RANDOM, device=device))
        return found

    @cached_property
    def pairs(self) -> list[Pair]:
        from raphael.evaluate.features.references import reference_images

        if not self.networks:
            return []
        height, width = self._images[0].shape[:2]
        limit = self.config.evaluate.max_reference_images
        area = self.config.autoencoder.is_pixels
        reference = list(reference_images(SHARDS, CAPTIONS, limit, height, width, area))
        words, found = f"{len(reference)} training pictures", []
        with self.stage.progress((len(self._images) + len(reference)) * len(self.networks), "images") as bar:
            for network in self.networks:
                rows = [network.rows(side, bar.update) for side in (self._images, reference)]
                found.append(Pair(network, *map(Rows, rows), reference=words))
        return found

    @cached_property
    def scenes(self) -> ProbeSet:
        from raphael.base.probe_set import read_probe_set

        return read_probe_set(self.drawn)

    @cached_property
    def pipeline(self) -> Any:
        from raphael.generate.pipeline import RaphaelPipeline

        return RaphaelPipeline.from_pretrained(self.model, device=self.device)

    def head(self) -> Any:
        from raphael.encoders.aesthetic import load_head

        return load_head(self.config.evaluate.aesthetic_head)

    def counts(self) -> dict[str, int]:
        settings = self.config.evaluate
        return {name: getattr(settings, name) for name in ("num_probe", "num_knockout_images", "num_swaps")}

    def progress(self, total: int, unit: str) -> Any:
        return self.stage.progress(total, unit)

    @property
    def device(self) -> Any:
        return device_of(self.config)


def scoring_clip(config: Config, model: Path) -> tuple[Network | None, str]:
    """(the CLIP that scores, or None; why there is none). Raises StageError where evaluate.scoring_clip is no CLIP."""
    if config.evaluate.scoring_clip:
        return clip_network(config, model), ""
    try:
        return clip_network(config, model), ""
    except (StageError, ValueError) as error:
        return None, f"the text encoder has no picture side ({error}); name a CLIP in evaluate.scoring_clip"


def clip_network(config: Config, model: Path) -> Network:
    """evaluate.scoring_clip, else the model's own, which is called fd_clip_self: it conditioned the sampling too."""
    from raphael.encoders.image import load_clip
    from raphael.evaluate.features.extract import embeds, network_sha256

    given = config.evaluate.scoring_clip
    scorer = load_clip(given or model / "text_encoder").to(device_of(config))
    images, texts = embeds(scorer.embed_images), embeds(scorer.embed_texts)
    return Network(f"fd_clip{'' if given else '_self'}", images, network_sha256(scorer.model), "clip", texts)
