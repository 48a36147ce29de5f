"""Who speaks, and of whom, when a step does not end. With real processes: test_faults.py."""

from __future__ import annotations

import time

import pytest

from raphael.train.distributed.watchdog import Watchdog, WorkerLost
from raphael.train.distributed.world import World


def watchdog_of(rank: int, silent: tuple[int, ...], elsewhere: tuple[int, ...] = (), store_read: bool = True):
    """Rank `rank` of four, computing after 40 images, and what it says; the others as it heard of them."""
    said: list[str] = []
    watchdog = Watchdog(World(rank=rank, size=4), said.append)
    watchdog.period_s = 0.01
    watchdog.at("computing", 40)
    now = time.monotonic()
    for other in watchdog.heard:
        place = "reading its batch" if other in elsewhere else "computing"
        watchdog.heard[other] = (
            f"7|{place} after 40 images",
            now - 100 * (other in silent) + 100 * (other not in silent),
        )
    watchdog.read_s = now + 100 if store_read else now - 100
    return watchdog, said


@pytest.mark.parametrize(
    ("silent", "elsewhere", "speaker", "words"),
    [
        ((2,), (), 0, "worker 2 (stopped or dead: silent for 100 s, last computing after 40 images)"),
        ((), (1,), 0, "worker 1 (hangs: reading its batch after 40 images)"),
        ((0, 1), (3,), 2, "worker 1 (stopped or dead"),
    ],
)
def test_one_of_those_that_wait_speaks_once_and_of_the_silent_ones_first(silent, elsewhere, speaker, words):
    for rank in set(range(4)) - {*silent, *elsewhere}:
        watchdog, said = watchdog_of(rank, silent, elsewhere)
        watchdog._speak(30.0)
        watchdog._speak(31.0)
        assert len(said) == (rank == speaker), (rank, said)
        if said:
            assert (
                said[0].startswith(f"worker {rank} waited 30 s (computing, after 40 images) for ") and words in said[0]
            )
            assert "hangs" not in said[0] or not silent


def test_where_rank_0_cannot_be_read_from_rank_1_speaks_of_it():
    lines = []
    for rank in (1, 2, 3):
        watchdog, said = watchdog_of(rank, (), store_read=False)
        watchdog._speak(30.0)
        lines += said
    assert len(lines) == 1 and lines[0].startswith("worker 1 waited") and "for worker 0 (stopped or dead" in lines[0]


def test_an_error_of_the_transport_is_said_before_it_is_raised():
    """Ray starts the group again and keeps the reason to itself."""
    watchdog, said = watchdog_of(0, (3,))
    with pytest.raises(WorkerLost) as caught:
        watchdog.__exit__(RuntimeError, RuntimeError("[gloo] Timed out waiting for recv"), None)
    assert said == [str(caught.value)] and "worker 3 (stopped or dead" in said[0]
