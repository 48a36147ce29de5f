"""Where in a network an adapter adds something: matrices, by the kind of the module that owns them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from raphael.base.config.lora import Target
from raphael.base.strict import ConfigError
from raphael.net.attention import CrossAttention, SelfAttention
from raphael.net.block import Block
from raphael.net.layers import Downsample, FeedForward, ResBlock, Upsample
from raphael.net.moe.experts import ExpertBank
from raphael.net.text_layers import TextRefiner


@dataclass(frozen=True, order=True)
class Site:
    """A matrix that an adapter adds to.

    parameter: its name in the network. expert: which of a stack (K, out, in). rows: (from, to) of the parameter, where
    several matrices of an adapter lie in one of ours. part: of the pipeline, whose parameter it is.
    """

    parameter: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    part: str = "unet"

    def of(self, parameter: Tensor) -> Tensor:
        """The matrix or kernel in that parameter, a view."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix if self.rows is None else matrix[slice(*self.rows)]


@dataclass(frozen=True)
class Pair:
    """(alpha / rank) up down. down: (rank, in), of a kernel (rank, in, h, w); up: (out, rank) or (out, rank, 1, 1)."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it is added to."""
        return (len(self.up), *self.down.shape[1:])

    def delta(self) -> Tensor:
        """float32, of `shape`."""
        return self.alpha / self.rank * product(self.down.float(), self.up.float())


def product(down: Tensor, up: Tensor) -> Tensor:
    """up down: of matrices, of stacks of them, of kernels."""
    if down.dim() != 4:
        return up @ down
    return (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])


Owned = tuple[str, nn.Module, str]  # path of a module, the module, its parameter's name


def owners(network: nn.Module, targets: Iterable[str]) -> list[Owned]:
    """The parameters of these kinds of modules (raphael/base/config/lora.py names them), in the network's order.

    Raises ConfigError for a kind that the network has not.
    """
    found = list(_kinds(network))
    absent = [kind for kind in targets if kind not in {name for name, _ in found}]
    if absent:
        there = ", ".join(dict.fromkeys(name for name, _ in found))
        raise ConfigError(f"lora.targets: got {absent[0]}, but the network has none, expected some of {there}")
    return [owned for kind, owned in found if kind in set(targets)]


def _kinds(network: nn.Module) -> Iterator[tuple[str, Owned]]:
    """(kind, parameter). What no kind holds is no target: gates, edge heads, embeddings, the first and last layer."""
    inside: dict[str, str] = {}  # path of a module -> kind of all that is below
    for path, module in network.named_modules():
        above = path.rpartition(".")[0]
        kind = inside.get(above, "")
        if not kind:
            kind = next((name for name, classes in OWNERS.items() if isinstance(module, classes)), "")
        inside[path] = kind
        if isinstance(module, ExpertBank):
            yield from (("experts", (path, module, name)) for name in ("w1", "w2"))
        elif isinstance(module, nn.Linear) and kind:
            yield kind, (path, module, "weight")
        elif isinstance(module, nn.Conv2d) and (kind or isinstance(network.get_submodule(above), Block)):
            yield "convolutions", (path, module, "weight")


ALL = get_args(Target)
OWNERS = {
    "text_layers": (TextRefiner,),
    "attention": (SelfAttention, CrossAttention),
    "experts": (FeedForward,),
    "convolutions": (ResBlock, Downsample, Upsample),
}


def there_are(network: nn.Module) -> list[str]:
    """The kinds of targets that the network has."""
    return list(dict.fromkeys(kind for kind, _ in _kinds(network)))


def sites_of(path: str, module: nn.Module, name: str) -> list[tuple[str, Site]]:
    """(name of a matrix in files, its site) of a parameter: an expert's matrices have one each."""
    parameter = f"{path}.{name}"
    if getattr(module, name).dim() != 3:
        return [(path, Site(parameter))]
    return [(f"{parameter}.{expert}", Site(parameter, expert)) for expert in range(len(getattr(module, name)))]


def own_names(network: nn.Module) -> dict[str, Site]:
    """Every matrix that an adapter of this network may hold, by its name in files."""
    return {name: site for owned in owners(network, there_are(network)) for name, site in sites_of(*owned)}


@torch.no_grad()
def add(base: Tensor, pairs: Iterable[tuple[Site, Pair, float]]) -> Tensor:
    """A parameter with what adapters add to it: (site in it, pair, weight) each. Sums in float32; base's type."""
    total = base.float().clone()
    for site, pair, weight in pairs:
        site.of(total).add_(pair.delta().to(total.device), alpha=weight)
    return total.to(base.dtype)
