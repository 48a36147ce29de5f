"""What a result has to say about where it was measured, and where it is kept."""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path
from typing import Any

from raphael.stage import write_json

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


def keep(name: str, rows: list[dict[str, Any]], **facts: Any) -> Path:
    """Write results/<name>-<device>-<yyyymm>.json and say where."""
    here = machine()
    device = re.sub(r"\W+", "-", here["gpu"]).lower() if "gpu" in here else f"{here['cores']}cores"
    file = RESULTS / f"{name}-{device}-{datetime.date.today():%Y%m}.json"
    write_json(file, {**here, **facts, "results": rows})
    print(f"\nkept in benchmarks/results/{file.name}")
    return file
