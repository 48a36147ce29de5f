"""How an objective runs in its world: recomputed or compiled block by block, sharded, in one pass or several.

Nothing here changes an update beyond rounding, whatever the objective is. What a "block" is, its network says: a module
with `transformer_blocks()`. A block has a switch `recompute`, and runs on every rank at every pass.

FSDP2 (arXiv 2304.11277; per-parameter sharding as in torchtitan): every rank keeps a share of each weight, its
gradient, its moments and its EMA; before a block runs its weights are gathered, and they stay until its backward is
done (ZeRO's second stage). Freed after the forward they would save memory once more; but gates are asked again outside
their block (the balance loss of time gates), and gathering twice costs half as many messages again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from raphael.base.precision import autocast, wants_bf16
from raphael.base.randomness import SampleRng
from raphael.base.strict import ConfigError
from raphael.train.distributed.exchange import GradientExchange
from raphael.train.distributed.sharding import own
from raphael.train.distributed.world import World

if TYPE_CHECKING:
    from raphael.train.state import State


EXCHANGED = ("cpu",)  # devices whose gradients are sent after the backward (raphael/train/distributed/exchange.py)


def prepare(objective: nn.Module, world: World) -> None:
    """Recompute, compile and shard the objective's blocks, in place and in this order. Names stay as they are.

    Comes before the optimizer: a parameter that is sharded is another object. Raises ConfigError.
    """
    parallel = world.parallel
    blocks = blocks_of(objective)
    for key in ("checkpoint_activations", "compile"):
        if getattr(parallel, key) != "none" and not blocks:
            raise ConfigError(
                f"parallel.{key}: got blocks, but {type(objective).__name__} has no network with transformer_blocks(), "
                "expected none"
            )
    for block in blocks:
        if parallel.checkpoint_activations == "blocks":
            block.recompute = True
        if parallel.compile == "blocks":
            block.compile()
    if world.sharded:
        _share_out(objective, blocks, world)


def blocks_of(objective: nn.Module) -> list[nn.Module]:
    owners = [module for module in objective.modules() if hasattr(module, "transformer_blocks")]
    return list(dict.fromkeys(block for owner in owners for block in owner.transformer_blocks()))


def network_of(objective: nn.Module) -> nn.Module:
    """The innermost module that holds every trainable parameter: what sampling calls, too, so FSDP2's root."""
    module = objective
    while True:
        holders = [
            child for child in module.children() if any(parameter.requires_grad for parameter in child.parameters())
        ]
        if len(holders) != 1 or any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            return module
        (module,) = holders


def _share_out(objective: nn.Module, blocks: list[nn.Module], world: World) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigError(
            f"parallel.strategy: got fsdp2 with torch {torch.__version__}, expected torch 2.15 or later: before, a "
            "parameter that one worker did not use made the others wait for ever; set ddp"
        )
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP2 knows one order in memory, not channels-last
            torch.distributed.broadcast(parameter, src=0)  # as DDP does: the shares are of one tensor
    kind = torch.device(world.device).type
    options = {
        "mesh": init_device_mesh(kind, (world.size,)),
        # Weights are gathered in fp32 and autocast casts what it would cast anyway: the arithmetic is that of DDP,
        # gates route by fp32 weights, and sampling may use another precision. Cost: twice the bytes of gathering bf16.
        "mp_policy": MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "reshard_after_forward": False,
    }
    for block in blocks:
        fully_shard(block, **options)
    network = network_of(objective)
    fully_shard(network, **options)
    network.set_reduce_scatter_unused_params(True)  # an idle expert gives zero, and nobody waits for it


