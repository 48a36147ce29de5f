"""RaphaelPipeline: a trained RAPHAEL from its folder, called with diffusers' argument names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from raphael.checkpoint import checkpoint_sha256, load_weights, read_checkpoint
from raphael.config import SamplerName, ThresholdKind
from raphael.diffusion.denoiser import TextCondition
from raphael.diffusion.schedule import Schedule
from raphael.encoders.autoencoder import load_autoencoder
from raphael.encoders.text import load_text_encoder
from raphael.net.unet import UNet
from raphael.preset import DiffusionConfig, UNetConfig
from raphael.sampling import Parts, PictureSeed, Sampling, decode_pictures, draw_latents
from raphael.stage import StageError
from raphael.strict import load

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image

    from raphael.generate.insight import Insight

WEIGHTS = "ema"  # the averaged weights are the model; "raw" is what the optimizer last held


@dataclass
class PipelineOutput:
    images: list[Image.Image] | np.ndarray  # output_type "pil", or "np": float32 (n, H, W, 3) in [0, 1]
    insight: Insight | None = field(default=None)  # attention maps, edge maps and routes; with collect=True


class RaphaelPipeline:
    """Draw with `pipeline("a red circle", num_inference_steps=30).images[0]`.

    sampler, threshold* and batch_size are attributes as a diffusers pipeline's scheduler is: how to draw, not what.
    """

    def __init__(
        self, unet: UNet, diffusion: DiffusionConfig, autoencoder: Any, text_encoder: Any, meta: dict[str, Any]
    ):
        self.unet = unet.eval()
        self.diffusion = diffusion
        self.schedule = Schedule(diffusion)
        self.autoencoder = autoencoder.eval()
        self.text_encoder = text_encoder.eval()
        self.meta = meta
        self.identity = ""
        self.sampler: SamplerName = "dpmpp_2m"
        self.threshold: ThresholdKind = "none"  # static, dynamic: for models of pixels (raphael/diffusion/guidance.py)
        self.threshold_percentile, self.threshold_bound = 99.5, 1.0
        self.batch_size = 50

    @classmethod
    def from_pretrained(cls, path: str | Path, weights: str = WEIGHTS) -> RaphaelPipeline:
        """Read a pipeline folder (models/raphael). Raises StageError: absent, broken, or of another shape."""
        folder = Path(path)
        if not folder.exists():  # of a file, a pickle too, read_checkpoint says what it is
            raise StageError(f"{path}: no such folder; expected a trained pipeline (run the stage train, or dvc pull)")
        groups, meta = read_checkpoint(folder, [weights])
        unet = UNet(load(UNetConfig, meta["unet"], str(folder / "meta.json"), "unet"))
        load_weights(unet, groups[weights], folder)
        pipeline = cls(
            unet,
            load(DiffusionConfig, meta["diffusion"], str(folder / "meta.json"), "diffusion"),
            load_autoencoder(folder / "autoencoder"),
            load_text_encoder(folder / "text_encoder"),
            meta,
        )
        pipeline.identity = checkpoint_sha256(folder)[:16]
        return pipeline

    def to(self, device: torch.device | str) -> RaphaelPipeline:
        for module in (self.unet, self.autoencoder, self.text_encoder):
            module.to(device)
        return self

    # diffusers' names are the contract here, so this is the one place with more than eight arguments
    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        *,
        eta: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        collect: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> PipelineOutput:
        """Draw num_images_per_prompt pictures for every prompt; those of one prompt lie side by side in `.images`.

        Picture i depends on (seed, i) and its prompt, not on the others. generator: as in diffusers; only its initial
        seed is used, a list gives every picture a seed of its own. height, width: pixels, default the first size that
        was trained at (meta["picture"]).
        guidance_scale: 1 is off. guidance_interval: where it acts, shares of the timesteps, 0 the cleanest. eta: of the
        sampler ddim, 0 to 1. collect: also attention maps, edge maps and routes (`.insight`). An empty prompt draws the
        unconditional picture; one longer than the context is cut, its closing token kept.
        progress: called with the number of pictures just finished. Raises ValueError for what does not fit.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        settings = Sampling(
            self.sampler,
            num_inference_steps,
            guidance_scale,
            eta=eta,
            guidance_interval=guidance_interval,
            threshold=self.threshold,
            threshold_percentile=self.threshold_percentile,
            threshold_bound=self.threshold_bound,
        )
        if output_type not in ("pil", "np"):
            raise ValueError(f"output_type: got {output_type!r}, expected pil or np")
        if not prompts:
            raise ValueError("prompt: got nothing to draw, expected a text or a list of texts")
        parts, seeds = self.parts(height, width), picture_seeds(seed, generator, len(prompts))
        latents, pictures = [], []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            latents.append(draw_latents(parts, prompts[part], seeds[part], settings, negative_prompt or ""))
            pictures.append(decode_pictures(parts, latents[-1]))
            if progress:
                progress(len(prompts[part]))
        insight = None
        if collect:
            from raphael.generate.insight import look_inside

            insight = look_inside(parts, self.text_encoder, prompts, torch.cat(latents), seeds)
        return PipelineOutput(_as(output_type, np.concatenate(pictures)), insight)

    def parts(self, height: int | None = None, width: int | None = None) -> Parts:
        """What drawing needs, for pictures of that size in pixels. Raises ValueError for one that does not fit."""
        first_height, first_width = drawn_size(self.meta["picture"])
        height, width = height or first_height, width or first_width
        downsampling = self.autoencoder.downsampling
        multiple = downsampling * 2 ** (len(self.unet.config.channels) - 1)
        if height < multiple or width < multiple or height % multiple or width % multiple:
            raise ValueError(
                f"got a picture of {height} x {width} px, expected multiples of {multiple} (height, width)"
            )
        shape = (self.unet.config.latent_channels, height // downsampling, width // downsampling)
        return Parts(self.unet, self.schedule, self.diffusion.prediction, self.encode, self.autoencoder.decode, shape)

    def encode(self, texts: list[str]) -> TextCondition:
        """What the network reads of the texts."""
        device = next(self.unet.parameters()).device
        encoding = self.text_encoder.encode(self.text_encoder.tokenize(texts).to(device))
        return TextCondition(encoding.context, encoding.mask)


def drawn_size(picture: dict[str, Any]) -> tuple[int, int]:
    """(height, width) in px of pictures drawn without asking for a size: the first that the model was trained at.

    picture: of a pipeline's meta.json. Those of models with one size only may name it by height_px and width_px.
    """
    height, width = picture["sizes_px"][0] if "sizes_px" in picture else (picture["height_px"], picture["width_px"])
    return height, width


def picture_seeds(seed: int, generator: Any, count: int) -> list[PictureSeed]:
    """One (seed, index) per picture; a list of generators gives (its seed, 0) to each."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != count:
            raise ValueError(f"generator: got {len(generator)}, expected one for each of {count} pictures")
        return [(item.initial_seed(), 0) for item in generator]
    start = seed if generator is None else generator.initial_seed()
    return [(start, index) for index in range(count)]


def _as(output_type: str, pictures: np.ndarray) -> list[Image.Image] | np.ndarray:
    if output_type == "np":
        return pictures.astype(np.float32) / 255
    from PIL import Image

    return [Image.fromarray(picture) for picture in pictures]
