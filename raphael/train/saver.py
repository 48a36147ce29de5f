"""Checkpoints written beside the training: the loop stops for a copy in main memory, a thread does the rest.

Every rank that holds something writes its own parts; nothing is gathered or sent. They meet at the disk: each says
there that its parts are whole, and rank 0 waits for all before it gives the checkpoint its name. A message between
the ranks could not do that, since the loop's own messages are under way meanwhile.
"""

from __future__ import annotations

import secrets
import threading
from typing import Any

import torch
from torch import Tensor

from raphael.base.checkpoint.home import CheckpointHome, Crew
from raphael.base.checkpoint.parts import Groups, Share
from raphael.train.distributed.world import World


class Saver:
    """`with Saver(home, world) as saver: ... saver.save(images, groups, meta)`, by every rank that has any groups.

    One checkpoint at a time: `save` waits for the one before. An error of the writing (a full disk, say) is raised by
    the next call of any method, as the CheckpointError it is. Leaving waits until what was begun is on disk; left by an
    exception, that goes on to whoever cares, whatever became of the writing.
    """

    def __init__(self, home: CheckpointHome, world: World):
        self.home = home
        self.crew = Crew()
        if world.sharded:
            # one name for what is being written, which no earlier start has used
            number = torch.tensor([secrets.randbits(31) if world.rank == 0 else 0], device=world.device)
            token = f"{int(world.sum(number)):08x}"
            self.crew = Crew(world.rank, world.size, token, world.parallel.collective_timeout_s)
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, images: int, groups: Groups, meta: dict[str, Any]) -> None:
        """Copy the tensors, then return: the next step may change them in place. meta must not change."""
        self.wait()
        copied = {group: {name: _copy(value) for name, value in held.items()} for group, held in groups.items()}
        self.thread = threading.Thread(
            target=self._write, args=(images, copied, meta), name="raphael-saver", daemon=True
        )
        self.thread.start()

    def check(self) -> None:
        """Raise what the writing raised, if it did. Waits for nothing."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def wait(self) -> None:
        """Until what was begun is on disk under its name."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def _write(self, images: int, groups: Groups, meta: dict[str, Any]) -> None:
        try:
            self.home.save(images, groups, meta, self.crew)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if error is None:
            self.wait()
        elif self.thread is not None:
            self.crew.leaving.set()  # another rank may be gone: its part would never come
            self.thread.join()


def _copy(held: Tensor | Share) -> Tensor | Share:
    if isinstance(held, Share):
        return Share(_copy(held.tensor), held.at, held.shape)
    return held.detach().to("cpu", copy=True)
