"""Prompt switching: one prompt for the first steps, another for the rest (eDiff-I, arXiv 2211.01324, figure 4).

Early steps lay out the image, late ones colour and sharpen it: where the switch stops having an effect says when the
model has decided what it draws.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from raphael.diffusion.denoiser import Denoiser
from raphael.diffusion.schedule import Noise
from raphael.edit.run import Edited, How, Session, check_share, progress_of, reached, split
from raphael.generate.pipeline import Pipeline
from raphael.net.condition import Condition


@dataclass(frozen=True)
class Switched:
    """A Denoiser that is told `later` from `share` of the steps on, whatever it is given.

    shares: of each row's switch; the rows that have not switched keep the condition that they are given.
    """

    denoiser: Denoiser
    schedule: Noise
    later: Condition
    shares: tuple[float, ...]  # one a row

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        progress, rows = progress_of(self.schedule, sigma), len(x)
        over = [reached(progress, share) for share in self.shares]
        if not any(over):
            return self.denoiser(x, sigma, cond)
        both = cond.concat(self.later).rows([row + rows * switched for row, switched in enumerate(over)])
        return self.denoiser(x, sigma, both)


def switch(pipeline: Pipeline, first: str, second: str, share: float, how: How = How()) -> Edited:  # noqa: B008
    """`first` for that share of the steps, then `second`. source: first alone; without: second alone.

    Share 0 is `second`'s own image to the bit, share 1 `first`'s. Raises ValueError for a share outside 0 to 1.
    """
    check_share("share", share)
    session = Session(pipeline, how)
    cond = session.condition(first, first, second)
    n = session.count
    later = session.condition(first, second, second)

    def wrap(denoiser: Denoiser) -> Denoiser:
        return Switched(denoiser, session.parts.schedule, later, (2.0,) * n + (share,) * n + (2.0,) * n)

    source, result, without = split(session.decode(session.draw(cond, wrap), cond), 3)
    facts = session.facts("switch", prompt=first, target=second, share=share)
    return Edited(source, result, without, (first, f"switched at {100 * share:g} %", second), facts)
