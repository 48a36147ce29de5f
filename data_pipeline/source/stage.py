"""Stage `source`: where the link list comes from.

scenes: draws the embedded corpus and publishes it (data_pipeline/source/publish.py). coco, folder, pictures,
webdataset: images that lie here, with their captions (data_pipeline/source/local.py). csv, jsonl, parquet: a list of
links, any LAION release. All leave data/source/ with metadata.parquet (LAION's columns) and prompts.json (held-out
prompts, never among the rows). Of scenes also choosing.json, other held-out prompts to choose guidance and steps by,
and probe.npz, the probe's scenes (raphael/base/probe_set.py).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from data_pipeline.common.places import SOURCE
from data_pipeline.source.output import CHOOSING_PROMPTS, fresh_folder, write_prompts, write_rows
from raphael.base.config.params import Config
from raphael.base.integrity.pieces import Pieces
from raphael.base.stage import Stage
from raphael.base.strict import to_dict


def run(config: Config, stage: Stage) -> None:
    from data_pipeline.source import lists as source_lists
    from data_pipeline.source import local as source_local

    kind = config.source.kind
    if kind == "scenes":
        _scenes(config, stage)
    elif config.source.is_local:
        source_local.run(config, stage)
    else:
        source_lists.run(config, stage)


def _scenes(config: Config, stage: Stage) -> None:
    from data_pipeline.source import publish, scene_captions

    settings = config.source.scenes
    num_rows = min(settings.num_rows, config.source.max_rows or settings.num_rows)
    work = stage.workdir(config.seed, to_dict(settings), num_rows)
    pieces = work / "pieces"
    pieces.mkdir(exist_ok=True)
    _render(config, stage, num_rows, pieces)
    folder = fresh_folder(work)
    metadata, truths = publish.join(pieces, folder / "site.zip", num_rows)
    write_rows(folder / "metadata.parquet", metadata)
    write_rows(folder / "truth.parquet", truths)
    side = config.picture.height_px
    prompts = scene_captions.heldout_prompts(config.seed, settings.num_heldout_prompts, side, settings.heldout_share)
    write_prompts(folder, "scenes", prompts)
    probed = _write_fresh_scenes(config, folder, {entry["prompt"] for entry in prompts})
    stage.publish(folder, SOURCE)
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
        probe_scenes=probed,
    )


def _write_fresh_scenes(config: Config, folder: Path, reported: set[str]) -> int:
    """Prompts for choosing settings by, and the probe's scenes; neither has a caption of the reporting prompts, nor one
    of the other. -> the number of the probe's scenes."""
    from data_pipeline.source import scene_captions, scene_probe
    from raphael.base.probe_set import PROBE

    settings, side = config.source.scenes, config.picture.height_px
    number, share = settings.num_heldout_prompts, settings.heldout_share
    choosing = scene_captions.heldout_prompts(config.seed, number, side, share, "choosing/", reported)
    write_prompts(folder, "scenes", choosing, CHOOSING_PROMPTS)
    if not settings.num_probe_scenes:
        return 0
    avoid = reported | {entry["prompt"] for entry in choosing}
    probe = scene_probe.probe_set(config.seed, settings.num_probe_scenes, side, share, avoid)
    probe.write(folder / PROBE)
    return len(probe)


def _render(config: Config, stage: Stage, num_rows: int, pieces: Path) -> None:
    """Draw what is not drawn yet, in processes that end with this one."""
    import multiprocessing
    import os
    from concurrent.futures import ProcessPoolExecutor, as_completed

    from data_pipeline.source import publish

    done = Pieces(pieces, stage.name)
    chunks = publish.chunks(num_rows)
    waiting = [(first, last) for first, last in chunks if not done.has(*publish.piece_files(pieces, first))]
    finished = num_rows - sum(last - first for first, last in waiting)
    with stage.progress(num_rows, "images", initial=finished) as bar:
        if len(waiting) <= 1:
            for first, last in waiting:
                done.add(*publish.render_chunk(config, first, last, pieces))
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
                done.add(*future.result())
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
