"""The paper's images of its routes (arXiv 2305.18295): how words spread over space experts, and timesteps over time
experts (figure 9), drawn from a checkpoint, each with its numbers.

Both gates are functions of their input alone (raphael/evaluate/report/routes.py): no image is generated for them.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.stage import StageError, write_json
from raphael.evaluate.report.routes import time_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from raphael.generate.pipeline import RaphaelPipeline

ADJECTIVES = ("red", "green", "blue", "yellow", "black", "white", "small", "large")
NOUNS = ("circle", "square", "triangle", "star", "cat", "dog", "house", "tree")
PROMPTS = tuple(f"a {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS)
NUM_WORDS = 24
ENCODED_AT_ONCE = 64
# of report.css: --paper, --ink, --soft, --line, --expert-0 ...
PAPER, INK, SOFT, LINE = "#faf8f4", "#211d18", "#6d655b", "#e6e0d6"
EXPERTS = ("#2f5f8f", "#c9703a", "#4f8a62", "#8d5a91", "#c79a22", "#3f95a0", "#a94a5c", "#7b7467")


def read_prompts(path: Path) -> list[str]:
    """Of a file like data/source/prompts.json, or one a line. Raises StageError where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
        listed = json.loads(text)["prompts"] if path.suffix == ".json" else text.splitlines()
        prompts = [entry["prompt"] if isinstance(entry, dict) else str(entry).strip() for entry in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(f"{path}: not readable as prompts ({type(error).__name__}); expected one a line") from None
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise StageError(f"{path}: got no prompts, expected at least one, one a line")
    return prompts


def word_paths(pipeline: RaphaelPipeline, prompts: list[str]) -> dict[str, Any]:
    """How often every word of the prompts took every space expert, in every block.

    A word is a token of the text encoder, closing and opening ones left out. {"prompts", "tokens", "blocks", "experts",
    "distinct_paths" (of the tokens), "words": [{"word", "count", "taken": [[times an expert was taken] per block]}],
    most frequent words first}. Raises ValueError where no block has Space-MoE.
    """
    import torch

    from raphael.summary.insight import token_words

    num_experts = pipeline.unet.config.num_space_experts
    taken: dict[str, list[list[int]]] = {}
    paths: Counter[tuple[int, ...]] = Counter()
    for start in range(0, len(prompts), ENCODED_AT_ONCE):
        part = prompts[start : start + ENCODED_AT_ONCE]
        with torch.inference_mode():
            cond = pipeline.encode(part)
            routes = (
                pipeline.unet.space_routes(cond.tokens, cond.mask).permute(1, 2, 0).tolist()
            )  # (prompts, N, blocks)
        for prompt, of_prompt, real in zip(part, routes, cond.mask.tolist(), strict=True):
            words = token_words(pipeline.text_encoder, prompt, len(of_prompt))
            for word, path, is_real in zip(words, of_prompt, real, strict=True):
                if not path:
                    raise ValueError("got a model without Space-MoE, expected one: its words take no routes")
                if not is_real or not word or (word.startswith("<") and word.endswith(">")):
                    continue
                paths[tuple(path)] += 1
                table = taken.setdefault(word.lower(), [[0] * num_experts for _ in path])
                for block, expert in enumerate(path):
                    table[block][expert] += 1
    listed = [{"word": word, "count": sum(table[0]), "taken": table} for word, table in taken.items()]
    listed.sort(key=lambda entry: (-entry["count"], entry["word"]))
    return {
        "prompts": len(prompts),
        "tokens": paths.total(),
        "blocks": pipeline.unet.num_blocks,
        "experts": num_experts,
        "distinct_paths": len(paths),
        "words": listed,
    }


def time_paths(pipeline: RaphaelPipeline) -> dict[str, Any]:
    """Which time expert every timestep takes in every block, and the share of the timesteps that each one has.

    {"num_steps", "experts", "table": [[expert per timestep, from 0] per block], "shares": [[per expert] per block],
    "runs": [[{"expert", "from", "to"}: neighbours that share an expert, from noise to image] per block]}. Timesteps
    are evenly spread in DDIM, so shares are those of its steps too. Raises ValueError where no block has Time-MoE.
    """
    num_steps, num_experts = pipeline.diffusion.num_steps, pipeline.unet.config.num_time_experts
    table = time_table(pipeline, num_steps)["experts"]
    if not table:
        raise ValueError("got a model without Time-MoE, expected one: its timesteps take no routes")
    shares = [[row.count(expert) / num_steps for expert in range(num_experts)] for row in table]
    return {
        "num_steps": num_steps,
        "experts": num_experts,
        "table": table,
        "shares": shares,
        "runs": [_runs(row) for row in table],
    }


def _runs(row: list[int]) -> list[dict[str, int]]:
    runs: list[dict[str, int]] = []
    for t in range(len(row) - 1, -1, -1):
        if runs and runs[-1]["expert"] == row[t]:
            runs[-1]["to"] = t
        else:
            runs.append({"expert": row[t], "from": t, "to": t})
    return runs


def draw_words(paths: dict[str, Any], num_words: int = NUM_WORDS) -> Figure:
    """A row a word, a column a block; a cell is split as the word's tokens are over the experts. On top, all words.

    Words that go the same way stand together: rows are in the order of their most taken experts.
    """
    blocks, experts = paths["blocks"], paths["experts"]
    order = {entry["word"]: [counts.index(max(counts)) for counts in entry["taken"]] for entry in paths["words"]}
    words = sorted(paths["words"][:num_words], key=lambda entry: (order[entry["word"]], entry["word"]))
    total = [[sum(entry["taken"][b][k] for entry in paths["words"]) for k in range(experts)] for b in range(blocks)]
    rows = [("all words", total), *((entry["word"], entry["taken"]) for entry in words)]
    places = [0.0, *(1.5 + index for index in range(len(words)))]
    subtitle = (
        f"{paths['prompts']:,} prompts, {paths['tokens']:,} tokens, "
        f"{paths['distinct_paths']:,} different paths of {experts}$^{{{blocks}}}$"
    )
    figure, axes = _page(1.9 + 0.62 * blocks, 2.1 + 0.27 * (places[-1] + 1), "Space experts of words", subtitle)
    for place, (_, taken) in zip(places, rows, strict=True):
        bars: list[list[tuple[float, float]]] = [[] for _ in range(experts)]
        for block, counts in enumerate(taken):
            left = block + 0.06
            for expert, count in enumerate(counts):
                width = 0.88 * count / max(1, sum(counts))
                bars[expert].append((left, width))
                left += width
        for expert, spans in enumerate(bars):
            axes.broken_barh(spans, (place - 0.39, 0.78), color=_colour(expert, experts), linewidth=0)
    axes.set_yticks(places, [name for name, _ in rows])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.set_xticks([block + 0.5 for block in range(blocks)], [str(block + 1) for block in range(blocks)])
    axes.set(xlim=(0, blocks), ylim=(places[-1] + 0.6, -0.7), xlabel="block, in the order of the forward pass")
    _legend(figure, experts)
    return figure


def draw_times(paths: dict[str, Any]) -> Figure:
    """A row a block, noise at the left as an image comes to be; coloured by the time expert in charge."""
    blocks, experts, steps = len(paths["table"]), paths["experts"], paths["num_steps"]
    subtitle = f"the expert of each of {steps:,} timesteps; on longer runs its number and the share of the run"
    figure, axes = _page(9.6, 2.0 + 0.36 * blocks, "Time experts of timesteps", subtitle)
    for block, runs in enumerate(paths["runs"]):
        bars: list[list[tuple[int, int]]] = [[] for _ in range(experts)]
        for run in runs:
            length = run["from"] - run["to"] + 1
            left = steps - 1 - run["from"]
            bars[run["expert"]].append((left, length))
            if length >= 0.02 * steps:
                share = f"  {length / steps:.0%}" if length >= 0.07 * steps else ""
                middle = left + length / 2
                axes.text(middle, block, f"{run['expert'] + 1}{share}", ha="center", va="center", color="white", size=9)
        for expert, spans in enumerate(bars):  # hundreds of bars at once: one by one they take seconds
            axes.broken_barh(spans, (block - 0.4, 0.8), color=_colour(expert, experts), linewidth=0)
    axes.set_yticks(range(blocks), [f"block {block + 1}" for block in range(blocks)])
    marks = [steps - 1, *(round(share * steps) for share in (0.8, 0.6, 0.4, 0.2)), 0]
    axes.set_xticks([steps - 1 - t for t in marks], [str(t) for t in marks])
    axes.set(xlim=(0, steps), ylim=(blocks - 0.4, -0.6), xlabel="timestep t, from noise (left) to image (right)")
    _legend(figure, experts)
    return figure


def _page(width: float, height: float, title: str, subtitle: str) -> tuple[Figure, Any]:
    """A figure of that many inches, at least wide enough for its title, and its axes."""
    from matplotlib.figure import Figure

    width = max(width, 6.4)
    figure = Figure((width, height), dpi=160, facecolor=PAPER)
    bottom, top, left = 0.62 / height, 1 - 1.18 / height, 1.25 / width
    axes = figure.add_axes((left, bottom, 1 - left - 0.35 / width, top - bottom), facecolor=PAPER)
    margin = 0.3 / width
    figure.text(margin, 1 - 0.42 / height, title, color=INK, size=16, family="serif")
    figure.text(margin, 1 - 0.68 / height, subtitle, color=SOFT, size=9.5)
    axes.tick_params(length=0, colors=INK, labelsize=9.5)
    axes.xaxis.label.set(color=SOFT, size=9.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _legend(figure: Figure, experts: int) -> None:
    from matplotlib.patches import Patch

    width, height = figure.get_size_inches()
    handles = [Patch(color=_colour(expert, experts), label=f"expert {expert + 1}") for expert in range(experts)]
    style = {"fontsize": 8.5, "labelcolor": SOFT, "frameon": False, "handlelength": 0.9, "handleheight": 0.9}
    place = {
        "loc": "upper left",
        "bbox_to_anchor": (0.3 / width, 1 - 0.79 / height),
        "borderaxespad": 0,
        "borderpad": 0.2,
    }
    figure.legend(handles=handles, ncols=min(experts, 8), columnspacing=1.1, handletextpad=0.45, **place, **style)


def _colour(expert: int, experts: int) -> Any:
    if experts <= len(EXPERTS):
        return EXPERTS[expert]
    from matplotlib import colormaps

    return colormaps["turbo"]((expert + 0.5) / experts)


def write_figures(
    pipeline: RaphaelPipeline, folder: Path, prompts: list[str], num_words: int = NUM_WORDS
) -> list[Path]:
    """figure5_words and figure9_times as .png, .json, .csv; returns the PNGs. A mixture that is absent has none."""
    layers = pipeline.unet.config
    if "moe" not in (layers.space_layer, layers.time_layer):
        raise ValueError(
            "got a model without Space-MoE and Time-MoE, expected one of them: there are no routes to draw"
        )
    if num_words < 1:
        raise ValueError(f"number of words: got {num_words}, expected at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if layers.space_layer == "moe":
        paths = word_paths(pipeline, prompts)
        table = [
            (entry["word"], block + 1, expert + 1, count)
            for entry in paths["words"]
            for block, counts in enumerate(entry["taken"])
            for expert, count in enumerate(counts)
        ]
        _write_table(folder / "figure5_words.csv", ("word", "block", "expert", "tokens"), table)
        write_json(folder / "figure5_words.json", {"model": pipeline.identity, **paths})
        written.append(folder / "figure5_words.png")
        draw_words(paths, num_words).savefig(written[-1], metadata={"Software": None})
    if layers.time_layer == "moe":
        paths = time_paths(pipeline)
        table = [(b + 1, t, expert + 1) for b, row in enumerate(paths["table"]) for t, expert in enumerate(row)]
        _write_table(folder / "figure9_times.csv", ("block", "timestep", "expert"), table)
        write_json(folder / "figure9_times.json", {"model": pipeline.identity, **paths})
        written.append(folder / "figure9_times.png")
        draw_times(paths).savefig(written[-1], metadata={"Software": None})
    return written


def _write_table(path: Path, names: tuple[str, ...], rows: list[tuple]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([names, *rows])
