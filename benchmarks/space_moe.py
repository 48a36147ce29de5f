"""How much the counting identity saves: Space-MoE as printed (one expert pass a token) against ours.

The printed formula is the peer, not the authors' code, which nobody has; they too remark that the cost is bounded by
the number of experts. 77 tokens, 6 experts, region masks of density about 0.3, float32, forward. The bound is 77 / 6.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from raphael.net.moe import SpaceMoE, gelu, region_mask

TOKENS, EXPERTS = 77, 6
SIZES = ((320, 32 * 32), (640, 16 * 16), (1280, 8 * 8))  # width, pixels: the levels of the sd shape at 256 px


def literal(moe: SpaceMoE, h: Tensor, context: Tensor, attention: Tensor) -> Tensor:
    """1/n sum_i e_route(i)( h o M_hat_i ), token by token."""
    mask, route = region_mask(attention, moe.mask_threshold), moe.gate(context)[0]
    out = torch.zeros_like(h)
    for i in range(TOKENS):
        k = int(route[0, i])
        inside = h * mask[:, :, i : i + 1]
        hidden = gelu(F.linear(inside, moe.experts.w1[k], moe.experts.b1[k]))
        out += F.linear(hidden, moe.experts.w2[k], moe.experts.b2[k])
    return out / TOKENS


def best_of(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function(*inputs)
        times.append(time.perf_counter() - started)
    return min(times)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| width | pixels | literal s | ours s | ratio (bound 12.8) | largest difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for width, pixels in SIZES:
        torch.manual_seed(0)
        moe = SpaceMoE(width, 1024, EXPERTS).eval()
        h, context = torch.randn(1, pixels, width), torch.randn(1, TOKENS, 1024)
        attention = torch.rand(1, pixels, TOKENS) ** 1.34
        attention = torch.where(attention > 0.62, attention, 0.1 * attention)  # masks of density 0.3
        inputs = (h, context, attention)
        difference = (moe(*inputs)[0] - literal(moe, *inputs)).abs().max().item()
        slow = best_of(partial(literal, moe), inputs, max(1, repeats // 2))
        fast = best_of(moe, inputs, repeats)
        print(f"| {width} | {pixels} | {slow:.3f} | {fast:.4f} | {slow / fast:.1f}x | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
