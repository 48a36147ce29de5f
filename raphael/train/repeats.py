"""Images that come more often than others in an epoch, as kohya's folders say it (docs/data.md)."""

from __future__ import annotations

from typing import Any

import numpy as np

from raphael.train.heldout import Subset

REPEATS = "repeats"  # of the records' facts: {key: how often}, of those that come more than once


def repeated(data: Any, facts: dict[str, Any]) -> Any:
    """The data set with each record as often as the facts say, each time a sample of its own with noise of its own;
    the data itself where they say nothing."""
    counts = facts.get(REPEATS)
    if not counts:
        return data
    times = np.fromiter((counts.get(key, 1) for key in data.keys), np.int64, len(data))
    return Subset(data, np.repeat(np.arange(len(data)), times))
