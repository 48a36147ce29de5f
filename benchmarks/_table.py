"""One table of what the newest result files say: python benchmarks/_table.py [FOLDER]"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = ("benchmark", "case", "ours", "peer", "unit", "ours / peer", "target", "met")
MET = {True: "yes", False: "NO", None: ""}


def newest(folder: Path) -> list[dict[str, Any]]:
    """The newest result of every benchmark on every kind of hardware, by name. Those without a summary are left out."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if "summary" not in result:
            continue
        key = (result["benchmark"], result.get("gpu", result["processor"]))
        if key not in found or result["measured"] > found[key]["measured"]:
            found[key] = result
    return [found[key] for key in sorted(found)]


def table_rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows = []
    for result in results:
        for row in result["summary"]:
            numbers = [f"{row[key]:,.4g}" for key in ("ours", "peer")]
            ratio = f"{row['ratio']:.3g}"
            rows.append(
                (result["benchmark"], row["case"], *numbers, row["unit"], ratio, row["target"], MET[row["met"]])
            )
    return rows


def render(results: list[dict[str, Any]]) -> str:
    rows = [COLUMNS, *table_rows(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    where = {
        f"{result['benchmark']}: {result.get('gpu', result['processor'])}, {result['cores']} cores, "
        f"torch {result['torch']}, {result['measured']}": None
        for result in results
    }
    judged = [row["met"] for result in results for row in result["summary"] if row["met"] is not None]
    return "\n".join([*lines, "", *where, f"{sum(judged)} of {len(judged)} targets met"])


def main(folder: Path) -> int:
    results = newest(folder)
    if not results:
        print(f"{folder}: got no result with a summary, expected at least one; run make bench", file=sys.stderr)
        return 1
    print(render(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results"))
