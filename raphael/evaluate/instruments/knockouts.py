"""Knock-outs: what of the network does the work? The loss on held-out images with one part taken away.

| part | what is done |
| --- | --- |
| `masks_of_ones` | every word's mask covers the whole map |
| `random_space_routes`, `random_time_routes` | every token, or sample, goes to an expert drawn at random |
| `uniform_space_routes`, `uniform_time_routes` | every one goes to all experts, each weighted 1 / K |
| `space_moe_removed`, `time_moe_removed` | the mixture's term is left out of the block |

Same images, timesteps and noise each time. A part whose knock-out costs less than 1 % of the loss is inert. Parts are
taken away by torch's forward hooks, which `knocked_out` removes whatever happens: no forward is ever patched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raphael.base.precision import autocast
from raphael.base.probe_set import ProbeSet
from raphael.base.randomness import SampleRng
from raphael.base.records import TOKEN_IDS, Records
from raphael.diffusion.prediction import prediction_of, training_pair
from raphael.evaluate.instruments.probe import mean_latents, network_of
from raphael.evaluate.metrics.intervals import bootstrap_mean
from raphael.generate.pipeline import RaphaelPipeline
from raphael.net.condition import Condition
from raphael.net.latents import moments_of
from raphael.net.moe.block import RaphaelBlock
from raphael.net.moe.mixtures import region_mask
from raphael.net.moe.unet import RaphaelUNet
from raphael.train.heldout import chosen

VERSION = "knockouts/v1"
INERT_BELOW = 0.01  # of the loss
SPACE = ("masks_of_ones", "random_space_routes", "uniform_space_routes", "space_moe_removed")
TIME = ("random_time_routes", "uniform_time_routes", "time_moe_removed")
BY_BLOCK = ("space_moe_removed", "time_moe_removed")  # that the stage evaluate takes away block by block, too
QUARTERS, BATCH = 4, 32


@dataclass(frozen=True)
class Images:
    """Scaled latents (n, C, h, w) and what the network reads of their captions, (n, N, D)."""

    latents: Tensor
    text: Condition
    source: str  # in words


@contextlib.contextmanager
def knocked_out(unet: RaphaelUNet, part: str, block: int | None = None, seed: int = 0) -> Iterator[None]:
    """Inside, `part` is taken away in every block that has it, or in the block of that index. seed: of random routes.

    Raises ValueError for a part that is none.
    """
    if part not in SPACE + TIME:
        raise ValueError(f"part: got {part!r}, expected one of {', '.join(SPACE + TIME)}")
    blocks = [item for item in unet.transformer_blocks() if block in (None, item.index)]
    with contextlib.ExitStack() as stack:
        for item in blocks:
            if (item.space_moe if part in SPACE else item.time_moe) is not None:
                _knock_out(stack, item, part, seed)
        yield


def parts_of(unet: RaphaelUNet) -> list[str]:
    """Those that the network has."""
    blocks = unet.transformer_blocks()
    space, time = (any(getattr(block, kind) is not None for block in blocks) for kind in ("space_moe", "time_moe"))
    return [*(SPACE if space else ()), *(TIME if time else ())]


def _knock_out(stack: contextlib.ExitStack, block: RaphaelBlock, part: str, seed: int) -> None:
    mixture: Any = block.space_moe if part in SPACE else block.time_moe

    def on(module: torch.nn.Module, hook: Callable[..., Any]) -> None:
        stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

    def removed(module, args, kwargs, output):
        term = torch.zeros_like(output[0]) if block.residual else args[0]  # without a residual: h passes
        return term, *output[1:]

    def random(gate, args, kwargs, output):
        expert, probability, weight = output
        generator = torch.Generator().manual_seed(1000 * seed + block.index)
        drawn = torch.randint(gate.num_experts, expert.shape, generator=generator)
        return drawn.to(expert), probability, torch.ones_like(weight)

    def uniform_space(module, args, kwargs, output):
        """The term is linear in the routes, so the mean over K constant ones is that of the uniform mixture."""
        routing = output[1]
        one = torch.ones_like(routing.expert, dtype=torch.float32)
        terms = []
        for k in range(module.gate.num_experts):
            choice = (torch.full_like(routing.expert, k), routing.probability, one)
            terms.append(module.forward(*args, **{**kwargs, "choice": choice})[0])
        return torch.stack(terms).mean(0), routing

    def uniform_time(module, args, kwargs, output):
        h, experts = args[0], module.gate.num_experts
        share = h.new_full((*h.shape[:2], experts), 1 / experts)
        return module.experts.weighted_sum(h, share, torch.zeros_like(share)), output[1]

    if part == "masks_of_ones":
        stack.callback(setattr, mixture, "mask_threshold", mixture.mask_threshold)
        mixture.mask_threshold = 0.0  # attention is positive on every pixel
    elif part.startswith("random"):
        on(mixture.gate, random)
    elif part == "uniform_space_routes":
        on(mixture, uniform_space)
    elif part == "uniform_time_routes":
        on(mixture, uniform_time)
    else:
        on(mixture, removed)


class Knockouts:
    """What is asked of one pipeline and some images, case by case; a case is the same whatever was before it.

    every_block: parts that are also taken away in one block after another.
    """

    def __init__(
        self,
        pipeline: RaphaelPipeline,
        images: Images,
        *,
        seed: int = 0,
        precision: str = "auto",
        every_block: tuple[str, ...] = SPACE + TIME,
    ):
        self.pipeline, self.images, self.seed, self.precision = pipeline, images, seed, precision
        self.cases = _cases(pipeline.unet, every_block)

    def __len__(self) -> int:
        """The loss as it is, every case, and what is inside."""
        return len(self.cases) + 2

    @torch.inference_mode()
    def __call__(self, number: int) -> Any:
        """The losses of the images, (n,); at last what `_inside` says."""
        with autocast(self.precision, self.pipeline.device):
            if number == len(self) - 1:
                return _inside(self.pipeline, self.images, self.seed)
            if number == 0:
                return _losses(self.pipeline, self.images, self.seed).tolist()
            with knocked_out(self.pipeline.unet, *self.cases[number - 1], self.seed):
                return _losses(self.pipeline, self.images, self.seed).tolist()

    def told(self, found: list[Any]) -> dict[str, Any]:
        """All of them, in order -> {version, n, of, seed, precision, loss, parts: [{part, block (null: all), loss,
        cost, low, high, inert}], mask_cover, gate_entropy}.

        cost: the rise as a share of the loss, with its 95 % bootstrap interval over images.
        """
        base, rows = np.array(found[0]), []
        loss = float(base.mean())
        for (part, block), losses in zip(self.cases, found[1:-1], strict=True):
            rise = np.array(losses) - base
            low, high = bootstrap_mean(rise) if len(rise) > 1 else (None, None)
            row: dict[str, Any] = {"part": part, "block": block, "loss": round(loss + float(rise.mean()), 6)}
            row |= {"cost": round(float(rise.mean()) / loss, 6)}
            row |= {"low": low and round(low / loss, 6), "high": high and round(high / loss, 6)}
            rows.append({**row, "inert": bool(row["cost"] < INERT_BELOW)})
        said = {"version": VERSION, "n": len(base), "of": self.images.source}
        said |= {"seed": self.seed, "precision": self.precision}
        return {**said, "loss": round(loss, 6), "parts": rows, **found[-1]}


def knockouts(asked: Knockouts, advance: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """`told` of all cases. advance: called with the cases done."""
    found = []
    for number in range(len(asked)):
        found.append(asked(number))
        advance(1)
    return asked.told(found)


def _cases(unet: RaphaelUNet, every_block: tuple[str, ...]) -> list[tuple[str, int | None]]:
    parts, blocks = parts_of(unet), range(unet.num_blocks)
    return [(part, None) for part in parts] + [(p, b) for p in parts if p in every_block for b in blocks]


def _passes(images: Images, num_steps: int) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(rows, their timesteps): strata of T in each quarter, so that no part of the schedule is left to chance."""
    n = len(images.latents)
    for quarter in range(QUARTERS):
        for first in range(0, n, BATCH):
            rows = np.arange(first, min(first + BATCH, n))
            places = (quarter + (rows + 0.5) / n) / QUARTERS
            yield rows, torch.from_numpy((places * num_steps).astype(np.int64)).to(images.latents.device)


