"""Muon: momentum whose update is a matrix with all singular values near one (Jordan et al. 2024, kellerjordan.github.io
/posts/muon), at AdamW's step size (Liu et al., arXiv 2502.16982, eq. 4).

    M <- mu M + (1 - mu) G
    U  = orthogonalised( (1 - mu) G + mu M )
    W <- (1 - eta lambda) W - 0.2 eta sqrt(max(m, n)) U

so that an entry of the update is about 0.2 eta, as AdamW's is, and both share one learning rate. torch.optim.Muon takes
matrices only; here a convolution is the matrix (out, in * height * width), and stacked experts (K, m, n) are K of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from raphael.base.precision import native_bf16
from raphael.train.distributed.sharding import as_shared, own, whole
from raphael.train.distributed.world import World

MOMENTUM = 0.95
# Newton-Schulz of fifth order, as steep at 0 as it can be: singular values end in about 0.7 .. 1.2, not at 1 (Jordan)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST_SIDE = 32  # a narrower matrix (the latent's first and last convolution, a gate's last layer) is left to AdamW


def is_muon_shape(parameter: Tensor) -> bool:
    """Whether the parameter is a matrix, a convolution or a stack of matrices, with both sides at least 32."""
    return 2 <= parameter.ndim <= 4 and min(_sides(parameter)) >= SMALLEST_SIDE


def orthogonalised(matrices: Tensor) -> Tensor:
    """U V^T of each U S V^T, roughly: (n, rows, columns) of any float type -> the same shape, bf16.

    Five matrix products a round, no decomposition. An all-zero matrix stays zero. Where the device has no products of
    bf16, what emulates them takes twelve times as long as float32 (an EPYC without AVX-512: four fifths of a step).
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(torch.bfloat16)
    x = x if native_bf16(x.device.type) else x.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.float().norm(dim=(1, 2), keepdim=True).clamp(min=1e-7).to(x)  # spectral norm <= Frobenius norm = 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(torch.bfloat16)


def owners(parameters: list[Tensor], workers: int) -> list[int]:
    """Which worker orthogonalises each parameter: the costliest first, each to who has least to do so far.

    Cost of a matrix of sides m <= k: some 4 m^2 k + 2 m^3 operations a round. A function of the shapes alone, so that
    all workers find the same.
    """
    costs = []
    for parameter in parameters:
        m, k = sorted(_sides(parameter))
        costs.append((len(parameter) if parameter.ndim == 3 else 1) * (4 * m * m * k + 2 * m**3))
    load, found = [0] * workers, [0] * len(parameters)
    for place in sorted(range(len(parameters)), key=lambda place: -costs[place]):
        found[place] = min(range(workers), key=load.__getitem__)
        load[found[place]] += costs[place]
    return found


