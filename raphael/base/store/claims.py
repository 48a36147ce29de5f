"""One run at a time writes what has one name in a store.

A store has no locks. Each run writes a claim of its own beside the output, then looks for others: of two that begin
together at least one sees the other, since a listing shows what was written before it (S3 and Google's promise that).
A claim is renewed while its run lives; one that was not for LASTS_S is of a run that died. Ages are differences of the
store's own times, so that no two clocks are compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from raphael.base.store.objects import Store, StoreError

CLAIMS = "claims"
LASTS_S, RENEWED_S = 180.0, 30.0


@contextlib.contextmanager
def claimed(store: Store, folder: str, stage: str, root: Path) -> Iterator[None]:
    """Hold `folder` of a store for a run in the workspace `root`. Raises StoreError where another workspace has it.

    A run of the same workspace is kept out by the stage's own lock, so that its claim is one that was left behind.
    """
    mine = f"{hashlib.sha256(f'{socket.gethostname()} {root}'.encode()).hexdigest()[:24]}.json"
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    name, data = f"{folder}/{CLAIMS}/{mine}", json.dumps(about).encode()
    store.put_bytes(data, name)
    try:
        found = store.entries(f"{folder}/{CLAIMS}")
        now_s = found[mine].changed_s
        for other, entry in sorted(found.items()):
            if other != mine and entry.changed_s > now_s - LASTS_S:
                raise StoreError(
                    f"another run of {stage} writes to {store.address}/{folder} ({_who(store, folder, other)}); wait "
                    f"for it, or end it first (a run that was killed counts for {LASTS_S:.0f} s)"
                )
        over = threading.Event()
        renewing = threading.Thread(target=_renew, args=(store, name, data, over), daemon=True)
        renewing.start()
        try:
            yield
        finally:
            over.set()
            renewing.join()
    finally:
        with contextlib.suppress(StoreError):  # it ends by itself
            store.remove(name)


def _renew(store: Store, name: str, data: bytes, over: threading.Event) -> None:
    while not over.wait(RENEWED_S):
        try:
            store.put_bytes(data, name)
        except StoreError as error:  # the run itself will notice, or the store is back before the claim ends
            print(f"a claim could not be renewed: {error}", file=sys.stderr, flush=True)


def _who(store: Store, folder: str, claim: str) -> str:
    try:
        said = json.loads(store.read(f"{folder}/{CLAIMS}/{claim}"))
        return f"process {said['pid']} on {said['host']}, since {said['since']}"
    except (StoreError, ValueError, KeyError, TypeError):
        return "it has just begun"
