"""What the points of a sweep came to, figure by figure: means over seeds with standard errors, or why there is none."""

from __future__ import annotations

import math
from typing import Any

from raphael.base.stage import StageError
from raphael.evaluate.metrics.spread import Spread

SAME_ON_AN_AXIS = ("n", "n_reference", "reference", "networks", "distance", "score")


def gather(series: dict[str, dict[float, list[dict[str, Any]]]]) -> dict[str, Any]:
    """name -> number -> results (one a seed), as a figure: {"series": {name: [{x, distance, score, metrics}]}, facts}.

    Raises StageError where the results were not measured alike: points of different n or networks share no axis.
    """
    results = [one for points in series.values() for ones in points.values() for one in ones]
    check_alike(results)
    figure: dict[str, Any] = {name: results[0][name] for name in SAME_ON_AN_AXIS}
    figure["series"] = {name: [row(x, ones) for x, ones in sorted(points.items())] for name, points in series.items()}
    return figure


def check_alike(results: list[dict[str, Any]]) -> None:
    for name in SAME_ON_AN_AXIS:
        values = {str(one[name]) for one in results}
        if len(values) > 1:
            raise StageError(
                f"sweep: got points with {name} {' and '.join(sorted(values)[:2])} for one axis, expected one: they do "
                "not compare"
            )


def row(x: float, ones: list[dict[str, Any]]) -> dict[str, Any]:
    """One number's point: what its seeds measured, each with mean, standard error (null for one seed) and values."""
    names = [name for name in ones[0]["metrics"] if all(name in one["metrics"] for one in ones)]
    metrics = {name: spread([one["metrics"][name] for one in ones]) for name in names}
    return {
        "x": x,
        "seeds": len(ones),
        "distance": metrics[ones[0]["distance"]],
        "score": metrics[ones[0]["score"]],
        "metrics": metrics,
    }


def spread(values: list[float]) -> dict[str, Any]:
    found = Spread.of(values)
    return {"mean": found.mean, "error": found.error if math.isfinite(found.error) else None, "values": values}


def absent(reason: str) -> dict[str, Any]:
    return {"absent": reason}
