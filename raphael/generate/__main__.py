"""Draw the held-out prompts with the trained model: data/generated/00000.png ... and images.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.checkpoint import checkpoint_sha256
from raphael.config import Config
from raphael.generate.jobs import How, draw_jobs, picture_jobs, unfinished_blocks
from raphael.stage import Stage, StageError, main, read_json, write_json
from raphael.strict import to_dict

if TYPE_CHECKING:
    from raphael.generate.pipeline import RaphaelPipeline

MODEL = Path("models/raphael")
PROMPTS = Path("data/source/prompts.json")
OUT = "data/generated"


def run(config: Config, stage: Stage) -> None:
    """Pictures are drawn in blocks of batch_size; a run that was killed goes on with the first unfinished one."""
    if not MODEL.is_dir():
        raise StageError(f"{MODEL}: no such folder; expected a trained pipeline (run the stage train, or dvc pull)")
    jobs = picture_jobs(read_json(PROMPTS), config.generate.images_per_prompt)
    folder = stage.workdir(MODEL, PROMPTS, to_dict(config.generate)) / "generated"
    folder.mkdir(exist_ok=True)
    unfinished = unfinished_blocks(jobs, config.generate.batch_size, folder)
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


def draw_block(pipeline: RaphaelPipeline, block: list[dict[str, Any]], config: Config, folder: Path) -> None:
    """Draw one block by the configuration's settings (jobs.py)."""
    from raphael.sampling import sampling_of

    draw_jobs(pipeline, block, How(sampling_of(config.generate), config.generate.seed), folder)


if __name__ == "__main__":
    raise SystemExit(main("generate", run, __doc__))
