"""What stages published, each file with size, time of change and hash: work/published/<output>.json.

A disk that loses bits changes bytes and no time of change. So a file of the noted time that has other bytes is damaged,
and who reads it is told which. One of another time and the noted bytes was linked or copied anew (dvc checkout): its
time is noted. One of another time and other bytes was written by someone; `raphael data verify` names it
(data_pipeline/tools/verify).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import xxhash

from raphael.base.files import file_xxh3, written_whole

FOLDER = Path("work/published")
Entry = tuple[int, int, str]  # bytes, time of change in ns, xxh3


def note(root: Path, out: Path, known: Mapping[str, str] | None = None) -> None:
    """Note what lies at `out`, a file or a folder. known: xxh3 of files by their names below it, where they were hashed
    when they were written; the others are read."""
    known, files = known or {}, {}
    for path in _files(out):
        name, stat = path.relative_to(out).as_posix(), path.stat()
        files[name] = [stat.st_size, stat.st_mtime_ns, known.get(name) or file_xxh3(path)]
    place = out.relative_to(root).as_posix()
    _write(root / FOLDER / f"{place.replace('/', '--')}.json", place, files)


def note_again(root: Path, changed: Path) -> None:
    """Of a file that was rewritten on purpose, in the list that has it; of one that is in none, nothing."""
    for list_file, place, files in _lists(root):
        name = os.path.relpath(changed, root / place)
        if name in files:
            stat = changed.stat()
            files[name] = [stat.st_size, stat.st_mtime_ns, file_xxh3(changed)]
            _write(list_file, place, files)


def noted(root: Path) -> dict[Path, Entry]:
    """Every noted file of a workspace. A list that cannot be read notes nothing."""
    found = {}
    for _, place, files in _lists(root):
        found |= {root / place / name: (size, time_ns, digest) for name, (size, time_ns, digest) in files.items()}
    return found


def faults(root: Path, inputs: Iterable[Path], most_bytes: int) -> list[str]:
    """One line for each damaged file among `inputs`, files and folders below `root`. most_bytes: larger files are known
    by their size alone."""
    paths = [file for item in inputs for file in _files(root / item) if file.is_file()]
    lines = []
    for list_file, place, files in _lists(root):
        start, again = f"{root / place}", False
        for path in paths if files else ():
            entry = files.get(os.path.relpath(path, start)) if f"{path}".startswith(start) else None
            if entry is None:
                continue
            stat, (size, time_ns, digest) = path.stat(), entry
            same = stat.st_size == size and (size > most_bytes or file_xxh3(path) == digest)
            if same and stat.st_mtime_ns != time_ns:
                entry[1], again = stat.st_mtime_ns, True
            elif not same and stat.st_mtime_ns == time_ns:
                lines.append(
                    f"{path.relative_to(root)}: damaged: other bytes than were written, though nobody wrote; "
                    "`raphael data verify` says how to restore it"
                )
        if again:
            _write(list_file, place, files)
    return lines


def _files(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]


def _lists(root: Path) -> Iterator[tuple[Path, str, dict[str, list]]]:
    """(list, output, its files); a list that is damaged itself is passed over: it would blame files that are whole."""
    for file in sorted((root / FOLDER).glob("*.json")):
        try:
            listed = json.loads(file.read_text(encoding="utf-8"))
            if listed["xxh3"] == _own(listed["out"], listed["files"]):
                yield file, listed["out"], listed["files"]
        except (ValueError, KeyError, TypeError):
            continue


def _own(place: str, files: dict[str, list]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([place, files], sort_keys=True).encode())


def _write(file: Path, place: str, files: dict[str, list]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    listed = {"out": place, "files": files, "xxh3": _own(place, files)}
    with written_whole(file) as temporary:
        temporary.write_text(json.dumps(listed, indent=0) + "\n", encoding="utf-8")
