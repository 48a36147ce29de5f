"""The rules about a row's numbers, shared by `select` (declared sizes, before a request) and `filter` (stored
pictures).

A rule looks at columns of n rows and marks those it drops. Rules are asked in order and a row belongs to the first
that marks it, so that counts by reason are exclusive and add up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from data_pipeline.schema import AESTHETIC, HEIGHT, SCORES, SIMILARITY, UNSAFE, WATERMARK, WIDTH

if TYPE_CHECKING:
    import numpy as np

    from raphael.config_data import FilterConfig

Columns = Mapping[str, "np.ndarray"]  # part -> float64 (n,), NaN where null
Rule = tuple[str, Callable[[Columns], "np.ndarray"]]  # reason, columns -> bool (n,), True: drop


def score_rules(config: FilterConfig, later: Collection[str] = ()) -> list[Rule]:
    """Scores, then size, then shape, in the order in which they are counted. A null passes every comparison; whether a
    null score is dropped is the first rule's business (`missing_score`). later: scores that are computed after the
    download, so that a row is not dropped for having none yet."""
    import numpy as np

    def too_small(c: Columns) -> np.ndarray:
        return (c[WIDTH] < config.min_side_px) | (c[HEIGHT] < config.min_side_px)

    def too_long(c: Columns) -> np.ndarray:  # with a ratio of 1 or more only the longer side can be too long
        return (c[WIDTH] > config.max_aspect_ratio * c[HEIGHT]) | (c[HEIGHT] > config.max_aspect_ratio * c[WIDTH])

    rules: list[Rule] = []
    if config.missing_score == "drop":
        rules += [
            (f"no {score} score", lambda c, score=score: np.isnan(c[score])) for score in SCORES if score not in later
        ]
    return rules + [
        ("aesthetic too low", lambda c: c[AESTHETIC] < config.min_aesthetic),
        ("watermarked", lambda c: c[WATERMARK] >= config.max_watermark),
        ("unsafe", lambda c: c[UNSAFE] >= config.max_unsafe),
        ("caption unlike picture", lambda c: c[SIMILARITY] < config.min_similarity),
        ("too small", too_small),
        ("too long and narrow", too_long),
    ]


def apply(rules: Iterable[Rule], columns: Columns, alive: np.ndarray, dropped: dict[str, int]) -> np.ndarray:
    """The rows still alive after the rules, bool (n,); what each rule drops is added to `dropped` under its reason."""
    import numpy as np

    for reason, marks in rules:
        left = alive & ~marks(columns)
        dropped[reason] = dropped.get(reason, 0) + int(np.count_nonzero(alive)) - int(np.count_nonzero(left))
        alive = left
    return alive
