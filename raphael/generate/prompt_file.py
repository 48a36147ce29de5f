"""`raphael generate`: what images.json tells of its images, and --prompts, a whole file of prompts at a time."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.config.sampling import Sampling, told
from raphael.base.stage import StageError
from raphael.generate.jobs import How, generate_list, image_entries, read_prompt_list

if TYPE_CHECKING:
    import torch

    from raphael.generate.pipeline import RaphaelPipeline
    from raphael.systems.guides.guide import Guide

LONGEST_NAME = 60


def settings_used(
    arguments: argparse.Namespace, sampling: Sampling, size_px: tuple[int, int], device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The settings in images.json: those of the command, and the images' height and width.

    precision is told where it came to bf16 on that device. The device is not: it changes roundings alone.
    """
    from raphael.base.precision import wants_bf16

    asked = {"seed": arguments.seed, **told(sampling), "negative_prompt": arguments.negative_prompt}
    bf16 = {"precision": "bf16"} if wants_bf16(sampling.precision, device) else {}
    return {**asked, "size_px": list(size_px), **bf16}


def told_guide(guide: Guide | None, weight: float | None) -> dict[str, Any]:
    """What images.json and PNGs tell of the guide that they followed; {} without one."""
    from raphael.systems.guides.guide import told

    return told(guide, weight)


def default_out(arguments: argparse.Namespace) -> Path:
    """A folder of its own for other words, another list, picture or seed, so that no call replaces another's images."""
    text = arguments.prompts.stem if arguments.prompts else arguments.prompt[0]
    text = f"{text} from {arguments.image.stem} {arguments.strength:g}" if arguments.image else text
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:LONGEST_NAME].rstrip("-")
    return Path("generated") / f"{words or 'images'}-seed{arguments.seed}"


def listed_prompts(arguments: argparse.Namespace) -> dict[str, Any]:
    """The list of --prompts, read before any model is. Raises StageError."""
    if arguments.show_edges:
        raise StageError("--show-edges: got it with --prompts, expected the prompts themselves; a sheet is for a few")
    return read_prompt_list(arguments.prompts)


def generate_file(
    arguments: argparse.Namespace, sampling: Sampling, listed: dict[str, Any], pipeline: RaphaelPipeline
) -> str:
    """Generate the images of a list of prompts; -> what was made, in words. Killed, the same command resumes.

    Raises StageError, one line.
    """
    entries = image_entries(listed, arguments.num_images)

    from tqdm import tqdm

    from raphael.generate.pipeline import default_size

    size_px = arguments.size or default_size(pipeline.meta["picture"])
    guided = (arguments.guidance, arguments.guidance_weight)
    first = (sampling, arguments.seed, arguments.batch_size, arguments.negative_prompt)
    how = How(*first, size_px, arguments.metadata, *guided)
    settings = settings_used(arguments, sampling, size_px, pipeline.device) | pipeline.told_adapters()
    settings |= told_guide(*guided)
    with tqdm(total=len(entries), unit=" images", desc="generate", dynamic_ncols=True) as bar:
        generate_list(pipeline, entries, how, settings, arguments.out, bar.update)
    return f"{arguments.out}: {len(entries):,} images of {len(listed['prompts']):,} prompts, and images.json"
