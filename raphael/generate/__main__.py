"""Draw the held-out prompts with the trained model: data/generated/00000.png ... and images.json."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.checkpoint import checkpoint_sha256
from raphael.config import Config
from raphael.stage import Stage, StageError, main, read_json, write_json
from raphael.strict import to_dict

if TYPE_CHECKING:
    from raphael.generate.pipeline import RaphaelPipeline

MODEL = Path("models/raphael")
PROMPTS = Path("data/source/prompts.json")
OUT = "data/generated"


def run(config: Config, stage: Stage) -> None:
    """Pictures are drawn in blocks of batch_size; a block with a picture missing is drawn again as a whole.

    So a run that was killed and taken up again sees the very batches of an undisturbed one, and ends in the same bytes.
    """
    if not MODEL.is_dir():
        raise StageError(f"{MODEL}: no such folder; expected a trained pipeline (run the stage train, or dvc pull)")
    jobs = picture_jobs(read_json(PROMPTS), config.generate.images_per_prompt)
    folder = stage.workdir(MODEL, PROMPTS, to_dict(config.generate)) / "generated"
    folder.mkdir(exist_ok=True)
    size = config.generate.batch_size
    blocks = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    unfinished = [block for block in blocks if not all((folder / job["file"]).is_file() for job in block)]
    done = len(jobs) - sum(map(len, unfinished))
    identity = checkpoint_sha256(MODEL)[:16]
    if unfinished:
        from raphael.generate.pipeline import RaphaelPipeline

        pipeline = RaphaelPipeline.from_pretrained(MODEL)
        with stage.progress(len(jobs), "images", initial=done) as bar:
            for block in unfinished:
                draw_block(pipeline, block, config, folder)
                bar.update(len(block))
    write_json(folder / "images.json", {"model": identity, "settings": to_dict(config.generate), "images": jobs})
    stage.publish(folder, OUT)
    stage.report(len(jobs), len(jobs), prompts=len({job["prompt"] for job in jobs}), model=identity)


def picture_jobs(prompts: dict[str, Any], images_per_prompt: int) -> list[dict[str, Any]]:
    """One entry per picture, in order: its file, index, and its prompt's entry.

    A picture's seed is (generate.seed, index), or its prompt's own where an evaluation protocol gives one.

    Raises StageError where prompts.json holds no prompts.
    """
    entries = prompts.get("prompts") if isinstance(prompts, dict) else None
    if not entries:
        raise StageError(
            f"{PROMPTS}: got no prompts, expected a list under the key prompts; run the stage source again"
        )
    pictures = [entry for entry in entries for _ in range(images_per_prompt)]
    return [{"file": f"{index:05d}.png", "index": index, **entry} for index, entry in enumerate(pictures)]


def draw_block(pipeline: RaphaelPipeline, block: list[dict[str, Any]], config: Config, folder: Path) -> None:
    """Draw one block and write its pictures, each whole or not at all."""
    from PIL import Image

    from raphael.sampling import draw_images, sampling_of

    settings = sampling_of(config.generate)
    seeds = [(job["seed"], 0) if "seed" in job else (config.generate.seed, job["index"]) for job in block]
    pictures = draw_images(pipeline.parts(), [job["prompt"] for job in block], seeds, settings, batch_size=len(block))
    for job, picture in zip(block, pictures, strict=True):
        temporary = folder / f".{job['file']}"
        Image.fromarray(picture).save(temporary, format="PNG")
        os.replace(temporary, folder / job["file"])


if __name__ == "__main__":
    raise SystemExit(main("generate", run, __doc__))
