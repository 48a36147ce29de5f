"""What a training with low rank trains: up and down beside every weight that it targets, the rest frozen.

torch's parametrizations put `LowRank` before a module's weight: whoever reads `module.weight` gets the sum, and no
forward knows of it. In a state dict the frozen weight is then `parametrizations.weight.original`; `merged` undoes that.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from raphael.base.config.lora import LoraConfig
from raphael.base.randomness import SampleRng
from raphael.base.strict import ConfigError
from raphael.net.lora.sites import Pair, Site, add, owners, product

STEPS = "lora_steps"  # a buffer: steps of a training with dropout
NAME = re.compile(r"(?:(.+)\.)?parametrizations\.(\w+)\.(original|0\.down|0\.up)")


class LowRank(nn.Module):
    """W -> W + scale up down, of a matrix, a kernel or a stack of matrices. up is zero at first: it begins at W.

    down is drawn uniformly in +-1/sqrt(in), as nn.Linear's weights and the reference implementation's down are.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__()
        down, up = shapes(tuple(weight.shape), rank)
        self.down = nn.Parameter(torch.empty(down, device=weight.device))
        self.up = nn.Parameter(torch.zeros(up, device=weight.device))
        self.scale = scale
        self.kept: Tensor | None = None  # (rank,) of this step, 0 or 1 / (1 - dropout); None: all
        bound = (weight[0] if weight.dim() == 3 else weight)[0].numel() ** -0.5
        nn.init.uniform_(self.down, -bound, bound)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # the sum is what is exported: bf16 would round it
            up = self.up
            if self.kept is not None and self.training:
                up = up * (self.kept.view(-1, 1, 1) if up.dim() == 4 else self.kept)
            return weight + self.scale * product(self.down, up).to(weight.dtype)


def shapes(weight: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of down and up, for a weight (out, in), (experts, out, in) or (out, in, h, w)."""
    if len(weight) == 3:
        return (weight[0], rank, weight[2]), (weight[0], weight[1], rank)
    if len(weight) == 4:
        return (rank, *weight[1:]), (weight[0], rank, 1, 1)
    return (rank, weight[1]), (weight[0], rank)


def largest_rank(weight: tuple[int, ...]) -> int:
    """The rank of the weight itself: above it nothing is gained."""
    if len(weight) == 4:
        return min(weight[0], weight[1] * weight[2] * weight[3])
    return min(weight[-2:])


def check_rank(network: nn.Module, config: LoraConfig) -> None:
    """Raises ConfigError for a rank above the smaller side of a target, or a target that there is not."""
    for path, module, name in owners(network, config.targets):
        most = largest_rank(tuple(getattr(module, name).shape))
        if config.rank > most:
            raise ConfigError(
                f"lora.rank: got {config.rank}, expected at most {most}, the smaller side of {path}.{name}; set a "
                "lower rank, or other targets"
            )


def attach(objective: nn.Module, network: nn.Module, config: LoraConfig, seed: int) -> None:
    """Freeze the objective and train low rank in its `network`, by settings with a rank. Same seed, same start.

    Raises ConfigError.
    """
    assert config.rank, "lora.rank: got 0, which is off"
    check_rank(network, config)
    objective.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _, module, name in owners(network, config.targets):
            weight = getattr(module, name)
            low = LowRank(weight.detach(), config.rank, config.strength / config.rank)
            parametrize.register_parametrization(module, name, low, unsafe=True)
    if config.dropout:
        device = next(network.parameters()).device
        network.register_buffer(STEPS, torch.zeros((), dtype=torch.int64, device=device))
        objective.register_forward_pre_hook(lambda *_: _drop(network, config, seed))


def _drop(network: nn.Module, config: LoraConfig, seed: int) -> None:
    """Choose what this step leaves out: a function of seed and step, so that no rank and no restart matters."""
    if not (network.training and torch.is_grad_enabled()):
        return
    steps = network.get_buffer(STEPS)
    lows = [module for module in network.modules() if isinstance(module, LowRank)]
    uniform = SampleRng(seed, 0, [int(steps)]).uniform("lora_dropout", (len(lows), config.rank))[0]
    kept = ((uniform >= config.dropout) / (1 - config.dropout)).to(steps.device, torch.float32)
    for low, row in zip(lows, kept, strict=True):
        low.kept = row
    steps += 1


def pairs_in(tensors: dict[str, Tensor], alpha: float) -> dict[Site, Pair]:
    """What was trained, from a state dict of a network that `attach` prepared."""
    found = {}
    for name in tensors:
        match = NAME.fullmatch(name)
        if match is None or match[3] != "original":
            continue
        owner = f"{match[1]}." if match[1] else ""
        below = f"{owner}parametrizations.{match[2]}.0"
        down, up = tensors[f"{below}.down"], tensors[f"{below}.up"]
        parameter = f"{owner}{match[2]}"
        if down.dim() == 3:
            found |= {Site(parameter, k): Pair(down[k], up[k], alpha) for k in range(len(down))}
        else:
            found[Site(parameter)] = Pair(down, up, alpha)
    return found


def merged(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The state dict of the plain network that computes the same."""
    adds: dict[str, list[tuple[Site, Pair, float]]] = {}
    for site, pair in pairs_in(tensors, alpha).items():
        adds.setdefault(site.parameter, []).append((site, pair, 1.0))
    plain = {}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None:
            if name != STEPS:
                plain[name] = tensor
        elif match[3] == "original":
            parameter = f"{match[1]}.{match[2]}" if match[1] else match[2]
            plain[parameter] = add(tensor, adds[parameter])
    return plain
