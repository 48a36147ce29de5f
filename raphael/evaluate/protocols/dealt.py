"""The pieces of metrics (raphael/evaluate/subject.py) computed by one single-threaded process a core.

A process takes the next piece that nobody has begun, and writes what it says to a file of its own: pieces take from a
tenth of a second to several, so no process waits long for another at the end. All of them are dealt out at once,
since a process pays seconds of imports before its first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raphael.base.cores.threads import available
from raphael.base.cores.workers import run_processes
from raphael.base.stage import Stage, read_json, write_json
from raphael.evaluate.catalogue import METRICS
from raphael.evaluate.scenes.readings import READINGS
from raphael.evaluate.subject import Pieces, Subject

READ = "readings"  # what the scene reader sees in the images, which several metrics ask for
PIECES: dict[str, Pieces] = {READ: READINGS, **{one.name: one.pieces for one in METRICS if one.pieces is not None}}
PIECES_A_PROCESS = 24  # fewer are not worth its imports


@dataclass(frozen=True)
class Work:
    """make: the subject anew, in another process. pieces: names with numbers, the long ones first."""

    make: Callable[[], Subject]
    folder: Path
    pieces: tuple[tuple[str, int], ...]

    def file(self, piece: tuple[str, int]) -> Path:
        return self.folder / "{}-{:05d}.json".format(*piece)

    def missing(self) -> list[tuple[str, int]]:
        return [piece for piece in self.pieces if not self.file(piece).is_file()]


def processes_for(pieces: int, device: str) -> int:
    """On CPUs one a core, where so many are worth it; elsewhere this one alone."""
    return max(1, min(available(), pieces // PIECES_A_PROCESS)) if device == "cpu" else 1


def deal(make: Callable[[], Subject], counts: dict[str, int], stage: Stage, folder: Path) -> dict[str, list[Any]]:
    """name -> its pieces, in their order. counts: how many, by names of PIECES. folder: for these very pieces; what is
    there already stays. Raises StageError: a worker's own line, or that one died too often."""
    names = sorted(counts, key=lambda name: counts[name])  # few pieces of a metric are long ones
    work = Work(make, folder, tuple((name, number) for name in names for number in range(counts[name])))
    _tidy(work)
    with stage.progress(len(work.pieces), "pieces") as bar:

        def look() -> None:
            bar.update(len(work.pieces) - len(work.missing()) - bar.bar.n)

        processes = processes_for(len(work.pieces), "cpu")
        run_processes(compute_share, work, processes, look, 1, "the same command resumes from here")
        look()
    return {name: [read_json(work.file((name, number))) for number in range(counts[name])] for name in names}


def compute_share(work: Work, worker: tuple[int, int], tick: Callable[[int], None]) -> None:
    subject = work.make()
    for piece in work.pieces:
        file = work.file(piece)
        if not file.is_file() and _begins(file, worker[0]):
            name, number = piece
            write_json(file, PIECES[name].compute(subject, number), lasting=False)
            tick(1)


def _begins(file: Path, which: int) -> bool:
    """Whether this worker does that piece: nobody has begun it, or this worker had, and died. A link is made at once,
    with what it says."""
    mark = file.with_suffix(".begun")
    try:
        os.symlink(str(which), mark)
    except FileExistsError:
        return os.readlink(mark) == str(which)
    return True


def _tidy(work: Work) -> None:
    """Of a run that was killed: who had begun what, and files that a power cut left empty."""
    for path in work.folder.iterdir():
        if path.suffix != ".json" or path.name.startswith("."):
            path.unlink()
    for piece in work.pieces:
        file = work.file(piece)
        if file.is_file():
            try:
                json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                file.unlink()
