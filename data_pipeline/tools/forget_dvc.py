"""What DVC is told when files that it tracks were changed on purpose: `dvc commit` for their stages.

A stage that was out of date before is not committed: old results would count as those of new code or settings. One
change is no such reason: `filter.opt_out`, which has to be named before anything can be forgotten.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from raphael.base.stage import StageError
from raphael.base.strict import read_yaml

DVC = [sys.executable, "-m", "dvc"]
LOCK, PIPELINE, PARAMS = "dvc.lock", "dvc.yaml", "params.yaml"


def touched_stages(root: Path, changed: list[str]) -> list[str]:
    """The stages of dvc.yaml, in its order, that have one of these files among their outputs; [] without dvc.lock."""
    if not ((root / LOCK).is_file() and (root / PIPELINE).is_file()):
        return []
    found = []
    for name, entry in read_yaml(root / PIPELINE)["stages"].items():
        outs = [
            out if isinstance(out, str) else next(iter(out)) for out in entry.get("outs", []) + entry.get("metrics", [])
        ]
        if any(file == out or file.startswith(f"{out}/") for file in changed for out in outs):
            found.append(name)
    recorded = read_yaml(root / LOCK)["stages"]
    return [name for name in found if name in recorded]


def stale_stages(root: Path) -> list[str]:
    """Stages that DVC holds for out of date now, a newly named opt-out list aside; [] without dvc.lock."""
    if not ((root / LOCK).is_file() and (root / PIPELINE).is_file()):
        return []
    said = run_dvc(root, "status", "--json")
    status = json.loads(said[said.find("{") :] if "{" in said else "{}")
    recorded = read_yaml(root / LOCK)["stages"]
    params = read_yaml(root / PARAMS) if (root / PARAMS).is_file() else {}
    return [name for name, changes in status.items() if not _only_opt_out(changes, recorded.get(name, {}), params)]


def _only_opt_out(changes: list[Any], recorded: dict[str, Any], params: dict[str, Any]) -> bool:
    """Whether a stage is out of date for nothing but filter.opt_out."""
    named = [set(files) for change in changes if isinstance(change, dict) for files in change.values()]
    if len(named) != len(changes) or any(files != {PARAMS} for files in named):
        return False
    before = recorded.get("params", {}).get(PARAMS, {})
    return all(_without(section, value) == _without(section, params.get(section)) for section, value in before.items())


def _without(section: str, value: Any) -> Any:
    if section != "filter" or not isinstance(value, dict):
        return value
    return {name: part for name, part in value.items() if name != "opt_out"}


def commit(root: Path, stages: list[str], stale: list[str]) -> tuple[list[str], list[str]]:
    """Record what lies there now for `stages`, those out of date before left out: (committed, left out)."""
    fresh = [name for name in stages if name not in stale]
    if fresh:
        run_dvc(root, "commit", "--force", *fresh)
    return fresh, [name for name in stages if name in stale]


def run_dvc(root: Path, *arguments: str) -> str:
    """What `dvc ARGUMENTS` says in a workspace. Raises StageError with its own line."""
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(
        [*DVC, *arguments], cwd=root, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("ERROR")]
        raise StageError(f"dvc {arguments[0]}: {lines[-1] if lines else 'failed'}; then run the same command again")
    return done.stdout
