"""What sweeps (flows/sweep) may vary of a system's models beside how they are sampled, as data of the system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Settings = dict[str, Any]


@dataclass(frozen=True)
class Knob:
    """A number of a trained network that may be changed while sampling; the pipeline's `turn` does it.

    figure: its name in sweep.json; title, axis: of that figure. low, high: what it may be. absent(unet): why a network
    of these settings has it not, "" where it has.
    """

    figure: str
    title: str
    axis: str
    low: float
    high: float
    absent: Callable[[Settings], str] = lambda unet: ""


@dataclass(frozen=True)
class Studied:
    """knobs: by the network's setting that holds the value it was trained with.

    numbers: figures over models that were trained with other values: name -> (title, axis). read(unet, training): of a
    model's network and of train.settings (numbers by name, all the rest that could make a difference).
    timed: numbers over which steps a second are shown too, by a prompt that lets the network do all that it can do.
    """

    knobs: dict[str, Knob] = field(default_factory=dict)
    numbers: dict[str, tuple[str, str]] = field(default_factory=dict)
    read: Callable[[Settings, Settings], tuple[dict[str, float], Settings]] = lambda unet, training: (
        {},
        {"unet": unet, "training": training},
    )
    timed: tuple[str, ...] = ()
    prompt: str = ""
