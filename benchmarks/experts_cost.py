"""What experts cost: steps/s of drawing and of training with 0 to 8 space experts and 0 to 4 time experts.

The preset `small` (96-192-288) at latent 32 x 32, context 77. A drawing step is what DDIM does for one image with
guidance: the network on both branches at once, no gradients, while the texts are remembered. A training step is
forward, mean square, backward, fused AdamW, batch 2, without the edge loss (it costs the same in every setting). The
number of space experts varies beside 4 time experts, that of time experts beside 6 space experts; 0 is no such layer.
All settings take turns in one process, best of the turns. Tokens are random, so all experts are used: the case that the
paper measured (40 tokens, section 4.2), whose six experts cost 24 % of DDIM's steps/s, of another size and on a GPU.

Rows of their own: a drawing step that does not remember the texts (routes, keys, values), nor keeps e_k(0).
Precision is what raphael/base/precision.py picks ("auto"), layout channels_last.
Writes results/experts_cost-<device>-<yyyymm>.json and a plot beside it, unless --quick.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from _machine import judged, keep
from _peers import Ours, config_of, fill, make_inputs

from raphael.base.precision import autocast, native_bf16
from raphael.net.condition import Condition
from raphael.net.moe.experts import ExpertBank

SPACE, TIME = (0, 1, 2, 4, 6, 8), (0, 1, 2, 4)
WITH_SPACE, WITH_TIME = 6, 4  # what the other sweep is beside: the paper's numbers
PAPER_SLOWDOWN = 24.0  # per cent, six space experts
Setting = tuple[int, int]  # space experts, time experts


class Case:
    """One network, drawing and training."""

    def __init__(self, setting: Setting, preset: str, latent: int):
        space, when = setting
        self.config = config_of(
            preset,
            space_layer="moe" if space else "none",
            time_layer="moe" if when else "none",
            num_space_experts=max(space, 1),
            num_time_experts=max(when, 1),
            edge_tokens="none",
        )
        self.net = fill(Ours(self.config)).to(memory_format=torch.channels_last)
        x, self.t, self.context = make_inputs(self.config, 2, latent)
        self.x = x.to(memory_format=torch.channels_last)

    def draw(self, steps: int, remember: bool = True, keep_zero: bool = True) -> float:
        """Seconds of the fastest of `steps` steps, after one that fills what is remembered."""
        net = self.net.eval().net
        banks = [module for module in net.modules() if isinstance(module, ExpertBank)]
        if not keep_zero:
            for bank in banks:
                bank.at_zero = bank._compute_at_zero
        taken = []
        remembering = net.remembering() if remember else contextlib.nullcontext()
        with torch.inference_mode(), remembering, autocast("auto", "cpu"):
            for _ in range(steps + 1):
                started = time.perf_counter()
                self.net(self.x, self.t[:1].expand(2), self.context)
                taken.append(time.perf_counter() - started)
        for bank in banks:
            bank.__dict__.pop("at_zero", None)
        return min(taken[1:])

    def train(self) -> float:
        """Seconds of one training step. The optimizer's moments go again: ten networks' would not fit beside."""
        self.net.train()
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-6, fused=True)
        for group in optimizer.param_groups:  # allocated before the clock starts
            for parameter in group["params"]:
                optimizer.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        started = time.perf_counter()
        with autocast("auto", "cpu"):
            prediction = self.net(self.x, self.t, self.context)
        prediction.float().square().mean().backward()
        optimizer.step()
        taken = time.perf_counter() - started
        self.net.zero_grad(set_to_none=True)
        return taken

    def used(self) -> tuple[int, float]:
        """Space experts that the tokens chose, the fewest of all blocks, and how many a pixel needs on average."""
        with torch.inference_mode():
            blocks = self.net.eval().net(self.x, self.t, Condition(self.context)).blocks
        routes = [block.space for block in blocks if block.space is not None]
        if not routes:
            return 0, 0.0
        fewest = min(int((route.load() > 0).sum()) for route in routes)
        return fewest, sum(float(route.cover.mean()) for route in routes) / len(routes)


def settings() -> list[Setting]:
    return list(dict.fromkeys([(space, WITH_TIME) for space in SPACE] + [(WITH_SPACE, when) for when in TIME]))


def measure(preset: str, latent: int, turns: int, steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the settings, rows of what is remembered."""
    cases = {setting: Case(setting, preset, latent) for setting in settings()}
    best = {setting: {"draw": float("inf"), "train": float("inf")} for setting in cases}
    full = cases[WITH_SPACE, WITH_TIME]
    ways = {
        "all remembered": {},
        "e_k(0) at every step": {"keep_zero": False},
        "texts and casts at every step": {"remember": False},
        "nothing remembered": {"remember": False, "keep_zero": False},
    }
    caches = dict.fromkeys(ways, float("inf"))
    for turn in range(turns):
        for setting, case in cases.items():
            best[setting]["draw"] = min(best[setting]["draw"], case.draw(steps))
            best[setting]["train"] = min(best[setting]["train"], case.train())
        for way, options in ways.items():
            caches[way] = min(caches[way], full.draw(steps, **options))
        print(f"turn {turn + 1} of {turns}", flush=True)
    rows = []
    for (space, when), times in best.items():
        fewest, cover = cases[space, when].used()
        row = {"space_experts": space, "time_experts": when, "experts_used_at_least": fewest, "cover": round(cover, 2)}
        for what, value in times.items():
            base = best[(0, when) if when == WITH_TIME else (space, 0)][what]
            row[f"{what}_steps_per_s"] = round(1 / value, 3)
            row[f"{what}_slower_percent"] = round(100 * (1 - base / value), 1)  # than with none of the kind that varies
        if space == WITH_SPACE:  # in both sweeps: beside no time experts too
            row["draw_slower_than_no_time_experts_percent"] = round(
                100 * (1 - best[space, 0]["draw"] / times["draw"]), 1
            )
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    fastest = caches["all remembered"]
    remembered = [
        {"way": way, "draw_steps_per_s": round(1 / value, 3), "times_as_long": round(value / fastest, 3)}
        for way, value in caches.items()
    ]
    for row in remembered:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows, remembered


