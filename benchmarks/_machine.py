"""What a result has to say about where it was measured, and where it is kept."""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path
from typing import Any

from raphael.base.stage import write_json

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores, threads and torch's version; with a GPU also its name."""
    import torch

    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    facts = {
        "processor": found.group(1).strip() if found else "unknown",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def judged(case: str, ours: float, peer: float, unit: str, target: str = "") -> dict[str, Any]:
    """A row of a summary: ratio = ours / peer, target "<= 1.0" or ">= 2" of that ratio, or "" where there is none."""
    ours, peer = float(ours), float(peer)  # NumPy's numbers are none of JSON's
    ratio = ours / peer
    met = None
    if target:
        sign, bound = target.split()
        met = ratio <= float(bound) if sign == "<=" else ratio >= float(bound)
    row = {"case": case, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio, "target": target, "met": met}
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}


def within(case: str, got: float, limit: float, unit: str) -> dict[str, Any]:
    """A row of a summary for what has a limit of its own and no peer: the limit stands in the peer's place."""
    return judged(f"{case}, beside its limit", got, limit, unit, "<= 1.0")


def result_file(name: str) -> Path:
    """Of this device and month."""
    here = machine()
    device = re.sub(r"\W+", "-", here["gpu"]).lower() if "gpu" in here else f"{here['cores']}cores"
    return RESULTS / f"{name}-{device}-{datetime.date.today():%Y%m}.json"


def keep(name: str, rows: list[dict[str, Any]], summary: list[dict[str, Any]], **facts: Any) -> Path:
    """Write results/<name>-<device>-<yyyymm>.json and say where. summary: rows of `judged`, for the table of all."""
    here = {"benchmark": name, "measured": f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}", **machine()}
    file = result_file(name)
    write_json(file, {**here, **facts, "summary": summary, "results": rows})
    print(f"\nkept in benchmarks/results/{file.name}")
    return file