class Muon(torch.optim.Optimizer):
    """Its state per parameter: `momentum`, of the parameter's shape. Every parameter must pass `is_muon_shape`.

    A parameter without a gradient stays as it is, weight decay included. Of one that is sharded over workers (FSDP2)
    the whole matrix is gathered and every worker computes the whole update; momentum stays sharded.

    Where each of world's workers has every gradient (DDP), each orthogonalises its share of the matrices, and one
    all-gather of bf16 brings it the others' (owner computes): Newton-Schulz is a third of a small network's step.
    """

    def __init__(self, params, lr: float, world: World = World()):  # noqa: B008 (frozen)
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        self.world = world
        for group in self.param_groups:
            for parameter in group["params"]:
                if not is_muon_shape(parameter):
                    raise ValueError(f"Muon: got a parameter of shape {list(parameter.shape)}; give it to AdamW")

    @torch.no_grad()
    def step(self) -> None:
        """Where the attribute `found_inf` is a tensor that is not 0, nothing changes (as in torch's fused AdamW)."""
        found_inf = getattr(self, "found_inf", None)
        self.bad = None if found_inf is None else found_inf != 0
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            shared = self.world.size > 1 and not self.world.sharded
            updates = self._updates_by_owners(parameters) if shared else self._updates(parameters)
            for parameter, update in updates:
                self._apply(parameter, update, group["lr"], group["weight_decay"])

    def _updates(self, parameters: list[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(parameter, its matrices (n, rows, columns) orthogonalised, bf16): one batched product per shape, not per
        layer; one shape at a time, since all of them at once are as large as the network."""
        alike: dict[tuple, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            alike[_sides(parameter)].append(parameter)
        for same in alike.values():
            orthogonal = orthogonalised(torch.cat([_matrices(whole(self._momentum(p)), like=p) for p in same]))
            counts = [len(parameter) if parameter.ndim == 3 else 1 for parameter in same]
            yield from zip(same, orthogonal.split(counts), strict=True)

    def _updates_by_owners(self, parameters: list[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The same on every rank, of which each computes its share: one message of 2 bytes a weight."""
        if not parameters:
            return
        rank, owned = self.world.rank, [[] for _ in range(self.world.size)]
        for parameter, owner in zip(parameters, owners(parameters, self.world.size), strict=True):
            owned[owner].append(parameter)
            if owner != rank:
                self._remember(parameter)
        longest = max(sum(parameter.numel() for parameter in mine) for mine in owned)
        sent = torch.empty(longest, dtype=torch.bfloat16, device=parameters[0].device)
        places = {id(parameter): piece for parameter, piece in _pieces(owned[rank], sent)}
        for parameter, update in self._updates(owned[rank]):
            places[id(parameter)].copy_(update)
        for mine, received in zip(owned, self.world.gather(sent), strict=True):
            yield from _pieces(mine, received)

    def _apply(self, parameter: nn.Parameter, update: Tensor, lr: float, weight_decay: float) -> None:
        if weight_decay:
            factor = 1 - lr * weight_decay
            own(parameter).mul_(factor if self.bad is None else torch.where(self.bad, 1.0, factor))
        scale = 0.2 * max(update.shape[1:]) ** 0.5
        update = as_shared(_as(update.to(parameter.dtype), parameter), like=parameter)
        own(parameter).add_(own(update), alpha=-lr * scale)

    def _remember(self, parameter: nn.Parameter) -> Tensor:
        """Take the gradient into the momentum, and return it."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        if self.bad is None:
            return state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        momentum, gradient = own(state["momentum"]), own(parameter.grad)
        momentum.copy_(torch.where(self.bad, momentum, momentum.lerp(gradient, 1 - MOMENTUM)))
        return state["momentum"]

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        """The gradient and the momentum, this gradient in it: Nesterov's look ahead."""
        ahead = parameter.grad.lerp(self._remember(parameter), MOMENTUM)
        if self.bad is not None:
            own(ahead).copy_(torch.where(self.bad, 0.0, own(ahead)))  # and 0 orthogonalised is 0
        return ahead


def _pieces(parameters: list[nn.Parameter], flat: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(parameter, a view of flat of its matrices' shape (n, rows, columns)), one after another."""
    at = 0
    for parameter in parameters:
        shape = (len(parameter) if parameter.ndim == 3 else 1, *_sides(parameter))
        yield parameter, flat[at : at + parameter.numel()].view(shape)
        at += parameter.numel()


def _sides(parameter: Tensor) -> tuple[int, int]:
    """(rows, columns) of the matrices that `_matrices` makes of it."""
    if parameter.ndim == 3:
        return tuple(parameter.shape[1:])
    return len(parameter), math.prod(parameter.shape[1:])


def _matrices(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """(n, rows, columns): a matrix as a stack of one, a convolution as the matrix (out, all the rest).

    The columns are in the order in which memory holds the parameter `like`, so that as a rule nothing is copied; no
    product above minds the order, but rounding does: it must not be that of a momentum read from a checkpoint.
    """
    if tensor.ndim == 3:
        return tensor
    if _is_channels_last(tensor if like is None else like):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(1, len(tensor), -1)


def _as(matrices: Tensor, parameter: Tensor) -> Tensor:
    """The inverse of `_matrices`, for a parameter of that shape and memory order."""
    if parameter.ndim == 4 and _is_channels_last(parameter):
        n, channels, height, width = parameter.shape
        return matrices.reshape(n, height, width, channels).permute(0, 3, 1, 2)
    return matrices.reshape(parameter.shape)


def _is_channels_last(parameter: Tensor) -> bool:
    return (
        parameter.ndim == 4
        and not parameter.is_contiguous()
        and parameter.is_contiguous(memory_format=torch.channels_last)
    )
