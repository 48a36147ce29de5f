"""generate, evaluate and report ended by SIGKILL at random moments and run again: the same bytes as if left alone?

python killed_stages.py FOLDER COUNT SEED [STAGE ...] prints a line of JSON a stage. Every stage runs in a fork of this
process, which imported all that they need, on one core; each kill is of a fresh copy of what the stage finds, followed
by one run to its end. Compared is everything that counts: all files of the outputs and the report, and that no other
file stays.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truth.generating_workspace import write_generating_workspace

STAGES = ("generate", "evaluate", "report")  # each finds what the one before it left
MODULES = {
    "generate": "raphael.generate.stage",
    "evaluate": "raphael.evaluate.stage",
    "report": "raphael.evaluate.report.page",
}
OUTPUTS = {
    "generate": ("data/generated", "reports/generate.json"),
    "evaluate": ("reports/evaluate.json",),
    "report": ("reports/index.html", "reports/report.json"),
}


@dataclass
class Found:
    kills: int = 0
    same: int = 0
    moments_s: list[float] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)


def begin(stage: str, root: Path) -> int:
    """Fork a stage, the leader of a group of its own. Returns its process id."""
    if child := os.fork():
        return child
    os.setsid()
    os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})  # else two processes generate
    try:
        from raphael.base.stage import main

        with open(root.with_suffix(".log"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.chdir(root)
        module = importlib.import_module(MODULES[stage])
        status = main(stage, module.run, "", ["--params", str(root / "params.yaml")])
        (root.parent / f"{root.name}.modules").write_text("\n".join(sys.modules))
        os._exit(status)
    except BaseException:
        traceback.print_exc()
        os._exit(9)


def finish(stage: str, root: Path) -> float:
    """Seconds of a run to the end. Raises RuntimeError."""
    started_s = time.monotonic()
    if status := os.waitpid(begin(stage, root), 0)[1]:
        raise RuntimeError(f"{stage} in {root} ended with {status} when nobody had killed it")
    return time.monotonic() - started_s


def killed_after(stage: str, root: Path, seconds: float) -> bool:
    """Run a stage and kill its group after so long. False where it was over before."""
    child, until_s = begin(stage, root), time.monotonic() + seconds
    while time.monotonic() < until_s:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            if status:
                raise RuntimeError(f"{stage} in {root} failed with {status}")
            return False
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):  # it ended, or is not yet the leader of its group
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def content(stage: str, root: Path) -> dict[str, bytes]:
    found = {}
    for name in OUTPUTS[stage]:
        place = root / name
        for path in place.rglob("*") if place.is_dir() else [place]:
            if path.is_file():
                found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found


def names(root: Path) -> set[str]:
    """Of every file but those that belong to nobody's result: a tracking store, its lock, times."""
    aside = ("mlruns", "mlartifacts", "mlflow.db", "work/timings", "work/locks", "work/published")
    found = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return {name for name in found if not name.startswith(aside)}


def import_all(names: Path) -> None:
    """What a run imported on its way, so that no fork has to: most of its time would be that."""
    for name in names.read_text().splitlines():
        if not name.startswith(("_", "truth", "pytest")):
            with contextlib.suppress(Exception):  # names that are made, not imported
                importlib.import_module(name)


def killed_often(home: Path, stage: str, count: int, rng: random.Random) -> Found:
    """home/before: what the stage finds. home/whole: after a run that was left alone; made here."""
    whole, found = home / "whole", Found()
    shutil.copytree(home / "before", home / "first")
    finish(stage, home / "first")
    import_all(home / "first.modules")
    shutil.copytree(home / "before", whole)
    seconds = finish(stage, whole)
    truth, there = content(stage, whole), names(whole)
    for _ in range(4 * count):
        if found.kills == count:
            break
        root = home / "killed"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(home / "before", root)
        moment_s = rng.uniform(0.0, 1.05) * seconds
        if not killed_after(stage, root, moment_s):
            continue
        finish(stage, root)
        found.kills += 1
        found.moments_s.append(round(moment_s, 2))
        wrong = sorted({name for name, data in content(stage, root).items() if truth.get(name) != data})
        wrong += sorted(names(root) ^ there)
        found.same += not wrong
        found.differing += wrong[:3]
    return found


def run(home: Path, count: int, seed: int, stages: tuple[str, ...] = STAGES) -> list[dict[str, Any]]:
    import torch

    torch.set_num_threads(1)
    for module in MODULES.values():
        importlib.import_module(module)
    few = {"num_probe": 1, "num_knockout_images": 1, "num_swaps": 1}
    before, rows = write_generating_workspace(_made(home / "made" / "before"), **few), []
    for stage in STAGES:
        started_s = time.monotonic()
        if stage in stages:
            place = home / stage
            place.mkdir()
            shutil.copytree(before, place / "before")
            found = killed_often(place, stage, count, random.Random(f"{stage} {seed}"))
            rows.append({
                "stage": stage, "kills": found.kills, "same": found.same, "differing": found.differing,
                "first_and_last_s": [min(found.moments_s, default=0), max(found.moments_s, default=0)],
                "seed": seed, "seconds": round(time.monotonic() - started_s, 1),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
        finish(stage, before)
    return rows


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), tuple(sys.argv[4:]) or STAGES)
