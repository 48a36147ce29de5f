"""Local photographs as a link list: COCO's caption JSON beside its picture folders, or any folder of pictures and
texts.

Pictures stay where they are; rows say http://<download.local_host>/<path below source.path> and the loopback server
serves that folder (data_pipeline/serve_images.py). Scores do not exist for local pictures: the columns are null, and
params.coco.yaml says `filter.missing_score: keep`.
"""

from __future__ import annotations

import json
import random
import shutil
import urllib.parse
from collections import Counter
from pathlib import Path
from typing import Any

from data_pipeline.serve_images import PICTURES
from data_pipeline.source import OUT, fresh_folder, write_prompts, write_table
from raphael.config import Config
from raphael.stage import Stage, StageError

SUITE = "captions"


def run(config: Config, stage: Stage) -> None:
    root = Path(config.source.path)
    if not config.source.path or not root.is_dir():
        raise StageError(
            f"source.path: got {config.source.path!r}, expected a folder; set source.path in {config.file}"
        )
    dropped: Counter[str] = Counter()
    read = _coco if config.source.kind == "coco" else _folder
    rows, heldout, total = read(root, config, dropped)
    if not rows:
        raise StageError(f"{root}: no picture with a caption found ({total} captions); {EXPECTED[config.source.kind]}")
    if config.source.max_rows and len(rows) > config.source.max_rows:
        dropped["beyond source.max_rows"] = len(rows) - config.source.max_rows
        rows = rows[: config.source.max_rows]
    prompts = [{"prompt": text, "suite": SUITE, "truth": None, "reference": name} for name, text in heldout]
    work = stage.workdir(config.source.kind, str(root), config.source.fingerprint, config.source.max_rows)
    folder = fresh_folder(work)
    with stage.progress(len(rows), "rows") as bar:
        table = _with_sizes(root, rows, config.download.local_host, bar, dropped)
    if not table:
        raise StageError(
            f"{root}: none of the {len(rows)} pictures can be read; expected PNG, JPEG, WebP, BMP or GIF files"
        )
    write_table(folder / "metadata.parquet", table)
    write_prompts(folder, config.source.kind, prompts)
    stage.publish(folder, OUT)
    shutil.rmtree(work)
    stage.report(
        total, len(table), dict(sorted(dropped.items())), kind=config.source.kind, heldout_prompts=len(prompts)
    )


EXPECTED = {
    "coco": "expected captions_train2017*.json beside a folder train2017/ of the pictures that it names",
    "folder": "expected pictures, each with a .txt of the same name or a file name that says what is on it",
}


def _coco(
    root: Path, config: Config, dropped: Counter[str]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]], int]:
    """Rows: one per (picture, caption) of train2017. Held out: the first caption of each val2017 picture."""
    train = _coco_captions(root, "train2017", required=True)
    rows = [(name, text) for name, text, present in train if present]
    dropped["picture not in the folder"] += len(train) - len(rows)
    heldout: dict[str, str] = {}
    for name, text, present in _coco_captions(root, "val2017", required=False):
        if present:
            heldout.setdefault(name, text)
    return rows, list(heldout.items())[: config.source.max_heldout_prompts], len(train)


def _coco_captions(root: Path, split: str, required: bool) -> list[tuple[str, str, bool]]:
    """(path below root, caption, is the picture there) of every caption of a split, by picture and annotation id."""
    files = sorted(root.glob(f"captions_{split}*.json")) or sorted(
        (root / "annotations").glob(f"captions_{split}*.json")
    )
    if not files and required:
        raise StageError(f"{root}: got no captions_{split}*.json, expected COCO's caption file there; set source.path")
    captions: dict[int, tuple[str, int, str]] = {}
    for file in files:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            names = {image["id"]: image["file_name"] for image in data["images"]}
            for item in data["annotations"]:
                captions[item["id"]] = (
                    f"{split}/{names[item['image_id']]}",
                    item["id"],
                    " ".join(item["caption"].split()),
                )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise StageError(
                f"{file}: not COCO caption JSON ({type(error).__name__}: {error}); expected images and annotations"
            ) from None
    present = {f"{split}/{path.name}" for path in (root / split).glob("*")}
    return [(name, text, name in present) for name, _, text in sorted(captions.values())]


def _folder(
    root: Path, config: Config, dropped: Counter[str]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]], int]:
    """A picture's caption is the .txt beside it (its lines are so many captions), else its file name in words."""
    pictures = sorted(path for path in root.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    captions: dict[str, list[str]] = {}
    total = 0
    for path in pictures:
        beside = path.with_suffix(".txt")
        if beside.is_file():
            lines = [
                " ".join(line.split()) for line in beside.read_text(encoding="utf-8", errors="replace").splitlines()
            ]
        else:
            lines = [" ".join(path.stem.replace("_", " ").replace("-", " ").split())]
        lines = [line for line in lines if line] or [""]
        total += len(lines)
        if lines == [""]:
            dropped["no caption"] += 1
            continue
        captions[path.relative_to(root).as_posix()] = lines
    names = sorted(captions)
    number = min(config.source.max_heldout_prompts, len(names) // 10)
    chosen = set(random.Random(f"{config.seed}/folder").sample(names, number))
    heldout = [(name, captions[name][0]) for name in names if name in chosen]
    dropped["held out for evaluation"] += sum(len(captions[name]) for name in chosen)
    rows = [(name, text) for name in names if name not in chosen for text in captions[name]]
    return rows, heldout, total


def _with_sizes(root: Path, rows, host: str, bar, dropped: Counter[str]) -> list[dict[str, Any]]:
    """Rows of metadata.parquet; width and height come from the pictures' headers. Unreadable pictures are dropped."""
    from PIL import Image, UnidentifiedImageError

    sizes: dict[str, tuple[int, int] | None] = {}
    table = []
    for name, text in rows:
        if name not in sizes:
            try:
                with Image.open(root / name) as picture:
                    sizes[name] = picture.size
            except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
                sizes[name] = None
        size = sizes[name]
        bar.update(1)
        if size is None:
            dropped["not a readable picture"] += 1
            continue
        url = f"http://{host}/{urllib.parse.quote(name)}"
        scores = dict.fromkeys(("similarity", "punsafe", "pwatermark", "AESTHETIC_SCORE"))
        table.append({"URL": url, "TEXT": text, "WIDTH": size[0], "HEIGHT": size[1], **scores})
    return table
