"""`python -m data_pipeline.tools.captioning FOLDER --model PATH`: a caption beside every image that has none, by any
image-to-text model of transformers (BLIP, GIT, Florence-2, a chatting VLM).

Captions are written as .txt beside their images, one at a time, so that a run that was stopped goes on; look at them
before you train on them. Weights are read from safetensors alone, and no code of a model's folder is ever run.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.places import IMAGE_FORMATS, IMAGE_SUFFIXES
from data_pipeline.gateway.bodies import BodyLimits
from raphael.base import devices
from raphael.base.config.params import load_config
from raphael.base.files import written_whole
from raphael.base.stage import StageError, one_clear_line

if TYPE_CHECKING:
    import torch
    from PIL import Image

PROJECT = Path(__file__).resolve().parents[2]
CHAT_PROMPT = "Describe this image in one sentence."
TASK_PROMPT = "<CAPTION>"  # Florence-2's models have tasks, not questions


@dataclass
class Captioner:
    """A model and its processor. prompt: what the model is asked; "": nothing, or what its kind needs."""

    model: Any
    processor: Any
    prompt: str
    max_tokens: int

    @classmethod
    def load(cls, place: str, prompt: str, max_tokens: int, device: torch.device) -> Captioner:
        """place: a folder, or a hub id. Raises StageError, one line."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        is_here = Path(place).is_dir()
        try:
            processor = AutoProcessor.from_pretrained(place, local_files_only=is_here, trust_remote_code=False)
            model = AutoModelForImageTextToText.from_pretrained(
                place, local_files_only=is_here, use_safetensors=True, dtype="auto", trust_remote_code=False
            )
        except Exception as error:  # a folder whose files do not fit fails in as many ways as transformers has
            detail = " ".join(str(error).split())[:300]
            where = "" if is_here else f"no folder {place} here, and as a hub id: "
            raise StageError(
                f"--model: {where}{detail}; expected an image-to-text model of transformers with a processor and "
                "safetensors, such as BLIP or Florence-2"
            ) from None
        return cls(model.eval().to(device), processor, prompt, max_tokens)

    @property
    def chats(self) -> bool:
        return bool(getattr(self.processor, "chat_template", None))

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """A caption of each RGB image, the likeliest word after word; spaces and line breaks are single spaces."""
        import torch

        told, asked = self._told(images)
        told = told.to(self.model.device)
        for name, value in told.items():
            if torch.is_floating_point(value):
                told[name] = value.to(self.model.dtype)
        with torch.inference_mode():
            ids = self.model.generate(**told, max_new_tokens=self.max_tokens, do_sample=False, num_beams=1)
        texts = self.processor.batch_decode(ids[:, asked:], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _told(self, images: Sequence[Image.Image]) -> tuple[Any, int]:
        """(the model's inputs, how many tokens of the answer are the question)."""
        if self.chats:
            content = [{"type": "image"}, {"type": "text", "text": self.prompt or CHAT_PROMPT}]
            question = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            told = self.processor(
                images=[[image] for image in images], text=[question] * len(images), return_tensors="pt", padding=True
            )
            return told, told["input_ids"].shape[1]
        kind = getattr(self.model.config, "model_type", "")
        prompt = self.prompt or (TASK_PROMPT if kind == "florence2" else "")
        text = {"text": [prompt] * len(images)} if prompt else {}
        return self.processor(images=list(images), **text, return_tensors="pt"), 0


def waiting(folder: Path, overwrite: bool) -> tuple[list[Path], int]:
    """(images to caption, how many have a caption already)."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise StageError(f"{folder}: no image in it; expected {', '.join(sorted(IMAGE_SUFFIXES))} files")
    left = [path for path in found if overwrite or not path.with_suffix(".txt").exists()]
    return left, len(found) - len(left)


def caption(
    paths: Sequence[Path], captioner: Captioner, batch_size: int, prefix: str = ""
) -> Iterator[tuple[Path, str]]:
    """Write a .txt beside each image; yields (image, caption), "" where it cannot be read or nothing was said."""
    rest = iter(paths)
    while batch := list(islice(rest, batch_size)):
        images = {path: image for path in batch if (image := _opened(path)) is not None}
        texts = dict(zip(images, captioner(list(images.values())), strict=True)) if images else {}
        for path in batch:
            if text := texts.get(path, ""):
                _write(path.with_suffix(".txt"), f"{prefix}{text}\n")
            yield path, text


def _opened(path: Path) -> Image.Image | None:
    from PIL import Image

    from raphael.base.images.colours import as_seen

    try:
        if _limits().refuses(path.read_bytes()):
            return None
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return as_seen(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # UnknownColours is a ValueError
        return None


@functools.cache
def _limits() -> BodyLimits:
    """Of the project's own settings."""
    download = load_config(PROJECT / "params.yaml").download
    return BodyLimits(download.max_bytes, download.max_pixels, download.max_decoded_bytes)


def _write(path: Path, text: str) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="caption", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="of images")
    parser.add_argument("--model", required=True, help="a folder with a model and its processor, or a hub id")
    parser.add_argument("--prompt", default="", help="what the model is asked (default: what its kind needs)")
    parser.add_argument("--prefix", default="", help="before every caption, such as 'sks dog, '")
    parser.add_argument("--max-tokens", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--overwrite", action="store_true", help="images that have a caption, too")
    devices.add_option(parser)
    given = parser.parse_args(argv)
    with one_clear_line("caption") as outcome:
        if not given.folder.is_dir():
            raise StageError(f"{given.folder}: no such folder; expected one of images")
        paths, had = waiting(given.folder, given.overwrite)
        written = _all(paths, given) if paths else 0
        print(
            f"caption: {written:,} written, {had:,} had one, {len(paths) - written:,} could not be read or said nothing"
        )
        if paths and not written:
            raise StageError(f"{given.folder}: no caption came of {len(paths)} images")
    return outcome.status


def _all(paths: Sequence[Path], given: argparse.Namespace) -> int:
    from tqdm import tqdm

    captioner = Captioner.load(given.model, given.prompt, given.max_tokens, devices.resolve(given.device))
    written = 0
    made = caption(paths, captioner, given.batch_size, given.prefix)
    for path, text in tqdm(made, total=len(paths), desc="caption", unit=" images"):
        written += bool(text)
        if not text:
            print(f"caption: {path}: no caption", file=sys.stderr)
    return written


if __name__ == "__main__":
    raise SystemExit(main())
