"""A trained GLIDE: prompts as token ids, small images by the fine-tuned base, large ones by the upsampler."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raphael.base.checkpoint.folder import load_weights, read_checkpoint
from raphael.base.checkpoint.parts import weights_hash
from raphael.base.strict import load
from raphael.diffusion.cascade import Upsampler
from raphael.diffusion.noise import noise_of
from raphael.diffusion.prediction import prediction_of
from raphael.encoders.text import load_text_encoder
from raphael.net.captions.captioned import Captioned, of_ids
from raphael.net.condition import Condition
from raphael.net.plain import PlainBlock
from raphael.systems.cascade import CascadePipeline
from raphael.systems.glide.system import BASE, FINETUNE, INPAINT, SEEING, UPSAMPLER, GlideSettings

if TYPE_CHECKING:
    from raphael.encoders.image import ClipScorer


def asked(encoder: Any, texts: list[str]) -> Condition:
    """Prompts as what the networks are told; of the empty one no token at all, as of a dropped caption."""
    ids = encoder.tokenize(texts)
    said = torch.tensor([bool(text) for text in texts])
    return of_ids(ids, encoder.mask_of(ids) & said[:, None])


class GlidePipeline(CascadePipeline):
    system = "glide"
    inpainter: Captioned | None = None  # the base that sees mask and picture, where it was trained

    @classmethod
    def load(cls, folder: Path, weights: str) -> GlidePipeline:
        _, meta = read_checkpoint(folder, [])
        settings = load(GlideSettings, {name: meta[name] for name in (BASE, UPSAMPLER)}, str(folder / "meta.json"))

        def read(part: str, own: Any, **more: Any) -> Captioned:
            network = Captioned(replace(own.unet, **more), own.text, PlainBlock)
            groups, _ = read_checkpoint(folder / part, [weights])
            load_weights(network, groups[weights], folder / part)
            return network

        large = read(UPSAMPLER, settings.upsampler)
        noise = noise_of(settings.upsampler.diffusion), prediction_of(settings.upsampler.diffusion)
        upsampler, text = (
            Upsampler(large, *noise, settings.upsampler.factor),
            load_text_encoder(folder / "text_encoder"),
        )
        pipeline = cls(read(FINETUNE, settings.base), settings.base.diffusion, upsampler, text, meta)
        if INPAINT in meta["parts"]:
            pipeline.inpainter = read(INPAINT, settings.base, **SEEING).eval()
        return pipeline

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        more = () if self.inpainter is None else (self.inpainter,)
        return (*super().modules, *more)

    def painting(self) -> GlidePipeline:
        if self.inpainter is None:
            return self
        seeing = copy.copy(self)
        seeing.unet = self.inpainter
        return seeing

    def encode(self, texts: list[str]) -> Condition:
        return asked(self.text_encoder, texts).to(self.device)

    @functools.cached_property
    def text_space(self) -> str:
        return f"texts {weights_hash(self.text_encoder)[:12]}"

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        return self.text_encoder.encode(self.text_encoder.tokenize(texts).to(self.device)).pooled

    def scorer(self) -> ClipScorer:
        from raphael.encoders.image import load_clip

        if self.source is None:
            return super().scorer()
        return load_clip(self.source.folder / "text_encoder").to(self.device)


PIPELINE = GlidePipeline
