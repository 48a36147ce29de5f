"""Files that count: written whole or not at all, and known by their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

BLOCK_BYTES = 4 << 20


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_xxh3(path: str | Path) -> str:
    """128 bits that find damage, an order of magnitude faster than sha256; no guard against someone who means harm."""
    import xxhash

    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def written_whole(path: str | Path, lasting: bool = True) -> Iterator[Path]:
    """The name of a file, or of a folder, to write, which becomes `path` at the end: whole, or not at all.

    It lies beside `path`, hidden and with the same suffix; left by an exception it is removed, a full disk keeps
    nothing half-written. What a killed process leaves, `.<name>.*`, is for whoever resumes. lasting: false for what is
    worth nothing after a power cut; it then costs no wait for the disk.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        put(temporary, path) if lasting else os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise


def put(finished: Path, path: Path) -> None:
    """Rename a finished file or folder of the same disk to its place so that a power cut leaves the old one or this.

    Without the first fsync a journal may keep the name and lose the bytes: a file of length zero under a name that
    counts. Without the second the name itself may be gone.
    """
    for each in [*finished.rglob("*"), finished] if finished.is_dir() else [finished]:
        fsync(each)
    os.replace(finished, path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Bring a file's bytes to disk, or a folder's names (new files, renames)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
