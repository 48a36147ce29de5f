"""Two folders of pictures, or one and its prompts, measured by a protocol: numbers that carry where they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raphael.evaluate.clip_score import clip_score_of_others
from raphael.evaluate.feature_cache import CachedFeatures, embed_folder
from raphael.evaluate.intervals import bootstrap_mean
from raphael.evaluate.kernels import cmmd, kid
from raphael.evaluate.neighbours import DENSITY_K, PRECISION_K, density_coverage, precision_recall
from raphael.evaluate.picture_folder import PictureFolder
from raphael.evaluate.prompts import list_sha256
from raphael.evaluate.protocol import AGAINST_REFERENCE, Protocol
from raphael.evaluate.spaces import Network
from raphael.stage import StageError

SETTINGS = ("guidance_scale", "sampler", "steps", "weights")  # what every number carries; weights: the model's hash


@dataclass
class Measurement:
    """What is measured, and the numbers so far. settings: SETTINGS and seed, None where unknown."""

    protocol: Protocol
    drawn: PictureFolder
    reference: PictureFolder | None
    settings: dict[str, Any]
    prompts: list[str] | None
    numbers: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: float, network: str, **more: Any) -> None:
        if not np.isfinite(value):
            raise ValueError(f"{name}: got {value}, expected a finite number")
        facts = {"n": len(self.drawn.files), "protocol": self.protocol.identity, "network": network}
        if self.reference is not None:
            facts["n_reference"] = len(self.reference.files)
        self.numbers.append({"name": name, "value": value, **more, **facts, **{k: self.settings[k] for k in SETTINGS}})


def settings_of(listing: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What the pictures were drawn with: images.json's settings, over them what the user gave."""
    written = listing.get("settings", {}) | ({"weights": listing["model"]} if listing.get("model") else {})
    return {name: given[name] if given.get(name) is not None else written.get(name) for name in (*SETTINGS, "seed")}


def check(measurement: Measurement, networks: list[Network]) -> None:
    """Everything the protocol asks for that can be known before a picture is read. Raises StageError."""
    protocol, listing = measurement.protocol, measurement.drawn.listing
    protocol.check_counts(
        len(measurement.drawn.files), len(measurement.reference.files) if measurement.reference else 0
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
            "in images.json beside the pictures (raphael generate writes it), or as options"
        )
    if protocol.captions.list_sha256 or protocol.seeds.rule != "any":
        _check_list(protocol, listing, measurement.settings["seed"])


def _check_list(protocol: Protocol, listing: dict[str, Any], seed: Any) -> None:
    entries = listing.get("images")
    if not entries or any("prompt" not in entry for entry in entries):
        raise StageError(f"{protocol.identity}: got no prompts; expected images.json beside the pictures, with prompts")
    if protocol.seeds.rule == "base + index":
        if seed != protocol.seeds.base or any(entry.get("index") != place for place, entry in enumerate(entries)):
            raise StageError(
                f"{protocol.identity}: got the seed {seed}, expected {protocol.seeds.base} with pictures 0, 1, 2 ..."
            )
    elif any("seed" not in entry for entry in entries):
        raise StageError(f"{protocol.identity}: images.json has no seed per picture, expected the table's")
    if protocol.captions.list_sha256 and list_sha256(entries) != protocol.captions.list_sha256:
        raise StageError(
            f"{protocol.identity}: these are not its prompts in its order; draw those of `raphael prompts`"
        )


