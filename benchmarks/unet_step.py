"""A training step of the `sd` preset's U-Net beside diffusers' UNet2DConditionModel of the same shape.

320-640-1280-1280, two res-blocks a level, as many heads a level as ours has (width 40), context 77 x 1024, 4 channels
in and out, plain GEGLU feed-forwards on both sides (benchmarks/_peers.py says what still differs). A step is forward,
mean square, backward, AdamW (on both sides ours, torch's fused one, unless a row says otherwise). bf16 is autocast over
float32 weights.

like for like   both in float32, contiguous, eager; both in bf16, channels_last, eager
as shipped      ours as raphael/train runs it: precision "auto", channels_last, fused AdamW; theirs as its own training
                script runs it: float32, contiguous, AdamW not fused
8 heads         theirs with SD v1's 8 heads of growing width, like for like in float32
mixtures        ours with both mixtures beside ours without, at half the widths (with them `sd` needs 27 GB to train)

On a CPU every side runs in a process of its own, one at a time, in turns; times are the best of all turns, memory is
the process's peak. With a GPU: images/s and the share of its peak bf16 rate (3 forward passes' FLOP an image, whatever
is recomputed), at two sizes, with and without compilation and activation checkpointing.
Not measured: data, text encoder, EMA. Writes results/unet_step-<device>-<yyyymm>.json, unless --quick.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from _apart import apart, here
from _machine import judged, keep

PEAK_BF16_TFLOPS = {"H100": 989.0, "H200": 989.0}  # dense, of the data sheets
HALF = (160, 320, 640, 640)


@dataclass(frozen=True)
class Side:
    """One network, and how it is run."""

    who: str  # ours, theirs
    bf16: bool = False
    channels_last: bool = False
    mixtures: bool = False
    heads: int | None = None  # of theirs; None: as many as ours
    preset: str = "sd"
    channels: tuple[int, ...] = ()  # instead of the preset's
    device: str = "cpu"
    compiled: bool = False
    checkpointed: bool = False


@dataclass(frozen=True)
class Size:
    batch: int
    latent: int
    turns: int  # measured, after one that is not


def config_and_maker(side: Side) -> tuple[Any, Callable[[], Any]]:
    from _peers import Ours, Theirs, config_of, dense

    config = config_of(side.preset, **({"channels": side.channels} if side.channels else {}))
    if side.who == "theirs":
        return config, lambda: Theirs(config, side.heads)
    if not side.mixtures:
        config = dense(config)
    return config, lambda: Ours(config)


def measure(side: Side, size: Size) -> dict[str, Any]:
    """Best seconds of forward (no gradients), forward + backward, AdamW fused and not; parameters and FLOP."""
    import torch
    from _peers import fill, make_inputs, size_and_cost

    from raphael.train.optim.optimizer import FusedAdamW

    config, make = config_and_maker(side)
    cost = size_and_cost(make, make_inputs(config, size.batch, size.latent))
    layout = torch.channels_last if side.channels_last else torch.contiguous_format
    net = fill(make()).to(side.device).to(memory_format=layout).train()
    x, t, context = make_inputs(config, size.batch, size.latent, side.device)
    x, noise = x.to(memory_format=layout), torch.randn_like(x)
    if side.checkpointed:
        net.checkpoint_activations()
    run = torch.compile(net) if side.compiled else net
    optimizer = FusedAdamW(net.parameters(), lr=1e-6)

    def autocast() -> torch.autocast:
        return torch.autocast(side.device, torch.bfloat16, enabled=side.bf16)

    def forward() -> None:
        with torch.no_grad(), autocast():
            run(x, t, context)

    def forward_backward() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            prediction = run(x, t, context)
        torch.nn.functional.mse_loss(prediction.float(), noise).backward()

    def update(fused: bool) -> None:
        for group in optimizer.param_groups:
            group["fused"] = fused
        optimizer.step()

    parts = {"forward_backward": forward_backward, "adamw_fused": lambda: update(True)}
    if side.device == "cpu":  # elsewhere the step's counters lie on the device, where only the fused form takes them
        parts["adamw_plain"] = lambda: update(False)
    parts["forward"] = forward  # last: before it every turn holds the gradients that the update needs
    best = dict.fromkeys(parts, float("inf"))
    for turn in range(size.turns + 1):
        for part, action in parts.items():
            net.train(part != "forward")
            taken = seconds(action, side.device)
            best[part] = min(best[part], taken) if turn else best[part]
    memory = {"device_peak_gb": torch.cuda.max_memory_allocated() / 1e9} if side.device == "cuda" else {}
    return {**{part: round(value, 5) for part, value in best.items()}, **cost, **memory}


def seconds(action: Callable[[], Any], device: str) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turns(sides: dict[str, Side], size: Size, rounds: int) -> dict[str, dict[str, Any]]:
    """The best of `rounds` processes of each side: one after the other, then again. rounds 0: once, in this process."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in sides}
    for _ in range(max(rounds, 1)):
        for name, side in sides.items():
            found = (apart if rounds else here)(measure, side, size)
            rows[name] = {key: min(value, rows[name].get(key, value)) for key, value in found.items()}
    for name, row in rows.items():
        row["step"] = round(row["forward_backward"] + row["adamw_fused"], 5)
        if "adamw_plain" in row:
            row["step_plain_adamw"] = round(row["forward_backward"] + row["adamw_plain"], 5)
        show = "  ".join(f"{key} {value:.4g}" for key, value in row.items())
        print(f"{name:<28} {show}", flush=True)
    return rows


