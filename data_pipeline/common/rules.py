"""The rules about a row's numbers: the one place that knows a limit, what it compares and the reason that it gives.

`select` asks them of declared sizes, before a request, `filter` of stored images, the data card of what was kept.

A rule looks at columns of n rows and marks those it drops. Rules are asked in order and a row belongs to the first
that marks it, so that counts by reason are exclusive and add up. A new rule: docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from data_pipeline.common.schema import (
    AESTHETIC,
    HEIGHT,
    SCORES,
    SHA256,
    SIMILARITY,
    SOURCE_SHA256,
    UNSAFE,
    URL,
    WATERMARK,
    WIDTH,
)

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from data_pipeline.common.opt_out import OptOut
    from raphael.base.config.data import FilterConfig, PictureConfig

Columns = Mapping[str, "np.ndarray"]  # part -> float64 (n,), NaN where null
Rule = tuple[str, Callable[[Columns], "np.ndarray"]]  # reason, columns -> bool (n,), True: drop
# Reasons that more than one module names, as reports have them
TOO_UNSAFE, OPTED_OUT = "unsafe", "opted out"
SMALLER = "smaller than its size"
SAME_BYTES, NEAR, EVALUATION = "duplicate picture", "near duplicate", "like an evaluation picture"


@dataclass(frozen=True)
class Limit:
    """A score is kept from `value` on ("min"), or strictly below it ("max")."""

    score: str
    kind: Literal["min", "max"]
    value: float
    reason: str

    @property
    def setting(self) -> str:
        return f"filter.{self.kind}_{self.score}"

    def drops(self, scores: np.ndarray | float) -> np.ndarray | bool:
        """A null, NaN here, passes every comparison."""
        return scores < self.value if self.kind == "min" else scores >= self.value

    def drops_all(self, low: float, high: float) -> bool:
        """Whether no score from low to high is kept."""
        return bool(self.drops(high if self.kind == "min" else low))


def limits(config: FilterConfig) -> dict[str, Limit]:
    """Of each score, in the order in which they are counted."""
    found = (
        Limit(AESTHETIC, "min", config.min_aesthetic, "aesthetic too low"),
        Limit(WATERMARK, "max", config.max_watermark, "watermarked"),
        Limit(UNSAFE, "max", config.max_unsafe, TOO_UNSAFE),
        Limit(SIMILARITY, "min", config.min_similarity, "caption unlike picture"),
    )
    return {limit.score: limit for limit in found}


def needed(config: FilterConfig, later: Collection[str] = ()) -> list[str]:
    """The scores without which a row is dropped. later: those that are computed after the download.

    `unsafe` fails closed by a setting of its own: who keeps images without an aesthetic score has not said that they
    may be anything.
    """
    missing = {score: config.missing_unsafe if score == UNSAFE else config.missing_score for score in SCORES}
    return [score for score in SCORES if missing[score] == "drop" and score not in later]


def hopeless(
    config: FilterConfig, low_high: Callable[[str], tuple[float, float] | None], later: Collection[str] = ()
) -> bool:
    """Whether the lowest and highest scores of some rows (None: unknown) prove that none of them is kept.

    Nulls and NaN are in no such range: nothing is proved by a score whose absence does not drop its row, nor by one of
    `later`, which a null may get, or which takes the place of the list's own.
    """
    known, ranges = limits(config), {score: low_high(score) for score in needed(config, later)}
    return any(pair is not None and known[score].drops_all(*pair) for score, pair in ranges.items())


def score_rules(config: FilterConfig, later: Collection[str] = ()) -> list[Rule]:
    """Scores, then size, then shape, in the order in which they are counted. A null passes every comparison; whether a
    null score is dropped is the first rules' business (`needed`)."""
    import numpy as np

    def too_small(c: Columns) -> np.ndarray:
        return (c[WIDTH] < config.min_side_px) | (c[HEIGHT] < config.min_side_px)

    def too_long(c: Columns) -> np.ndarray:  # with a ratio of 1 or more only the longer side can be too long
        return (c[WIDTH] > config.max_aspect_ratio * c[HEIGHT]) | (c[HEIGHT] > config.max_aspect_ratio * c[WIDTH])

    rules: list[Rule] = [
        (f"no {score} score", lambda c, score=score: np.isnan(c[score])) for score in needed(config, later)
    ]
    rules += [(limit.reason, lambda c, limit=limit: limit.drops(c[limit.score])) for limit in limits(config).values()]
    return [*rules, ("too small", too_small), ("too long and narrow", too_long)]


def size_rules(config: PictureConfig) -> list[Rule]:
    """Marks stored images that would have to grow to cover their size, where these are left out."""
    from raphael.base.images.sizes import must_grow

    if config.too_small != "drop":
        return []
    return [(SMALLER, lambda c: must_grow(c[HEIGHT], c[WIDTH], config.sizes_px))]


def apply(rules: Iterable[Rule], columns: Columns, alive: np.ndarray, dropped: dict[str, int]) -> np.ndarray:
    """The rows still alive after the rules, bool (n,); what each rule drops is added to `dropped` under its reason."""
    import numpy as np

    for reason, marks in rules:
        left = alive & ~marks(columns)
        dropped[reason] = dropped.get(reason, 0) + int(np.count_nonzero(alive)) - int(np.count_nonzero(left))
        alive = left
    return alive


def opt_out_rules(table: pa.Table, opt_out: OptOut) -> list[Rule]:
    """Marks rows whose image, as it came or as it is stored, or whose address is on the list."""
    import numpy as np

    if not opt_out:
        return []
    columns = (table[name].to_pylist() for name in (URL, SHA256, SOURCE_SHA256))
    rows = zip(*columns, strict=True)
    marks = np.fromiter((opt_out.has_url(url) or opt_out.has_sha256(digests) for url, *digests in rows), bool)
    return [(OPTED_OUT, lambda _: marks)]
