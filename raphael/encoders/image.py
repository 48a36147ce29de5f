"""A CLIP as a judge: images and texts as unit vectors of one space; a dot product is the CLIP score's cosine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from raphael.encoders.clip import OpenClip, is_clip_folder, load_clip_folder, load_open_clip, normaliser
from raphael.encoders.pretrained import PretrainedError, follow, one_line, split_revision

if TYPE_CHECKING:
    from PIL import Image

BATCH = 64


class ClipScorer(nn.Module):
    """embed_images and embed_texts, both -> float32 (B,D) of unit norm. `name` says which CLIP this is.

    Images are scaled (bicubic) until their short side is the tower's, cropped to the middle, and normalised with the
    mean and standard deviation that the tower was trained with.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenize: Callable[[list[str]], Tensor],
        features: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
        image_size_px: int,
        normalise: Callable[[Tensor], Tensor],
        name: str,
    ):
        super().__init__()
        self.model, self.tokenize, self.image_size_px, self.name = model, tokenize, image_size_px, name
        self.image_features, self.text_features = features
        self.normalise = normalise

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image] | np.ndarray) -> Tensor:
        """images: PIL images of any size, or uint8 (B,H,W,3)."""
        parts = []
        for start in range(0, len(images), BATCH):
            pixels = np.stack([self._fit(image) for image in images[start : start + BATCH]])
            parts.append(self.image_features(self.normalise(torch.from_numpy(pixels).to(self.device))))
        return _unit(parts)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), BATCH):
            parts.append(self.text_features(self.tokenize(list(texts[start : start + BATCH])).to(self.device)))
        return _unit(parts)

    def _fit(self, image: Any) -> np.ndarray:
        from PIL import Image

        if not isinstance(image, Image.Image):
            array = np.asarray(image)
            if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
                raise ValueError(f"images: got {array.dtype} {array.shape}, expected PIL images or uint8 (B,H,W,3)")
            image = Image.fromarray(array)
        image = image.convert("RGB")
        side, (width, height) = self.image_size_px, image.size
        if (width, height) != (side, side):
            short = min(width, height)  # sizes cut, borders rounded, as in torchvision, hence in open_clip
            width, height = width * side // short, height * side // short
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            left, top = round((width - side) / 2), round((height - side) / 2)
            image = image.crop((left, top, left + side, top + side))
        return np.asarray(image)


def load_clip(spec_or_folder: str | Path) -> ClipScorer:
    """models/clip or another folder of that form, a pointer, "open_clip:<arch>:<weights>", "clip:<folder or hub id>".

    Raises PretrainedError, one line; a T5 has no images.
    """
    spec = follow(spec_or_folder)
    kind, _, rest = spec.partition(":")
    if kind == "open_clip" and rest:
        arch, _, weights = rest.partition(":")
        return from_open_clip(load_open_clip(arch, weights), f"{arch}-{Path(weights).stem}")
    if kind == "clip" and rest:
        return _from_transformers(rest)
    if is_clip_folder(spec):
        return from_open_clip(load_clip_folder(spec), "own")
    raise PretrainedError(
        f"CLIP: got {spec!r}, expected a folder like models/clip, open_clip:<arch>:<weights>, clip:<folder or hub id>; "
        "with a T5 as text encoder, name a CLIP in evaluate.scoring_clip"
    )


def from_open_clip(clip: OpenClip, name: str) -> ClipScorer:
    """The scorer over a CLIP that is already in memory."""
    features = (clip.model.encode_image, clip.model.encode_text)
    return ClipScorer(clip.model, clip.tokenize, features, clip.image_size_px, normaliser(clip.mean, clip.std), name)


def _from_transformers(where: str) -> ClipScorer:
    from transformers import AutoTokenizer, CLIPModel

    from raphael.encoders.clip import CLIP_MEAN, CLIP_STD, MAX_CHARS

    local = Path(where).expanduser()
    where, revision = split_revision(where)
    target, local_only = (str(local), True) if local.is_dir() else (where, False)
    safely: dict[str, Any] = {"local_files_only": local_only, "revision": revision, "trust_remote_code": False}
    with one_line("CLIP", where, "config.json, model.safetensors and the tokenizer's files"):
        tokenizer = AutoTokenizer.from_pretrained(target, **safely)
        model = CLIPModel.from_pretrained(target, use_safetensors=True, dtype=torch.float32, **safely)
    model.eval().requires_grad_(False)
    length = model.config.text_config.max_position_embeddings

    def tokenize(texts: list[str]) -> Tensor:
        batch = tokenizer(
            [text[:MAX_CHARS] for text in texts],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        return batch["input_ids"]

    features = (
        lambda pixels: model.get_image_features(pixel_values=pixels).pooler_output,
        lambda ids: model.get_text_features(input_ids=ids).pooler_output,
    )
    size = model.config.vision_config.image_size
    return ClipScorer(model, tokenize, features, size, normaliser(CLIP_MEAN, CLIP_STD), Path(where).name)


def _unit(parts: list[Tensor]) -> Tensor:
    if not parts:
        raise ValueError("got nothing to embed, expected at least one image or text")
    return torch.nn.functional.normalize(torch.cat(parts).float(), dim=-1)
