"""Stage `source`: where the link list comes from.

scenes: draws the embedded corpus and publishes it (data_pipeline/publish.py). coco, folder: local photographs and
their captions, published in place by the loopback server. csv, jsonl, parquet: a list of links, any LAION release. All
leave data/source/ with metadata.parquet (LAION's columns) and prompts.json (held-out prompts, never among the rows).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from raphael.config import Config
from raphael.stage import Stage, main, write_json

OUT = "data/source"


def run(config: Config, stage: Stage) -> None:
    from data_pipeline import source_lists, source_local

    kind = config.source.kind
    if kind == "scenes":
        _scenes(config, stage)
    elif kind in ("coco", "folder"):
        source_local.run(config, stage)
    else:
        source_lists.run(config, stage)


def _scenes(config: Config, stage: Stage) -> None:
    from data_pipeline import publish, scene_captions

    settings = config.source.scenes
    num_rows = min(settings.num_rows, config.source.max_rows or settings.num_rows)
    work = stage.workdir(config.seed, vars(settings), num_rows, _code_fingerprint())
    pieces = work / "pieces"
    pieces.mkdir(exist_ok=True)
    _render(config, stage, num_rows, pieces)
    folder = fresh_folder(work)
    metadata, truths = publish.join(pieces, folder / "site.zip", num_rows)
    write_table(folder / "metadata.parquet", metadata)
    write_table(folder / "truth.parquet", truths)
    side = config.picture.height_px
    prompts = scene_captions.heldout_prompts(config.seed, settings.num_heldout_prompts, side, settings.heldout_share)
    write_prompts(folder, "scenes", prompts)
    stage.publish(folder, OUT)
    shutil.rmtree(work)
    wrong = {name: 0 for name in publish.KINDS}
    for truth in truths:
        if truth["fault"]:
            wrong[truth["fault"]] += 1
    stage.report(
        num_rows,
        num_rows,
        kind="scenes",
        good=num_rows - sum(wrong.values()),
        published_with_a_fault={
            name: {"rows": count, "noticed": publish.KINDS[name].noticed} for name, count in wrong.items()
        },
        heldout_prompts=len(prompts),
    )


def _render(config: Config, stage: Stage, num_rows: int, pieces: Path) -> None:
    """Draw what is not drawn yet, in processes that end with this one."""
    import multiprocessing
    import os
    from concurrent.futures import ProcessPoolExecutor, as_completed

    from data_pipeline import publish

    waiting = [(first, last) for first, last in publish.chunks(num_rows) if not (pieces / f"{first:08d}.json").exists()]
    finished = num_rows - sum(last - first for first, last in waiting)
    with stage.progress(num_rows, "pictures", initial=finished) as bar:
        if len(waiting) <= 1:
            for first, last in waiting:
                publish.render_chunk(config, first, last, pieces)
                bar.update(last - first)
            return
        spawn = multiprocessing.get_context("spawn")
        workers = min(2, os.cpu_count() or 1)
        pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with, initargs=(os.getpid(),))
        try:
            running = {
                pool.submit(publish.render_chunk, config, first, last, pieces): last - first for first, last in waiting
            }
            for future in as_completed(running):
                future.result()
                bar.update(running[future])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end_with(parent: int) -> None:
    """Initialiser of a drawing process: leave within a second of the parent's death, and leave Ctrl-C to the parent."""
    import os
    import signal
    import threading
    import time

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _code_fingerprint() -> list[str]:
    """A half-drawn corpus must not be finished by another renderer."""
    from raphael.stage import file_sha256

    here = Path(__file__).parent
    return [file_sha256(here / name) for name in ("scenes.py", "scene_drawing.py", "scene_captions.py", "publish.py")]


# ---- shared by the three modules of this stage ---------------------------------------------------------------------


def fresh_folder(work: Path) -> Path:
    folder = work / "source"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def write_prompts(folder: Path, source: str, prompts: list[dict]) -> None:
    write_json(folder / "prompts.json", {"source": source, "prompts": prompts})


METADATA_TYPES = {
    "URL": "string", "TEXT": "string", "WIDTH": "int32", "HEIGHT": "int32",
    "similarity": "float64", "punsafe": "float64", "pwatermark": "float64", "AESTHETIC_SCORE": "float64",
    "id": "int64", "url": "string", "caption": "string", "fault": "string", "truth": "string",
}  # fmt: skip


def write_table(path: Path, rows: list[dict]) -> None:
    """A parquet file of metadata or truth rows; their first row names the columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(rows[0])
    schema = pa.schema([(name, pa.type_for_alias(METADATA_TYPES[name])) for name in columns])
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


if __name__ == "__main__":
    raise SystemExit(main("source", run, __doc__))
