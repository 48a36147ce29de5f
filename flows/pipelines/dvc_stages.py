"""What DVC says about the pipeline: its stages in order, which are out of date, and running one of them.

DVC owns the order and the cache. Nothing here decides either; this is the one place that runs `dvc`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from flows.environment import stage_environment
from flows.serve.processes import run_group
from raphael.base.pipeline import StageEntry, read_pipeline
from raphael.base.stage import StageError

__all__ = ["StageEntry", "ancestors", "out_of_date", "read_pipeline", "reproduce"]
DVC = [sys.executable, "-m", "dvc"]
BUSY = re.compile(r"is busy|Unable to acquire lock|blocked by", re.IGNORECASE)
SAID_ERROR = re.compile(r"^(?!ERROR)[\w.]+: error: .*", re.MULTILINE)
TAIL_CHARS = 20000


def ancestors(pipeline: dict[str, StageEntry]) -> dict[str, set[str]]:
    """For each stage all stages that it needs, directly or not. An output covers what lies in it and what holds it."""
    makers = {out: name for name, entry in pipeline.items() for out in entry.outs}
    direct = {
        name: {maker for out, maker in makers.items() for dep in entry.deps if maker != name and _overlap(out, dep)}
        for name, entry in pipeline.items()
    }
    found: dict[str, set[str]] = {}

    def collect(name: str) -> set[str]:
        if name not in found:
            found[name] = set(direct[name]).union(*(collect(parent) for parent in direct[name]))
        return found[name]

    return {name: collect(name) for name in pipeline}


def out_of_date(root: Path) -> dict[str, str]:
    """The stages that `dvc repro` would look at, each with the reason. One question to DVC, about a second."""
    done = subprocess.run(
        [*DVC, "status", "--json"],
        cwd=root,
        env=stage_environment(root),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise StageError(what_went_wrong("dvc status", done.stdout + done.stderr))
    start = done.stdout.find("{")
    return {name: _reason(changes) for name, changes in json.loads(done.stdout[start:] or "{}").items()}


def reproduce(
    root: Path,
    stage: str,
    on_text: Callable[[str], None] = lambda text: None,
    on_tick: Callable[[], None] = lambda: None,
    wait: bool = False,
) -> str:
    """Bring one stage up to date by `dvc repro --single-item`; its inputs are taken as they are.

    wait: for another DVC that holds the lock, as one of ours does before and after its stage; else that is an error.
    Returns "ran", "restored" (from DVC's cache of runs) or "up to date". Raises StageError with the stage's own line.
    """
    tail = ""
    log = root / "work" / "logs" / f"{stage}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:

        def heard(text: str) -> None:
            nonlocal tail
            tail = (tail + text)[-TAIL_CHARS:]
            file.write(text)
            file.flush()
            on_text(text)

        command = [*DVC, *(["--wait-for-lock"] if wait else []), "repro", "--single-item", stage]
        status = run_group(command, root, stage_environment(root), heard, on_tick)
    if status:
        raise StageError(what_went_wrong(stage, tail))
    said = log.read_text(encoding="utf-8")
    if f"Running stage '{stage}'" in said:
        return "ran"
    return "restored" if "is cached - skipping run" in said else "up to date"


def what_went_wrong(what: str, said: str) -> str:
    """One line of what a program said before it failed: the stage's own error where there is one."""
    if BUSY.search(said):
        return f"{what}: another run is active in this folder (DVC's lock is taken); wait for it or end it"
    own = SAID_ERROR.findall(said)
    if own:
        return own[-1]
    errors = [line for line in said.splitlines() if line.startswith("ERROR")]
    lines = errors or [line for line in said.splitlines() if line.strip()]
    return f"{what}: {lines[-1] if lines else 'ended without a word'} (all of it: work/logs/{what}.log)"


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


def _reason(changes: list) -> str:
    kinds = [kind if isinstance(kind, str) else next(iter(kind)) for kind in changes]
    return ", ".join(dict.fromkeys(kinds))
