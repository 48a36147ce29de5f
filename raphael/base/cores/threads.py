"""How many threads compute, and how they wait for each other.

libgomp's threads spin while they wait. As soon as anything else wants a core they take it from the thread that they
wait for: fifty images then cost 931 to 1,098 ms each beside one busy process, with passive waiting 120, by one thread
105 to 133 (two cores of an EPYC). libgomp reads its environment when torch is imported, so it is set before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def wait_passively() -> None:
    """Of this process, where torch is not imported yet, and of its children. A person's own settings stay."""
    for name, value in PASSIVE.items():
        os.environ.setdefault(name, value)


def available() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes by one thread: sums then do not depend on the number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
