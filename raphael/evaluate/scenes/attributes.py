"""Asked and read: the exact truth of drawn scenes, counted.

Every picture is read by raphael/evaluate/scenes/reader.py and judged against the truth its prompt came with. Two things
stand beside each share so that one can tell what it is worth: its 95 % interval, and the share that the same pictures
reach against the truths of OTHER prompts of their suite (chance: what a model that ignores its prompt would reach).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from raphael.evaluate.metrics.intervals import share
from raphael.evaluate.scenes.reader import ATTRIBUTES, SceneReading, judge

HEADLINE_SUITES = {  # the pictures behind each number at the top; None: every picture whose prompt states it
    "background_colour": "single",
    "shape_colour": "single",
    "shape": "single",
    "relation": "relation",
    "count": "count",
    "text": "text",
    "style": None,
}
CHANCE_DRAWS = 5
PICTURE = "picture_accuracy"  # share of pictures in which everything that the prompt states is right


def score(entries: Sequence[dict[str, Any]], readings: Sequence[SceneReading]) -> dict[str, Any]:
    """entries: images.json's, each with suite and truth, one per reading.

    -> <attribute>_accuracy, _n, _low, _high at the top, picture_accuracy too; `chance`: {<attribute>_accuracy};
    `by_suite`: the same.
    """
    judged = [(entry, reading) for entry, reading in zip(entries, readings, strict=True) if entry.get("truth")]
    verdicts = [(entry["suite"], judge(reading, entry["truth"])) for entry, reading in judged]
    shuffled = _against_others(judged)
    result: dict[str, Any] = {}
    for attribute, suite in HEADLINE_SUITES.items():
        result |= share(f"{attribute}_accuracy", _outcomes(verdicts, attribute, suite))
    chance = {}
    for attribute, suite in HEADLINE_SUITES.items():
        outcomes = _outcomes(shuffled, attribute, suite)
        chance[f"{attribute}_accuracy"] = round(sum(outcomes) / len(outcomes), 6) if outcomes else None
    result |= share(PICTURE, _whole(verdicts))
    outcomes = _whole(shuffled)
    chance[PICTURE] = round(sum(outcomes) / len(outcomes), 6) if outcomes else None
    result["chance"] = chance
    result["by_suite"] = {}
    for suite in sorted({suite for suite, _ in verdicts}):
        rows: dict[str, Any] = {"pictures": sum(name == suite for name, _ in verdicts)}
        rows |= share(PICTURE, _whole([item for item in verdicts if item[0] == suite]))
        for attribute in ATTRIBUTES:
            outcomes = _outcomes(verdicts, attribute, suite)
            if outcomes:
                rows |= share(f"{attribute}_accuracy", outcomes)
        result["by_suite"][suite] = rows
    return result


def _outcomes(verdicts: list[tuple[str, dict[str, bool | None]]], attribute: str, suite: str | None) -> list[bool]:
    return [
        bool(verdict[attribute])
        for name, verdict in verdicts
        if verdict[attribute] is not None and suite in (None, name)
    ]


def wrong_attributes(entry: dict[str, Any], reading: SceneReading) -> list[str]:
    """What the prompt states and the picture does not show."""
    return [name for name, right in judge(reading, entry["truth"]).items() if right is False]


def _whole(verdicts: list[tuple[str, dict[str, bool | None]]]) -> list[bool]:
    return [all(right is not False for right in verdict.values()) for _, verdict in verdicts]


def _against_others(judged: list[tuple[dict[str, Any], SceneReading]]) -> list[tuple[str, dict[str, bool | None]]]:
    """Every picture judged against the truths of a few other pictures of its suite, drawn once and for all.

    Drawn, not at fixed distances: prompts come in cycles (one, two, three objects) that distances could hit.
    """
    verdicts = []
    for suite in sorted({entry["suite"] for entry, _ in judged}):
        members = [item for item in judged if item[0]["suite"] == suite]
        rng = random.Random(suite)
        for index, (_, reading) in enumerate(members):
            for place in rng.sample(range(len(members) - 1), min(CHANCE_DRAWS, len(members) - 1)):
                other = members[place + (place >= index)][0]
                verdicts.append((suite, judge(reading, other["truth"])))
    return verdicts
