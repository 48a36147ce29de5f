"""`raphael plan --rows 2e9 --machines 64`: hours, terabytes and dollars of the data stages, and what is full first.

From measured rates (rates.json, measured again by benchmarks/rates.py) and the shares that one names; every line shows
its arithmetic. What nobody has measured on this kind of machine is named, and left out of the sums.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from data_pipeline.tools.scale.arithmetic import Asked, Part, Planned, plan, too_large
from data_pipeline.tools.scale.rates import GIVEN, Rates, read_rates
from raphael.base.files import written_whole
from raphael.base.stage import StageError, one_clear_line

BEGIN, END = "<!-- begin: raphael plan {} -->", "<!-- end -->"
HELP = {  # of Asked's numbers: (what it is, lowest, highest, whether whole)
    "rows": ("of the list", 1, 1e13, True),
    "machines": ("that work at the same time", 1, 1e6, True),
    "workspaces": ("parts of the list, each with stages of its own", 1, 1e6, True),
    "cores": ("of a machine", 1, 1e4, True),
    "gpus": ("of a machine", 0, 1e3, True),
    "memory_gb": ("of a machine", 1, 1e6, False),
    "network_gbit": ("a second, of a machine", 1e-3, 1e5, False),
    "links_per_s": ("that a machine's resolver and the web allow", 1e-3, 1e9, False),
    "alive": ("share of the links that become images", 1e-6, 1, False),
    "image_kb": ("of a stored image", 1e-3, 1e6, False),
    "selected": ("share of the rows that `select` keeps", 1e-6, 1, False),
    "filtered": ("share of the images that `filter` and `captions` keep", 1e-6, 1, False),
    "machine_usd": ("dollars a machine and hour", 0, 1e6, False),
    "gpu_usd": ("dollars a GPU and hour, on top", 0, 1e6, False),
    "storage_usd": ("dollars a GB and month", 0, 1e6, False),
    "months": ("that shards and records are kept", 0, 1e4, False),
}
SWITCHES = {"score": "with scores computed by a CLIP", "near_duplicates": "with the search for images that look alike"}
KEPT = ("shards", "records")  # what is paid for by the month


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `Asked`, and how to show it."""
    for field in fields(Asked):
        name = f"--{field.name.replace('_', '-')}"
        if field.name in HELP:
            words, *_ = HELP[field.name]
            default = {"required": True} if field.name == "rows" else {"default": field.default}
            words = words if field.name == "rows" else f"{words} (default: %(default)s)"
            parser.add_argument(name, type=_number(name, *HELP[field.name][1:]), metavar="N", help=words, **default)
        elif field.name in SWITCHES:
            parser.add_argument(name, action="store_true", help=SWITCHES[field.name])
    text = "that images are encoded at, such as 512x768 (default: 256x256)"
    parser.add_argument("--size", dest="size_px", type=_size, default=(256, 256), metavar="HxW", help=text)
    text = "a rate of your own, such as encode.gpu=60 (Mpx/s), instead of the table's; may be repeated"
    parser.add_argument("--rate", action="append", default=[], metavar="NAME=VALUE", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _number(name: str, low: float, high: float, whole: bool) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (whole and value != int(value)):  # NaN is in no range
            kind = "a whole number" if whole else "a number"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {kind} from {low:g} to {high:g}")
        return int(value) if whole else value

    return read


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and 8 <= int(side) <= 8192 for side in sides):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected HEIGHTxWIDTH in pixels, 8 to 8192 each")
    return int(sides[0]), int(sides[1])


def asked_of(arguments: argparse.Namespace) -> tuple[Asked, Rates]:
    """Raises StageError."""
    asked = Asked(**{field.name: getattr(arguments, field.name) for field in fields(Asked)})
    if asked.workspaces > asked.cores * asked.machines:
        raise StageError(
            f"--workspaces: got {asked.workspaces}, expected at most a core each, {asked.cores * asked.machines}: each "
            "has a process of its own"
        )
    if asked.workspaces > asked.rows:
        raise StageError(f"--workspaces: got {asked.workspaces} for {asked.rows} rows, expected a row each at least")
    return asked, read_rates().given(arguments.rate)


