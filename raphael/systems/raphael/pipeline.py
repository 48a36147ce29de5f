"""A trained RAPHAEL: prompts by a frozen text encoder, latents by a frozen autoencoder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raphael.base.checkpoint.folder import load_weights, read_checkpoint
from raphael.base.checkpoint.parts import weights_hash
from raphael.base.config.preset import DiffusionConfig, RaphaelUNetConfig
from raphael.base.config.sampling import Sampling
from raphael.base.strict import load
from raphael.diffusion.sampling import ImageSeed, Parts
from raphael.encoders.autoencoder import load_autoencoder
from raphael.encoders.text import load_text_encoder
from raphael.encoders.weighted import encode_prompts, parse_weights
from raphael.net.condition import Condition
from raphael.net.moe.mixtures import SpaceMoE
from raphael.net.moe.unet import RaphaelUNet
from raphael.systems.pipeline import Pipeline

if TYPE_CHECKING:
    from raphael.encoders.image import ClipScorer
    from raphael.summary.inside import Inside
    from raphael.summary.insight import Insight


class RaphaelPipeline(Pipeline):
    def __init__(
        self, unet: RaphaelUNet, diffusion: DiffusionConfig, autoencoder: Any, text_encoder: Any, meta: dict[str, Any]
    ):
        super().__init__(unet, diffusion, meta)
        self.autoencoder = autoencoder.eval()
        self.text_encoder = text_encoder.eval()

    @classmethod
    def load(cls, folder: Path, weights: str) -> RaphaelPipeline:
        groups, meta = read_checkpoint(folder, [weights])
        unet = RaphaelUNet(load(RaphaelUNetConfig, meta["unet"], str(folder / "meta.json"), "unet"))
        load_weights(unet, groups[weights], folder)
        return cls(
            unet,
            load(DiffusionConfig, meta["diffusion"], str(folder / "meta.json"), "diffusion"),
            load_autoencoder(folder / "autoencoder"),
            load_text_encoder(folder / "text_encoder"),
            meta,
        )

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        return self.unet, self.autoencoder, self.text_encoder

    @property
    def components(self) -> dict[str, Any]:
        return {**super().components, "autoencoder": self.autoencoder, "text_encoder": self.text_encoder}

    @property
    def downsampling(self) -> int:
        return self.autoencoder.downsampling

    @property
    def latent_scale(self) -> tuple[float, float]:
        return self.autoencoder.scaling_factor, self.autoencoder.shift

    @functools.cached_property
    def space(self) -> str:
        if self.autoencoder.is_pixels:
            return super().space
        factor, shift = self.latent_scale
        return f"latents {weights_hash(self.autoencoder)[:12]} of factor {factor:.6g}, shift {shift:.6g}"

    @functools.cached_property
    def text_space(self) -> str:
        return f"texts {weights_hash(self.text_encoder)[:12]}"

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        plain = ["".join(part for part, _ in parse_weights(text)) for text in texts]  # a guide knows no weights
        return self.text_encoder.encode(self.text_encoder.tokenize(plain).to(self.device)).pooled

    def encode(self, texts: list[str]) -> Condition:
        encoding = self.text_encoder.encode(self.text_encoder.tokenize(texts).to(self.device))
        return Condition(encoding.context, encoding.mask)

    def reader(self, how: Sampling, weighted: bool = True) -> Callable[[list[str]], Condition]:
        def read(texts: list[str]) -> Condition:
            chunks = how.long_prompts == "chunks"
            encoding = encode_prompts(self.text_encoder, texts, self.device, weighted=weighted, chunks=chunks)
            return Condition(encoding.context, encoding.mask)

        return read

    def scorer(self) -> ClipScorer:
        from raphael.encoders.image import load_clip

        if self.source is None:
            return super().scorer()
        return load_clip(self.source.folder / "text_encoder").to(self.device)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.autoencoder.decode(latents)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        return self.autoencoder.latents_from_moments(self.autoencoder.encode_moments(images))

    def turn(self, knob: str, value: float) -> None:
        """alpha of every Space-MoE (raphael/base/config/studied.py); its weights stay those of another alpha."""
        assert knob == "mask_threshold", knob
        for module in self.unet.modules():
            if isinstance(module, SpaceMoE):
                module.mask_threshold = value

    def look_inside(self, parts: Parts, prompts: list[str], latents: torch.Tensor, seeds: list[ImageSeed]) -> Insight:
        """Attention maps, edge maps and routes."""
        from raphael.summary.insight import look_inside

        return look_inside(parts, self.text_encoder, prompts, latents, seeds)

    def inspect(
        self, prompt: str, seed: int = 0, sampling: Sampling | None = None, negative_prompt: str = ""
    ) -> Inside:
        from raphael.summary.inside import inspect

        how = sampling or self.defaults
        parts = self.parts(encode=self.reader(replace(how, long_prompts="cut"), weighted=False))
        return inspect(parts, self.text_encoder, prompt, (seed, 0), how, negative_prompt)


PIPELINE = RaphaelPipeline