def cpu_sides(quick: bool, automatic: bool) -> dict[str, Side]:
    preset = "sd-debug" if quick else "sd"
    ours, theirs = Side("ours", preset=preset), Side("theirs", preset=preset)
    fast = {"bf16": True, "channels_last": True}
    half = {"channels": () if quick else HALF, "bf16": automatic, "channels_last": True}
    sides = {
        "ours fp32": ours,
        "theirs fp32": theirs,
        "ours bf16": replace(ours, **fast),
        "theirs bf16": replace(theirs, **fast),
        "theirs fp32, 8 heads": replace(theirs, heads=2 if quick else 8),
        "half, dense": replace(ours, **half),
        "half, mixtures": replace(ours, **half, mixtures=True),
    }
    if not automatic:  # what "auto" chooses on such a processor
        sides["ours fp32 channels_last"] = replace(ours, channels_last=True)
    return sides


def cpu_summary(rows: dict[str, dict[str, Any]], automatic: bool) -> list[dict[str, Any]]:
    def row(case: str, ours: str, peer: str, key: str, target: str = "", peer_key: str = "") -> dict[str, Any]:
        unit = {"peak_gb": "GB", "forward_gflop": "GFLOP"}.get(key, "s")
        return judged(case, rows[ours][key], rows[peer][peer_key or key], unit, target)

    shipped = "ours bf16" if automatic else "ours fp32 channels_last"
    summary = []
    for kind, how in (("fp32", "fp32 contiguous"), ("bf16", "bf16 channels_last")):
        for key, what in (("step", "training step"), ("forward", "forward"), ("peak_gb", "peak memory")):
            summary.append(row(f"like for like, {how}: {what}", f"ours {kind}", f"theirs {kind}", key, "<= 1.0"))
    eight = "theirs fp32, 8 heads"
    precision = "bf16" if automatic else "fp32"
    return [
        *summary,
        row("like for like, fp32 contiguous, peer with 8 heads: training step", "ours fp32", eight, "step"),
        row("like for like, fp32 contiguous: FLOP of a forward", "ours fp32", "theirs fp32", "forward_gflop"),
        row(
            f"as shipped ({precision} channels_last fused; fp32 contiguous plain AdamW): training step",
            shipped,
            "theirs fp32",
            "step",
            "<= 0.6",
            "step_plain_adamw",
        ),
        row("mixtures (peer: ours dense), half widths: training step", "half, mixtures", "half, dense", "step"),
        row("mixtures (peer: ours dense), half widths: forward", "half, mixtures", "half, dense", "forward"),
        row(
            "mixtures (peer: ours dense), half widths: FLOP, experts fused",
            "half, mixtures",
            "half, dense",
            "forward_gflop",
        ),
    ]


def on_gpu(quick: bool, batches: dict[int, int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and summary. The two sides take turns; both have one batch size at each size of latents."""
    import torch

    name = torch.cuda.get_device_name()
    peak = next((rate for part, rate in PEAK_BF16_TFLOPS.items() if part in name), None)
    preset = "sd-debug" if quick else "sd"
    rows, summary = [], []
    for latent, batch in batches.items():
        for compiled in (False, True):
            for checkpointed in (False, True):
                way = {"compiled": compiled, "checkpointed": checkpointed, "preset": preset, "device": "cuda"}
                sides = {who: Side(who, bf16=True, channels_last=True, **way) for who in ("ours", "theirs")}
                sides["ours, mixtures"] = replace(sides["ours"], mixtures=True)
                case = f"bf16 channels_last, latent {latent}, batch {batch}"
                case += (", compiled" if compiled else "") + (", checkpointed" if checkpointed else "")
                found = in_turns(sides, Size(batch, latent, 1 if quick else 10), 0 if quick else 2)
                for who, row in found.items():
                    row["images_per_s"] = round(batch / row["step"], 2)
                    tflop = 3 * row["forward_gflop"] / 1e3  # of the batch; backward is twice the forward
                    row["mfu"] = round(tflop / row["step"] / peak, 4) if peak else None
                    rows.append({"case": case, "who": who, **asdict(sides[who]), **row})
                ours, theirs = found["ours"], found["theirs"]
                summary.append(judged(case, ours["images_per_s"], theirs["images_per_s"], "images/s", ">= 1.0"))
                memory = (ours["device_peak_gb"], theirs["device_peak_gb"])
                summary.append(judged(f"{case}: peak memory", *memory, "GB", "<= 1.0"))
    return rows, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the preset sd-debug, one turn: does it run at all")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=2, help="on a CPU")
    parser.add_argument("--rounds", type=int, default=2, help="processes a side, on a CPU")
    arguments = parser.parse_args()
    quick = arguments.quick
    if arguments.device == "cuda":
        rows, summary = on_gpu(quick, {8: 2} if quick else {32: 128, 64: 32})
        facts = {}
    else:
        automatic = (here if quick else apart)(native)["bf16"]
        sides, size = cpu_sides(quick, automatic), Size(1 if quick else arguments.batch, 8 if quick else 32, 1)
        measured = in_turns(sides, size, 0 if quick else arguments.rounds)
        rows = [{"case": name, **asdict(sides[name]), **row} for name, row in measured.items()]
        summary, facts = cpu_summary(measured, automatic), asdict(size)
    for row in summary:
        print(
            f"{row['case']:<86} {row['ours']:>9} {row['peer']:>9} {row['unit']:<8} {row['ratio']:.3f} {row['target']}"
        )
    if not quick:
        keep("unet_step", rows, summary, shape="sd", **facts)


def native() -> dict[str, bool]:
    from raphael.base.precision import native_bf16

    return {"bf16": native_bf16("cpu")}


if __name__ == "__main__":
    main()
