"""The checkpoints of one training: the newest and the best, written by one process or by several together.

<folder>/
  000000004800/   a checkpoint (raphael/base/checkpoint/folder.py), named by images seen
  000000009600/
  best.json       which of them has the lowest held-out loss, and so stays however old it is
  .000000014400.*/   one that is being written, or was when its process was killed
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.checkpoint.folder import Stored, finish
from raphael.base.checkpoint.parts import CheckpointError, Groups, write_parts
from raphael.base.stage import write_json

if TYPE_CHECKING:
    from torch import Tensor

BEST = "best.json"
POLL_S = 0.02
LEAVING_S = 5.0


@dataclass(frozen=True)
class Crew:
    """Which of the processes that write a checkpoint together this is. Rank 0 finishes it.

    token: the same for all of them, and another for each start. patience_s: how long rank 0 waits for the others'
    parts; much less once `leaving` is set, since one of them may be gone.
    """

    rank: int = 0
    size: int = 1
    token: str = ""
    patience_s: float = 600.0
    leaving: threading.Event = field(default_factory=threading.Event)


class CheckpointHome:
    """A folder of checkpoints named by images seen. The newest `keep` stay, and the best."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder)
        self.keep = keep

    def all(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("[0-9]*") if path.is_dir())

    def save(self, images: int, groups: Groups, meta: dict[str, Any], crew: Crew = Crew()) -> Path:  # noqa: B008 (frozen)
        """Write a checkpoint, or this process' parts of it: then the others must call this, too, on the same disk.

        Returns once it has its name; at others than rank 0, once their parts are on disk. Raises CheckpointError
        where it cannot be written, a full disk say; those before it are whole.
        """
        from safetensors import SafetensorError

        path = self.folder / f"{images:012d}"
        temporary = self.folder / f".{path.name}.{crew.token or os.getpid()}"
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            index = write_parts(temporary, groups, crew.rank, crew.size)
            if crew.rank:
                write_json(temporary / _told(crew.rank), index)
                return path
            finish(temporary, path, [index, *_others(temporary, crew)], meta)
            self._sort_out(path, meta)
            return path
        except BaseException as error:
            if crew.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            if not isinstance(error, OSError | SafetensorError):
                raise
            line = self._line(path, error, groups)
            if crew.rank:
                _tell(temporary / _told(crew.rank), line)
            raise CheckpointError(line) from error

    def _line(self, path: Path, error: BaseException, groups: Groups) -> str:
        size = sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())
        before = self.all()
        disk = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        return (
            f"{path}: the checkpoint cannot be written ({getattr(error, 'strerror', None) or error}); it takes "
            f"{size / 1e9:,.3f} GB, {shutil.disk_usage(disk).free / 1e9:,.3f} GB are free: make room, then "
            f"the same command resumes from {f'{before[-1]}, which is whole' if before else 'the start'}"
        )

    def _sort_out(self, path: Path, meta: dict[str, Any]) -> None:
        """After a new checkpoint: whether it is the best, and which go. meta["score"]: {"metric", "value"}, if any."""
        best, score = self.best(), meta.get("score")
        if score and (best is None or best["metric"] != score["metric"] or score["value"] < best["value"]):
            best = {"checkpoint": path.name, **score}
            write_json(self.folder / BEST, best)
        stay = {best["checkpoint"]} if best else set()
        for old in self.all()[: -self.keep]:
            if old.name not in stay:
                going = old.with_name(f".{old.name}.old")  # so that one half removed is none
                os.rename(old, going)
                shutil.rmtree(going)

    def best(self) -> dict[str, Any] | None:
        """{"checkpoint": its name, "metric", "value"} of the lowest score among those that are there."""
        try:
            best = json.loads((self.folder / BEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return best if (self.folder / best["checkpoint"]).is_dir() else None

    def sweep(self) -> None:
        """Remove what a killed process left unfinished. Only one process may: rank 0, before anyone writes."""
        for stray in [*self.folder.glob(".[0-9]*"), *self.folder.glob(f".{BEST}.*")]:
            shutil.rmtree(stray, ignore_errors=True) if stray.is_dir() else stray.unlink()

    def find(
        self,
        warn: Callable[[str], None] = print,
        rank: int = 0,
        size: int = 1,
        agree: Callable[[bool], bool] = lambda damaged: damaged,
    ) -> Stored | None:
        """The newest checkpoint that is whole, to read from; None where there is none at all.

        A damaged one is named to `warn` and passed over. Several processes verify it together, each its share of the
        files; agree(flag) is then whether the flag is set at any of them. Raises CheckpointError when all are damaged.
        """
        damage: list[CheckpointError] = []
        for path in reversed(self.all()):
            error = None
            try:
                stored = Stored(path)
                stored.check(None, rank, size)
            except CheckpointError as caught:
                error = caught
                warn(f"passing over a checkpoint: {error}")
            if not agree(error is not None):
                return stored
            damage.append(error or CheckpointError(f"{path}: another worker found it damaged"))
        if damage:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole ({damage[0]}); delete that folder to start over"
            )
        return None

    def newest(self, warn: Callable[[str], None] = print) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """(groups, meta) of the newest checkpoint that is whole, as a whole."""
        stored = self.find(warn)
        return None if stored is None else (stored.load(), stored.meta)


def _told(rank: int) -> str:
    return f".worker-{rank:05d}.json"


def _tell(path: Path, error: str) -> None:
    try:
        write_json(path, {"error": error})
    except OSError:
        pass  # no room for that either: rank 0 will wait in vain, and this process' own error is said


def _others(temporary: Path, crew: Crew) -> list[dict[str, Any]]:
    """What the other processes told of their parts, once all have. Raises CheckpointError."""
    found = []
    since_s = time.monotonic()
    for rank in range(1, crew.size):
        path = temporary / _told(rank)
        while not path.exists():
            waited_s = time.monotonic() - since_s
            if waited_s > (min(LEAVING_S, crew.patience_s) if crew.leaving.is_set() else crew.patience_s):
                raise CheckpointError(f"{path.parent}: worker {rank} did not write its part within {waited_s:.0f} s")
            time.sleep(POLL_S)
        index = json.loads(path.read_text(encoding="utf-8"))
        if "error" in index:
            raise CheckpointError(f"worker {rank}: {index['error']}")
        path.unlink()
        found.append(index)
    return found
