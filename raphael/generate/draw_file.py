"""`raphael generate`: what images.json tells of its pictures, and --prompts, a whole file of prompts at a time."""

from __future__ import annotations

import argparse
from typing import Any

from raphael.generate.jobs import How, draw_list, picture_jobs, read_prompt_list
from raphael.stage import StageError

SETTINGS = (
    "seed", "steps", "guidance_scale", "sampler", "eta", "guidance_interval", "threshold", "threshold_percentile",
    "threshold_bound", "negative_prompt",
)  # fmt: skip


def drawn_with(arguments: argparse.Namespace, size_px: tuple[int, int]) -> dict[str, Any]:
    """The settings in images.json: those of the command, and the pictures' height and width."""
    return {name: getattr(arguments, name) for name in SETTINGS} | {"size_px": list(size_px)}


def draw_file(arguments: argparse.Namespace) -> str:
    """Draw the prompts of a file; -> what was drawn. Killed, the same command goes on. Raises StageError."""
    if arguments.show_edges:
        raise StageError("--show-edges: got it with --prompts, expected the prompts themselves; a sheet is for a few")
    listed = read_prompt_list(arguments.prompts)
    jobs = picture_jobs(listed, arguments.num_images)

    from tqdm import tqdm

    from raphael.generate.pipeline import RaphaelPipeline, drawn_size
    from raphael.sampling import Sampling

    pipeline = RaphaelPipeline.from_pretrained(arguments.checkpoint)
    size_px = arguments.size or drawn_size(pipeline.meta["picture"])
    sampling = Sampling(
        arguments.sampler,
        arguments.steps,
        arguments.guidance_scale,
        eta=arguments.eta,
        guidance_interval=tuple(arguments.guidance_interval),
        threshold=arguments.threshold,
        threshold_percentile=arguments.threshold_percentile,
        threshold_bound=arguments.threshold_bound,
    )
    how = How(sampling, arguments.seed, arguments.batch_size, arguments.negative_prompt, size_px)
    with tqdm(total=len(jobs), unit=" images", desc="generate", dynamic_ncols=True) as bar:
        draw_list(pipeline, jobs, how, drawn_with(arguments, size_px), arguments.out, bar.update)
    return f"{arguments.out}: {len(jobs):,} pictures of {len(listed['prompts']):,} prompts, and images.json"
