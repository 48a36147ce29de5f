"""What the hooks of attention cost where there are none: the shipped model beside the same network without them.

The peer's attention is ours with every line about hooks taken out (raphael/net/attention.py). Both draw the same
latents from the same seeds, in turns, in one process of one thread; the ratio is the median over pairs, the order
within a pair alternates. Their bits must be equal. For information: the same with hooks that look and change nothing.

Writes results/plain_path-<device>-<yyyymm>.json, unless --quick.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from _machine import judged, keep
from torch import Tensor

from raphael.diffusion.sampling import Order, encode_texts, sample_order
from raphael.generate.pipeline import RaphaelPipeline
from raphael.net.attention import (
    SMALL_MAP_PIXELS,
    CrossAttention,
    SelfAttention,
    _counted,
    _cross_map,
    attend,
)
from raphael.net.condition import AttentionHooks
from raphael.systems.request import Start

PROMPT = "a red circle on a blue background"
BATCHES = (1, 16)


class BareSelf(SelfAttention):
    def forward(self, h: Tensor, site: Any, hooks: Any = None) -> Tensor:
        B, P, D = h.shape
        q, k, v = self.qkv(h).view(B, P, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if P > SMALL_MAP_PIXELS or h.device.type != "cpu":
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = self._map(q, k).to(v.dtype) @ v
        return self.out(out.transpose(1, 2).reshape(B, P, D))


class BareCross(CrossAttention):
    def forward(
        self,
        h: Tensor,
        context: Tensor,
        context_mask: Tensor | None,
        site: Any,
        hooks: Any = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
        need_map: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        B, P, D = h.shape
        q = self.q(h).view(B, P, self.num_heads, -1).transpose(1, 2)
        k, v = self.keys_values(context) if keys_values is None else keys_values
        if not need_map:
            return self.out(attend(q, k, v, context_mask).transpose(1, 2).reshape(B, P, D)), None
        maps, v = _cross_map(q, k, context_mask), _counted(v, context_mask)
        out = self.out((maps.to(v) @ v).transpose(1, 2).reshape(B, P, D))
        joined = maps.mean(1) if self.joined == "mean_of_heads" else maps.amax(1)
        return out, joined if context_mask is None else joined.masked_fill(~context_mask[:, None, :], 0)


@contextmanager
def without_hooks(network: torch.nn.Module) -> Iterator[None]:
    """Inside, its attentions are the peer's."""
    bare = {SelfAttention: BareSelf, CrossAttention: BareCross}
    found = [module for module in network.modules() if type(module) in bare]
    kinds = [type(module) for module in found]
    for module in found:
        module.__class__ = bare[type(module)]
    try:
        yield
    finally:
        for module, kind in zip(found, kinds, strict=True):
            module.__class__ = kind


def drawing(pipeline: Any, batch: int, steps: int) -> Callable[[AttentionHooks | None], Tensor]:
    """hooks -> latents of `batch` images."""
    parts = pipeline.parts()
    settings = pipeline._how(None, {"steps": steps})[0]
    with torch.inference_mode():
        cond, null = encode_texts(parts, [PROMPT] * batch), encode_texts(parts, [""])

    def draw(hooks: AttentionHooks | None = None) -> Tensor:
        noise = Start(0, None, None).of(range(batch), parts.latent_shape, pipeline.device)
        return sample_order(parts, Order(cond.with_hooks(hooks), null, noise, settings))

    return draw


def seconds(draw: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    latents = draw()
    return time.perf_counter() - start, latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="one pair of one step; keeps nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = RaphaelPipeline.from_pretrained("scenes")
    rows, summary = [], []
    looking = AttentionHooks(edit=lambda call, maps: maps)
    for batch in BATCHES:
        draw = drawing(pipeline, batch, 1 if arguments.quick else pipeline.defaults.steps)
        draw(looking)
        times: dict[str, list[float]] = {"ours": [], "bare": [], "looking": []}
        for pair in range(1 if arguments.quick else arguments.pairs):
            for side in ("ours", "bare") if pair % 2 else ("bare", "ours"):
                if side == "bare":
                    with without_hooks(pipeline.unet):
                        spent, bare = seconds(draw)
                else:
                    spent, ours = seconds(draw)
                times[side].append(spent)
            times["looking"].append(seconds(lambda: draw(looking))[0])  # noqa: B023 (called here)
            assert torch.equal(ours, bare), "the plain path draws other bits"
        ratio = statistics.median(a / b for a, b in zip(times["ours"], times["bare"], strict=True))
        row = {"batch": batch, "median_ratio": round(ratio, 4), "equal_bits": True, **times}
        rows.append(row)
        least = {side: min(found) for side, found in times.items()}
        print(f"batch {batch}: {ratio:.4f} of the peer; looking on: {least['looking'] / least['ours']:.2f}", flush=True)
        summary.append(judged(f"batch {batch}, median of pairs", ratio, 1.0, "share", "<= 1.01"))
    if not arguments.quick:
        keep("plain_path", rows, summary)


if __name__ == "__main__":
    main()