def _losses(pipeline: RaphaelPipeline, images: Images, seed: int) -> np.ndarray:
    """(n,) float64: each image's error of v, the mean over its timesteps."""
    network, total = network_of(pipeline), np.zeros(len(images.latents))
    for rows, t in _passes(images, pipeline.schedule.num_steps):
        x0, noise, text = _batch(images, rows, seed)
        total[rows] += network.velocity_errors(x0, noise, t, text).double().cpu().numpy() / QUARTERS
    return total


def _batch(images: Images, rows: np.ndarray, seed: int) -> tuple[Tensor, Tensor, Condition]:
    x0 = images.latents[rows]
    noise = SampleRng(seed, 0, rows).normal("knockouts", x0.shape[1:]).to(x0.device)
    return x0, noise, images.text.rows(torch.from_numpy(rows))


def _inside(pipeline: RaphaelPipeline, images: Images, seed: int) -> dict[str, Any]:
    """mask_cover: by block, the share of the map inside a word's mask, mean over words and images; gate_entropy: of
    both kinds of gates by block, 1 undecided, 0 certain. null where a block has no such mixture."""
    cover: dict[int, list[Tensor]] = {}
    entropy: dict[str, dict[int, list[Tensor]]] = {"space": {}, "time": {}}
    blocks, prediction = pipeline.unet.transformer_blocks(), prediction_of(pipeline.diffusion)
    for rows, t in _passes(images, pipeline.schedule.num_steps):
        x0, noise, text = _batch(images, rows, seed)
        x_t = training_pair(prediction, pipeline.schedule, x0, noise, t)[0].float()
        for index, block in enumerate(pipeline.unet(x_t, t, text, collect=True).blocks):
            for kind in ("space", "time"):
                if (routing := getattr(block, kind)) is not None:
                    entropy[kind].setdefault(index, []).append(routing.entropy())
            if block.space is not None:
                inside = region_mask(block.attention, blocks[index].space_moe.mask_threshold).float().mean(1)
                cover.setdefault(index, []).append(inside[block.space.chosen])

    def means(found: dict[int, list[Tensor]]) -> list[float | None]:
        return [round(float(torch.cat(found[i]).mean()), 6) if i in found else None for i in range(len(blocks))]

    return {"mask_cover": means(cover), "gate_entropy": {kind: means(found) for kind, found in entropy.items()}}


