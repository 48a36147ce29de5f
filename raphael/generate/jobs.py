"""Many pictures of many prompts into a folder, images.json beside them; taken up again when killed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.stage import StageError, read_json, write_json

if TYPE_CHECKING:
    from raphael.generate.pipeline import RaphaelPipeline
    from raphael.sampling import Sampling

LISTING = "images.json"
Job = dict[str, Any]


@dataclass(frozen=True)
class How:
    """How a list is drawn. size_px: (height, width), None: the first that the model was trained at."""

    sampling: Sampling
    seed: int = 0
    batch_size: int = 50
    negative_prompt: str = ""
    size_px: tuple[int, int] | None = None


def read_prompt_list(file: Path) -> dict[str, Any]:
    """-> {"prompts": [{"prompt", ...}]}: of JSON as `raphael prompts` writes it, or of a text with one prompt a line.

    Raises StageError, one line, for a file that is neither.
    """
    try:
        if file.suffix == ".json":
            listed = read_json(file)
            ok = all(isinstance(entry["prompt"], str) for entry in listed["prompts"])
        else:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
            listed, ok = {"prompts": [{"prompt": line} for line in lines if line]}, True
    except (OSError, ValueError, KeyError, TypeError, StageError) as error:
        raise StageError(
            f"--prompts: {file}: not readable as prompts ({type(error).__name__}); expected one a line, or JSON of "
            "`raphael prompts`"
        ) from None
    if not (ok and listed["prompts"]):
        raise StageError(f"--prompts: {file}: got no prompts, expected one a line, or JSON of `raphael prompts`")
    return listed


def picture_jobs(listed: dict[str, Any], images_per_prompt: int) -> list[Job]:
    """One entry per picture, in order: its file, index, and its prompt's entry.

    Raises StageError where there are no prompts in it.
    """
    entries = listed.get("prompts") if isinstance(listed, dict) else None
    if not entries:
        raise StageError("prompts.json: got no prompts, expected a list of them; run the stage source again")
    pictures = [entry for entry in entries for _ in range(images_per_prompt)]
    return [{"file": f"{index:05d}.png", "index": index, **entry} for index, entry in enumerate(pictures)]


def unfinished_blocks(jobs: list[Job], size: int, folder: Path) -> list[list[Job]]:
    """Blocks of `size` with a picture missing. They are drawn as a whole, so that a run that was killed sees the very
    batches of an undisturbed one, and ends in the same bytes."""
    blocks = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    return [block for block in blocks if not all((folder / job["file"]).is_file() for job in block)]


def draw_jobs(pipeline: RaphaelPipeline, block: list[Job], how: How, folder: Path) -> None:
    """Draw one block as one batch and write its pictures, each whole or not at all.

    A picture's seed is (how.seed, index), or its prompt's own where an evaluation protocol gives one.
    """
    from PIL import Image

    from raphael.sampling import draw_images

    seeds = [(job["seed"], 0) if "seed" in job else (how.seed, job["index"]) for job in block]
    parts, prompts = pipeline.parts(*(how.size_px or (None, None))), [job["prompt"] for job in block]
    pictures = draw_images(parts, prompts, seeds, how.sampling, how.negative_prompt, batch_size=len(block))
    for job, picture in zip(block, pictures, strict=True):
        temporary = folder / f".{job['file']}"
        Image.fromarray(picture).save(temporary, format="PNG")
        os.replace(temporary, folder / job["file"])


def draw_list(
    pipeline: RaphaelPipeline,
    jobs: list[Job],
    how: How,
    settings: dict[str, Any],
    out: Path,
    tick: Callable[[int], None] = lambda n: None,
) -> None:
    """All pictures into `out`. settings: what images.json tells of them.

    images.json is written first: with a picture missing the folder is no measured set (picture_folder.py says so), and
    the same call goes on in it. Raises StageError for a folder with other pictures.
    """
    listing = {"model": pipeline.identity, "settings": settings, "images": jobs}
    if out.is_dir() and any(out.iterdir()):
        known = read_json(out / LISTING) if (out / LISTING).is_file() else None
        if known != listing:
            raise StageError(
                f"--out: {out} holds other pictures (another model, prompts or settings); expected a new folder, or "
                "that of the same call"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / LISTING, listing)
    unfinished = unfinished_blocks(jobs, how.batch_size, out)
    tick(len(jobs) - sum(map(len, unfinished)))
    for block in unfinished:
        draw_jobs(pipeline, block, how, out)
        tick(len(block))
