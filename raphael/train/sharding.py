"""Tensors that are shared out over the workers (torch's DTensor, as FSDP2 makes them) and plain ones, by one name.

Told apart by what they can do: importing DTensor's package costs three seconds that a training without it need not pay.
"""

from __future__ import annotations

from torch import Tensor


def is_shared_out(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from all ranks where it is shared out: then every rank must call this."""
    return tensor.full_tensor() if is_shared_out(tensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """What this rank holds of the tensor, a view."""
    return tensor.to_local() if is_shared_out(tensor) else tensor


def as_shared(full: Tensor, like: Tensor) -> Tensor:
    """A full tensor, the same on every rank, in the form of `like`: its share where that is shared out. No message."""
    if not is_shared_out(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
