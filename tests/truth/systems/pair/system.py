"""Two parts: a mean of the latents, then what is left of them."""

from __future__ import annotations

from dataclasses import dataclass

from raphael.base.config.systems import Part, System


@dataclass(frozen=True)
class Settings:
    width: int
    gain: float = 1.0


SYSTEM = System(
    name="pair",
    about="two parts, for tests",
    settings=Settings,
    check=lambda config: None,
    fields=("moments",),
    inputs=(),
    parts=(
        Part("mean", share=0.25, network="net"),
        Part("rest", share=0.75, needs=("mean",), losses=("loss", "size"), network="net"),
    ),
    asked="four",
)
