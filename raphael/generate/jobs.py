"""Many images of many prompts into a folder, images.json beside them; taken up again when killed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.files import written_whole
from raphael.base.images.fit import is_whole
from raphael.base.stage import StageError, read_json, write_json
from raphael.generate.metadata import Made, chunk

if TYPE_CHECKING:
    from raphael.diffusion.sampling import Sampling
    from raphael.generate.pipeline import RaphaelPipeline
    from raphael.systems.guides.guide import Guide

LISTING = "images.json"
ImageEntry = dict[str, Any]


@dataclass(frozen=True)
class How:
    """How a list of images is generated. size_px: (height, width), None: the first that the model was trained at.
    metadata: PNGs say how they were made (metadata.py). guide, guidance_weight: of gradients, as a call has them."""

    sampling: Sampling
    seed: int = 0
    batch_size: int = 50
    negative_prompt: str = ""
    size_px: tuple[int, int] | None = None
    metadata: bool = False
    guide: Guide | None = None
    guidance_weight: float | None = None


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


def image_entries(listed: dict[str, Any], images_per_prompt: int) -> list[ImageEntry]:
    """One entry per image, in order: its file, index, and its prompt's entry.

    Raises StageError where there are no prompts in it.
    """
    entries = listed.get("prompts") if isinstance(listed, dict) else None
    if not entries:
        raise StageError("prompts.json: got no prompts, expected a list of them; run the stage source again")
    images = [entry for entry in entries for _ in range(images_per_prompt)]
    return [{"file": f"{index:05d}.png", "index": index, **entry} for index, entry in enumerate(images)]


def unfinished_blocks(entries: list[ImageEntry], size: int, folder: Path) -> list[list[ImageEntry]]:
    """Blocks of `size` with an image missing. They are generated as a whole, so that a run that was killed sees
    the very batches of an undisturbed one, and ends in the same bytes. A damaged image is named, and removed; so is
    what a killed run left half written."""
    for left in folder.glob(".*.png"):
        left.unlink()
    for entry in entries:
        if (file := folder / entry["file"]).is_file() and not is_whole(file):
            print(f"{file}: damaged: generated again", file=sys.stderr, flush=True)
            file.unlink()
    return unfinished([entries[start : start + size] for start in range(0, len(entries), size)], folder)


def unfinished(blocks: list[list[ImageEntry]], folder: Path) -> list[list[ImageEntry]]:
    """Those with an image missing."""
    return [block for block in blocks if not all((folder / entry["file"]).is_file() for entry in block)]


def generate_entries(pipeline: RaphaelPipeline, block: list[ImageEntry], how: How, folder: Path) -> None:
    """Generate one block as one batch and write its images, each atomically.

    An image's seed is (how.seed, index), or its prompt's own where an evaluation protocol gives one.
    """
    from PIL import Image

    from raphael.diffusion.sampling import generate_images
    from raphael.systems.guides.guide import guided, told

    seeds = [(entry["seed"], 0) if "seed" in entry else (how.seed, entry["index"]) for entry in block]
    reader, prompts = pipeline.reader(how.sampling, weighted=False), [entry["prompt"] for entry in block]
    parts = pipeline.parts(*(how.size_px or (None, None)), reader)
    parts = guided(pipeline, parts, how.guide, how.guidance_weight)
    images = generate_images(parts, prompts, seeds, how.sampling, how.negative_prompt, batch_size=len(block))
    of_guide = told(how.guide, how.guidance_weight)
    for row, (entry, image) in enumerate(zip(block, images, strict=True)):
        info = None
        if how.metadata:
            own = tuple(seeds) if any("seed" in entry for entry in block) else ()
            made = (pipeline.identity, how.seed, block[0]["index"], row, tuple(prompts))
            size_px = (image.shape[0], image.shape[1])
            info = chunk(Made(*made, how.negative_prompt, how.sampling, size_px, own, as_written=True, **of_guide))
        with written_whole(folder / entry["file"]) as temporary:
            Image.fromarray(image).save(temporary, format="PNG", pnginfo=info)


def generate_list(
    pipeline: RaphaelPipeline,
    entries: list[ImageEntry],
    how: How,
    settings: dict[str, Any],
    out: Path,
    tick: Callable[[int], None] = lambda n: None,
) -> None:
    """All images into `out`. settings: what images.json tells of them.

    images.json is written first: with an image missing the folder is no measured set (image_folder.py says so), and
    the same call resumes in it. Raises StageError for a folder with other images.
    """
    listing = {"model": pipeline.identity, "settings": settings, "images": entries}
    if out.is_dir() and any(out.iterdir()):
        known = read_json(out / LISTING) if (out / LISTING).is_file() else None
        if known != listing:
            raise StageError(
                f"--out: {out} holds other images (another model, prompts or settings); expected a new folder, or "
                "that of the same call"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / LISTING, listing)
    unfinished = unfinished_blocks(entries, how.batch_size, out)
    tick(len(entries) - sum(map(len, unfinished)))
    for block in unfinished:
        generate_entries(pipeline, block, how, out)
        tick(len(block))
