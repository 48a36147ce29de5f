"""kill -9 at random moments of generate, evaluate and report, then the same command again: the same bytes?

The stages are the tests' (tests/truth/killed_stages.py): an untrained model of the smallest size, twelve images. Each
kill is of a fresh workspace, and followed by a run to its end whose outputs are compared with an undisturbed run's.
Trainings: kill_points.py. Stages of data: tests/data_pipeline/test_faults.py.

Writes results/stage-kills-<device>-<yyyymm>.json with the number of kills, unless --quick.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _machine import judged, keep

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("generate", "evaluate", "report")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one kill of `report`: does it run at all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--note", default="", help="about the machine, kept in the result")
    for stage in STAGES:
        parser.add_argument(f"--{stage}", type=int, default=100, metavar="KILLS", help="default: %(default)s")
    arguments = parser.parse_args()
    counts = {"report": 1} if arguments.quick else {stage: getattr(arguments, stage) for stage in STAGES}
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    rows = []
    for stage, count in counts.items():
        if not count:
            continue
        with tempfile.TemporaryDirectory() as folder:
            script = ROOT / "tests/truth/killed_stages.py"
            command = [sys.executable, str(script), folder, str(count), str(arguments.seed), stage]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{stage:<9} {rows[-1]['kills']:>4} kills, {rows[-1]['same']} same, {rows[-1]['seconds']:.0f} s")
    summary = [
        judged(f"kill -9, {row['stage']} ({row['kills']} kills): same bytes, all", row["same"], row["kills"], "runs",
               ">= 1.0")
        for row in rows
    ]  # fmt: skip
    if not arguments.quick:
        keep("stage-kills", rows, summary, **({"note": arguments.note} if arguments.note else {}))


if __name__ == "__main__":
    main()
