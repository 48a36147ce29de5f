"""EMA: an exponential moving average of the trained parameters, in float32."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from raphael.train.distributed.sharding import own


class Ema:
    """ema <- ema + (1 - d) (parameter - ema), d = min(decay, (1 + n) / (10 + n)) at the n-th update.

    The ramp lets the first updates forget the random start, so the EMA needs no correction of bias. decay 0: off,
    and the EMA is the parameters themselves.

    start: the training's step after which the EMA begins, as a copy of the parameters of then (n = 0). Until then
    it is the parameters themselves. 0: it begins at the first weights.
    every: the parameters are taken in at every so many-th step only, with the share 1 - prod d of those steps together:
    what the formula gives where they stood still in between. The EMA is then up to every - 1 steps late.
    on_cpu: it lies in main memory where the parameters are on another device; the same EMA up to rounding.
    """

    def __init__(
        self, parameters: dict[str, Tensor], decay: float, start: int = 0, every: int = 1, on_cpu: bool = False
    ):
        self.parameters, self.decay, self.start, self.every = parameters, decay, start, every
        self.count = 0  # the training's steps so far
        apart = on_cpu and any(tensor.device.type != "cpu" for tensor in parameters.values())
        copies = {name: tensor.detach().cpu() if apart else tensor.detach() for name, tensor in parameters.items()}
        self.shadow = {name: tensor.float().clone() for name, tensor in copies.items()} if decay else {}
        self.landing = Landing(parameters) if decay and apart else None

    @property
    def begun(self) -> bool:
        return bool(self.decay) and self.count >= self.start

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Take in the parameters after step number `count` = 1, 2, ... of the training."""
        self.count = count
        if not self.begun:
            return
        n = count - self.start
        if n % self.every:
            return
        kept = math.prod(min(self.decay, (1 + i) / (10 + i)) for i in range(n - self.every + 1, n + 1)) if n else 0.0
        share = 1 - kept
        if self.landing is not None:
            self._settle()
            self.landing.take(self.parameters, share)
        else:
            self._mix([own(self.parameters[name].detach()) for name in self.shadow], share)

    def _mix(self, current: list[Tensor], share: float) -> None:
        torch._foreach_lerp_(
            [own(tensor) for tensor in self.shadow.values()], [tensor.float() for tensor in current], share
        )

    @torch.no_grad()
    def _settle(self) -> None:
        """Finish the update that is under way, if any."""
        if self.landing is not None and (share := self.landing.share) is not None:
            self._mix(self.landing.wait(), share)

    def weights(self) -> dict[str, Tensor]:
        """The EMA weights by name (the parameters themselves where the EMA is off or has not begun)."""
        self._settle()
        return self.shadow if self.begun else {name: tensor.detach() for name, tensor in self.parameters.items()}

    def stored(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the EMA weights; nothing where the EMA is off."""
        return dict(self.weights()) if self.decay else {}

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Inside, the modules have the EMA weights; after, exactly their own again."""
        shadow = self.weights() if self.begun else {}
        before = {name: self.parameters[name].detach().clone() for name in shadow}
        for name, tensor in shadow.items():
            self.parameters[name].copy_(tensor)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in before.items():
                    self.parameters[name].copy_(tensor)


class Landing:
    """Parameters on their way to main memory. Nothing waits for the device until the next step has been queued: the
    copy of step n is awaited at step n + 1, so the host runs one step ahead at most, and the device never idles."""

    def __init__(self, parameters: dict[str, Tensor]):
        self.on_gpu = any(tensor.is_cuda for tensor in parameters.values())
        self.buffers = [
            torch.empty_like(tensor, device="cpu", pin_memory=self.on_gpu, requires_grad=False)
            for tensor in parameters.values()
        ]
        self.share: float | None = None  # of the update under way
        self.event = torch.cuda.Event() if self.on_gpu else None

    def take(self, parameters: dict[str, Tensor], share: float) -> None:
        for buffer, tensor in zip(self.buffers, parameters.values(), strict=True):
            buffer.copy_(tensor.detach(), non_blocking=True)
        if self.event is not None:
            self.event.record()
        self.share = share

    def wait(self) -> list[Tensor]:
        """The parameters that were taken, once they are here."""
        if self.event is not None:
            self.event.synchronize()
        self.share = None
        return self.buffers
