"""The rates that a plan counts with: rates.json, written by `benchmarks/rates.py --write`.

A rate is what one lane (a core, a process, a GPU) does in a second, or the bytes that an item takes. One that nobody
has measured on this kind of machine has no value, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raphael.base.stage import StageError, read_json

FILE = Path(__file__).with_name("rates.json")
MEASURED, GIVEN, UNKNOWN = "measured", "given", "not measured"


@dataclass(frozen=True)
class Rate:
    """value: of `unit`, above 0; None: nobody has measured it. how: by what, on what."""

    name: str
    value: float | None
    unit: str
    how: str
    origin: str = MEASURED


@dataclass(frozen=True)
class Rates:
    """By name. machine: what they were measured on."""

    machine: dict[str, Any]
    by_name: dict[str, Rate]

    def __getitem__(self, name: str) -> Rate:
        return self.by_name[name]

    def given(self, told: Iterable[str]) -> Rates:
        """With others in their place: "encode.gpu=900" each. Raises StageError."""
        changed = dict(self.by_name)
        for text in told:
            name, equals, value = text.partition("=")
            if not equals or name not in changed:
                raise StageError(f"--rate: got {text!r}, expected NAME=VALUE, the name one of {', '.join(changed)}")
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if not (math.isfinite(number) and number > 0):
                raise StageError(
                    f"--rate: got {text!r}, expected {name}=VALUE, a number above 0 ({changed[name].unit})"
                )
            changed[name] = replace(changed[name], value=number, origin=GIVEN, how="given with --rate")
        return replace(self, by_name=changed)


def read_rates(path: Path = FILE) -> Rates:
    """Raises StageError where the table is missing, damaged, or holds what is no rate."""
    table = read_json(path)
    found = {}
    try:
        for name, entry in table["rates"].items():
            value = entry["value"]
            if value is not None and not (math.isfinite(value) and value > 0):
                raise StageError(f"{path}: {name}: got {value!r}, expected a number above 0, or null where unmeasured")
            origin = UNKNOWN if value is None else MEASURED
            found[name] = Rate(name, value, entry["unit"], entry["how"], origin)
        return Rates(table["machine"], found)
    except (KeyError, TypeError, AttributeError) as error:
        raise StageError(
            f"{path}: got a table without {error}, expected rates with value, unit and how, and a machine; write it "
            "again with benchmarks/rates.py --write"
        ) from None
