"""Fifty runs of all data stages in one process, as a served flow would see them: nothing grows."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import psutil
import pytest
from truth.faulty_runs import STAGES, change, run_here, write_settings

TURNS, SETTLED = 50, 10  # after so many, what is loaded and cached once is there
MOST_MEMORY = 64 << 20


def used(root: Path) -> dict[str, int]:
    process = psutil.Process()
    gc.collect()
    return {
        "bytes in work/": sum(path.stat().st_size for path in (root / "work").rglob("*") if path.is_file()),
        "files in work/": sum(path.is_file() for path in (root / "work").rglob("*")),
        "files open": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
        "in shared memory": sum(path.name.startswith(("sem.mp-", "psm_")) for path in Path("/dev/shm").glob("*")),
        "folders of Ray": len(list(Path("/tmp").glob("raphael-ray-*"))),
        "memory": process.memory_info().rss,
    }


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_fifty_runs_leave_disk_memory_shared_memory_and_handles_as_ten_did(project, tmp_path) -> None:
    write_settings(project, tmp_path, 40)
    seen = []
    for turn in range(TURNS):
        change(tmp_path, "pipeline", engine="ray" if turn % 5 == 4 else "local")
        for stage in STAGES:
            shutil.rmtree(tmp_path / STAGES[stage].output, ignore_errors=True)
            run_here(stage, tmp_path)
        seen.append(used(tmp_path))
        print(turn, seen[-1], flush=True)
    settled, last = seen[SETTLED - 1], seen[-1]
    grown = {name: (settled[name], last[name]) for name in last if last[name] > settled[name] + 2 and name != "memory"}
    allowed = {"bytes in work/": 1.02 * settled["bytes in work/"]}  # the list of scored pieces gets a line each
    grown = {name: pair for name, pair in grown.items() if pair[1] > allowed.get(name, 0)}
    assert not grown, grown
    assert last["memory"] < settled["memory"] + MOST_MEMORY
