"""Is everything below data/ and models/ what was written? Every file is read, each bad one is named.

A file is compared with its hash in dvc.lock (of a folder, in DVC's listing of it), and in what the stage noted when it
published the file (raphael/base/integrity/published.py); one of the two is enough, since an older workspace has one of
them alone. A file that neither knows is looked at by itself: checksums of table pages, of archives and PNGs, hashes of
images in their shard's table, manifests. With --cache the objects of DVC's cache are compared with their names, too:
`dvc checkout` hands out a damaged one as if it were whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raphael.base.integrity import published
from raphael.base.stage import StageError
from raphael.base.strict import read_yaml

PLACES = ("data", "models")
BLOCK_BYTES = 4 << 20
LISTING = ".dir"  # of an object that lists a folder's files


@dataclass
class Found:
    """What was read. bad: a line each; unknown: files that nothing vouches for."""

    files: int = 0
    size: int = 0
    bad: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def verify(root: Path, with_cache: bool = False) -> Found:
    """Read and judge every file below data/ and models/ of a workspace. Raises StageError where neither is there."""
    if not any((root / place).is_dir() for place in PLACES):
        raise StageError(f"{root}: no data/ and no models/ here; name a workspace's settings: --params FILE")
    found, noted = Found(), published.noted(root)
    cache = cache_of(root)
    recorded, damaged = recorded_by_dvc(root, cache)
    found.bad += damaged
    for path in sorted({*_files(root), *(path for path in {*noted, *recorded} if path.is_relative_to(root))}):
        if path.relative_to(root).parts[0] not in PLACES:
            continue
        if not path.is_file():
            again = _again(cache, recorded.get(path))
            found.bad.append(f"{path.relative_to(root)}: missing: it was there when its stage ended; {again}")
            continue
        found.files, found.size = found.files + 1, found.size + path.stat().st_size
        if line := _judge(path, noted.get(path), recorded.get(path), found, root):
            found.bad.append(f"{path.relative_to(root)}: {line}; {_again(cache, recorded.get(path))}")
    if with_cache and cache is None:
        raise StageError(f"{root}: got no DVC project there, expected one with --cache")
    if with_cache:
        found.bad += bad_objects(cache, found)
    return found


def _judge(path: Path, noted: published.Entry | None, md5: str | None, found: Found, root: Path) -> str:
    """What is wrong with a file; "" where nothing is."""
    if noted and path.stat().st_size == noted[0] and published.file_xxh3(path) == noted[2]:
        return ""
    if md5 and file_md5(path) == md5:
        return ""
    if noted or md5:
        rewritten = noted and path.stat().st_mtime_ns != noted[1]
        return "changed since its stage published it" if rewritten else "damaged: other bytes than were written"
    found.unknown.append(path.relative_to(root).as_posix())
    from data_pipeline.tools.verify.look import fault_of

    return fault_of(path)


def _again(cache: Path | None, md5: str | None) -> str:
    """What to do. Files are often hard links to DVC's objects: then both are damaged, and a checkout brings it back."""
    if cache and md5 and (kept := _object(cache, md5)).is_file():
        if file_md5(kept) == md5:
            return "delete it, then dvc checkout"
        return f"delete it and {kept}, then dvc pull, or dvc repro of the stage that makes it"
    return "delete it, then run the stage that makes it (dvc repro)"


def _files(root: Path) -> Iterator[Path]:
    for place in PLACES:
        for folder, _, names in os.walk(root / place):
            yield from (Path(folder) / name for name in names)


def recorded_by_dvc(root: Path, cache: Path | None) -> tuple[dict[Path, str], list[str]]:
    """(md5 of every file that dvc.lock knows, lines on listings that are damaged). A listing that is not in the cache
    leaves its folder unknown."""
    lock = root / "dvc.lock"
    if cache is None or not lock.is_file():
        return {}, []
    found: dict[Path, str] = {}
    bad: list[str] = []
    for stage in read_yaml(lock)["stages"].values():
        for out in stage.get("outs", ()):
            md5 = str(out.get("md5", ""))
            if not md5.endswith(LISTING):
                found |= {root / out["path"]: md5} if md5 else {}
                continue
            try:
                entries = listed(cache, md5)
            except StageError as error:
                bad.append(str(error))
                continue
            found |= {root / out["path"] / entry["relpath"]: entry["md5"] for entry in entries}
    return found, bad


def listed(cache: Path, md5: str) -> list[dict[str, Any]]:
    """The files of a folder as DVC's object lists them; [] where the cache has no such object. Raises StageError."""
    object_file = _object(cache, md5)
    if not object_file.is_file():
        return []
    if file_md5(object_file) != md5.removesuffix(LISTING):
        raise StageError(f"{object_file}: damaged: its md5 is not its name; delete it, then dvc commit or dvc pull")
    return json.loads(object_file.read_text(encoding="utf-8"))


def _object(cache: Path, md5: str) -> Path:
    return cache / "files" / "md5" / md5[:2] / md5[2:]


def cache_of(root: Path) -> Path | None:
    """Where DVC's cache lies, by its own settings; None outside a DVC project."""
    if not (root / ".dvc").is_dir():
        return None
    from data_pipeline.tools.forget_dvc import run_dvc

    return root / run_dvc(root, "cache", "dir").strip().splitlines()[-1]


def bad_objects(cache: Path, found: Found) -> list[str]:
    """A line on each object of the cache that is not what its name says."""
    bad = []
    for path in sorted((cache / "files" / "md5").glob("??/*")):
        if not path.is_file():
            continue
        found.files, found.size = found.files + 1, found.size + path.stat().st_size
        if file_md5(path) != path.parent.name + path.name.removesuffix(LISTING):
            bad.append(
                f"{path}: damaged: its md5 is not its name; delete it, then dvc pull, or dvc commit of a whole copy"
            )
    return bad


def file_md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
