"""What processes that were killed leave outside the workspace: folders of Ray, named semaphores in shared memory.

A process that ends by itself cleans up behind itself; after SIGKILL of a whole group, a power cut of a container, an
end for lack of memory nobody does. So whoever comes next does it, for what is certainly nobody's any more.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
YOUNG_S = 60.0  # a semaphore as young as this may not be mapped yet
_OWNER = re.compile(r"-(\d+)-\w+$")


def private_folder(prefix: str, home: Path) -> Path:
    """A folder that other users cannot enter, which says whose it is. Those of processes that are gone are removed."""
    for left in home.glob(f"{prefix}-*"):
        owner = _OWNER.search(left.name)
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            if owner and left.lstat().st_uid == os.getuid() and not _is_alive(int(owner[1])):
                shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}-{os.getpid()}-", dir=home))


def sweep_semaphores(folder: Path = SHARED_MEMORY) -> int:
    """Remove this user's semaphores of Python's multiprocessing that no process has mapped. Returns how many.

    Nobody but their owner can open them, so processes of other users need not be asked.
    """
    old_s, found = time.time() - YOUNG_S, {}
    for path in folder.glob("sem.mp-*"):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            if stat.st_uid == os.getuid() and stat.st_mtime < old_s:
                found[path] = (stat.st_dev, stat.st_ino)
    mapped = set(mapped_semaphores()) if found else set()
    left = [path for path, place in found.items() if place not in mapped]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)


def mapped_semaphores() -> Iterator[tuple[int, int]]:
    """(device, inode) of the semaphores that processes have in their memory. Not their names: the C library makes one
    under another name, maps that, and links it to its own."""
    line = re.compile(r"^\S+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) (\d+) .*/sem\.", re.MULTILINE)
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            for major, minor, inode in line.findall(maps.read_text(errors="replace")):
                yield os.makedev(int(major, 16), int(minor, 16)), int(inode)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
