"""Two folders of images, or one and its prompts, measured by a protocol: numbers that carry where they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from raphael.base.stage import StageError
from raphael.evaluate.catalogue import metrics_named
from raphael.evaluate.features.cache import embed_folder
from raphael.evaluate.features.image_folder import ImageFolder
from raphael.evaluate.features.spaces import Network
from raphael.evaluate.metric import Found
from raphael.evaluate.metric import measure as measure_metrics
from raphael.evaluate.protocols.prompts import list_sha256
from raphael.evaluate.protocols.protocol import Protocol
from raphael.evaluate.subject import HEAD, PROMPTS, TRUTH, Pair, Subject

SETTINGS = ("guidance_scale", "sampler", "steps", "weights")  # what every number carries; weights: the model's hash


@dataclass
class Measurement:
    """What is measured, and the numbers so far. settings: SETTINGS and seed, None where unknown. beside: metrics that
    were asked for and are not the protocol's."""

    protocol: Protocol
    generated: ImageFolder
    reference: ImageFolder | None
    settings: dict[str, Any]
    prompts: list[str] | None
    numbers: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # what metrics tell beside their numbers
    beside: tuple[str, ...] = ()
    aesthetic_head: Path | None = None

    def take(self, found: Found) -> None:
        """Every number with what it means nothing without: n, protocol, network, settings."""
        of_metric = {name: metric for metric, names in found.by_metric.items() for name in names}
        for number in found.numbers:
            if number.value is None:
                self.absent[number.name] = "no prompt states it"
                continue
            protocol = self.protocol.identity
            if (metric := of_metric[number.name]) in self.beside:
                protocol += f" + {metric}"
            told: dict[str, Any] = {"name": number.name, "value": number.value, **number.more}
            told |= {} if number.asked is None else {"asked": number.asked}
            told |= {} if number.low is None else {"low": number.low, "high": number.high}
            told |= {} if number.asked is None else {"chance": number.chance}
            told |= {"n": len(self.generated.files), "protocol": protocol, "network": number.network}
            if self.reference is not None:
                told["n_reference"] = len(self.reference.files)
            self.numbers.append({**told, **{name: self.settings[name] for name in SETTINGS}})
        self.absent |= found.absent
        self.facts |= found.facts


class Folders(Subject):
    """Two folders of images, or one and its prompts; features from the cache, computed where it lacks them."""

    def __init__(self, measurement: Measurement, networks: list[Network], cache: Path, tick: Callable[[int], None]):
        entries = measurement.generated.listing.get("images", [])
        super().__init__(measurement.protocol.rules, entries, measurement.prompts, tick)
        self.measurement, self.networks, self.cache = measurement, networks, cache

    @cached_property
    def pairs(self) -> list[Pair]:
        if not self.networks:
            return []
        reference = self.measurement.reference
        sides = [embed_folder(self.measurement.generated, self._prepare, self.networks, self.cache, tick=self.tick)]
        if reference is not None:
            sides.append(embed_folder(reference, self._prepare, self.networks, self.cache, tick=self.tick))
        return [Pair(network, *of_both) for network, *of_both in zip(self.networks, *sides, strict=True)]

    def images(self) -> Iterator[np.ndarray]:
        return self.measurement.generated.prepared(*self._prepare)

    @property
    def _prepare(self) -> tuple[Any, int]:
        rules = self.measurement.protocol.pictures
        return rules.preparation, rules.only_size_px

    def has(self, need: str) -> bool:
        return self.measurement.aesthetic_head is not None if need == HEAD else super().has(need)

    def head(self) -> Any:
        from raphael.encoders.aesthetic import load_head

        return load_head(self.measurement.aesthetic_head)

    def why_absent(self, need: str) -> str:
        if self.measurement.protocol.settings_required and need in (PROMPTS, TRUTH):
            raise StageError(f"{self.measurement.protocol.identity}: {REQUIRED[need]}")
        if need == HEAD:
            return "no aesthetic head: give --aesthetic-head FILE (LAION's weights; a V2 head reads ViT-L/14)"
        return super().why_absent(need)


REQUIRED = {
    PROMPTS: "got no prompts; expected them in images.json, or --prompts",
    TRUTH: "images.json has no truth per image; is this the scenes corpus?",
}


