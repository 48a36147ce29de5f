"""`raphael evaluate export`: images in the layout that a public benchmark's own scorer reads.

The scorers need detectors and language models that are not installable beside this project; their layouts are
plain files. Each was read off the scorer's code, which is named at each function.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raphael.base.files import put
from raphael.base.stage import StageError
from raphael.evaluate.features.image_folder import ImageFolder, Preparation, read_prepared

AS_THEY_ARE = Preparation("none", 0)
LONGEST_NAME_BYTES = 255  # of a file, on the file systems in use


@dataclass(frozen=True)
class Row:
    """One prompt of a benchmark. metadata: what the scorer wants beside the images (GenEval alone)."""

    id: str
    prompt: str
    metadata: dict[str, Any] | None = None


def export(bench: str, images: Path, prompts: Path, out: Path) -> str:
    """Write every image of every prompt into `out`, atomically; -> what was written and how to score it.

    Raises StageError where a prompt has no images, prompts have different numbers of them, or the layout cannot hold
    them.
    """
    layout = LAYOUTS[bench]
    rows = bench_rows(bench, prompts)
    image_sets = by_row(ImageFolder.read(images), rows)
    if out.exists() and any(out.iterdir()):
        raise StageError(f"export: {out} is not empty, and a scorer would read what is in it; expected a new folder")
    each = len(image_sets[0])
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    layout.write(rows, image_sets, unfinished)
    if out.exists():
        out.rmdir()
    put(unfinished, out)
    text = f"{out}: {len(rows):,} prompts of {bench}, {each} images each\n{layout.score.format(out=out, each=each)}"
    if layout.each and each != layout.each:
        text += f"\nthe benchmark's own number is {layout.each} images a prompt: with {each} the score is another one"
    return text


def bench_rows(bench: str, source: Path | None) -> list[Row]:
    """The prompts in the benchmark's own order, from its own file. Raises StageError with the file it expects."""
    layout = LAYOUTS[bench]
    if source is None or not Path(source).exists():
        raise StageError(f"{bench}: {source or 'no file given'}: expected {layout.file}")
    try:
        rows = layout.read(Path(source))
    except (KeyError, TypeError, ValueError, csv.Error) as error:  # json's and Unicode's errors are ValueErrors
        raise StageError(f"{bench}: {source}: cannot be read ({error}); expected {layout.file}") from None
    if not rows:
        raise StageError(f"{bench}: {source}: holds no prompts; expected {layout.file}")
    ids = [row.id for row in rows]
    if len(set(ids)) < len(ids):
        raise StageError(f"{bench}: {source}: got one id twice, expected different ones")
    return rows


def by_row(folder: ImageFolder, rows: list[Row]) -> list[list[Path]]:
    """The images of each row, by its prompt's text (blanks as one), as many for every row, at least one.

    Where several rows have one prompt, its images are dealt out in order.
    """
    entries = folder.listing.get("images", [])
    if not entries or any("prompt" not in entry for entry in entries):
        raise StageError(f"{folder.folder}: got no prompts; expected images.json beside the images, with prompts")
    found: dict[str, list[Path]] = {}
    for entry, file in zip(entries, folder.files, strict=True):
        found.setdefault(_plain(entry["prompt"]), []).append(file)
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(_plain(row.prompt), []).append(place)
    dealt: list[list[Path]] = [[] for _ in rows]
    for prompt, mine in places.items():
        each = len(found.get(prompt, [])) // len(mine)
        for number, place in enumerate(mine):
            dealt[place] = found.get(prompt, [])[number * each : (number + 1) * each]
    for row, files in zip(rows, dealt, strict=True):
        if not files:
            missing = sum(not files for files in dealt)
            raise StageError(
                f"{folder.folder}: {missing} of {len(rows)} prompts have no image, the first is {row.id} "
                f"{row.prompt!r}; generate those of `raphael prompts --bench`"
            )
        if len(files) != len(dealt[0]):
            raise StageError(
                f"{folder.folder}: {row.prompt!r} has {len(files)} images, others {len(dealt[0])}; expected as many"
            )
    return dealt


def geneval_rows(source: Path) -> list[Row]:
    """evaluation_metadata.jsonl: an object a line, {"tag", "include", "prompt", ...}; ids are the lines' numbers."""
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Row(f"{number:05d}", str(line["prompt"]), line) for number, line in enumerate(lines)]


def write_geneval(rows: list[Row], image_sets: list[list[Path]], out: Path) -> None:
    """<five digits>/metadata.jsonl and <five digits>/samples/<five digits>.png.

    djghosh13/geneval: generation/diffusers_generate.py writes this, evaluation/evaluate_images.py reads it (folders
    whose name is a number, images whose name is a number and .png).
    """
    for row, files in zip(rows, image_sets, strict=True):
        home = out / row.id / "samples"
        home.mkdir(parents=True)
        (home.parent / "metadata.jsonl").write_text(json.dumps(row.metadata), encoding="utf-8")
        for number, file in enumerate(files):
            write_png(file, home / f"{number:05d}.png")


def dpg_rows(source: Path) -> list[Row]:
    """dpg_bench.csv (item_id and text, a line a question), or the folder prompts/ with <item_id>.txt."""
    if source.is_dir():
        return [Row(file.stem, file.read_text(encoding="utf-8").strip()) for file in sorted(source.glob("*.txt"))]
    texts: dict[str, str] = {}
    for row in csv.DictReader(io.StringIO(source.read_text(encoding="utf-8-sig"), newline="")):
        texts.setdefault(row["item_id"], row["text"])
    return [Row(name, text) for name, text in texts.items()]