class Replica:
    """This rank's copy of the objective, or its share: from a batch to gradients that are the mean over all ranks."""

    def __init__(self, objective: nn.Module, world: World, precision: str):
        self.world, self.precision = world, precision
        self.objective = objective
        self.module, self.exchange = _replicate(_Losses(objective), world)

    def gradients(self, batch: dict[str, Tensor], rng: SampleRng) -> dict[str, Tensor]:
        """Forward and backward of this rank's slice. Returns the losses and statistics, without gradient.

        In several passes each counts by its share of the images, so that a mean over the batch stays one; a statistic
        that is no such mean (an expert's share of the tokens) becomes the mean over passes, as it is over ranks.
        """
        parts = self.parts(len(rng))
        if len(parts) == 1:
            with autocast(self.precision, self.world.device):
                loss, outputs = self.module(batch, rng)
            loss.backward()
            self._exchanged()
            return outputs
        summed: dict[str, Tensor] = {}
        for part in parts:
            share = (part.stop - part.start) / len(rng)
            with self._sending(part is parts[-1]):
                with autocast(self.precision, self.world.device):
                    loss, outputs = self.module(
                        {name: tensor[part] for name, tensor in batch.items()},
                        SampleRng(rng.seed, rng.epochs[part], rng.indices[part]),
                    )
                (share * loss).backward()
            for name, value in outputs.items():
                summed[name] = share * value + summed[name] if name in summed else share * value
        self._exchanged()
        return summed

    def _exchanged(self) -> None:
        if self.exchange is not None:
            self.exchange.average()

    def parts(self, count: int) -> list[slice]:
        """The passes over `count` images, the last one perhaps shorter."""
        size = self.world.parallel.micro_batch or count
        return [slice(first, min(first + size, count)) for first in range(0, count, size)]

    @contextlib.contextmanager
    def _sending(self, last: bool) -> Iterator[None]:
        """Inside, gradients stay on this rank unless this is the last pass: one exchange a step, not one a pass."""
        if self.world.sharded:
            network = network_of(self.objective)
            network.set_requires_gradient_sync(last)
            network.set_is_last_backward(last)
            yield
        elif self.world.size > 1 and self.exchange is None and not last:
            with self.module.no_sync():
                yield
        else:
            yield

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, the network may be called for images: by rank 0 alone, or by all ranks where it is sharded.

        Its weights are gathered at once: what is computed once for all steps (raphael/net/memory.py) asks blocks for
        their parts, and only a block's own forward would gather them.
        """
        self.objective.eval()
        if self.world.sharded:
            gather(self.objective)
        yield
        self.objective.train()
        if self.world.sharded:
            release(self.objective)

    def outlook(self, state: State) -> str:
        """What is on, and the memory of one worker that does not depend on the batch: said at the start."""
        world, loop = self.world, state.loop
        parallel = world.parallel
        images = loop.batch_size // world.size
        passes = -(-images // (parallel.micro_batch or images))
        spread = f"{world.size} workers ({parallel.strategy})" if world.size > 1 else "1 worker"
        on = [
            f"{spread} on {world.device}",
            f"precision {'bf16' if wants_bf16(loop.precision, world.device) else 'fp32'}",
            f"batch {loop.batch_size} ({images} a worker, {passes} {'pass' if passes == 1 else 'passes'})",
            loop.optimizer,
        ]
        on += ["blocks recomputed"] if parallel.checkpoint_activations == "blocks" else []
        on += ["blocks compiled"] if parallel.compile == "blocks" else []
        on += [f"losses above {loop.spike_factor:g} medians skipped"] if loop.spike_factor else []
        held = sum(own(parameter.detach()).nbytes for parameter in self.objective.parameters())
        trained = sum(own(parameter.detach()).nbytes for parameter in state.parameters.values())
        parts = {
            "weights": held + sum(tensor.nbytes for tensor in self.objective.buffers()),
            "gradients": trained,
            "optimizer": state.optimizer.expected_bytes(),
        }
        kind = torch.device(world.device).type  # an EMA in main memory beside a GPU is not its business
        emas = [own(tensor) for ema in state.emas.values() for tensor in ema.shadow.values()]
        parts["EMA"] = sum(tensor.nbytes for tensor in emas if tensor.device.type == kind)
        if world.sharded:  # whole ones, between forward and backward
            parts["gathered weights"] = sum(parameter.numel() * 4 for parameter in state.parameters.values())
        memory = " + ".join(f"{name} {size / 2**20:,.1f}" for name, size in parts.items() if size)
        copied = trained + sum(tensor.nbytes for tensor in [*self.objective.buffers(), *emas])
        copied += state.optimizer.expected_bytes()
        return (
            f"{', '.join(on)}; {memory} = {sum(parts.values()) / 2**20:,.1f} MiB a worker, activations beside; "
            f"{copied / 2**20:,.1f} MiB of main memory while a checkpoint is written"
        )


def gather(objective: nn.Module) -> None:
    """Gather what is sharded, on all ranks together, until `release`."""
    from torch.distributed.fsdp import FSDPModule

    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


def release(objective: nn.Module) -> None:
    """Free gathered weights. Without it the next forward would take them for those of the shares, changed since."""
    for module in objective.modules():
        if hasattr(module, "reshard"):
            module.reshard()


class _Losses(nn.Module):
    """The objective as DDP wants it: only the loss carries gradients out, so a statistic cannot claim a parameter."""

    def __init__(self, objective: nn.Module):
        super().__init__()
        self.objective = objective

    def forward(self, batch: dict[str, Tensor], rng: SampleRng) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = self.objective(batch, rng)
        return outputs["loss"], {name: torch.as_tensor(value).detach() for name, value in outputs.items()}


def _replicate(module: nn.Module, world: World) -> tuple[nn.Module, GradientExchange | None]:
    if world.size == 1 or world.sharded:
        return module, None
    if torch.device(world.device).type in EXCHANGED:
        return module, GradientExchange(module.parameters(), world)
    import warnings

    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
    warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated.*")  # its heir is not in torch 2.10
    replica = nn.parallel.DistributedDataParallel(
        module, find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=True
    )
    return replica, None
