"""Tensors that are sharded over the workers (torch's DTensor, as FSDP2 makes them) and plain ones, by one name.

Told apart by what they can do: importing DTensor's package costs three seconds that a training without it need not pay.
"""

from __future__ import annotations

from torch import Tensor

from raphael.base.checkpoint.parts import Share


def is_shared_out(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from all ranks where it is sharded: then every rank must call this."""
    return tensor.full_tensor() if is_shared_out(tensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """What this rank holds of the tensor, a view."""
    return tensor.to_local() if is_shared_out(tensor) else tensor


def as_shared(full: Tensor, like: Tensor) -> Tensor:
    """A full tensor, the same on every rank, in the form of `like`: its share where that is sharded. No message."""
    if not is_shared_out(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def place(tensor: Tensor) -> tuple[int, ...]:
    """Where what this rank holds of the tensor begins in the whole, in each dimension."""
    at, sizes = [0] * tensor.ndim, list(tensor.shape)
    if is_shared_out(tensor):
        mesh = tensor.device_mesh
        for number, placement in enumerate(tensor.placements):
            if placement.is_shard():  # torch.chunk: all have as much as the first, but for the last ones
                most = -(-sizes[placement.dim] // mesh.size(number))
                first = min(sizes[placement.dim], most * mesh.get_local_rank(number))
                at[placement.dim] += first
                sizes[placement.dim] = min(most, sizes[placement.dim] - first)
        assert sizes == list(own(tensor).shape), f"{tensor.placements}: got {list(own(tensor).shape)}, expected {sizes}"
    return tuple(at)


def to_save(tensors: dict[str, Tensor], rank_0: bool) -> dict[str, Tensor | Share]:
    """What this rank writes of these tensors: its share where they are sharded, the rest if it is rank 0."""
    found: dict[str, Tensor | Share] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if not is_shared_out(tensor):
            if rank_0:
                found[name] = tensor
            continue
        # where a dimension of the mesh keeps copies, the first of them is written
        copies = [n for n, placement in enumerate(tensor.placements) if not placement.is_shard()]
        if own(tensor).numel() and not any(tensor.device_mesh.get_local_rank(n) for n in copies):
            found[name] = Share(own(tensor), place(tensor), tuple(tensor.shape))
    return found
