"""img2dataset in a process of its own, every argument spelt out: `python -m data_pipeline.run_img2dataset '<JSON>'
<parent>`.

It runs unpatched. What it imports and does not use here (torch by way of webdataset, ray, wandb, the hub) is kept out
of these processes: three of them start, and each would spend ten seconds on it. All of them, the pool's workers too,
end when their parent does.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import types

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
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:  # on Linux too: the parent may have gone before the signal was asked for
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave_out_unused() -> None:
    """Make the modules that are not used unavailable in this process; img2dataset and its libraries do without."""
    for name in UNUSED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # import raises ModuleNotFoundError
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))


def main() -> None:
    end_with_parent(int(sys.argv[2]))
    leave_out_unused()
    import img2dataset

    img2dataset.download(**json.loads(sys.argv[1]))


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # the processes that img2dataset spawns import this module first
    end_with_parent(os.getppid())
    leave_out_unused()
