"""A second implementation of DDPM's training, with nothing of the project's schedule, prediction, objective or loop."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

T = 1000


def alpha_bars(schedule: str, terminal: bool) -> list[float]:
    """The products of 1 - beta, written out (arXiv 2006.11239, section 4; 2102.09672, eq. 17; 2305.08891)."""
    if schedule == "linear":
        betas = [1e-4 + (0.02 - 1e-4) * t / (T - 1) for t in range(T)]
    else:
        bars = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
        betas = [min(0.999, 1 - bars[t + 1] / bars[t]) for t in range(T)]
    found, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        found.append(product)
    if terminal:
        first, last = math.sqrt(found[0]), math.sqrt(found[-1])
        found = [((math.sqrt(bar) - last) * first / (first - last)) ** 2 for bar in found]
    return found


def wanted(prediction: str, x0: Tensor, noise: Tensor, bar: float) -> Tensor:
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return x0
    return math.sqrt(bar) * noise - math.sqrt(1 - bar) * x0


def losses(
    net: nn.Module,
    images: np.ndarray,  # uint8 (n, 3, H, W)
    labels: np.ndarray,
    num_classes: int,
    draws: list[tuple[np.ndarray, Tensor, Tensor, Tensor]],  # a step: rows, timestep's u, noise, label's u
    kind: tuple[str, str, bool],  # schedule, prediction, terminal
    rates: list[float],
) -> list[float]:
    """The loss of every step of AdamW with the gradient's norm clipped to 1; net(x, t, vector) is trained in place."""
    bars = alpha_bars(kind[0], kind[2])
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    found = []
    for (rows, u, noise, drop), rate in zip(draws, rates, strict=True):
        noised, targets, times, vectors = [], [], [], []
        for place, row in enumerate(rows):
            t = int(float(u[place]) * T)
            x0 = torch.from_numpy(images[row].astype(np.float32)) / 127.5 - 1
            noised.append(math.sqrt(bars[t]) * x0 + math.sqrt(1 - bars[t]) * noise[place])
            targets.append(wanted(kind[1], x0, noise[place], bars[t]))
            vector = torch.zeros(num_classes)
            if drop[place] >= 0.1:
                vector[labels[row]] = 1.0
            times.append(float(t))
            vectors.append(vector)
        predicted = net(torch.stack(noised), torch.tensor(times), torch.stack(vectors))
        loss = ((predicted - torch.stack(targets)) ** 2).mean()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        found.append(float(loss.detach()))
    return found
