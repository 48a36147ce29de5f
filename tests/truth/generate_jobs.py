"""The stage generate's share of a worker that is killed. A module of its own, since another process imports it."""

import os
import signal

from raphael.generate.stage import generate_share


def die_once(work, worker, tick):
    """generate_share by a process that is killed behind its first block, once."""
    mark = work.folder / f".died-{worker[0]}"

    def ticking(count):
        tick(count)
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    generate_share(work, worker, ticking)
