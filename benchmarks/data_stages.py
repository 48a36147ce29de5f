"""What the data stages make of three kinds of lists, stage by stage, with every dropped row's reason and the seconds.

scenes: the drawn corpus and its broken site. coco: photographs and captions of ../shared/data/coco. laion: real rows of
LAION (../shared/data/laion) against a rehearsed web that answers from those photographs as the web does
(data_pipeline/download/serve_rehearsal.py). coyo: seven real rows that bring scores. Without ../shared only scenes run.

    python benchmarks/data_stages.py [--rows 5000] [--quick]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from _machine import keep

from raphael.base.stage import read_json

PROJECT = Path(__file__).resolve().parent.parent
SHARED = PROJECT.parent / "shared" / "data"
STAGES = ("source", "select", "download", "score", "filter", "captions")
PHOTOGRAPHS = {"encode_format": "jpg", "encode_quality": 95, "image_size_px": 128, "timeout_s": 4.0, "deadline_s": 8.0}
UNSCORED = {"missing_score": "keep", "missing_unsafe": "keep", "near_duplicate_bits": 4}


def lists(rows: int) -> dict[str, dict[str, dict[str, Any]]]:
    """For each list what is other than in params.yaml."""
    found: dict[str, dict[str, dict[str, Any]]] = {"scenes": {"source": {"max_rows": rows}}}
    if not SHARED.is_dir():
        print("no ../shared/data beside the project: only the drawn corpus is run")
        return found
    coco, laion = str(SHARED / "coco"), SHARED / "laion"
    web = {**PHOTOGRAPHS, "local_host": "", "rehearsal": coco, "shard_rows": 1000}
    found["coco"] = {
        "source": {"kind": "coco", "path": coco, "max_rows": rows},
        "download": {**PHOTOGRAPHS, "local_host": "coco.invalid"},
        "filter": UNSCORED,
    }
    found["laion"] = {
        "source": {"kind": "parquet", "path": str(laion / "laion_url_text_5000.parquet"), "max_rows": rows},
        "download": web,
        "filter": UNSCORED,
    }
    found["coyo"] = {
        "source": {"kind": "jsonl", "path": str(laion / "coyo_preview_rows.jsonl")},
        "select": {"score_rules": True},
        "download": web,
    }
    return found


def run(name: str, changes: dict[str, dict[str, Any]], root: Path) -> list[dict[str, Any]]:
    """All stages in `root`; one row a stage. The counts are checked: what a stage keeps the next one gets."""
    params = yaml.safe_load((PROJECT / "params.yaml").read_text())
    for section, values in changes.items():
        params[section].update(values)
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    rows, before = [], None
    for stage in STAGES:
        started_s = time.perf_counter()
        module = [sys.executable, "-m", f"data_pipeline.{stage}", "--params", str(root / "params.yaml")]
        done = subprocess.run(module, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        report = read_json(root / f"reports/{stage}.json")
        total, kept, dropped = (report[part] for part in ("total", "kept", "dropped"))
        if total != kept + sum(dropped.values()) or before not in (None, total):
            raise SystemExit(f"{name}: {stage}: got {total} rows of {before}, {kept} kept, {dropped}: rows are missing")
        seconds = round(time.perf_counter() - started_s, 2)
        rows.append({"list": name, "stage": stage, "rows": total, "kept": kept, "dropped": dropped, "seconds": seconds})
        print(f"| {name} | {stage} | {total:,} | {kept:,} | {seconds} |", flush=True)
        before = kept
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000, help="of each list at most (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="100 rows of each; nothing is kept")
    arguments = parser.parse_args()
    print("| list | stage | rows | kept | s |\n| --- | --- | --- | --- | --- |")
    results = []
    for name, changes in lists(100 if arguments.quick else arguments.rows).items():
        with tempfile.TemporaryDirectory() as folder:
            results += run(name, changes, Path(folder))
    if not arguments.quick:
        note = "laion and coyo: links and captions are real, the web is rehearsed; seconds include starting Python"
        keep("data_stages", results, [], note=note)


if __name__ == "__main__":
    main()
