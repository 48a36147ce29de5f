"""Two runs never write one output of a store at the same time."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from raphael.base.store import claims
from raphael.base.store.claims import claimed
from raphael.base.store.objects import Store, StoreError


@pytest.fixture(params=["s3", "file"])
def store(request, tmp_path):
    if request.param == "file":
        return Store(f"file://{tmp_path}/bucket")
    request.getfixturevalue("s3")
    return Store("s3://pictures/prefix")


def test_the_second_run_is_told_who_has_the_output_and_the_first_goes_on(store):
    with claimed(store, "out", "encode", Path("/one")):
        with pytest.raises(
            StoreError, match=r"^another run of encode writes to .*/out \(process \d+ on .*, since .*\); wait for it"
        ):
            with claimed(store, "out", "encode", Path("/two")):
                pytest.fail("both have it")
        assert len(store.entries("out/claims")) == 1, "the second took its own claim back"
        with claimed(store, "another", "encode", Path("/two")):
            pass
    assert store.entries("out/claims") == {}
    with claimed(store, "out", "encode", Path("/two")):
        pass


def test_a_workspaces_own_claim_of_a_killed_run_does_not_stop_it(store):
    killed = claimed(store, "out", "encode", Path("/one"))
    killed.__enter__()
    try:
        with claimed(store, "out", "encode", Path("/one")):
            pass
    finally:
        killed.__exit__(None, None, None)


def test_a_claim_is_renewed_while_its_run_lives_and_ends_without_that(store, monkeypatch):
    monkeypatch.setattr(claims, "LASTS_S", 2.5)
    monkeypatch.setattr(claims, "RENEWED_S", 0.2)
    with claimed(store, "out", "encode", Path("/one")):
        time.sleep(3.5)  # S3's times are whole seconds
        with pytest.raises(StoreError, match="another run"), claimed(store, "out", "encode", Path("/two")):
            pass
    monkeypatch.setattr(claims, "RENEWED_S", 1000)
    killed = claimed(store, "out", "encode", Path("/one"))
    killed.__enter__()
    try:
        time.sleep(4)
        with claimed(store, "out", "encode", Path("/two")):
            pass
    finally:
        killed.__exit__(None, None, None)


def test_of_many_that_begin_together_at_most_one_writes(store):
    inside, most, refused, guard = 0, 0, 0, threading.Lock()
    start = threading.Barrier(6)

    def run(number: int) -> None:
        nonlocal inside, most, refused
        start.wait()
        try:
            with claimed(store, "out", "encode", Path(f"/{number}")):
                with guard:
                    inside, most = inside + 1, max(most, inside + 1)
                time.sleep(0.05)
                with guard:
                    inside -= 1
        except StoreError:
            refused += 1

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most <= 1 and refused >= 1
