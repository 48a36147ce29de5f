"""Where it fails: what was asked held against what was read, relations by their parts, and the ceiling of each number.

The ceiling is what a perfect denoiser would reach: true images of held-out scenes as they were drawn (the reader's own
mistakes), and the same after the autoencoder's encoder and decoder (its loss beside them).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from raphael.evaluate.metrics.intervals import share
from raphael.evaluate.scenes.attributes import HEADLINE_SUITES, PICTURE, score
from raphael.evaluate.scenes.reader import ATTRIBUTES, ReadObject, SceneReading, judge, pairing

Judged = Sequence[tuple[dict[str, Any], SceneReading]]  # a truth in the form of prompts.json, and what was read
NOTHING = "nothing"
PARTS = ("two_objects", "both_shapes", "both_colours", "both_pairs", "right_side", "right_side_of_both_pairs")


def judged(entries: Sequence[dict[str, Any]], readings: Sequence[SceneReading], suite: str = "") -> Judged:
    """Truths with their readings, of the entries that have one (and are of that suite)."""
    pairs = zip(entries, readings, strict=True)
    return [(e["truth"], r) for e, r in pairs if e.get("truth") and suite in ("", e["suite"])]


def asked_and_read(pairs: Judged) -> dict[str, dict[str, dict[str, int]]]:
    """attribute -> asked -> read -> count, the most frequent first; "nothing" where nothing of that kind was read.

    Objects are paired as `judge` pairs them, by most agreement. A relation's read side is that of the two asked
    objects; "not both" where they were not both found.
    """
    counts: dict[str, dict[str, Counter]] = {attribute: {} for attribute in ATTRIBUTES}

    def add(attribute: str, asked: Any, read: Any) -> None:
        counts[attribute].setdefault(str(asked), Counter())[NOTHING if read is None else str(read)] += 1

    for truth, reading in pairs:
        if colour := (truth.get("background") or {}).get("colour"):
            add("background_colour", colour, reading.background_colour)
        asked = truth.get("objects") or []
        found = pairing(asked, reading.objects)
        for index, item in enumerate(asked):
            for attribute, name in (("shape_colour", "colour"), ("shape", "shape")):
                if item.get(name):
                    add(attribute, item[name], getattr(found.get(index), name, None))
        if truth.get("relation"):
            add("relation", truth["relation"]["kind"], _side(truth, reading))
        for attribute, name in (("count", "count"), ("text", "text"), ("style", "style")):
            if truth.get(name) is not None:
                add(attribute, truth[name], getattr(reading, name))
    return {
        attribute: {asked: _ordered(reads) for asked, reads in sorted(rows.items())}
        for attribute, rows in counts.items()
        if rows
    }


def relation_parts(pairs: Judged) -> dict[str, Any]:
    """Of the images whose prompt states a relation: share with each of PARTS right, as {part, part_n, _low, _high}.

    both_shapes, both_colours: each asked one was read, on whichever object; both_pairs: each with its own shape and
    colour. right_side: what `judge` says of the relation; of both_pairs: among the images where these are right.
    """
    outcomes: dict[str, list[bool]] = {part: [] for part in PARTS}
    for truth, reading in pairs:
        if not truth.get("relation"):
            continue
        asked = [(item["shape"], item["colour"]) for item in truth["objects"]]
        read = [(item.shape, item.colour) for item in reading.objects]
        outcomes["two_objects"].append(len(read) == len(asked))
        outcomes["both_shapes"].append(_within([shape for shape, _ in asked], [shape for shape, _ in read]))
        outcomes["both_colours"].append(_within([colour for _, colour in asked], [colour for _, colour in read]))
        outcomes["both_pairs"].append(_within(asked, read))
        outcomes["right_side"].append(bool(judge(reading, truth)["relation"]))
        if outcomes["both_pairs"][-1]:
            outcomes["right_side_of_both_pairs"].append(outcomes["right_side"][-1])
    found: dict[str, Any] = {}
    for part in PARTS if outcomes["two_objects"] else ():
        found |= share(part, outcomes[part])
    return found


def ceiling(
    entries: Sequence[dict[str, Any]], drawn: Sequence[SceneReading], decoded: Sequence[SceneReading]
) -> dict[str, Any]:
    """{"drawn": numbers, "decoded": numbers}: those of `score` and `relation_parts`, of what is read in true images."""
    found = {}
    for name, readings in (("drawn", drawn), ("decoded", decoded)):
        numbers = score(entries, readings)
        keys = [f"{key}{end}" for key in (*_headline(), PICTURE) for end in ("", "_n", "_low", "_high")]
        parts = relation_parts(judged(entries, readings, "relation"))
        found[name] = {key: numbers[key] for key in keys if numbers.get(key) is not None} | {"relation_parts": parts}
    return found


def _headline() -> list[str]:
    return [f"{attribute}_accuracy" for attribute in HEADLINE_SUITES]


def _within(asked: list[Any], read: list[Any]) -> bool:
    return not Counter(asked) - Counter(read)


def _ordered(reads: Counter) -> dict[str, int]:
    return dict(sorted(reads.items(), key=lambda item: (-item[1], item[0])))


def _side(truth: dict[str, Any], reading: SceneReading) -> str:
    """The side at which the relation's subject was read, by the larger distance of the centres."""
    relation, asked = truth["relation"], truth["objects"]
    subject, other = (_find(asked[relation[role]], reading.objects) for role in ("subject", "object"))
    if subject is None or other is None or subject is other:
        return "not both"
    across, down = (a - b for a, b in zip(subject.centre, other.centre, strict=True))
    if abs(across) >= abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def _find(asked: dict[str, Any], read: Sequence[ReadObject]) -> ReadObject | None:
    """The read object of that colour, of that shape too where there are several."""
    found = [item for item in read if item.colour == asked["colour"]]
    return max(found, key=lambda item: item.shape == asked["shape"], default=None)