@torch.inference_mode()
def images_of_scenes(pipeline: RaphaelPipeline, asked: ProbeSet, n: int) -> Images:
    """n of the probe's scenes, of every suite as many."""
    rows = np.unique(np.linspace(0, len(asked) - 1, min(n, len(asked))).round().astype(np.int64))
    text = pipeline.encode([asked.captions[row] for row in rows])
    return Images(mean_latents(pipeline, asked.images[rows]), text, "held-out scenes")


@torch.inference_mode()
def images_of_records(pipeline: RaphaelPipeline, records: Records, n: int) -> Images:
    """Of the n records that a training with train.num_heldout: n keeps out, those of the most frequent size."""
    rows = chosen(records.keys, min(n, len(records) - 1))
    held = np.searchsorted(np.cumsum(records.bucket_counts), rows, side="right")
    rows = rows[held == np.bincount(held).argmax()]
    batch = {name: torch.from_numpy(array).to(pipeline.device) for name, array in records.batch(rows).items()}
    moments = moments_of(batch).float()
    encoding = pipeline.text_encoder.encode(batch[TOKEN_IDS].long())
    latents = pipeline.autoencoder.latents_from_moments(moments).float()
    return Images(latents, Condition(encoding.context, encoding.mask), f"records {records.sha256[:16]}")


def knockout_table(measured: dict[str, Any]) -> str:
    """The numbers as text."""
    lines = [f"loss {measured['loss']:.4f} on {measured['n']} {measured['of']}", ""]
    lines.append(f"{'knocked out':<28}{'block':>6}{'loss':>10}{'cost':>10}{'95 % interval':>20}")
    for row in measured["parts"]:
        block = "all" if row["block"] is None else str(row["block"])
        interval = "" if row["low"] is None else f"{100 * row['low']:.2f} to {100 * row['high']:.2f}"
        line = f"{row['part'].replace('_', ' '):<28}{block:>6}{row['loss']:>10.4f}{100 * row['cost']:>8.2f} %"
        lines.append(f"{line}{interval:>20}{'  inert' if row['inert'] else ''}")

    def by_block(values: list[float | None]) -> str:
        return ", ".join("none" if value is None else f"{value:.2f}" for value in values)

    lines += ["", f"share of the map inside a word's mask, by block: {by_block(measured['mask_cover'])}"]
    for kind, values in measured["gate_entropy"].items():
        lines.append(f"entropy of the {kind} gates (1 undecided), by block: {by_block(values)}")
    return "\n".join(lines)
