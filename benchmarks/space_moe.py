"""What the counting identity saves: Space-MoE as printed (one expert pass a token), a gather per token, and ours.

The printed formula is the peer, not the authors' code, which nobody has; they too remark that the cost is bounded
by the number of experts, so the fused form over all six is about what they must have run, and stands in a column of its
own. 77 tokens, 6 experts, region masks of density about 0.3, one sample; the three widths of the `sd` preset at 512 px.
Cover 6: tokens take all six experts in turn; cover 3: only three of them. The bound of the ratio is 77 / cover.

Ours and the peers take turns in one process; times are the best of their turns. Errors are largest differences from the
literal loop in float64, relative to its largest value; for the gradients of h and of all expert weights alike.
Writes results/space_moe-<device>-<yyyymm>.json, unless --quick.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from _machine import judged, keep
from torch import Tensor

from raphael.net.moe.experts import feed_forward
from raphael.net.moe.mixtures import SpaceMoE, region_mask

TOKENS, EXPERTS = 77, 6
SIZES = ((320, 64 * 64), (640, 32 * 32), (1280, 16 * 16))  # width, pixels
TARGETS = {6: 11.5, 3: 20.0}  # times the literal loop, on a CPU


def literal(moe: SpaceMoE, h: Tensor, mask: Tensor, route: list[int]) -> Tensor:
    """1/n sum_i e_route(i)( h o M_hat_i ), token by token."""
    experts = moe.experts.experts()
    out = torch.zeros_like(h)
    for i, k in enumerate(route):
        out = out + feed_forward(h * mask[:, :, i : i + 1], experts[k])
    return out / TOKENS


def gathered(moe: SpaceMoE, h: Tensor, mask: Tensor, route: list[int]) -> Tensor:
    """The same, each expert on its token's own pixels; e_k(0) elsewhere."""
    experts, at_zero = moe.experts.experts(), moe.experts.at_zero()
    out = torch.zeros_like(h[0])
    for i, k in enumerate(route):
        pixels = mask[0, :, i].nonzero().squeeze(1)
        inside = feed_forward(h[0, pixels], experts[k])
        out = (out + at_zero[k]).index_add(0, pixels, inside - at_zero[k])
    return (out / TOKENS).unsqueeze(0)


class Case:
    """One layer with its input, in one type: the ways to compute it as functions without arguments."""

    def __init__(self, width: int, pixels: int, cover: int, dtype: torch.dtype, device: str):
        torch.manual_seed(0)
        self.moe = SpaceMoE(width, 64, EXPERTS).to(device, dtype).eval()
        self.h = torch.randn(1, pixels, width, dtype=torch.float64).to(device, dtype)
        attention = torch.rand(1, pixels, TOKENS, dtype=torch.float64) ** 1.34
        attention = torch.where(attention > 0.62, attention, 0.1 * attention).to(device, dtype)  # density 0.3
        self.mask = region_mask(attention, self.moe.mask_threshold).to(dtype)
        self.route = [i % cover for i in range(TOKENS)]
        context = torch.zeros(1, TOKENS, 64, device=device, dtype=dtype)
        expert = torch.tensor([self.route], device=device)
        ones = torch.ones(1, TOKENS, device=device, dtype=dtype)
        choice = (expert, torch.full((1, TOKENS, EXPERTS), 1 / EXPERTS, device=device), ones)

        def ours(plan: str) -> Tensor:
            self.moe.plan = plan
            return self.moe(self.h, context, attention, choice=choice)[0]

        first = self.moe.experts.experts()[0]
        self.ways: dict[str, Callable[[], Tensor]] = {
            "literal": lambda: literal(self.moe, self.h, self.mask, self.route),
            "gather per token": lambda: gathered(self.moe, self.h, self.mask, self.route),
            "fused, six experts": lambda: ours("fused"),
            "ours": lambda: ours("auto"),
            "one dense FFN": lambda: feed_forward(self.h, first),
        }

    def forward(self, way: str) -> Tensor:
        with torch.no_grad():
            return self.ways[way]()

    def forward_backward(self, way: str) -> list[Tensor]:
        bank = self.moe.experts
        inputs = [self.h.requires_grad_(True), bank.w1, bank.b1, bank.w2, bank.b2]
        return list(torch.autograd.grad(self.ways[way]().square().mean(), inputs, allow_unused=True))


def seconds(action: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def relative(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).abs().max() / truth.abs().max()).item()


def measure(width: int, pixels: int, cover: int, repeats: int, device: str) -> list[dict[str, Any]]:
    exact, case = (Case(width, pixels, cover, dtype, device) for dtype in (torch.float64, torch.float32))
    rows = []
    for mode in ("forward", "forward + backward"):

        def run(of: Case, way: str, mode: str = mode) -> list[Tensor]:
            return [of.forward(way)] if mode == "forward" else of.forward_backward(way)

        truth = run(exact, "literal")
        errors = {
            name: max(relative(got, want) for got, want in zip(run(of, "ours"), truth, strict=True))
            for name, of in (("float32", case), ("float64", exact))
        }
        best = dict.fromkeys(case.ways, float("inf"))
        for turn in range(repeats):
            for way in best:
                if turn and way == "literal" and turn > repeats // 2:
                    continue
                best[way] = min(best[way], seconds(lambda way=way: run(case, way), device))
        ratio = best["literal"] / best["ours"]
        rows.append(
            {
                "width": width,
                "pixels": pixels,
                "cover": cover,
                "mode": mode,
                "seconds": {way: round(value, 5) for way, value in best.items()},
                "times_literal": round(ratio, 2),
                "bound": round(TOKENS / cover, 1),
                "target": TARGETS[cover],
                "times_dense_ffn": round(best["ours"] / best["one dense FFN"], 2),
                "error_float32": errors["float32"],
                "error_float64": errors["float64"],
            }
        )
        show = "  ".join(f"{value * 1e3:9.1f}" for value in best.values())
        print(
            f"{width:>5} {pixels:>6} {cover:>5}  {mode:<19} {show}  {ratio:6.1f}x (bound {TOKENS / cover:.1f}, target "
            f"{TARGETS[cover]})  errors {errors['float32']:.1e} {errors['float64']:.1e}",
            flush=True,
        )
    return rows


def summary_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds beside the literal loop's; the targets are times as fast, hence their inverse."""
    return [
        judged(
            f"width {row['width']}, cover {row['cover']}, {row['mode']}, fp32; peer: literal loop",
            row["seconds"]["ours"],
            row["seconds"]["literal"],
            "s",
            f"<= {1 / row['target']:.3f}",
        )
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, one turn: does it run at all")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    sizes, repeats = (((64, 64), (96, 36)), 1) if arguments.quick else (SIZES, arguments.repeats)
    print("width pixels cover  mode                 ms: literal  per token      fused       ours  dense FFN")
    rows = []
    for width, pixels in sizes:
        for cover in TARGETS:
            rows += measure(width, pixels, cover, repeats, arguments.device)
    if not arguments.quick:
        keep("space_moe", rows, summary_of(rows), tokens=TOKENS, experts=EXPERTS, density=0.3, precision="float32")


if __name__ == "__main__":
    main()
