"""Which worker a process is, and how the work of a step is sharded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raphael.base.config.params import ParallelConfig

PLAIN = ParallelConfig(
    strategy="ddp", micro_batch=0, checkpoint_activations="none", compile="none", max_failures=0,
    collective_timeout_s=600.0, min_workers=0, placement_timeout_s=300.0,
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """Which worker this is, where it computes, and how the workers share the work.

    preempted: whether a worker's machine will soon be taken away. Every rank asks at every point logged, and all get
    the same answer.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    parallel: ParallelConfig = PLAIN
    preempted: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.rank < self.size:
            raise ValueError(
                f"got worker {self.rank} of {self.size}, expected at least one worker, counted from 0; "
                "set num_workers in params.yaml (0: this process alone, without Ray)"
            )

    @staticmethod
    def current(device: str = "cpu", parallel: ParallelConfig = PLAIN) -> World:
        """This process' place in torch.distributed's process group; alone where there is none."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device, parallel)
        return World(device=device, parallel=parallel)

    @property
    def sharded(self) -> bool:
        """Whether tensors are sharded, so that whoever wants a whole one needs every rank."""
        return self.parallel.strategy == "fsdp2" and self.size > 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place. On a GPU nothing waits."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """(size, *shape): every rank's tensor, of one shape, any number type."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        sent = tensor.contiguous().view(torch.uint8)  # gloo does not know every type; bytes it does
        found = torch.empty(self.size * sent.numel(), dtype=torch.uint8, device=tensor.device)
        torch.distributed.all_gather_into_tensor(found, sent.reshape(-1))
        return found.view(tensor.dtype).view(self.size, *tensor.shape)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item())
