"""The Metric seam: a name, which way is better, what it needs, and a function of the subject that is measured.

    metric = metric_named("frechet")              raphael/evaluate/catalogue.py
    found = measure([metric], subject)            every number that its needs allow, and why the others are absent

Whoever measures (the stage evaluate, `raphael evaluate --images`, a sweep) has a Subject of its own and takes the
metrics from a protocol; a metric knows the Subject and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from raphael.evaluate.subject import NEEDS, Pieces, Subject

DIGITS = 6  # of the numbers in reports/evaluate.json


@dataclass(frozen=True)
class Number:
    """One result. value None: nothing was there to judge. low, high: its 95 % interval. asked: outcomes behind a
    share, None where it is a mean over all images. chance: what ignoring the prompts would give."""

    name: str
    value: float | None
    network: str = ""  # what read the images: a sha256 of weights, or a reader's name
    low: float | None = None
    high: float | None = None
    asked: int | None = None
    chance: float | None = None
    more: dict[str, Any] = field(default_factory=dict)  # constants of the formula: k, subset_size
    reference: str = ""  # in words, where a distance is to something

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"{self.name}: got {self.value}, expected a finite number")

    def flat(self) -> dict[str, Any]:
        """As keys of reports/evaluate.json: NAME; of a share NAME_n, _low, _high; of a mean NAME_interval."""
        facts: dict[str, Any] = {self.name: _rounded(self.value)}
        if self.reference:
            facts[f"{self.name}_reference"] = self.reference
        if self.asked is not None:
            return facts | {
                f"{self.name}_n": self.asked,
                f"{self.name}_low": _rounded(self.low),
                f"{self.name}_high": _rounded(self.high),
            }
        if self.low is not None:
            facts[f"{self.name}_interval"] = [_rounded(self.low), _rounded(self.high)]
        return facts


@dataclass
class Found:
    """numbers, what else is told beside them, and why a metric is absent. by_metric: names of each one's numbers."""

    numbers: list[Number] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    by_metric: dict[str, list[str]] = field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """All of it as keys of reports/evaluate.json; `chance` holds the numbers' chances by name."""
        flat: dict[str, Any] = {}
        for number in self.numbers:
            flat |= number.flat()
        chances = {number.name: _rounded(number.chance) for number in self.numbers if number.asked is not None}
        return flat | ({"chance": chances} if chances else {}) | self.facts


@dataclass(frozen=True)
class Metric:
    """better: of its numbers; None where neither way is, or where they are several. needs: of NEEDS. compute gives
    the numbers of a subject that has them. keys: a regular expression of its numbers' names; "": they are told in
    facts alone. about: what it says, in words. pieces: what compute asks for by subject.computed(name, pieces)."""

    name: str
    better: Literal["higher", "lower"] | None
    needs: tuple[str, ...]
    compute: Callable[[Subject], Found]
    about: str
    keys: str = ""
    pieces: Pieces | None = None

    def __post_init__(self) -> None:
        if unknown := [need for need in self.needs if need not in NEEDS]:
            raise ValueError(f"{self.name}: needs {unknown[0]!r}, expected some of {', '.join(NEEDS)}")


def measure(metrics: Iterable[Metric], subject: Subject) -> Found:
    """Every metric whose needs are there; of the others, what is missing and what makes it."""
    found = Found()
    for metric in metrics:
        missing = [why for need in metric.needs if (why := subject.missing(need))]
        if missing:
            found.absent[metric.name] = "; ".join(dict.fromkeys(missing))
            continue
        one = metric.compute(subject)
        found.numbers += one.numbers
        found.facts |= one.facts
        found.absent |= one.absent
        found.by_metric[metric.name] = [number.name for number in one.numbers]
    return found


def _rounded(value: float | None) -> float | None:
    return round(value, DIGITS) if isinstance(value, float) else value
