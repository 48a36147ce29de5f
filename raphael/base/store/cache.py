"""Files of a store that are kept on this machine's disk, up to a number of bytes; the least recently used goes first.

Where and how much is a fact of the machine, like its credentials, not of the work: RAPHAEL_CACHE_DIR (default:
~/.cache/raphael) and RAPHAEL_CACHE_GB. All processes of the machine share the folder. Files are named by
their sha256, so that a data set that was made again shares what did not change. Room is made before a file is fetched,
and a file that is being fetched counts with all its bytes. What goes while a process has it open takes its disk until
that process lets go.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from raphael.base.files import file_xxh3
from raphael.base.stage import StageError

FOLDER, LIMIT = "RAPHAEL_CACHE_DIR", "RAPHAEL_CACHE_GB"
DEFAULT_GB = 50.0
STALE_S = 3600.0  # a file that was not finished for so long is of a process that died
FETCHED_S = 600.0  # within which those that take all the room should be finished
# Writes over the file of that name, whole and compared, and never cuts it short: its length is the room that it has
Fetch = Callable[[Path], None]


class CacheError(StageError):
    """The cache cannot hold what is asked of it. One line."""


def machine_cache() -> ShardCache:
    """The cache that the environment names. Raises CacheError for a limit that is no number."""
    said = os.environ.get(LIMIT, "")
    try:
        limit_gb = float(said) if said else DEFAULT_GB
        if not limit_gb > 0:
            raise ValueError(said)
    except ValueError:
        raise CacheError(f"{LIMIT}: got {said!r}, expected a number of GB above 0, such as {DEFAULT_GB:g}") from None
    return ShardCache(machine_folder() / "shards", int(limit_gb * 1e9))


def machine_folder() -> Path:
    return Path(os.environ.get(FOLDER) or Path.home() / ".cache/raphael")


class ShardCache:
    """`take` gives the path of a file that is whole; `dropped` names those that this process was told to forget."""

    def __init__(self, folder: Path, most_bytes: int):
        self.folder, self.most_bytes = folder, most_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.used: dict[str, int] = {}  # name -> when this process used it last, ns
        self.compared: set[str] = set()
        self.dropped: deque[str] = deque(maxlen=1 << 16)
        self.busy: dict[str, threading.Lock] = {}
        self.guard = threading.Lock()

    def path(self, name: str) -> Path:
        return self.folder / name

    def is_there(self, name: str, size: int) -> bool:
        """Whether a file of that size is there, compared or not; it is used now."""
        try:
            if self.path(name).stat().st_size != size:
                return False
        except FileNotFoundError:
            return False
        self.use(name)
        return True

    def use(self, name: str) -> None:
        """Say that a file is used now."""
        self.used[name] = time.time_ns()

    def take(self, name: str, size: int, xxh3: str, fetch: Fetch) -> Path:
        """The path of a file that is there and whole; fetched where it is not. xxh3: "" where it is not known.

        A file that an earlier process left is compared before it is used for the first time. Raises CacheError, and
        what `fetch` raises.
        """
        path = self.path(name)
        with self.guard:
            lock = self.busy.setdefault(name, threading.Lock())
        with lock:
            if not self._is_whole(path, name, size, xxh3):
                with self._room(size) as temporary:
                    fetch(temporary)
                    with self._locked():  # whoever counts meanwhile would see both names, or neither
                        os.replace(temporary, path)
                self.compared.add(name)
            self.use(name)
            with contextlib.suppress(FileNotFoundError):  # for the other processes
                os.utime(path)
        return path

    def bytes(self) -> int:
        """What lies in the folder now, with what is being fetched."""
        with self._locked():
            return sum(size for _, size, _ in self._files())

    def too_small(self, size: int) -> CacheError:
        return CacheError(
            f"{self.folder}: got {size / 1e9:.3g} GB to hold at once, expected less than {LIMIT} = "
            f"{self.most_bytes / 1e9:.3g}; give the cache several times that"
        )

    def _is_whole(self, path: Path, name: str, size: int, xxh3: str) -> bool:
        try:
            if path.stat().st_size != size:
                return False
            if name not in self.compared and xxh3 and file_xxh3(path) != xxh3:
                return False
        except FileNotFoundError:
            return False
        self.compared.add(name)
        return True

    @contextlib.contextmanager
    def _room(self, size: int) -> Iterator[Path]:
        """The name of a file to write, for which the oldest were removed; it is gone afterwards."""
        temporary = self.folder / f".{os.getpid()}-{threading.get_ident()}-{time.time_ns()}"
        if size > self.most_bytes:
            raise self.too_small(size)
        until_s = time.monotonic() + FETCHED_S
        while not self._reserved(size, temporary):
            if time.monotonic() > until_s:
                raise CacheError(
                    f"{self.folder}: no room for {size / 1e6:.0f} MB within {LIMIT} = {self.most_bytes / 1e9:.3g} "
                    f"beside what other processes fetch; raise it"
                )
            time.sleep(0.05)
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _reserved(self, size: int, temporary: Path) -> bool:
        """Make room; False where files that are being fetched take it."""
        with self._locked():
            files = list(self._files())
            total = sum(bytes_ for _, bytes_, _ in files)
            oldest_first = sorted(files, key=lambda file: max(file[2], self.used.get(file[0].name, 0)))
            for path, bytes_, _ in oldest_first:
                if total + size <= self.most_bytes:
                    break
                if not path.name.startswith("."):  # not being fetched
                    path.unlink(missing_ok=True)
                    self.dropped.append(path.name)
                    total -= bytes_
            if total + size > self.most_bytes:
                return False
            with open(temporary, "wb") as file:
                file.truncate(size)  # it counts from now on
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone at the folder's names, among all processes."""
        with open(self.folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _files(self) -> Iterator[tuple[Path, int, int]]:
        """(path, bytes, time of change in ns); what nobody finished for long is removed."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name == ".lock":
                    continue
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue
                if entry.name.startswith(".") and time.time() - stat.st_mtime > STALE_S:
                    Path(entry.path).unlink(missing_ok=True)
                    continue
                yield Path(entry.path), stat.st_size, stat.st_mtime_ns