def as_json(asked: Asked, rates: Rates) -> dict[str, Any]:
    """All of it: what was asked, every part with its arithmetic, sums. Seconds, bytes and dollars."""
    stages = plan(asked, rates)
    used = {rate.name: rate for stage in stages for phase in stage.phases for part in phase for *_, rate in part.terms}
    written = {name: bytes_ for stage in stages for name, bytes_ in stage.written.items()}
    stored = sum(written[name] for name in KEPT) / 1e9 * asked.storage_usd * asked.months
    worked = sum(stage.usd(asked) for stage in stages)
    longest = max(stages, key=lambda stage: stage.seconds)
    return {
        "asked": {field.name: getattr(asked, field.name) for field in fields(Asked)},
        "measured_on": rates.machine,
        "rates": {
            name: {"value": rate.value, "unit": rate.unit, "origin": rate.origin, "how": rate.how}
            for name, rate in sorted(used.items())
        },
        "rows": {"links": asked.links, "images": asked.images, "kept": asked.kept},
        "stages": [_stage_json(stage, asked) for stage in stages],
        "total": {
            "seconds": sum(stage.seconds for stage in stages),
            "bytes": written,
            "usd": {"machines": worked, "storage": stored, "sum": worked + stored},
            "first_bottleneck": {
                "stage": longest.name,
                "part": longest.bottleneck.name,
                "relief": longest.bottleneck.lanes.relief,
            },
            "not_measured": sorted({name for stage in stages for name in stage.unknown}),
        },
        "does_not_fit": too_large(asked, rates),
    }


def _stage_json(stage: Planned, asked: Asked) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "seconds": stage.seconds,
        "machines": stage.machines,
        "usd": stage.usd(asked),
        "first_bottleneck": {"part": stage.bottleneck.name, "relief": stage.bottleneck.lanes.relief},
        "not_measured": stage.unknown,
        "phases": [[_part_json(part) for part in phase] for phase in stage.phases],
    }


def _part_json(part: Part) -> dict[str, Any]:
    return {
        "part": part.name,
        "seconds": part.seconds,
        "formula": part.formula,
        "lanes": part.lanes.count,
        "not_measured": part.unknown,
    }


def as_text(asked: Asked, rates: Rates) -> str:
    """Markdown: a table of the stages, the arithmetic, the sums, what was measured and what was not."""
    whole = as_json(asked, rates)
    lines = [_heading(asked), "", "| stage | hours | machines | dollars | first bottleneck |", "| --- " * 5 + "|"]
    for stage in whole["stages"]:
        unknown = "; not in it: " + ", ".join(stage["not_measured"]) if stage["not_measured"] else ""
        hours = f"{_hours(stage['seconds'])}{' and more' if unknown else ''}"
        cells = [stage["stage"], hours, stage["machines"], _usd(stage["usd"])]
        lines.append("| " + " | ".join(map(str, [*cells, stage["first_bottleneck"]["part"] + unknown])) + " |")
    total = whole["total"]
    first = total["first_bottleneck"]
    lines += [
        f"| together | {_hours(total['seconds'])}{' and more' if total['not_measured'] else ''} | | "
        f"{_usd(total['usd']['machines'])} | "
        f"{first['stage']}: {first['part']}; relief: {first['relief']} |",
        "",
        "| what lies on disk | TB |",
        "| --- | ---: |",
        *(f"| {name} | {bytes_ / 1e12:,.3g} |" for name, bytes_ in total["bytes"].items()),
        "",
        f"Shards and records, {asked.months:g} month{'' if asked.months == 1 else 's'} at ${asked.storage_usd:g} a GB: "
        f"{_usd(total['usd']['storage'])}; with the machines {_usd(total['usd']['sum'])}.",
    ]
    lines += [f"Does not fit: {sentence}." for sentence in whole["does_not_fit"]]
    lines += [
        "",
        'The arithmetic (parts of a stage run at the same time; after "then" when those before are done):',
        "",
    ]
    for stage in whole["stages"]:
        for number, phase in enumerate(stage["phases"]):
            for part in phase:
                then = "then " if number else ""
                hours = "?" if part["not_measured"] else f"{_hours(part['seconds'])} h"
                lines.append(f"- {stage['stage']}, {then}{part['part']}: {part['formula']} = {hours}")
    lines += ["", *_origins(whole)]
    return "\n".join(lines)


