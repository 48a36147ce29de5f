"""The fixed prompts whose images are generated again and again while training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

COLUMNS = 4  # of the grids in models/<system>/samples


def fixed_prompts(own: Sequence[str], most: int, entries: Iterable[dict[str, Any]]) -> list[str]:
    """train.sample_prompts where they are set, else the first `most` held-out ones, of each suite in turn."""
    if own:
        return list(own)
    suites: dict[str, list[str]] = {}
    for entry in entries:
        suites.setdefault(entry["suite"], []).append(entry["prompt"])
    longest = max(map(len, suites.values()), default=0)
    turns = [prompts[i] for i in range(longest) for prompts in suites.values() if i < len(prompts)]
    return list(dict.fromkeys(turns))[:most]
