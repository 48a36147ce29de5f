"""Measure the generated images: what they show (exact, for scenes), how well they fit their prompts, how far they are
from real ones. Writes reports/evaluate.json."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from raphael.base.config.params import Config
from raphael.base.config.systems import system_of
from raphael.base.cores.threads import one_thread
from raphael.base.stage import Stage, device_of, read_json
from raphael.base.strict import to_dict
from raphael.evaluate.catalogue import metrics_named
from raphael.evaluate.findings import log_evaluation, worth_looking_at
from raphael.evaluate.instruments.measured import INSTRUMENTS
from raphael.evaluate.metric import Found, measure
from raphael.evaluate.metrics.of_prompts import cosines
from raphael.evaluate.protocols.facts import protocol_facts
from raphael.evaluate.protocols.prompts import list_sha256
from raphael.evaluate.protocols.protocol import Protocol, load_protocol, meta_of, system_protocol
from raphael.evaluate.protocols.workspace import DRAWN, ImageFiles, Workspace
from raphael.evaluate.scenes.attributes import wrong_attributes
from raphael.evaluate.scenes.classes import NAME as CLASS
from raphael.evaluate.scenes.classes import shape_of
from raphael.evaluate.subject import TRUTH

GENERATED = Path("data/generated")
MODEL = Path("models/raphael")


def run(config: Config, stage: Stage) -> None:
    stage.expect_whole(GENERATED)
    listing = read_json(GENERATED / "images.json")
    entries = listing["images"]
    protocol = protocol_of(config, MODEL)
    images = ImageFiles(GENERATED, tuple(entry["file"] for entry in entries))
    facts: dict[str, Any] = {"model": listing["model"], "settings": listing["settings"]}
    facts["prompts"] = list_sha256(entries)
    unfinished = _unfinished(config, stage, protocol)
    subject = Workspace(config, stage, protocol, entries, images, MODEL, unfinished)
    with one_thread() if device_of(config).type == "cpu" else contextlib.nullcontext():
        found = measure(metrics_named(protocol.metrics, "evaluate.metrics"), subject)
        facts |= told(found, subject)
        facts["failures"] = failures(subject, found)
    facts["protocol"] = protocol_facts(protocol, found, subject, facts)
    stage.report(len(entries), len(entries), **facts)
    log_evaluation(config, stage, facts, entries, images)
    shutil.rmtree(unfinished.parent)


def _unfinished(config: Config, stage: Stage, protocol: Protocol) -> Path:
    """The folder for the pieces of this very evaluation."""
    drawn = [DRAWN] if DRAWN.is_file() else []
    folder = stage.workdir(MODEL, GENERATED, *drawn, to_dict(config.evaluate), protocol.identity) / "pieces"
    folder.mkdir(exist_ok=True)
    return folder


def protocol_of(config: Config, model: Path) -> Protocol:
    """evaluate.protocol, else that of the model's system, with the metrics of evaluate.metrics beside its own. Raises
    ConfigError."""
    named = config.evaluate.protocol
    if named:
        protocol = load_protocol(named, where="evaluate.protocol")
    else:
        protocol = system_protocol(system_of(meta_of(model)))
    return protocol.with_metrics(config.evaluate.metrics, "evaluate.metrics")


def told(found: Found, subject: Workspace) -> dict[str, Any]:
    """The numbers as keys of the report; of what could not be had, null and why."""
    facts = found.flat()
    if "clip_score" in found.absent:
        facts |= {"clip_score": None, "clip_score_absent_because": found.absent["clip_score"]}
    elif "clip_score" in found.by_metric:
        facts["scorer"] = subject.clips[0].network.network[:16]
    asked = [name for name in INSTRUMENTS if name in found.absent or name in found.by_metric]
    absent = {name: found.absent[name] for name in asked if name in found.absent}
    facts |= dict.fromkeys(absent)
    if absent and len(absent) == len(asked):
        facts["instruments_absent_because"] = "; ".join(dict.fromkeys(absent.values()))
    return facts


def failures(subject: Workspace, found: Found) -> dict[str, Any]:
    """Images worth looking at, by the scores of the first CLIP and by what the reader sees, where these are there."""
    scores = cosines(subject, subject.clips[0]) if subject.clips else None
    wrong = None
    if CLASS in found.by_metric and CLASS not in found.absent:
        read = zip(subject.entries, subject.readings, strict=True)
        wrong = [["class"] if entry.get("label") not in (None, shape_of(reading)) else [] for entry, reading in read]
    elif subject.has(TRUTH):
        read = zip(subject.entries, subject.readings, strict=True)
        wrong = [wrong_attributes(entry, reading) if entry.get("truth") else [] for entry, reading in read]
    return worth_looking_at(subject.entries, scores, wrong)