def summary_of(rows: list[dict[str, Any]], remembered: list[dict[str, Any]]) -> list[dict[str, Any]]:
    six = next(row for row in rows if (row["space_experts"], row["time_experts"]) == (WITH_SPACE, WITH_TIME))
    names = ("drawing step", "training step")
    found = [
        judged(
            f"{name}: slower with six space experts than with none (peer: the paper's 24 % of DDIM, other size, GPU)",
            six[f"{what}_slower_percent"],
            PAPER_SLOWDOWN,
            "%",
            "<= 1.0" if what == "draw" else "",
        )
        for what, name in zip(("draw", "train"), names, strict=True)
    ]
    rate = {row["way"]: row["draw_steps_per_s"] for row in remembered}
    nothing = rate["nothing remembered"]
    found.append(judged("drawing step, peer: ours, nothing remembered", rate["all remembered"], nothing, "steps/s"))
    return found


def plot(rows: list[dict[str, Any]], file: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, kind, beside, fixed in (
        (axes[0], "space_experts", "time_experts", WITH_TIME),
        (axes[1], "time_experts", "space_experts", WITH_SPACE),
    ):
        chosen = sorted((row for row in rows if row[beside] == fixed), key=lambda row: row[kind])
        for what, name, mark in (("draw", "drawing", "o-"), ("train", "training", "s--")):
            rates = [row[f"{what}_steps_per_s"] for row in chosen]
            axis.plot([row[kind] for row in chosen], [100 * rate / rates[0] for rate in rates], mark, label=name)
        axis.set_xlabel(f"number of {kind.replace('_', ' ')} ({fixed} {beside.replace('_', ' ')})")
        axis.set_xticks([row[kind] for row in chosen])
        axis.set_ylim(0, 115)
        axis.grid(alpha=0.3)
    axes[0].plot([WITH_SPACE], [100 - PAPER_SLOWDOWN], "k*", markersize=11, label="paper, DDIM on a GPU")
    axes[0].set_ylabel("steps/s, per cent of none")
    axes[0].legend(loc="lower left")
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the preset small-debug, one turn: does it run at all")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    preset, latent, turns, steps = ("small-debug", 8, 1, 1) if arguments.quick else ("small", 32, arguments.turns, 3)
    rows, remembered = measure(preset, latent, turns, steps)
    summary = summary_of(rows, remembered)
    if not arguments.quick:
        precision = "bf16" if native_bf16("cpu") else "fp32"
        facts = {"preset": preset, "latent": latent, "precision": precision, "caches": remembered}
        file = keep("experts_cost", rows, summary, **facts)
        plot(
            rows,
            file.with_suffix(".png"),
            f"preset {preset}, latent {latent}, {precision}, {torch.get_num_threads()} threads",
        )


if __name__ == "__main__":
    main()