def _heading(asked: Asked) -> str:
    gpus = f" and {asked.gpus} GPU{'' if asked.gpus == 1 else 's'}" if asked.gpus else " without GPUs"
    return (
        f"{asked.rows:,} rows, {asked.machines} machines of {asked.cores} cores{gpus}, {asked.workspaces} workspaces: "
        f"{asked.links:,.0f} links, {asked.images:,.0f} images ({asked.alive:.0%} alive), {asked.kept:,.0f} kept, "
        f"encoded at {asked.size_px[0]} x {asked.size_px[1]} px. A machine costs ${asked.machine_usd:g} an hour"
        + (f", a GPU ${asked.gpu_usd:g}." if asked.gpus else ".")
    )


def _origins(whole: dict[str, Any]) -> list[str]:
    """Of which rates what is said: by whom they were measured, which are others' or yours, which nobody knows."""
    by_origin: dict[str, list[str]] = {}
    for name, rate in whole["rates"].items():
        by_origin.setdefault(rate["origin"], []).append(name)
    machine = whole["measured_on"]
    lines = []
    for origin, names in sorted(by_origin.items()):
        where = {
            "measured": f"measured by benchmarks/rates.py ({machine['processor']}, {machine['measured']})",
            "published": "published by others, not measured here",
            "asked": "what was asked for",
            GIVEN: "given with --rate",
        }.get(origin, "not measured on this kind of machine, and left out of the sums")
        lines.append(f"- {where}: {', '.join(names)}")
    return lines


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.3g}" if seconds < 3.6e6 else f"{seconds / 3600:,.0f}"


def _usd(value: float) -> str:
    return f"${value:,.2f}" if value < 10 else f"${value:,.0f}"


def show(arguments: argparse.Namespace) -> None:
    """Raises StageError."""
    asked, rates = asked_of(arguments)
    print(json.dumps(as_json(asked, rates), indent=2) if arguments.json else as_text(asked, rates))


def written_again(page: str) -> str:
    """A page of Markdown whose plans, between their marks, are made anew. Raises StageError."""
    head, mark = BEGIN.split("{}")
    parts = page.split(head)
    for number, part in enumerate(parts[1:], 1):
        told, _, rest = part.partition(mark)
        if END not in rest:
            raise StageError(f"a plan without its end: expected {END} after {head}{told}{mark}")
        parser = argparse.ArgumentParser(prog="raphael plan")
        add_options(parser)
        text = as_text(*asked_of(parser.parse_args(told.split())))
        parts[number] = f"{told}{mark}\n\n{text}\n\n{END}{rest.partition(END)[2]}"
    return head.join(parts)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="raphael plan",
        description="Hours, terabytes and dollars of the data stages from measured rates, and what is full first.",
        epilog="--write PAGE.md alone: make the plans of a page anew, between their marks",
    )
    add_options(parser)
    with one_clear_line("raphael plan") as outcome:
        if len(argv) == 2 and argv[0] == "--write":
            page = Path(argv[1])
            text = written_again(page.read_text(encoding="utf-8"))
            with written_whole(page) as temporary:
                temporary.write_text(text, encoding="utf-8")
        else:
            show(parser.parse_args(argv))
    return outcome.status


if __name__ == "__main__":
    raise SystemExit(main())