def write_dpg(rows: list[Row], image_sets: list[list[Path]], out: Path) -> None:
    """<item_id>.png: four square images as 2 x 2, row by row, or one.

    TencentQQGYLab/ELLA: dpg_bench/compute_dpg_bench.py cuts it by --resolution (an image's side) and --pic-num, and
    takes the name up to the first dot for the id.
    """
    import numpy as np
    from PIL import Image

    for row, files in zip(rows, image_sets, strict=True):
        if len(files) not in (1, 4):
            raise StageError(f"dpg: got {len(files)} images for {row.id}, expected 4 (a 2 x 2 grid) or 1")
        if "." in row.id or "/" in row.id:
            raise StageError(f"dpg: got the id {row.id!r}; the scorer would cut it at the dot")
        parts = [read_prepared(file, AS_THEY_ARE) for file in files]
        height, width = parts[0].shape[:2]
        if height != width or any(part.shape != parts[0].shape for part in parts):
            raise StageError(f"dpg: {files[0]}: got {width} x {height} px, expected squares of one size")
        grid = parts[0] if len(parts) == 1 else np.vstack([np.hstack(parts[:2]), np.hstack(parts[2:])])
        Image.fromarray(grid).save(out / f"{row.id}.png")


def t2i_rows(source: Path) -> list[Row]:
    """examples/dataset/<category>_val.txt: a prompt a line, what follows a tab is not the prompt's."""
    lines = [line.split("\t")[0].strip() for line in source.read_text(encoding="utf-8").splitlines()]
    return [Row(str(number), line) for number, line in enumerate(line for line in lines if line)]


def write_t2i(rows: list[Row], image_sets: list[list[Path]], out: Path) -> None:
    """samples/<prompt>_<six digits>.png, the number running through all images.

    Karine-Huang/T2I-CompBench: GORS_finetune/inference_eval.py writes this; BLIPvqa_eval/BLIP_vqa.py sorts by the
    number and takes what is before the first underscore for the prompt.
    """
    (out / "samples").mkdir()
    number = 0
    for row, files in zip(rows, image_sets, strict=True):
        name = f"{row.prompt}_{number:06d}.png"
        if "_" in row.prompt or "/" in row.prompt or len(name.encode()) > LONGEST_NAME_BYTES:
            raise StageError(f"t2i-compbench: {row.prompt!r} cannot be a file's name as the scorer reads it")
        for file in files:
            write_png(file, out / "samples" / f"{row.prompt}_{number:06d}.png")
            number += 1


def parti_rows(source: Path) -> list[Row]:
    """PartiPrompts.tsv: Prompt, Category, Challenge, Note; ids are the rows' numbers, from 0."""
    text = source.read_text(encoding="utf-8-sig")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [Row(f"{number:05d}", row["Prompt"]) for number, row in enumerate(reader)]


def write_parti(rows: list[Row], image_sets: list[list[Path]], out: Path) -> None:
    """<row>.png, or <row>_<number>.png where there are several. PartiPrompts has no scorer: its judges are people."""
    for row, files in zip(rows, image_sets, strict=True):
        for number, file in enumerate(files):
            write_png(file, out / (f"{row.id}.png" if len(files) == 1 else f"{row.id}_{number}.png"))


def write_png(source: Path, target: Path) -> None:
    """A whole image as PNG: the file itself where it is one. Raises StageError where it is broken."""
    from PIL import Image

    pixels = read_prepared(source, AS_THEY_ARE)
    if source.suffix.lower() == ".png":
        shutil.copyfile(source, target)
    else:
        Image.fromarray(pixels).save(target)


def _plain(prompt: str) -> str:
    return " ".join(prompt.split())


@dataclass(frozen=True)
class Layout:
    """file: what the prompts come from, in words. each: images a prompt in the published protocol, 0: not said."""

    file: str
    read: Callable[[Path], list[Row]]
    write: Callable[[list[Row], list[list[Path]], Path], None]
    each: int
    score: str


LAYOUTS = {
    "geneval": Layout(
        "GenEval's prompts/evaluation_metadata.jsonl",
        geneval_rows,
        write_geneval,
        4,
        "score it in GenEval: python evaluation/evaluate_images.py {out} --outfile results.jsonl --model-path DETECTOR",
    ),
    "dpg": Layout(
        "DPG-Bench's dpg_bench.csv, or its folder prompts/ of .txt",
        dpg_rows,
        write_dpg,
        4,
        "score it in ELLA: python dpg_bench/compute_dpg_bench.py --image-root-path {out} --resolution SIDE "
        "--pic-num {each}",
    ),
    "t2i-compbench": Layout(
        "T2I-CompBench's examples/dataset/<category>_val.txt",
        t2i_rows,
        write_t2i,
        10,
        "score it in T2I-CompBench: python BLIPvqa_eval/BLIP_vqa.py --out_dir={out} (for attributes)",
    ),
    "partiprompts": Layout(
        "PartiPrompts.tsv", parti_rows, write_parti, 0, "no scorer: show them to people (raphael prefer)"
    ),
}
