"""`raphael prefer make`: two folders of images of the same prompts become a page on which people choose, blind.

After DrawBench (Saharia et al. 2022, arXiv 2205.11487, section 4.1 and appendix E) and ViLG-300 as RAPHAEL uses it
(arXiv 2305.18295, section 4.1): all images of one prompt by one model make a set, two sets stand side by side, and a
person says of each prompt which set has the higher quality and which fits the text better, or that neither does.

The folder is complete in itself: no network, no server. What tells the models apart (names, seed, sides, order) is in a
key file BESIDE the folder, so that the folder can be given away as it is. Images are written anew as PNG under
names made by a hash: neither name, format nor metadata tells whose they are. (Their size in pixels does, where the
models' sizes differ.)
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raphael.base.files import put
from raphael.base.stage import StageError, write_json
from raphael.evaluate.features.image_folder import ImageFolder, Preparation, read_prepared
from raphael.evaluate.report.pages import page_environment

TEMPLATES = Path(__file__).resolve().parents[1] / "report" / "templates"
QUESTIONS = {  # in the order they are asked; the wording follows Imagen's appendix E
    "quality": "Which is of higher quality?",
    "alignment": "Which better represents the text?",
}
AS_THEY_ARE = Preparation("none", 0)


@dataclass(frozen=True)
class PromptPair:
    """One prompt, and its images by either model: as many on both sides."""

    prompt: str
    suite: str
    a: tuple[Path, ...]
    b: tuple[Path, ...]


def make_study(a: Path, b: Path, out: Path, names: tuple[str, str], seed: int, key: Path | None = None) -> Path:
    """Write the page to the folder `out` and the key beside it; returns the key's path. Raises StageError.

    names: of a and b, for the key and the tally alone. key: default <out>.key.json.
    """
    if names[0] == names[1]:
        raise StageError(f"prefer: got the name {names[0]!r} twice, expected two; give --names A B")
    pairs = pair_up(ImageFolder.read(a), ImageFolder.read(b))
    key = key or out.with_name(f"{out.name}.key.json")
    if key.resolve().is_relative_to(out.resolve()):
        raise StageError(f"prefer: the key {key} would lie in the folder that raters get; expected it outside {out}")
    if out.exists() and any(out.iterdir()) and not (out / "index.html").is_file():
        raise StageError(f"prefer: {out} holds something else than a study; expected an empty or a new folder")
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "pictures").mkdir(parents=True)
    items, sides = arrange(pairs, seed, unfinished / "pictures")
    study = _digest(seed, *(file for item in items for file in (*item["left"], *item["right"])))
    page = render({"study": study, "questions": list(QUESTIONS.items()), "items": items})
    (unfinished / "index.html").write_text(page, encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    put(unfinished, out)
    facts = {"study": study, "seed": seed, "names": {"a": names[0], "b": names[1]}}
    write_json(key, {**facts, "questions": QUESTIONS, "items": sides})
    return key


def pair_up(a: ImageFolder, b: ImageFolder) -> list[PromptPair]:
    """The prompts of both in the order of a. Raises StageError where prompts or their numbers of images differ."""
    ours, theirs = _by_prompt(a), _by_prompt(b)
    for one, other, here, there in ((a, b, ours, theirs), (b, a, theirs, ours)):
        lonely = [prompt for prompt in here if prompt not in there]
        if lonely:
            raise StageError(
                f"prefer: {len(lonely)} prompts have images in {one.folder} and none in {other.folder}, the first is "
                f"{lonely[0]!r}; generate the same prompts with both"
            )
    for prompt, (files, _) in ours.items():
        if len(files) != len(theirs[prompt][0]):
            raise StageError(
                f"prefer: {prompt!r} has {len(files)} images in {a.folder} and {len(theirs[prompt][0])} in "
                f"{b.folder}, expected as many; generate both with the same --num-images"
            )
    return [PromptPair(p, suite, tuple(files), tuple(theirs[p][0])) for p, (files, suite) in ours.items()]


def arrange(pairs: list[PromptPair], seed: int, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Shuffle prompts and sides and write the images to `folder`. -> (what the page knows, what the key knows).

    Each model stands left on half of the prompts (one more for odd numbers), so a taste for a side helps neither.
    """
    rng = np.random.default_rng(seed)
    order, a_left = rng.permutation(len(pairs)), rng.permutation(len(pairs)) % 2 == 0
    items, sides = [], {}
    for place in order:
        pair = pairs[place]
        name = _digest(seed, pair.prompt)
        files = {}
        for model, images in (("a", pair.a), ("b", pair.b)):
            files[model] = []
            for number, image in enumerate(images):
                files[model].append(f"pictures/{_digest(seed, pair.prompt, model, number)}.png")
                _write_png(image, folder.parent / files[model][-1])
        left, right = ("a", "b") if a_left[place] else ("b", "a")
        items.append({"id": name, "prompt": pair.prompt, "left": files[left], "right": files[right]})
        sides[name] = {"prompt": pair.prompt, "suite": pair.suite, "left": left, "right": right}
    return items, sides


def render(content: dict[str, Any]) -> str:
    """The page; content becomes JSON that cannot leave its script element (jinja sorts keys, so order is in lists)."""
    environment = page_environment()
    files = {name: (TEMPLATES / f"preference.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    return environment.get_template("preference.html").render(content=content, **files)


def _by_prompt(folder: ImageFolder) -> dict[str, tuple[list[Path], str]]:
    entries = folder.listing.get("images", [])
    if not entries or any("prompt" not in entry for entry in entries):
        raise StageError(
            f"prefer: {folder.folder}: got no prompts; expected images.json beside the images, with prompts"
        )
    found: dict[str, tuple[list[Path], str]] = {}
    for entry, file in zip(entries, folder.files, strict=True):
        found.setdefault(entry["prompt"], ([], entry.get("suite") or ""))[0].append(file)
    return found


def _write_png(source: Path, target: Path) -> None:
    from PIL import Image

    Image.fromarray(read_prepared(source, AS_THEY_ARE)).save(target)


def _digest(*parts: Any) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:12]
