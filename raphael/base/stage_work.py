"""The folders of a stage's unfinished work: which one a run resumes in, and what becomes of the others.

A folder belongs to its inputs and to the code that made it, which it names in made_by.json. Nothing is reused that
other code made, unless someone said that both give the same (raphael/base/code/stage_code.py). Nothing that holds
checkpoints goes but by age and size: work of other settings or other code stays for KEPT_DAYS after it was last
touched; where it takes more than KEPT_BYTES, the oldest goes first, though not within SAFE_DAYS. What goes is printed.
`make clean` removes all. One run of a stage works in a workspace at a time: `only_run`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.files import written_whole

if TYPE_CHECKING:
    from raphael.base.code.stage_code import StageCode

MADE_BY = "made_by.json"
CHECKPOINTS = "checkpoints"  # the folder in which a training keeps them
KEPT_DAYS, SAFE_DAYS, KEPT_BYTES = 30, 7, 100 * 10**9
DAY_S = 86400


class OtherRun(Exception):
    """The stage is running in this workspace already. The message is one line."""


class OtherCode(Exception):
    """There is work of other code for these inputs, and nobody said what becomes of it. The message is one line."""


@dataclass(frozen=True)
class Found:
    """The folder to work in; others: of the same inputs, made by other code."""

    path: Path
    others: list[Path]


@contextlib.contextmanager
def only_run(lock: Path, name: str) -> Iterator[None]:
    """Hold the stage's lock. Raises OtherRun, with the process that has it and since when.

    The kernel gives the lock back when the process ends, however it ends; the file stays and says nothing by itself.
    On a file system without locks a line on standard error says that nobody watches.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with _opened(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OtherRun(
                f"another run of {name} is going on in this workspace ({_holder(file)}); wait for it, or end it first: "
                "two would take each other's files"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
            print(f"{name}: no locks on this file system: see that no other run of {name} works here", file=sys.stderr)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode(), 0)
        yield


@contextlib.contextmanager
def _opened(lock: Path) -> Iterator[int]:
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield file
    finally:
        os.close(file)


def _holder(file: int) -> str:
    try:
        said = json.loads(os.pread(file, 4096, 0))
        where = "" if said["host"] == socket.gethostname() else f" on {said['host']}"
        return f"process {said['pid']}{where}, since {said['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has just begun"


def find(home: Path, inputs: str, code: StageCode | None, anew: bool = False) -> Found:
    """The folder in `home` for the inputs with this digest, made if absent.

    anew: begin in a folder of its own where other code left work. Raises OtherCode where that is not wanted.
    """
    if code is None:
        path = home / inputs[:16]
        path.mkdir(parents=True, exist_ok=True)
        return Found(path, [])
    made = {folder: record for folder in _folders(home) if (record := _record(folder)).get("inputs") == inputs}
    path = home / _name(inputs, code.version, "" if code.declared else code.digest)
    if (path / MADE_BY).is_file() and path not in made and not _record(path):
        # Cut short by a power failure. The folder's name is a hash of inputs, version and code, so it says as much.
        print(f"{path / MADE_BY}: damaged: written again", file=sys.stderr, flush=True)
        made[path] = {"code": code.digest, "version": code.version, "files": code.files}
    if path.is_dir() and path not in made and _has_work(path):  # of nobody knows which code
        made[path] = {"code": "", "version": code.version, "files": {}}
    mine = {folder for folder, record in made.items() if _same(record["code"], code)}
    others = [folder for folder in made if folder not in mine and _has_work(folder)]
    if mine and path not in mine:
        left = max(mine, key=lambda folder: folder.stat().st_mtime_ns)  # made before its code was declared
        path = left if path.exists() else left.rename(path)
    elif not mine:
        at_stake = [f for f in others if made[f]["version"] == code.version and (f == path or not code.declared)]
        if at_stake and not anew:
            newest = max(at_stake, key=lambda folder: folder.stat().st_mtime_ns)
            raise OtherCode(_refusal(newest, made[newest], code))
        if path in others:
            path = home / _name(inputs, code.version, code.digest)
    path.mkdir(parents=True, exist_ok=True)
    for stray in path.glob(f".{MADE_BY}.*"):  # of a run killed while it wrote
        stray.unlink()
    record = {"stage": code.stage, "inputs": inputs, "version": code.version, "code": code.digest, "files": code.files}
    if not _same(_record(path).get("code", ""), code) or not _has_work(path):
        _write(path / MADE_BY, record)
    return Found(path, [folder for folder in others if folder != path])


def sweep(home: Path, found: Found, inputs: str) -> list[str]:
    """Remove leftovers for which nobody would come back. Returns a line on each that held checkpoints."""
    kept: list[tuple[float, int, Path]] = []  # (when it was last touched, bytes)
    last_s = _last_worked(home.parent)
    for other in list(home.iterdir()):
        if other == found.path:
            continue
        if not other.is_dir():
            other.unlink()
        elif _holds_checkpoints(other) or (_record(other).get("inputs") == inputs and _has_work(other)):
            kept.append((*_touched_and_size(other), other))
        else:
            shutil.rmtree(other)
    lines, now, total = [], time.time(), sum(size for _, size, _ in kept)
    if kept and last_s is not None and now - last_s > KEPT_DAYS * DAY_S:
        days = (now - last_s) / DAY_S
        return [
            f"the clock says that no stage ran here for {days:.0f} days: nothing of before is removed by its age now"
        ]
    for touched_s, size, folder in sorted(kept):
        days = (now - touched_s) / DAY_S
        if days > KEPT_DAYS or (total > KEPT_BYTES and days > SAFE_DAYS):
            shutil.rmtree(folder)
            total -= size
            lines.append(
                f"removed {folder.parent.name}/{folder.name}: {size / 1e9:,.3f} GB of other settings or code, "
                f"last touched {days:.0f} days ago (such work is kept for {KEPT_DAYS} days, and "
                f"{KEPT_BYTES / 1e9:g} GB of it)"
            )
    return lines


def _last_worked(work: Path) -> float | None:
    """When a stage last ended in this workspace, by the clock of then. A clock that jumps ahead (a dead battery, a
    wrong time server) makes everything old at once."""
    times = [path.stat().st_mtime for path in (work / "timings").glob("*.json")]
    return max(times, default=None)


def _refusal(folder: Path, record: dict[str, Any], code: StageCode) -> str:
    where = f"work/{folder.parent.name}/{folder.name}"
    return (
        f"the code of this stage changed since this work was made ({where}, version {record['version']}): "
        f"{code.difference(record['files'])}; nothing is reused and nothing deleted before you say what that means: "
        f"{code.ways()}; or give the stage --anew, to begin in another folder and say it later"
    )


def _same(digest: str, code: StageCode) -> bool:
    return digest == code.digest or (code.declared and digest in code.known)


def _name(inputs: str, version: int, digest: str) -> str:
    return hashlib.sha256(f"{inputs} {version} {digest}".encode()).hexdigest()[:16]


def _folders(home: Path) -> list[Path]:
    return [folder for folder in home.iterdir() if folder.is_dir()] if home.is_dir() else []


def _record(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / MADE_BY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write(path: Path, record: dict[str, Any]) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _has_work(folder: Path) -> bool:
    return any(not path.name.startswith((MADE_BY, f".{MADE_BY}")) for path in folder.iterdir())


def _holds_checkpoints(folder: Path) -> bool:
    return any(any((folder / CHECKPOINTS).glob(pattern)) for pattern in ("[0-9]*", "*/[0-9]*"))  # */: of a part


def _touched_and_size(folder: Path) -> tuple[float, int]:
    stats = [path.lstat() for path in [folder, *folder.rglob("*")]]
    return max(stat.st_mtime for stat in stats), sum(stat.st_size for stat in stats)
