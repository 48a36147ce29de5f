"""Attacks on what the project starts and reads, run for real against it: `make attack`.

A table at the end has what was aimed at, what was tried, in how many disguises (`ways.py`), and what came of it. An
attack proves nothing unless it would succeed where the door is open, so each has its control: the same requests by
somebody who may. Sockets are loopback's, commands write one file, and nothing is left behind.

To add an attack: a `test_*.py` here; `tried(target, way, what, outcome)` for each attempt, after it was refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

TABLE: dict[tuple[str, str], list[tuple[str, str]]] = {}  # (target, what) -> [(disguise, what came of it)]
HEAD = ("target", "tried", "disguises", "came of it")


@pytest.fixture(scope="session")
def tried() -> Callable[[str, str, str, str], None]:
    """Note an attempt that was refused: target, disguise, what was tried, what came of it."""
    return lambda target, way, what, outcome: TABLE.setdefault((target, what), []).append((way, outcome))


def pytest_terminal_summary(terminalreporter, config) -> None:
    if not TABLE or not any("attacks" in argument for argument in config.args):
        return
    rows = [HEAD]
    for (target, what), attempts in TABLE.items():
        outcomes = Counter(outcome for _, outcome in attempts)
        came = ", ".join(f"{outcome} ({count})" for outcome, count in outcomes.items())
        rows.append((target, what, str(len({way for way, _ in attempts})), came))
    widths = [max(map(len, column)) for column in zip(*rows)]
    terminalreporter.section(f"{sum(map(len, TABLE.values()))} attempts, all refused unless a test above failed")
    for row in rows:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
