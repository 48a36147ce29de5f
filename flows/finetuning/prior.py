"""Prior preservation (DreamBooth, arXiv 2208.12242, section 3.2): beside somebody's images as many of the model's own.

The model generates them before its training, of prompts about the class that the images are of; trained on both, it
learns the new without forgetting what it called by the old words. Half of the images of an epoch are its own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from raphael.base.files import put
from raphael.base.stage import StageError, read_json, write_json

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MADE = "made.json"


def prompts_of(given: tuple[str, ...]) -> tuple[str, ...]:
    """Texts, and in the place of a name of a file its lines that are not empty. Raises StageError for one without."""
    found: list[str] = []
    for text in given:
        if not text.endswith(".txt"):
            found.append(text)
            continue
        if not Path(text).is_file():
            raise StageError(f"--prior: {text}: no such file, expected a prompt, or a .txt file of prompts, one a line")
        lines = Path(text).read_text(encoding="utf-8").splitlines()
        if not (some := [line.strip() for line in lines if line.strip()]):
            raise StageError(f"--prior: {text}: got no prompt, expected one a line")
        found += some
    return tuple(found)


def join_prior(
    base: Path, data: Path, folder: Path, prompts: tuple[str, ...], trigger: str = "", count: int = 0
) -> Path:
    """Write `folder`: own/ with the images of `data` and their .txt captions, prior/ with the model's. Returns it.

    Made for the same images and prompts already, it stays. trigger: stands before the captions of data's images.
    count: of the model's images; 0: as many as data's. Where there are k times as many, those of data come k times in
    an epoch (kohya's folders: k_own, 1_prior). Raises StageError for data that is no folder of images with .txt
    captions, or fewer images than that of the model's.
    """
    images = sorted(path for path in data.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
    silent = [path for path in images if not path.with_suffix(".txt").is_file()]
    if not images or silent:
        got = f"{silent[0].name} without one" if silent else "no images"
        raise StageError(f"--prior: {data}: got {got}, expected images, each with a .txt caption beside it")
    count = count or len(images)
    if count < len(images):
        raise StageError(f"--prior-images: got {count}, expected at least the {len(images)} that {data} has")
    told = {"model": str(base), "prompts": list(prompts), "trigger": trigger}
    told["images"] = [[str(path.relative_to(data)), path.stat().st_size, path.stat().st_mtime_ns] for path in images]
    if count > len(images):
        told["count"] = count
    if (folder / MADE).is_file():
        if read_json(folder / MADE) == told:
            return folder
    elif folder.exists() and any(folder.iterdir()):
        raise StageError(f"{folder}: holds something else; expected a new folder for the images of --prior")
    made = folder.with_name(f".{folder.name}.new")  # of a run that was killed, too
    shutil.rmtree(made, ignore_errors=True)
    repeats = round(count / len(images))
    own, prior = (made / f"{repeats}_own", made / "1_prior") if repeats > 1 else (made / "own", made / "prior")
    own.mkdir(parents=True)
    for number, path in enumerate(images):
        name = own / f"{number:05d}{path.suffix.lower()}"
        name.symlink_to(path.resolve())
        lines = path.with_suffix(".txt").read_text(encoding="utf-8", errors="replace").splitlines()
        name.with_suffix(".txt").write_text("\n".join(f"{trigger} {line}".strip() for line in lines), encoding="utf-8")
    _generate(base, prompts, count, prior)
    write_json(made / MADE, told)
    shutil.rmtree(folder, ignore_errors=True)
    put(made, folder)
    return folder


def _generate(base: Path, prompts: tuple[str, ...], count: int, folder: Path) -> None:
    from tqdm import tqdm

    from raphael.generate.pipeline import RaphaelPipeline

    folder.mkdir()
    pipeline = RaphaelPipeline.from_pretrained(base)
    texts = [prompts[number % len(prompts)] for number in range(count)]
    with tqdm(total=count, unit=" images", desc="prior", dynamic_ncols=True) as bar:
        images = pipeline(texts, progress=bar.update).images
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        image.save(folder / f"{number:05d}.png")
        (folder / f"{number:05d}.txt").write_text(text, encoding="utf-8")
