"""What training a preset costs: floating-point operations, GPU hours, money. `python -m raphael.summary.cost`.

    hours = images x FLOP of a training step / (peak x MFU) / 3600        money = hours x price of one

FLOPs are counted on the real network without its weights (raphael/summary/model.py), a training step is three
forwards, and with `checkpoint_activations` four. Latents are taken as encoded beforehand, once an image; the text
tower runs at every step, since captions are dropped at random. MFU is a scenario: ours is not measured here.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "<!-- begin: python -m raphael.summary.cost -->", "<!-- end -->"


@dataclass(frozen=True)
class Gpu:
    """A card: dense bf16 peak, and what an hour of it costs where it is rented."""

    name: str
    peak_flops: float  # 1/s
    usd_per_hour: float


@dataclass(frozen=True)
class Work:
    """What a training does to one image, in FLOP, the mean over the preset's sizes."""

    unet_step: float  # forward
    text: float
    encode: float  # of the autoencoder


@dataclass(frozen=True)
class Scenario:
    """A way to train: how many images are seen, of how many distinct ones, on what, and how well it is used."""

    name: str
    images: float
    distinct_images: float
    gpu: Gpu
    mfu: float  # of the training steps
    forwards: int = 3  # 4: blocks are computed again in the backward

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu: got {self.mfu:g}, expected above 0 and up to 1, the share of the peak")


@dataclass(frozen=True)
class Cost:
    flop: float
    hours: float  # of one GPU
    usd: float


A100 = Gpu("A100", 312e12, 2.0)
H200 = Gpu("H200", 989e12, 2.0)
PAPER_BATCH, PAPER_GPUS, PAPER_DAYS = 2000, 1000, 60
DATASET_IMAGES = 730e6  # pairs, as a secondary source gives the paper's data; LAION's aesthetic subsets hold as many
ANCHOR_MFU = 0.365  # 8 x H200, Stable Diffusion 2's U-Net at 512 px, MLPerf v5.0
ENCODE_MFU = 0.30
BUDGET_USD = 50_000


def cost_of(work: Work, scenario: Scenario) -> Cost:
    """FLOP, GPU hours and money of a whole training, encoding included."""
    steps = scenario.images * (scenario.forwards * work.unet_step + work.text)
    encode = scenario.distinct_images * work.encode
    seconds = steps / (scenario.gpu.peak_flops * scenario.mfu) + encode / (scenario.gpu.peak_flops * ENCODE_MFU)
    hours = seconds / 3600
    return Cost(steps + encode, hours, hours * scenario.gpu.usd_per_hour)


def images_for(work: Work, scenario: Scenario, usd: float) -> float:
    """How many images the budget sees, after its images are encoded; 0 where encoding alone costs more."""
    encode = scenario.distinct_images * work.encode / (scenario.gpu.peak_flops * ENCODE_MFU) / 3600
    left_s = (usd / scenario.gpu.usd_per_hour - encode) * 3600
    each = scenario.forwards * work.unet_step + work.text
    return max(0.0, left_s * scenario.gpu.peak_flops * scenario.mfu / each)


def mfu_of(work: Work, images: float, gpu: Gpu, hours: float) -> float:
    """The share of the peak that a training of so many images in so many GPU hours used, encoding left out."""
    return images * (3 * work.unet_step + work.text) / (gpu.peak_flops * hours * 3600)


def work_of(preset_name: str) -> tuple[Work, dict[tuple[int, ...], Work]]:
    """(the mean over the preset's sizes, each size's). Some seconds: the parts are built on the meta device."""
    from raphael.base.config.preset import load_preset
    from raphael.summary.model import build_parts, count_flops, runs

    preset = load_preset(preset_name)
    parts = build_parts(preset)
    each = {}
    for size in preset.sizes_px:
        run = runs(preset, parts, size)
        each[size] = Work(*(count_flops(run[part]) for part in ("unet", "text tower", "encode")))
    mean = [sum(getattr(work, name) for work in each.values()) / len(each) for name in ("unet_step", "text", "encode")]
    return Work(*mean), each


