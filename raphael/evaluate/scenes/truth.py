"""The truth of drawn scenes as metrics: what was asked held against what the scene reader sees in each image."""

from __future__ import annotations

from raphael.evaluate.metric import Found, Number
from raphael.evaluate.scenes.attributes import score
from raphael.evaluate.scenes.breakdown import asked_and_read as asked_and_read_of
from raphael.evaluate.scenes.breakdown import judged
from raphael.evaluate.scenes.breakdown import relation_parts as relation_parts_of
from raphael.evaluate.subject import Subject

READER = "scene_reader"
READER_VERSION = "v1"  # another one wherever the reader reads otherwise


def scenes(subject: Subject) -> Found:
    """Attribute by attribute, with Wilson's intervals and chance, at the top and by suite."""
    facts, found = score(subject.entries, subject.readings), Found()
    for name in [name for name in facts if name.endswith("_accuracy")]:
        ends = {end: facts[f"{name}_{end}"] for end in ("low", "high")}
        chance = facts["chance"][name]
        found.numbers.append(Number(name, facts[name], READER, **ends, asked=facts[f"{name}_n"], chance=chance))
    found.facts["by_suite"] = facts["by_suite"]
    return found


def asked_and_read(subject: Subject) -> Found:
    """attribute -> asked -> read -> count (raphael/evaluate/scenes/breakdown.py)."""
    return Found(facts={"asked_and_read": asked_and_read_of(judged(subject.entries, subject.readings))})


def relation_parts(subject: Subject) -> Found:
    """Shares of a relation's parts, told in facts: they are conditional on one another."""
    relations = judged(subject.entries, subject.readings, "relation")
    return Found(facts={"relation_parts": relation_parts_of(relations)})
