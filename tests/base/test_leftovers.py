"""What killed processes leave outside the workspace is removed by whoever comes next, and nothing that is in use."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raphael.base.cores import leftovers
from raphael.base.cores.leftovers import SHARED_MEMORY, mapped_semaphores, private_folder, sweep_semaphores


def gone() -> int:
    """The id of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def file_of(name: str) -> Path:
    return SHARED_MEMORY / f"sem.{name.lstrip('/')}"


def test_a_folder_is_its_users_alone_and_says_whose_it_is(tmp_path: Path) -> None:
    folder = private_folder("raphael-ray", tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700 and f"-{os.getpid()}-" in folder.name


def test_folders_of_processes_that_are_gone_are_removed_and_no_others(tmp_path: Path) -> None:
    dead, alive, other = (tmp_path / name for name in (f"r-{gone()}-x1", f"r-{os.getpid()}-x2", "r-nobody"))
    for folder in (dead, alive, other):
        (folder / "session").mkdir(parents=True)
    made = private_folder("r", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {alive.name, other.name, made.name}


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "YOUNG_S", -1.0)


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no /dev/shm")
def test_a_semaphore_of_nobody_is_removed_and_one_in_use_stays(tmp_path: Path, old: None) -> None:
    """In a folder of links, so that nobody else's are touched."""
    held = multiprocessing.get_context("spawn").Lock()
    real = file_of(held._semlock.name)
    (tmp_path / "sem.mp-held").symlink_to(real)
    for name in ("sem.mp-nobody", "sem.other", "psm_1"):
        (tmp_path / name).write_bytes(bytes(32))
    assert sweep_semaphores(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["psm_1", "sem.mp-held", "sem.other"]


def test_a_young_semaphore_stays(tmp_path: Path) -> None:
    path = tmp_path / "sem.mp-young"
    path.write_bytes(bytes(32))
    assert sweep_semaphores(tmp_path) == 0 and path.exists()
    os.utime(path, (time.time() - 3600,) * 2)
    assert sweep_semaphores(tmp_path) == 1


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no /dev/shm")
def test_what_a_killed_group_leaves_in_shared_memory_is_found(old: None) -> None:
    """The tracker that would clean up dies with the group."""
    script = (
        "import multiprocessing as m, time; l = m.get_context('spawn').Lock(); print(l._semlock.name, flush=True); "
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script + "time.sleep(60)"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    left = file_of(child.stdout.readline().strip())
    place = (left.stat().st_dev, left.stat().st_ino)
    assert place in set(mapped_semaphores())
    os.killpg(child.pid, 9)
    child.wait()
    until_s = time.monotonic() + 5
    while place in set(mapped_semaphores()) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert left.exists() and place not in set(mapped_semaphores())
    left.unlink()
