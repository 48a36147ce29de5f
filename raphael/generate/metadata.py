"""What a PNG says of how it was made: a text as AUTOMATIC1111's readers want it, and JSON from which it is made again.

    parameters   the prompt, a line with the negative one, a line "Steps: 15, Sampler: DPM++ 2M, ..."
    raphael      FORM, the model, the prompts and numbers of the batch that it stood in, settings and size

An image's last bits depend on the size of its batch (raphael/diffusion/sampling.py), so the whole batch is told. No
time is: the same request gives the same bytes. Of image to image the picture is told by the sha256 of its pixels.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.config.sampling import Sampling
from raphael.base.images.fit import read_image
from raphael.base.stage import StageError
from raphael.base.strict import later, load, to_dict

if TYPE_CHECKING:
    import numpy as np
    from PIL.PngImagePlugin import PngInfo

FORM = "raphael-image/1"
TEXT, JSON = "parameters", "raphael"
LONG = 2000  # letters, above which a text is compressed: 50 prompts are more than the pixels of a small image
SAMPLERS = {  # AUTOMATIC1111's names
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "Euler",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "unipc": "UniPC",
    "euler_ancestral": "Euler a",
}


@dataclass(frozen=True)
class Made:
    """How one image was made. batch: the prompts of the images that were sampled together; row: which of them it is.

    first: the number of the batch's first image, so its own is first + row. size_px: (height, width).
    seeds: (seed, number) of each row, where they are not (seed, first + row). as_written: brackets are letters, as in
    a file of prompts. image_sha256, strength: of the picture that image to image began from. guidance,
    guidance_weight: of the guide whose gradients it followed, kind:identity.
    """

    model: str
    seed: int
    first: int
    row: int
    batch: tuple[str, ...]
    negative_prompt: str
    sampling: Sampling
    size_px: tuple[int, ...]
    seeds: tuple[tuple[int, ...], ...] = later(())
    as_written: bool = later(False)
    image_sha256: str = later("")
    strength: float = later(1.0)
    guidance: str = later("")
    guidance_weight: float = later(1.0)

    @property
    def prompt(self) -> str:
        return self.batch[self.row]

    @property
    def image_seeds(self) -> list[tuple[int, int]]:
        """Of each row."""
        if self.seeds:
            return [(seed, number) for seed, number in self.seeds]
        return [(self.seed, self.first + row) for row in range(len(self.batch))]


def picture_sha256(pixels: np.ndarray) -> str:
    """Of uint8 (H, W, 3), its shape among it."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def batch_of(prompts: list[str], index: int, batch_size: int) -> tuple[int, tuple[str, ...]]:
    """(its first number, its prompts) of the batch in which image `index` of all is sampled."""
    first = index - index % batch_size
    return first, tuple(prompts[first : first + batch_size])


def a1111(made: Made) -> str:
    """The text that AUTOMATIC1111 writes; what it has no word for it skips when it reads it."""
    how, (seed, number) = made.sampling, made.image_seeds[made.row]
    told: dict[str, Any] = {
        "Steps": how.steps,
        "Sampler": SAMPLERS[how.sampler],
        "CFG scale": f"{how.guidance_scale:g}",
        "Seed": seed,
        "Size": f"{made.size_px[1]}x{made.size_px[0]}",  # width first
        "Model hash": made.model[:10],
        "Model": "raphael",
    }
    if how.eta:
        told["Eta"] = f"{how.eta:g}"
    if made.image_sha256:
        told["Denoising strength"] = f"{made.strength:g}"
    if made.guidance:
        told["Guided by"] = f"{made.guidance} x {made.guidance_weight:g}"
    if number:
        told["Image number"] = number
    lines = [made.prompt, *([f"Negative prompt: {made.negative_prompt}"] if made.negative_prompt else [])]
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in told.items())])


def chunk(made: Made) -> PngInfo:
    """For Pillow's `save(pnginfo=...)`."""
    from PIL.PngImagePlugin import PngInfo

    info, told = PngInfo(), {"form": FORM, **to_dict(made)}
    for key, text in ((TEXT, a1111(made)), (JSON, json.dumps(told, sort_keys=True))):
        try:
            text.encode("latin-1")  # what a tEXt chunk holds; others go into iTXt, which readers know, too
            info.add_text(key, text, zip=len(text) > LONG)
        except UnicodeEncodeError:
            info.add_itxt(key, text, zip=len(text) > LONG)
    return info


def read_made(file: Path) -> Made:
    """Of a PNG that `raphael generate` wrote. Raises StageError, one line."""

    def text_of(image: Any) -> str | None:
        image.load()  # texts may stand behind the pixels
        return getattr(image, "text", {}).get(JSON)

    text = read_image(file, text_of, "expected a PNG of raphael generate", f"--from: {file}")
    if text is None:
        raise StageError(
            f"--from: {file}: does not say how it was made; expected a PNG of raphael generate, not --no-metadata's"
        )
    try:
        told = json.loads(text)
        form = told.pop("form")
        if form != FORM:
            raise ValueError(f"form {form!r}, expected {FORM!r}")
        made = load(Made, told, str(file), JSON)
        if not 0 <= made.row < len(made.batch) or len(made.size_px) != 2:
            raise ValueError(f"row {made.row} of {len(made.batch)}, size {made.size_px}")
        if made.seeds and [len(pair) for pair in made.seeds] != [2] * len(made.batch):
            raise ValueError(f"seeds {made.seeds} of {len(made.batch)} images")
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # ConfigError is a ValueError
        detail = " ".join(str(error).split())[:200]
        raise StageError(f"--from: {file}: what it says of itself is damaged ({detail})") from None
    return made
