"""Generate images of the held-out prompts with the trained model: data/generated/00000.png ... and images.json."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.checkpoint.folder import Stored
from raphael.base.config.params import Config
from raphael.base.config.systems import find_system, system_of
from raphael.base.cores.threads import available, one_thread
from raphael.base.cores.workers import run_processes
from raphael.base.integrity.contents import model_sha256
from raphael.base.stage import Stage, StageError, device_of, read_json, write_json
from raphael.base.strict import to_dict
from raphael.generate.jobs import How, generate_entries, image_entries, unfinished, unfinished_blocks

if TYPE_CHECKING:
    from raphael.generate.pipeline import RaphaelPipeline

MODEL = Path("models/raphael")
PROMPTS = Path("data/source/prompts.json")
OUT = "data/generated"


def run(config: Config, stage: Stage) -> None:
    """Images are generated in blocks of batch_size; a run that was killed resumes with the first unfinished one."""
    if not MODEL.is_dir():
        raise StageError(f"{MODEL}: no such folder; expected a trained pipeline (run the stage train, or dvc pull)")
    meta = Stored(MODEL).meta
    asked = find_system(system_of(meta), f"{MODEL}/meta.json: system").prompts(meta, read_json(PROMPTS))
    entries = image_entries(asked, config.generate.images_per_prompt)
    folder = stage.workdir(MODEL, PROMPTS, to_dict(config.generate)) / "generated"
    folder.mkdir(exist_ok=True)
    missing = unfinished_blocks(entries, config.generate.batch_size, folder)
    done = len(entries) - sum(map(len, missing))
    identity = model_sha256(MODEL)[:16]
    if missing:
        generate_blocks(Work(stage.root, config, str(device_of(config)), folder, missing), stage, len(entries), done)
    write_json(folder / "images.json", {"model": identity, "settings": to_dict(config.generate), "images": entries})
    stage.publish(folder, OUT)
    stage.report(len(entries), len(entries), prompts=len({entry["prompt"] for entry in entries}), model=identity)


@dataclass(frozen=True)
class Work:
    """Blocks of images that are not there yet; plain values, for another process."""

    root: Path
    config: Config
    device: str
    folder: Path
    blocks: list[list[dict[str, Any]]]


def generate_blocks(work: Work, stage: Stage, total: int, done: int) -> None:
    """On a GPU here, on CPUs by one single-threaded process a core. An image's bytes do not depend on their number:
    a block is one batch, and each is computed by one thread."""
    processes = 1 if work.device != "cpu" else min(available(), len(work.blocks))
    with stage.progress(total, "images", initial=done) as bar:
        if processes == 1:
            with one_thread() if work.device == "cpu" else contextlib.nullcontext():
                generate_share(work, (0, 1), bar.update)
            return

        def look() -> None:
            there = total - sum(map(len, unfinished(work.blocks, work.folder)))
            bar.update(there - bar.bar.n)

        run_processes(generate_share, work, processes, look, 1, "the same command resumes from here")
        look()


def generate_share(work: Work, worker: tuple[int, int], tick: Callable[[int], None]) -> None:
    """Every n-th block, and of these what is not there: a worker that died is started again."""
    from raphael.generate.pipeline import RaphaelPipeline

    which, workers = worker
    pipeline = RaphaelPipeline.from_pretrained(work.root / MODEL, device=work.device)
    for block in unfinished(work.blocks[which::workers], work.folder):
        generate_block(pipeline, block, work.config, work.folder)
        tick(len(block))


def generate_block(pipeline: RaphaelPipeline, block: list[dict[str, Any]], config: Config, folder: Path) -> None:
    """Generate one block by the configuration's settings (jobs.py)."""
    from raphael.diffusion.sampling import sampling_of

    generate_entries(pipeline, block, How(sampling_of(config.generate), config.generate.seed), folder)
