"""AdamW, Adafactor, or Muon for the matrices and AdamW for the rest; groups by the type of module that owns a
parameter; and the learning rate by images seen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from raphael.base.config.params import LoopConfig
from raphael.train.distributed.sharding import is_shared_out, own, whole
from raphael.train.distributed.world import World
from raphael.train.optim.muon import Muon, is_muon_shape

# Weight decay is for matrices that mix features. Norms, biases and embeddings have none; nor has a bare parameter of
# any other module, unless its class names it in `decayed`, a tuple of attribute names.
DECAYED: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    nn.modules.conv._ConvNd: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Groups for an optimizer: those with weight decay, those without. Frozen parameters are in none.

    A group that would be empty is left out. Asserts that the groups partition the trainable parameters.
    """
    decayed: dict[int, Tensor] = {}
    for owner in module.modules():
        names = getattr(type(owner), "decayed", None)
        if names is None:
            names = next((names for kind, names in DECAYED.items() if isinstance(owner, kind)), ())
        for name in names:
            parameter = getattr(owner, name)
            if parameter is not None and parameter.requires_grad:
                decayed[id(parameter)] = parameter
    trainable = {id(parameter): parameter for parameter in module.parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(f"{type(module).__name__}: got no parameter with requires_grad, expected something to train")
    plain = {key: parameter for key, parameter in trainable.items() if key not in decayed}
    # in the order of module.parameters(), so that every rank and every run has the same
    ordered = [parameter for key, parameter in trainable.items() if key in decayed]
    groups = [
        {"params": ordered, "weight_decay": weight_decay, "kind": "mixing"},
        {"params": list(plain.values()), "weight_decay": 0.0, "kind": "plain"},
    ]
    groups = [group for group in groups if group["params"]]
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(members) == len(set(members)) and set(members) == set(trainable), (
        "groups do not partition the parameters"
    )
    return groups


class Optimizers:
    """One or two of torch's optimizers, each with its share of the parameters, as the loop and checkpoints see them."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, bad: Tensor | None = None) -> None:
        """bad: bool (), on the device; where it is true nothing changes, neither weights nor moments.

        On a CPU it is looked at. Elsewhere that would stop the device at every step, so the update itself is masked.
        """
        looks = any(isinstance(optimizer, torch.optim.Adafactor) for optimizer in self.optimizers)
        if bad is not None and (bad.device.type == "cpu" or looks):  # Adafactor waits for the device in any case
            if bad:
                return
            bad = None
        self.masked_step(bad)

    def masked_step(self, bad: Tensor | None) -> None:
        for optimizer in self.optimizers:
            optimizer.found_inf = None if bad is None else bad.float()  # fused AdamW's and our Muon's name for it
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def expected_bytes(self) -> int:
        """Of the moments that this rank will hold: two of AdamW, one of Muon, rows and columns of Adafactor."""
        return sum(
            _moments_bytes(optimizer, own(parameter.detach()))
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        )

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """By name; empty for a parameter that never had a gradient."""
        return next((opt.state[parameter] for opt in self.optimizers if parameter in opt.state), {})

    def restore(self, moments: dict[Tensor, dict[str, Tensor]]) -> None:
        """Become an optimizer with these moments of these parameters, and none of others."""
        for optimizer in self.optimizers:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter in moments:
                        optimizer.state[parameter] = moments[parameter]


def _moments_bytes(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    if isinstance(optimizer, torch.optim.Adafactor):
        if parameter.dim() < 2:
            return parameter.nbytes
        return parameter.nbytes // parameter.shape[-1] + parameter.nbytes // parameter.shape[-2]
    return (1 if isinstance(optimizer, Muon) else 2) * parameter.nbytes


def make_optimizer(module: nn.Module, loop: LoopConfig, world: World = World()) -> Optimizers:  # noqa: B008 (frozen)
    groups = parameter_groups(module, loop.weight_decay)
    if loop.optimizer == "adamw":
        return Optimizers(_adamw(groups, loop))
    if loop.optimizer == "adafactor":  # arXiv 1804.04235; its step is the rate times the weights' own size
        return Optimizers(torch.optim.Adafactor(groups, lr=loop.learning_rate))
    matrices, rest = [], []
    for group in groups:
        mixing = group["params"] if group["kind"] == "mixing" else []
        chosen = {id(parameter) for parameter in mixing if is_muon_shape(parameter)}
        matrices.append({**group, "params": [p for p in group["params"] if id(p) in chosen]})
        rest.append({**group, "params": [p for p in group["params"] if id(p) not in chosen]})
    matrices, rest = ([group for group in part if group["params"]] for part in (matrices, rest))
    optimizers = [Muon(matrices, loop.learning_rate, world)] if matrices else []
    return Optimizers(*optimizers, *([_adamw(rest, loop)] if rest else []))


class FusedAdamW(torch.optim.AdamW):
    """torch's fused AdamW: one pass over all parameters, on a CPU several times as fast as the loop over tensors.

    Its kernel there copies a channels-last tensor there and back, 1.8 to 2.6 times the time; it gets a view of it in
    the order of memory instead. The state is as torch's.
    """

    def __init__(self, params: Iterable, **settings: Any):
        super().__init__(params, fused=True, **settings)

    def _init_group(self, group: dict, *lists: list[Tensor]) -> bool:
        complex_found = super()._init_group(group, *lists)
        of_one_parameter = lists[:4]  # parameters, gradients, both moments
        for k, tensors in enumerate(zip(*of_one_parameter, strict=True)):
            if tensors[0].dim() == 4 and not any(map(is_shared_out, tensors)):
                if all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors):
                    for place, tensor in zip(of_one_parameter, tensors, strict=True):
                        place[k] = tensor.permute(0, 2, 3, 1)
        return complex_found


def _adamw(groups: list[dict], loop: LoopConfig) -> FusedAdamW:
    return FusedAdamW(groups, lr=loop.learning_rate, betas=tuple(loop.betas))


def learning_rate(images: int, loop: LoopConfig) -> float:
    """The rate of the step that ends at `images` seen: linear warm-up, then constant, or a cosine down to 0; of a
    trapezoid constant until the last decay_images, then that cosine (warm-up, stable, decay: arXiv 2405.18392)."""
    warm = min(1.0, images / loop.warmup_images) if loop.warmup_images else 1.0
    if loop.schedule == "constant" or images <= loop.warmup_images:
        return loop.learning_rate * warm
    first = loop.warmup_images if loop.schedule == "cosine" else max(loop.warmup_images, decay_begins(loop))
    progress = min(1.0, max(0.0, (images - first) / max(1, loop.num_images - first)))
    return loop.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def decay_begins(loop: LoopConfig) -> int:
    """Images until which a trapezoid's rate does not depend on num_images."""
    return loop.num_images - loop.decay_images


def clip_gradients(parameters: Iterable[Tensor], clip_norm: float) -> Tensor:
    """Scale gradients so that their norm over all parameters is at most clip_norm (0: leave them). Returns the norm."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    if clip_norm:
        torch._foreach_mul_([own(gradient) for gradient in gradients], (clip_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
