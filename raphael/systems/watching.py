"""`callback_on_step_end` of a pipeline's call, as diffusers has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raphael.diffusion.samplers import Callback, Ended, Watch
from raphael.diffusion.schedule import Noise

# (pipeline, step, timestep, {name: tensor}) -> None, or a mapping whose `latents` sampling goes on from
StepEnd = Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor] | None]
TENSORS = ("latents", "x0")


class StepEndWatch(Watch):
    """Calls a StepEnd after every step; a pipeline whose `_interrupt` it has set true stops there.

    latents: what sampling holds after the step: x_0 + sigma eps of our samplers, the scheduler's own sample of a
    diffusers scheduler. x0: the step's estimate of the clean latents, to be decoded as a preview.
    Raises ValueError for a name of a tensor that there is not.
    """

    def __init__(
        self, pipeline: Any, step_end: StepEnd, inputs: Sequence[str], noise: Noise, callback: Callback | None
    ):
        if unknown := [name for name in inputs if name not in TENSORS]:
            expected = f"some of {', '.join(TENSORS)}"
            raise ValueError(f"callback_on_step_end_tensor_inputs: got {unknown[0]!r}, expected {expected}")
        super().__init__(callback)
        self.pipeline, self.step_end, self.inputs, self.noise = pipeline, step_end, tuple(inputs), noise

    def __call__(self, step: int, sigma: float, x: Tensor, x0: Tensor) -> bool | None:
        self.x0 = x0
        self.timestep = float(self.noise.timestep(torch.tensor([sigma], dtype=torch.float64)))
        return super().__call__(step, sigma, x, x0)

    def moved(self, step: int, x: Tensor) -> Tensor:
        told = {"latents": x, "x0": self.x0}
        answer = self.step_end(self.pipeline, step, self.timestep, {name: told[name] for name in self.inputs})
        if answer and "latents" in answer:
            given = answer["latents"]
            if given.shape != x.shape:
                got, expected = tuple(given.shape), tuple(x.shape)
                raise ValueError(f"callback_on_step_end: got latents of shape {got}, expected {expected}")
            x = given.to(x)
        if self.pipeline._interrupt:
            raise Ended(x)
        return x


def watching(
    pipeline: Any, step_end: StepEnd | None, inputs: Sequence[str], callback: Callback | None
) -> Watch | Callback | None:
    """What a call's callbacks come to; None where there are none."""
    pipeline._interrupt = False
    if step_end is None:
        return callback
    return StepEndWatch(pipeline, step_end, inputs, pipeline.schedule, callback)
