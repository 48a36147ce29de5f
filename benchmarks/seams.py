"""What the seams for many systems cost a training step and a sampling: this checkout beside an older one.

    git worktree add ../before f0ac40f && python benchmarks/seams.py --before ../before

Two processes of one thread, one in each checkout, do the same in turns: a step of the preset tiny at batch 16 (forward,
loss, backward, clip, torch's AdamW) and 16 images of 15 steps with guidance; the same weights, data and random numbers,
so that losses and latents must be equal. The order within a pair alternates; the median of the pairs' ratios counts,
with its interval by bootstrap. Writes results/seams-<device>-<yyyymm>.json, unless --quick.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from _machine import judged, keep

HERE = Path(__file__).resolve().parent
WORK = {"step": 400, "sample": 40}  # pairs of each


class Side:
    """A process in one checkout that answers by lines."""

    def __init__(self, checkout: Path):
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "_seam_side.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=checkout, env=environment, **pipes)
        self._line("ready")

    def __call__(self, work: str) -> tuple[float, float]:
        print(work, file=self.process.stdin, flush=True)
        told = json.loads(self._line())
        return told["seconds"], told["value"]

    def _line(self, expected: str = "") -> str:
        line = self.process.stdout.readline().strip()
        if not line or (expected and line != expected):
            raise SystemExit(f"{self.process.args}: ended, or said {line!r}")
        return line

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """Of the median, 95 % by bootstrap."""
    picked = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    return tuple(np.quantile(np.median(ratios[picked], axis=1), (0.025, 0.975)).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the commit to compare with")
    parser.add_argument("--quick", action="store_true", help="three pairs; keeps nothing")
    arguments = parser.parse_args()
    sides = {"before": Side(arguments.before.resolve()), "now": Side(HERE.parent)}
    rows, summary = [], []
    try:
        for work, pairs in WORK.items():
            for side in sides.values():
                side(work)  # to warm up
            times: dict[str, list[float]] = {"before": [], "now": []}
            equal = True
            for pair in range(3 if arguments.quick else pairs):
                values = {}
                for name in ("before", "now") if pair % 2 else ("now", "before"):
                    spent_s, values[name] = sides[name](work)
                    times[name].append(spent_s)
                equal &= values["before"] == values["now"]
            ratios = np.array(times["now"]) / np.array(times["before"])
            low, high = interval(ratios)
            median = float(np.median(ratios))
            print(
                f"{work}: {median:.4f} of before ({low:.4f}-{high:.4f}, {len(ratios)} pairs), equal: {equal}",
                flush=True,
            )
            told = {name: round(float(np.median(found)), 5) for name, found in times.items()}
            row = {"work": work, "pairs": len(ratios), "median_ratio": round(median, 4), "equal": equal}
            rows.append({**row, "interval": [round(low, 4), round(high, 4)], "median_s": told})
            summary.append(judged(f"{work}, median of pairs", median, 1.0, "share", "<= 1.01"))
    finally:
        for side in sides.values():
            side.end()
    if not arguments.quick:
        keep("seams", rows, summary)


if __name__ == "__main__":
    main()
