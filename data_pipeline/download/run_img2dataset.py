"""img2dataset in a process of its own, every argument spelt out: `python -m data_pipeline.download.run_img2dataset
'<JSON>' <parent> ['<limits as JSON>']`.

It runs unpatched, but for one part: with limits its resizer works in a process that may die
(data_pipeline/download/decoder.py), because img2dataset's pool waits for ever for the shard of a worker that was
killed. What it imports and does not use here (torch by way of webdataset, ray, wandb, the hub, and what only resizers
need) is kept out of these processes: three of them start, and each would spend ten seconds on it. All of them, the
pool's workers too, end when their parent does.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import threading
import time
import types
from pathlib import Path

from data_pipeline.download.decoder import GuardedResizer, Limits, killed_with_parent

UNUSED = ("torch", "ray", "huggingface_hub")
ROBOTS = ["noai", "noimageai", "noindex", "noimageindex"]


def arguments(config, rows: str, folder: str) -> dict:
    """img2dataset.download's arguments, all of them.

    config: DownloadConfig; rows: path of a parquet with id and url; folder: where the shards go.
    """
    attempts = config.retries + 1
    return {
        "url_list": rows,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": None,  # captions join by id, from links.parquet
        "bbox_col": None,
        "save_additional_columns": ["id"],
        "output_folder": folder,
        "output_format": "webdataset",
        "number_sample_per_shard": config.shard_rows,
        "oom_shard_count": 5,
        "image_size": config.image_size_px,
        "resize_mode": "keep_ratio",  # the default, border, paints white bars that a generator learns
        "resize_only_if_bigger": True,
        "upscale_interpolation": "lanczos",
        "downscale_interpolation": "area",
        "encode_format": config.encode_format,
        "encode_quality": config.encode_quality,
        "skip_reencode": False,
        "disable_all_reencoding": False,
        "min_image_size": 0,  # size and shape are the filter stage's business, so that they are counted in one place
        "max_image_area": float(config.max_pixels),
        "max_aspect_ratio": float("inf"),
        "extract_exif": False,
        "compute_hash": "sha256",
        "verify_hash": None,
        "processes_count": config.processes,
        "thread_count": config.threads,
        "subjob_size": 1000,
        "distributor": "multiprocessing",
        "max_shard_retry": 1,
        "retries": 0,  # the gateway repeats, and only what may pass
        "timeout": int(attempts * (config.deadline_s + 1) + 90),  # the gateway answers before that, whatever happens
        "incremental_mode": "incremental",
        "enable_wandb": False,
        "wandb_project": "",
        "user_agent_token": config.user_agent,
        "disallowed_header_directives": ROBOTS,
    }


def command(config, rows: str, folder: str) -> list[str]:
    """The command line of img2dataset over `rows`, its images decoded within config's limits; as `arguments`."""
    lists = tuple(str(Path(path).resolve()) for path in config.hash_lists)
    limits = dataclasses.asdict(
        Limits(config.max_pixels, config.max_decoder_bytes, config.max_decoder_s, lists, config.hash_list_bits)
    )
    parts = json.dumps(arguments(config, rows, folder)), str(os.getpid()), json.dumps(limits)
    return [sys.executable, "-m", "data_pipeline.download.run_img2dataset", *parts]


def environment() -> dict[str, str]:
    """The child's environment: no proxy between it and the gateway, no news of versions, one thread per library."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {
        **kept,
        "no_proxy": "*",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "WANDB_MODE": "disabled",
        "WANDB_SILENT": "true",
        "WDS_SECURE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def end_with_parent(parent: int) -> None:
    """Arrange that this process is killed when `parent` (its process id) is gone. Linux tells at once; elsewhere a
    thread looks."""
    killed_with_parent(parent)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave_out_unused() -> None:
    """Make the modules that are not used unavailable in this process; img2dataset and its libraries do without."""
    for name in UNUSED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # import raises ModuleNotFoundError
    empty = ("wandb", "albumentations") if len(sys.argv) > 3 else ("wandb",)  # spawned processes have the same argv
    for name in empty:
        sys.modules.setdefault(name, types.ModuleType(name))


def main() -> None:
    end_with_parent(int(sys.argv[2]))
    leave_out_unused()
    import img2dataset

    if len(sys.argv) > 3:
        module = sys.modules["img2dataset.main"]  # the package has a function of this name
        module.Resizer = functools.partial(GuardedResizer, Limits(**json.loads(sys.argv[3])))
    img2dataset.download(**json.loads(sys.argv[1]))


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # the processes that img2dataset spawns import this module first
    end_with_parent(os.getppid())
    leave_out_unused()
