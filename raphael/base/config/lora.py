"""The settings of low-rank adaptation: `train.lora`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from raphael.base.strict import Range

Target = Literal["attention", "experts", "text_layers", "convolutions"]


@dataclass(frozen=True)
class LoraConfig:
    """W + (alpha / rank) up down instead of W, of which up and down are trained (LoRA, arXiv 2106.09685).

    The base, train.init_from, stays as it is. Gates are no targets: a route that moves is another model.
    """

    rank: Annotated[int, Range(0)] = 0  # 0: off, every weight is trained
    alpha: Annotated[float, Range(0)] = 0.0  # 0: as the rank, so that the factor is 1
    targets: tuple[Target, ...] = ("attention",)  # attention: of image and text; experts: of both mixtures, each apart
    # share of the rank that a step leaves out, the same for all samples; what stays is scaled up
    dropout: Annotated[float, Range(0, 0.99)] = 0.0

    @property
    def strength(self) -> float:
        """alpha, as files name it."""
        return self.alpha or float(self.rank)

    def __post_init__(self) -> None:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets: got {list(self.targets)}, expected at least one, each once")

    def check(self, init_from: str, micro_batch: int, strategy: str) -> None:
        """Raises ValueError where the rest of `train` contradicts it."""
        if not self.rank:
            return
        for wrong, got, expected in (
            (not init_from, "init_from ''", "a model that it is trained on: raphael train --from sets it"),
            (
                strategy == "fsdp2",
                "parallel.strategy fsdp2",
                "ddp: what is trained is small, and was not tried in shares",
            ),
            (
                bool(self.dropout and micro_batch),
                f"dropout {self.dropout:g} and parallel.micro_batch {micro_batch}",
                "one of them 0: what is left out is chosen once a step",
            ),
        ):
            if wrong:
                raise ValueError(f"lora.rank: got {self.rank} with {got}, expected {expected}")