def settings_of(listing: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What the images were generated with: images.json's settings, over them what the user gave."""
    written = listing.get("settings", {}) | ({"weights": listing["model"]} if listing.get("model") else {})
    return {name: given[name] if given.get(name) is not None else written.get(name) for name in (*SETTINGS, "seed")}


def check(measurement: Measurement, networks: list[Network]) -> None:
    """Everything the protocol asks for that can be known before an image is read. Raises StageError."""
    protocol, listing = measurement.protocol, measurement.generated.listing
    protocol.check_counts(
        len(measurement.generated.files), len(measurement.reference.files) if measurement.reference else 0
    )
    for kind in protocol.networks:
        if not any(network.kind == kind for network in networks):
            raise StageError(f"{protocol.identity} needs a network of kind {kind}; got none of it: give --features")
    if "inception" in protocol.networks and not any(network.name == "fid" for network in networks):
        raise StageError(f"{protocol.identity}: the Inception weights are not the published ones, so this is no FID")
    unknown = [name for name in SETTINGS if measurement.settings[name] is None]
    if protocol.settings_required and unknown:
        raise StageError(
            f"{protocol.identity}: {', '.join(unknown)} unknown, and a number without them says nothing; expected them "
            "in images.json beside the images (raphael generate writes it), or as options"
        )
    if protocol.captions.list_sha256 or protocol.seeds.rule != "any":
        _check_list(protocol, listing, measurement.settings["seed"])


def _check_list(protocol: Protocol, listing: dict[str, Any], seed: Any) -> None:
    entries = listing.get("images")
    if not entries or any("prompt" not in entry for entry in entries):
        raise StageError(f"{protocol.identity}: got no prompts; expected images.json beside the images, with prompts")
    if protocol.seeds.rule == "base + index":
        if seed != protocol.seeds.base or any(entry.get("index") != place for place, entry in enumerate(entries)):
            raise StageError(
                f"{protocol.identity}: got the seed {seed}, expected {protocol.seeds.base} with images 0, 1, 2 ..."
            )
    elif any("seed" not in entry for entry in entries):
        raise StageError(f"{protocol.identity}: images.json has no seed per image, expected the table's")
    if protocol.captions.list_sha256 and list_sha256(entries) != protocol.captions.list_sha256:
        raise StageError(
            f"{protocol.identity}: these are not its prompts in its order; generate those of `raphael prompts`"
        )


def measure(
    measurement: Measurement,
    networks: list[Network],
    cache: Path,
    tick: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """-> the report: {protocol, images, reference, settings, numbers: [{name, value, n, ...}], absent: {metric: why},
    facts: what is told beside numbers}.

    Raises StageError and ValueError for what the protocol refuses and for what cannot be measured.
    """
    protocol = measurement.protocol
    check(measurement, networks)
    subject = Folders(measurement, networks, cache, tick)
    measurement.take(measure_metrics(metrics_named(protocol.metrics, protocol.identity), subject))
    if not (measurement.numbers or measurement.facts):
        reasons = "; ".join(f"{name}: {why}" for name, why in measurement.absent.items())
        raise StageError(
            f"{protocol.identity}: nothing could be measured ({reasons or 'no metric fits these networks'})"
        )
    return {
        "protocol": protocol.identity,
        "about": protocol.about,
        "images": _side(measurement.generated),
        "reference": _side(measurement.reference) if measurement.reference else None,
        "settings": measurement.settings,
        "networks": {network.name: network.network for network in networks},
        "numbers": measurement.numbers,
        "absent": measurement.absent,
        "facts": measurement.facts,
    }


def table(report: dict[str, Any]) -> str:
    """The numbers as text, one a line."""
    settings = ", ".join(f"{name} {value if value is not None else '?'}" for name, value in report["settings"].items())
    sizes = f"{report['images']['n']:,} images"
    if report["reference"]:
        sizes += f" against {report['reference']['n']:,}"
    lines = [f"{report['protocol']}: {sizes}; {settings}"]
    cells = [
        (
            number["name"],
            f"{number['value']:.6g}",
            f"[{number['low']:.4g}, {number['high']:.4g}]" if "low" in number else "",
            f"chance {number['chance']:.3g}" if number.get("chance") is not None else "",
            number["network"][:12],
        )
        for number in report["numbers"]
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        text = (
            f"{cell:>{width}}" if place == 1 else f"{cell:<{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            if width
        )
        lines.append(f"  {'  '.join(text)}".rstrip())
    lines += [f"  {name}: not measured: {why}" for name, why in report["absent"].items()]
    return "\n".join(lines)


def _side(folder: ImageFolder) -> dict[str, Any]:
    return {"folder": str(folder.folder), "n": len(folder.files), "sha256": folder.digest()}
