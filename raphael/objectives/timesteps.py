"""Where in time a diffusion model is trained, and where it still learns: the spread of the timesteps of training, and
the error of a prediction apart for each quarter of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

QUARTERS = 4  # of the timesteps, whose losses are logged apart


@torch.no_grad()
def by_quarter(prediction: Tensor, target: Tensor, t: Tensor, num_steps: int) -> dict[str, Tensor]:
    """ "denoise_t" (4,): mean over the batch of the errors that lie in each quarter of the timesteps, 0 elsewhere, and
    the quarters' shares of the batch, by which the loop divides. (B, C, h, w) twice, t (B,)"""
    error = (prediction.float() - target).square().flatten(1).mean(1)
    inside = F.one_hot((QUARTERS * t // num_steps).long(), QUARTERS).float()  # (B, 4)
    return {"denoise_t": (error[:, None] * inside).mean(0), "denoise_t.share": inside.mean(0)}


def shifted(u: Tensor, shift: float) -> Tensor:
    """Shares of the timesteps (B,), uniform in [0, 1) -> shares that lie at larger noise for shift > 1.

    s u / (1 + (s - 1) u) (arXiv 2403.03206, eq. 23). A small map has few pixels to average noise over, so what it shows
    is settled at larger noise than in a large one: that is where its training should look.
    """
    return shift * u / (1 + (shift - 1) * u)
