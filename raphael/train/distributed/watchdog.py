"""Who is missing when a step does not end: every worker says where it is, so that the others can name the silent one.

torch ends a message that nobody answers after parallel.collective_timeout_s (gloo raises, NCCL ends the process), and
names no rank. Here each rank writes where it is into the process group's store, a few times within that limit, from a
thread of its own, and reads what the others wrote. A rank that writes nothing is stopped or dead; one that writes, but
is somewhere else than those that wait, hangs there.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from raphael.base.stage import StageError
from raphael.train.distributed.world import World

LONGEST_PERIOD_S = 5.0
SILENT_PERIODS = 3


class WorkerLost(RuntimeError):
    """A worker did not answer. One line. No StageError: the group may be started again (parallel.max_failures)."""


class Watchdog:
    """`with Watchdog(world, say) as watchdog: ... watchdog.at("reading data", images)`. Alone in its world: nothing.

    say: hears the line on one of the ranks that have waited for the whole limit, before torch ends anything, or after
    it has. Inside, an error of torch's transport becomes WorkerLost.
    """

    def __init__(self, world: World, say: Callable[[str], None]):
        self.world, self.say = world, say
        self.limit_s = world.parallel.collective_timeout_s
        self.period_s = min(LONGEST_PERIOD_S, self.limit_s / 6)
        self.place = ("starting", 0)
        self.since_s = self.read_s = time.monotonic()
        # what the other ranks wrote, and when that was new to us
        self.heard = {rank: ("0|starting", self.read_s) for rank in range(world.size) if rank != world.rank}
        self.done = threading.Event()
        self.said = False

    def at(self, what: str, images: int) -> None:
        """This rank is now at `what`. Costs nothing: the thread writes it down."""
        self.place, self.since_s = (what, images), time.monotonic()

    def __enter__(self) -> Watchdog:
        if self.world.size > 1:
            threading.Thread(target=self._follow, daemon=True, name="raphael-watchdog").start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        waited_s = time.monotonic() - self.since_s
        lost = (
            self.world.size > 1 and isinstance(error, RuntimeError) and not isinstance(error, StageError | WorkerLost)
        )
        if lost and (waited_s >= self.limit_s or _of_transport(error)):
            # one that died just now was heard a moment ago: listen until its silence tells it from the others
            time.sleep((SILENT_PERIODS + 1) * self.period_s)
            self.done.set()
            self._speak(waited_s, str(error))
            raise WorkerLost(self.line(waited_s, str(error))) from error
        self.done.set()

    def line(self, waited_s: float, error: str = "") -> str:
        """Who is missing, as far as this rank can tell; where it cannot, torch's words."""
        what, images = self.place
        names = (
            ", ".join(self.missing().values())
            or f"another worker ({' '.join(error.split())[:200] or 'all give signs of life'})"
        )
        return (
            f"worker {self.world.rank} waited {waited_s:.0f} s ({what}, after {images:,} images) for {names}; the "
            f"limit is train.parallel.collective_timeout_s {self.limit_s:g}; the last checkpoint is whole and the same "
            "command resumes from it"
        )

    def missing(self) -> dict[int, str]:
        """The silent ones by rank, in words; where there is none, those that are somewhere else."""
        now, quiet_s = time.monotonic(), SILENT_PERIODS * self.period_s
        if now - self.read_s > quiet_s:  # the store lives in the process of rank 0
            return {0: "worker 0 (stopped or dead: nothing can be read from it)"}
        silent, elsewhere = {}, {}
        for rank, (place, heard_s) in sorted(self.heard.items()):
            place = place.split("|")[1]
            if now - heard_s > quiet_s:
                silent[rank] = f"worker {rank} (stopped or dead: silent for {now - heard_s:.0f} s, last {place})"
            elif place != _words(self.place):
                elsewhere[rank] = f"worker {rank} (hangs: {place})"
        return silent or elsewhere

    def _speak(self, waited_s: float, error: str = "") -> None:
        """Say who is missing, once, and as the first of those that wait: one line from a group of hundreds."""
        present = set(range(self.world.size)) - self.missing().keys()
        if not self.said and self.world.rank == min(present):
            self.said = True
            self.say(self.line(waited_s, error))

    def _follow(self) -> None:
        store = torch.distributed.distributed_c10d._get_default_store()
        with contextlib.suppress(Exception):
            store = store.clone()  # a connection of its own, where the kind of store has one
        count = 0
        while True:
            count += 1
            with contextlib.suppress(Exception):  # the store goes away when rank 0 ends
                store.set(f"raphael/at/{self.world.rank}", f"{count}|{_words(self.place)}")
                for rank, (known, _) in self.heard.items():
                    if store.check([f"raphael/at/{rank}"]):
                        place = store.get(f"raphael/at/{rank}").decode()
                        if place != known:
                            self.heard[rank] = place, time.monotonic()
                self.read_s = time.monotonic()
            if time.monotonic() - self.since_s > self.limit_s:
                self._speak(time.monotonic() - self.since_s)
            if self.done.wait(self.period_s):
                return


def _words(place: tuple[str, int]) -> str:
    return f"{place[0]} after {place[1]:,} images"


def _of_transport(error: RuntimeError) -> bool:
    """Whether the error is of a message between workers. gloo's are plain RuntimeErrors, known by their words alone."""
    kinds = tuple(
        found for name in ("DistError", "DistBackendError") if (found := getattr(torch.distributed, name, None))
    )
    words = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "pair closure", "broken pipe")
    return isinstance(error, kinds) or any(word in str(error).lower() for word in words)
