"""Gradients averaged over workers that share a machine's cores: one message a step.

torch's DistributedDataParallel sends buckets while the backward runs, which hides the message on a GPU. On a CPU the
thread that sends takes the core that computes, and its search for unused parameters walks the graph at every step:
measured on two cores, 84 ms of a step of 244. Here the backward ends first; then one all-reduce of all gradients.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from raphael.train.distributed.world import World


class GradientExchange:
    """Every rank holds all parameters; they become rank 0's here, and `average` keeps them alike.

    A parameter without a gradient on one rank counts as zero there; one without a gradient on any rank stays without,
    so that neither weight decay nor momentum moves it (as with DistributedDataParallel and find_unused_parameters).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World):
        self.world = world
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in self.parameters]
        kinds = {(parameter.dtype, parameter.device) for parameter in self.parameters}
        assert len(kinds) == 1, f"one type and device: got {kinds}"
        ((dtype, device),) = kinds
        # the last entries say who has a gradient
        self.flat = torch.zeros(sum(sizes) + len(sizes), dtype=dtype, device=device)
        *pieces, self.present = self.flat.split([*sizes, len(sizes)])
        self.pieces = [_in_order_of(parameter, piece) for parameter, piece in zip(self.parameters, pieces, strict=True)]
        with torch.no_grad():
            for parameter in self.parameters:
                torch.distributed.broadcast(_as_held(parameter), src=0)

    @torch.no_grad()
    def average(self) -> None:
        """Each parameter's gradient becomes the mean over ranks. It holds until the next call."""
        found = [parameter.grad is not None for parameter in self.parameters]
        self.present.copy_(torch.tensor(found, dtype=self.present.dtype))
        if not all(found):
            for piece, has in zip(self.pieces, found, strict=True):
                if not has:
                    piece.zero_()
        mine = [(piece, parameter.grad) for piece, parameter in zip(self.pieces, self.parameters, strict=True)]
        mine = [(piece, gradient) for piece, gradient in mine if gradient is not None]
        torch._foreach_copy_([piece for piece, _ in mine], [gradient for _, gradient in mine])
        self.world.sum(self.flat).div_(self.world.size)
        for parameter, piece, share in zip(self.parameters, self.pieces, self.present.tolist(), strict=True):
            parameter.grad = piece if share else None


def _as_held(parameter: Tensor) -> Tensor:
    """A view in the order in which memory holds it: messages want contiguous tensors."""
    order = sorted(range(parameter.ndim), key=lambda dim: -parameter.stride(dim))
    return parameter.permute(order)


def _in_order_of(parameter: Tensor, flat: Tensor) -> Tensor:
    """A view of flat (n,) with the parameter's shape and order in memory."""
    return flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset())
