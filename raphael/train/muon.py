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

import torch
from torch import Tensor, nn

from raphael.train.sharding import as_shared, own, whole

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

    Five matrix products a round, no decomposition. An all-zero matrix stays zero.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.float().norm(dim=(1, 2), keepdim=True).clamp(min=1e-7).to(x)  # spectral norm <= Frobenius norm = 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Its state per parameter: `momentum`, of the parameter's shape. Every parameter must pass `is_muon_shape`.

    A parameter without a gradient stays as it is, weight decay included. Of one that is shared out over workers (FSDP2)
    the whole matrix is gathered and every worker computes the whole update, as with DDP; momentum stays shared out.
    """

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
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
            alike: dict[tuple, list[nn.Parameter]] = defaultdict(list)  # one batched product per shape, not per layer
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[_sides(parameter)].append(parameter)
            for parameters in alike.values():
                self._step_alike(parameters, group["lr"], group["weight_decay"])

    def _step_alike(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        orthogonal = orthogonalised(torch.cat([_matrices(whole(self._momentum(p)), like=p) for p in parameters]))
        scale = 0.2 * max(orthogonal.shape[1:]) ** 0.5
        counts = [len(parameter) if parameter.ndim == 3 else 1 for parameter in parameters]
        for parameter, update in zip(parameters, orthogonal.split(counts), strict=True):
            if weight_decay:
                factor = 1 - lr * weight_decay
                own(parameter).mul_(factor if self.bad is None else torch.where(self.bad, 1.0, factor))
            update = as_shared(_as(update.to(parameter.dtype), parameter), like=parameter)
            own(parameter).add_(own(update), alpha=-lr * scale)

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        if self.bad is None:
            momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
            return parameter.grad.lerp(momentum, MOMENTUM)  # Nesterov's look ahead
        momentum, gradient = own(state["momentum"]), own(parameter.grad)
        momentum.copy_(torch.where(self.bad, momentum, momentum.lerp(gradient, 1 - MOMENTUM)))
        ahead = parameter.grad.lerp(state["momentum"], MOMENTUM)
        own(ahead).copy_(torch.where(self.bad, 0.0, own(ahead)))  # and 0 orthogonalised is 0
        return ahead


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
