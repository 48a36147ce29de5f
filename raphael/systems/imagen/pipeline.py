"""A trained Imagen: prompts by its frozen T5, small images by the base, large ones by the upsampler."""

from __future__ import annotations

from pathlib import Path

from raphael.base.checkpoint.folder import load_weights, read_checkpoint
from raphael.base.strict import load
from raphael.diffusion.cascade import Upsampler
from raphael.diffusion.noise import noise_of
from raphael.diffusion.prediction import prediction_of
from raphael.encoders.text import load_text_encoder
from raphael.net.efficient.unet import EfficientUNet
from raphael.net.plain import PlainBlock
from raphael.net.unet import UNet
from raphael.systems.cascade import CascadePipeline
from raphael.systems.imagen.system import BASE, UPSAMPLER, ImagenSettings


class ImagenPipeline(CascadePipeline):
    system = "imagen"

    @classmethod
    def load(cls, folder: Path, weights: str) -> ImagenPipeline:
        _, meta = read_checkpoint(folder, [])
        own = {name: meta[name] for name in (BASE, UPSAMPLER)}
        settings = load(ImagenSettings, own, str(folder / "meta.json"))
        base, large = UNet(settings.base.unet, PlainBlock), EfficientUNet(settings.upsampler.unet, PlainBlock)
        for name, network in ((BASE, base), (UPSAMPLER, large)):
            groups, _ = read_checkpoint(folder / name, [weights])
            load_weights(network, groups[weights], folder / name)
        noise = noise_of(settings.upsampler.diffusion), prediction_of(settings.upsampler.diffusion)
        upsampler = Upsampler(large, *noise, settings.upsampler.factor)
        text = load_text_encoder(folder / "text_encoder")
        return cls(base, settings.base.diffusion, upsampler, text, meta)


PIPELINE = ImagenPipeline