def measure(
    measurement: Measurement,
    networks: list[Network],
    cache: Path,
    tick: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """-> the report: {protocol, images, reference, settings, numbers: [{name, value, n, ...}], absent: {metric: why}}.

    Raises StageError and ValueError for what the protocol refuses and for what cannot be measured.
    """
    protocol = measurement.protocol
    check(measurement, networks)
    prepare = (protocol.pictures.preparation, protocol.pictures.only_size_px)
    if networks:
        drawn = embed_folder(measurement.drawn, prepare, networks, cache, tick=tick)
        real: list[CachedFeatures | None] = [None] * len(networks)
        if measurement.reference is not None:
            real = list(embed_folder(measurement.reference, prepare, networks, cache, tick=tick))
        for network, ours, theirs in zip(networks, drawn, real, strict=True):
            if theirs is not None:
                against_reference(measurement, network, ours, theirs)
            if "clip_score" in protocol.metrics and network.kind == "clip":
                fit_of_prompts(measurement, network, ours)
    if "scenes" in protocol.metrics:
        read_scenes(measurement, tick)
    if not measurement.numbers:
        reasons = "; ".join(f"{name}: {why}" for name, why in measurement.absent.items())
        raise StageError(
            f"{protocol.identity}: nothing could be measured ({reasons or 'no metric fits these networks'})"
        )
    return {
        "protocol": protocol.identity,
        "about": protocol.about,
        "images": _side(measurement.drawn),
        "reference": _side(measurement.reference) if measurement.reference else None,
        "settings": measurement.settings,
        "networks": {network.name: network.network for network in networks},
        "numbers": measurement.numbers,
        "absent": measurement.absent,
    }


def against_reference(measurement: Measurement, network: Network, ours: CachedFeatures, theirs: CachedFeatures) -> None:
    """Every distance that the protocol lists, in one network's features."""
    wanted = AGAINST_REFERENCE & set(measurement.protocol.metrics)
    n, m, sha256 = ours.count, theirs.count, network.network
    if "frechet" in wanted:
        distance = ours.statistics().distance(theirs.statistics())
        measurement.add(network.metric(n), distance, sha256)
    if wanted == {"frechet"}:
        return
    drawn, real = ours.array(), theirs.array()
    if "kid" in wanted:
        rule = measurement.protocol.kid
        size = min(rule.subset_size, n, m)
        mean, std = kid(drawn, real, rule.subsets, size, rule.seed)
        measurement.add(
            network.name_of("kid"), mean, sha256, std_of_subsets=std, subset_size=size, subsets=rule.subsets
        )
    if "cmmd" in wanted and network.kind == "clip":
        measurement.add(network.name_of("cmmd"), cmmd(drawn, real), sha256)
    for metric, act, k in (
        ("precision_recall", precision_recall, PRECISION_K),
        ("density_coverage", density_coverage, DENSITY_K),
    ):
        if metric in wanted and min(n, m) <= k:
            measurement.absent[metric] = f"needs more than {k} pictures on each side, got {n} and {m}"
        elif metric in wanted:
            for name, value in act(drawn, real, k).items():
                measurement.add(network.name_of(name), value, sha256, k=k)


def fit_of_prompts(measurement: Measurement, network: Network, ours: CachedFeatures) -> None:
    """CLIP score with its 95 % interval over prompts, and beside it the score with everyone else's prompt."""
    if measurement.prompts is None:
        if measurement.protocol.settings_required:
            raise StageError(
                f"{measurement.protocol.identity}: got no prompts; expected them in images.json, or --prompts"
            )
        measurement.absent["clip_score"] = "no prompts: neither images.json nor --prompts"
        return
    assert network.embed_texts is not None
    prefix = measurement.protocol.clip_prefix
    images = _unit(ours.array())
    texts = _unit(network.embed_texts([prefix + prompt for prompt in measurement.prompts]))
    cosines = (images * texts).sum(1)
    name = f"clip_score_{network.name.removeprefix('fd_clip_')}"
    interval = {}
    if len(set(measurement.prompts)) > 1:
        interval["low"], interval["high"] = bootstrap_mean(cosines, measurement.prompts)
    measurement.add(name, float(cosines.mean()), network.network, **interval)
    if len(cosines) > 1:
        measurement.add(f"{name}_of_other_prompts", clip_score_of_others(images, texts), network.network)


def read_scenes(measurement: Measurement, tick: Callable[[int], None]) -> None:
    """The exact truth of drawn scenes, attribute by attribute, with Wilson's intervals and chance beside it."""
    from raphael.evaluate.attributes import score
    from raphael.evaluate.scene_reader import read_scene

    entries = measurement.drawn.listing.get("images", [])
    if not any(entry.get("truth") for entry in entries):
        raise StageError(
            f"{measurement.protocol.identity}: images.json has no truth per picture; is this the scenes corpus?"
        )
    protocol = measurement.protocol

    def readings() -> Iterator[Any]:
        for picture in measurement.drawn.pictures(protocol.pictures.preparation, protocol.pictures.only_size_px):
            yield read_scene(picture)
            tick(1)

    facts = score(entries, list(readings()))
    for name in [name for name in facts if name.endswith("_accuracy")]:
        if facts[name] is None:
            measurement.absent[name] = "no prompt states it"
            continue
        more = {"low": facts[f"{name}_low"], "high": facts[f"{name}_high"], "chance": facts["chance"][name]}
        measurement.add(name, facts[name], "scene_reader", asked=facts[f"{name}_n"], **more)


def table(report: dict[str, Any]) -> str:
    """The numbers as text, one a line."""
    settings = ", ".join(f"{name} {value if value is not None else '?'}" for name, value in report["settings"].items())
    sizes = f"{report['images']['n']:,} pictures"
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


def _side(pictures: PictureFolder) -> dict[str, Any]:
    return {"folder": str(pictures.folder), "n": len(pictures.files), "sha256": pictures.digest()}


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
