"""An exponential moving average of the trained parameters, in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from raphael.train.sharding import own


class Ema:
    """average <- average + (1 - d) (parameter - average), d = min(decay, (1 + n) / (10 + n)) at the n-th update.

    The ramp lets the first updates forget the random start, so the average needs no correction of bias. decay 0: off,
    and the average is the parameters themselves.
    """

    def __init__(self, parameters: dict[str, Tensor], decay: float):
        self.parameters = parameters
        self.decay = decay
        self.average = {name: tensor.detach().float().clone() for name, tensor in parameters.items()} if decay else {}

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Take in the parameters after update number `count` = 1, 2, ..."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + count) / (10 + count))
        current = [own(self.parameters[name].detach()).float() for name in self.average]
        torch._foreach_lerp_([own(tensor) for tensor in self.average.values()], current, 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights by name (the parameters themselves where the average is off)."""
        return self.average if self.decay else {name: tensor.detach() for name, tensor in self.parameters.items()}

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Inside, the modules have the averaged weights; after, exactly their own again."""
        before = {name: self.parameters[name].detach().clone() for name in self.average}
        for name, tensor in self.average.items():
            self.parameters[name].copy_(tensor)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in before.items():
                    self.parameters[name].copy_(tensor)