def scenarios() -> list[Scenario]:
    return [
        Scenario("one pass over 730 M pairs", DATASET_IMAGES, DATASET_IMAGES, H200, ANCHOR_MFU),
        Scenario("one pass, blocks computed again", DATASET_IMAGES, DATASET_IMAGES, H200, ANCHOR_MFU, forwards=4),
        Scenario("one pass, MFU 25 %", DATASET_IMAGES, DATASET_IMAGES, H200, 0.25),
        Scenario("one pass, MFU 15 %", DATASET_IMAGES, DATASET_IMAGES, H200, 0.15),
        Scenario("one pass on A100, MFU 28 %", DATASET_IMAGES, DATASET_IMAGES, A100, 0.28),
        Scenario("SD 2-base's 2.87 G images", 2.867e9, DATASET_IMAGES, H200, ANCHOR_MFU),
        Scenario("100 M images (the paper's ablations)", 100e6, 100e6, H200, ANCHOR_MFU),
    ]


def page(preset_name: str) -> str:
    """The tables of docs/cost.md, in Markdown."""
    mean, each = work_of(preset_name)
    lines = [
        f"TFLOP for one image with `{preset_name}` (Space-MoE at full cover; a multiply-add counts 2):",
        "",
        "| height x width | U-Net step | training step | text | encode |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = [(f"{size[0]} x {size[1]}", work) for size, work in each.items()] + [("mean", mean)]
    for name, work in rows:
        numbers = (work.unet_step, 3 * work.unet_step, work.text, work.encode)
        lines.append(f"| {name} | " + " | ".join(f"{number / 1e12:.3f}" for number in numbers) + " |")
    lines += [
        "",
        "| scenario | images | GPU | MFU | FLOP | GPU hours | days on 64 | money |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for scenario in scenarios():
        cost = cost_of(mean, scenario)
        lines.append(
            f"| {scenario.name} | {scenario.images / 1e6:,.0f} M | {scenario.gpu.name} | {scenario.mfu:.1%} | "
            f"{cost.flop:.2e} | {cost.hours:,.0f} | {cost.hours / 24 / 64:,.1f} | ${cost.usd:,.0f} |"
        )
    lines += ["", f"For ${BUDGET_USD:,} (encoding of every image seen included, up to 730 M):", ""]
    lines += ["| GPU | MFU | images |", "| --- | --- | --- |"]
    for gpu, mfu in ((H200, ANCHOR_MFU), (H200, 0.25), (H200, 0.15), (A100, 0.28)):
        lines.append(f"| {gpu.name} | {mfu:.1%} | {_affordable(mean, gpu, mfu) / 1e6:,.0f} M |")
    hours = PAPER_GPUS * PAPER_DAYS * 24
    seen = hours * 3600 * A100.peak_flops * 0.28 / (3 * mean.unet_step + mean.text)
    lines += [
        "",
        f"The paper's {hours:,} A100-hours would, at MFU 28 %, see {seen / 1e9:.1f} G images of this network, "
        f"{seen / PAPER_BATCH / 1e6:.1f} M steps of its batch of {PAPER_BATCH:,}; at ${A100.usd_per_hour:g} an hour "
        f"they cost ${hours * A100.usd_per_hour / 1e6:.2f} M. One pass over 730 M pairs in that time is an MFU of "
        f"{mfu_of(mean, DATASET_IMAGES, A100, hours):.1%}.",
    ]
    return "\n".join(lines)


def _affordable(work: Work, gpu: Gpu, mfu: float) -> float:
    """Images that the budget sees where each is encoded once, up to as many as there are."""
    each = (3 * work.unet_step + work.text) / mfu + work.encode / ENCODE_MFU
    images = BUDGET_USD / gpu.usd_per_hour * 3600 * gpu.peak_flops / each
    if images <= DATASET_IMAGES:
        return images
    return images_for(work, Scenario("", 0, DATASET_IMAGES, gpu, mfu), BUDGET_USD)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cost", description="Hours and money of a training, as Markdown.")
    parser.add_argument("--preset", default="raphael-3b", help="default: %(default)s")
    parser.add_argument("--write", type=Path, help="put the tables into this page, between its two marks")
    arguments = parser.parse_args(argv)
    text = page(arguments.preset)
    if arguments.write is None:
        print(text)
        return 0
    whole = arguments.write.read_text(encoding="utf-8")
    head, _, rest = whole.partition(BEGIN)
    tail = rest.partition(END)[2]
    arguments.write.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")
    return 0
