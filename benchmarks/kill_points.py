"""kill -9 at random moments of a training, then the same command again: how many bits differ from a run left alone?

The trainings are the tests' (tests/truth/kill_points.py): a network with blocks, activation checkpointing on,
60 steps, five checkpoints; every byte of the last one is compared.

bare      one process, the loop alone
ddp       two processes
fsdp2     two processes, everything sharded
ray       two Ray Train workers; one training, of which one worker after the other is killed

Writes results/kill-points-<device>-<yyyymm>.json with the number of kills, unless --quick.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _machine import judged, keep

ROOT = Path(__file__).resolve().parent.parent
COUNTS = {"bare": 200, "ddp": 10, "fsdp2": 10, "ray": 10}
NAMES = {"bare": "the loop alone", "ddp": "2 workers", "fsdp2": "2 workers, FSDP2", "ray": "2 Ray workers"}


def kill(kind: str, count: int, seed: int) -> dict[str, Any]:
    """A row of the result. Raises CalledProcessError where a training did not end."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    script = ROOT / "tests/truth/kill_points.py"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), folder, kind, str(count), str(seed)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    print(f"{NAMES[kind]:<18} {row['kills']:>4} kills  {row['differing_bits']} bits differ  {row['seconds']:.0f} s")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two kills of the loop alone: does it run at all")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--note", default="", help="about the machine, kept in the result")
    for kind, count in COUNTS.items():
        parser.add_argument(f"--{kind}", type=int, default=count, metavar="KILLS", help=f"{NAMES[kind]}; 0: none")
    arguments = parser.parse_args()
    counts = {"bare": 2} if arguments.quick else {kind: getattr(arguments, kind) for kind in COUNTS}
    rows = [kill(kind, count, arguments.seed) for kind, count in counts.items() if count]
    summary = [
        judged(f"kill -9, {NAMES[row['kind']]} ({row['kills']} kills): same bytes, all", row["same"], row["trainings"],
               "trainings", ">= 1.0")
        for row in rows
    ]  # fmt: skip
    if not arguments.quick:
        note = {"note": arguments.note} if arguments.note else {}
        keep("kill-points", rows, summary, threads_each=1, activation_checkpointing=True, **note)


if __name__ == "__main__":
    main()
