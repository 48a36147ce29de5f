"""Means over seeds with their standard errors, and differences of such means."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Of one number over the seeds of an arm."""

    mean: float
    error: float  # standard error of the mean; NaN for a single seed
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), error, tuple(values))


@dataclass(frozen=True)
class Difference:
    """An arm's mean minus the baseline's."""

    value: float
    error: float

    @classmethod
    def of(cls, arm: Spread, baseline: Spread) -> Difference:
        return cls(arm.mean - baseline.mean, math.hypot(arm.error, baseline.error))

    @property
    def told(self) -> bool:
        return abs(self.value) > 2 * self.error  # False for NaN
