"""Images <-> latents: diffusers' AutoencoderKL (trained here or pretrained), TAEF2, or none (pixels), behind one class.

The posterior's raw moments are what is stored; scaling is `(z - shift) * scaling_factor`
(raphael/net/latents.py), measured on the corpus so that latents have a standard deviation of 1, and kept in the
saved config, never as a constant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raphael.base.config.params import PIXEL_AUTOENCODER, AutoencoderConfig
from raphael.base.stage import read_json, write_json
from raphael.encoders import pretrained, taesd
from raphael.encoders.light.kl import KlNetwork, load_kl
from raphael.encoders.pixels import PixelNetwork
from raphael.encoders.pretrained import CONFIG, PretrainedError, follow, one_line
from raphael.net.latents import DETERMINISTIC_LOG_VARIANCE, sample_latents

if TYPE_CHECKING:
    import numpy as np

KL_FILES = "config.json and diffusion_pytorch_model.safetensors"
INITIAL_LOG_VARIANCE = -7.0


class Autoencoder(nn.Module):
    """An image autoencoder with a diagonal Gaussian posterior.

    latent_channels C; downsampling f (H = f h); scaling_factor, shift: floats, see `measure_scaling`.
    scaling_known: whether they belong to these weights, or still have to be measured.
    """

    def __init__(self, network: nn.Module, scaling_factor: float | None = None, shift: float = 0.0):
        super().__init__()
        self.network = network
        self.tiny = isinstance(network, taesd.TinyNetwork)
        self.is_pixels = isinstance(network, PixelNetwork)
        self.kind = "taef2" if self.tiny else PIXEL_AUTOENCODER if self.is_pixels else "kl"
        if self.kind != "kl":
            self.latent_channels, self.downsampling = network.latent_channels, network.downsampling
        else:
            self.latent_channels = int(network.config.latent_channels)
            self.downsampling = 2 ** (len(network.config.block_out_channels) - 1)
        self.set_scaling(1.0 if scaling_factor is None else scaling_factor, shift)
        self.scaling_known = scaling_factor is not None or self.is_pixels

    @property
    def device(self) -> torch.device:
        return next(itertools.chain(self.parameters(), self.buffers())).device

    def set_scaling(self, scaling_factor: float, shift: float) -> None:
        if not (math.isfinite(scaling_factor) and scaling_factor > 0 and math.isfinite(shift)):
            got = f"factor {scaling_factor} and shift {shift}"
            raise ValueError(f"scaling: got {got}, expected finite numbers, the factor above 0")
        self.scaling_factor, self.shift, self.scaling_known = float(scaling_factor), float(shift), True

    def encode_moments(self, images: Tensor) -> Tensor:
        """images (B,3,H,W) in [-1,1], sides multiples of `downsampling` -> (B,2C,h,w): raw mean and log-variance."""
        if images.ndim != 4 or images.shape[1] != 3 or any(side % self.downsampling for side in images.shape[2:]):
            expected = f"(B, 3, H, W), sides multiples of {self.downsampling}"
            raise ValueError(f"images: got {tuple(images.shape)}, expected {expected}")
        if self.kind != "kl":
            mean = images if self.is_pixels else self.network.encode(images * 0.5 + 0.5)
            return torch.cat([mean, torch.full_like(mean, DETERMINISTIC_LOG_VARIANCE)], dim=1)
        return self.network.encode(images).latent_dist.parameters

    def latents_from_moments(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B,2C,h,w) -> scaled latents (B,C,h,w); noise: standard normal, None for the posterior's mean."""
        return sample_latents(moments, self.scaling_factor, self.shift, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B,C,h,w) -> images (B,3,H,W), clamped to [-1,1]."""
        return self.decode_raw(latents / self.scaling_factor + self.shift).clamp(-1, 1)

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Unscaled latents -> images, not clamped: what the training's loss sees."""
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents: got {tuple(latents.shape)}, expected (B, {self.latent_channels}, h, w)")
        if self.is_pixels:
            return self.network.decode(latents)
        if self.tiny:
            return self.network.decode(latents) * 2 - 1
        return self.network.decode(latents).sample

    @property
    def last_layer(self) -> Tensor:
        """The weight of the decoder's last convolution, by which its losses are balanced."""
        if self.kind != "kl":
            raise ValueError(f"last_layer: got {self.kind}, expected an AutoencoderKL: no other is trained here")
        return self.network.decoder.conv_out.weight

    def facts(self) -> dict[str, Any]:
        """What the records and the reports say of this autoencoder."""
        return {
            "kind": self.kind,
            "latent_channels": self.latent_channels,
            "downsampling": self.downsampling,
            "scaling_factor": self.scaling_factor,
            "shift": self.shift,
        }

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load_autoencoder` reads; a KL one is diffusers' own. Equal weights give equal bytes."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.is_pixels:
            write_json(folder / CONFIG, {"kind": PIXEL_AUTOENCODER})
            return
        if self.tiny:
            taesd.save_tiny(self.network, folder)
            write_json(folder / CONFIG, {"kind": "taef2", "scaling_factor": self.scaling_factor, "shift": self.shift})
            return
        network = self.network.to_diffusers() if isinstance(self.network, KlNetwork) else self.network
        network.register_to_config(scaling_factor=self.scaling_factor, shift_factor=self.shift)
        network.save_pretrained(folder, safe_serialization=True)
        config = read_json(folder / CONFIG)
        config.pop("_name_or_path", None)  # where it once was says nothing, and would make equal folders differ
        write_json(folder / CONFIG, config)


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """A KL autoencoder to train: random (torch's global generator) but for `start_linear`; convolutions only."""
    from diffusers import AutoencoderKL

    from raphael.encoders.linear_start import start_linear

    levels = len(config.channels)
    network = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        force_upcast=False,
        mid_block_add_attention=False,
    )
    start_linear(network)
    with torch.no_grad():  # nearly deterministic at first: at a deviation of 1 the noise drowns hundreds of steps
        network.quant_conv.weight[config.latent_channels :].mul_(0.1)
        network.quant_conv.bias[config.latent_channels :].fill_(INITIAL_LOG_VARIANCE)
    return Autoencoder(network)


def load_autoencoder(folder_or_id: str | Path) -> Autoencoder:
    """In evaluation mode, on the CPU, in float32. Raises PretrainedError, one line.

    folder_or_id: a folder written by `save` or `pretrained.write_pointer`, a diffusers folder, a folder with TAEF2's
    two files, a hub id of an AutoencoderKL, or "pixels".
    """
    spec = follow(folder_or_id)
    if spec == PIXEL_AUTOENCODER or _own_config(spec).get("kind") == PIXEL_AUTOENCODER:
        return Autoencoder(PixelNetwork()).eval()
    known = {**_own_config(spec), **pretrained.pointed_facts(folder_or_id)}
    if (Path(spec).expanduser() / taesd.ENCODER_FILE).is_file():
        try:
            network: nn.Module = taesd.load_tiny(Path(spec).expanduser())
        except ValueError as error:
            raise PretrainedError(f"the autoencoder: {error}") from None
        scaling, shift = known.get("scaling_factor"), known.get("shift", 0.0)
    else:
        network = _load_kl(spec)
        scaling = known.get("scaling_factor", network.config.scaling_factor)
        shift = known.get("shift", network.config.shift_factor) or 0.0
    return Autoencoder(network, scaling, shift).eval().requires_grad_(False)


def _load_kl(spec: str) -> nn.Module:
    local = Path(spec).expanduser()
    name, revision = pretrained.split_revision(spec)
    with one_line("the autoencoder", name, KL_FILES):
        if local.is_dir():
            kind = read_json(local / CONFIG).get("_class_name") if (local / CONFIG).is_file() else None
            if kind != "AutoencoderKL":
                raise PretrainedError(
                    f"the autoencoder: {spec}: got config.json of {kind or 'nothing'}, expected AutoencoderKL's "
                    f"({KL_FILES}), or {taesd.ENCODER_FILE} and {taesd.DECODER_FILE}"
                )
            if (light := load_kl(local)) is not None:
                return light
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_pretrained(
            str(local) if local.is_dir() else name,
            revision=revision,
            local_files_only=local.is_dir(),
            use_safetensors=True,  # a pickle can run code when it is read
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,  # the other way wants accelerate, and says so at length
        )


def _own_config(spec: str) -> dict[str, Any]:
    path = Path(spec).expanduser() / CONFIG
    config = read_json(path) if path.is_file() else {}
    return config if config.get("kind") in ("taef2", PIXEL_AUTOENCODER) else {}


ENCODED_AT_ONCE = 32


@torch.inference_mode()
def encode_images(autoencoder: Autoencoder, images: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Images uint8 (M, H, W, 3) -> scaled latents (M, C, h, w), the posterior's means, where the autoencoder is.

    size: (height, width) in px that they are scaled and cropped to.
    """
    import numpy as np
    from PIL import Image

    from raphael.base.images.fit import fit

    device = autoencoder.device
    if images.shape[1:3] != tuple(size):
        images = np.stack([fit(Image.fromarray(image), *size, autoencoder.is_pixels) for image in images])
    found = []
    for first in range(0, len(images), ENCODED_AT_ONCE):
        part = torch.from_numpy(images[first : first + ENCODED_AT_ONCE]).to(device).permute(0, 3, 1, 2)
        found.append(autoencoder.latents_from_moments(autoencoder.encode_moments(part.float() / 127.5 - 1)).float())
    return torch.cat(found)


@torch.no_grad()
def measure_scaling(moments: Iterable[Tensor]) -> tuple[float, float]:
    """(scaling_factor, shift) under which latents drawn from these posteriors have mean 0 and standard deviation 1.

    moments: batches (B,2C,h,w). Over all channels and places (Rombach et al. 2022, appendix G, there over one
    batch); the posterior's own variance counts. Sums in float64.
    """
    count, total, squares = 0, 0.0, 0.0
    for batch in moments:
        mean, log_variance = batch.double().chunk(2, dim=1)
        count += mean.numel()
        total += float(mean.sum())
        squares += float((mean.square() + log_variance.clamp(-30, 20).exp()).sum())
    if not count:
        raise ValueError("got no moments, expected at least one batch to measure the scaling on")
    shift = total / count
    return 1.0 / math.sqrt(max(squares / count - shift**2, 1e-12)), shift


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,). Both (B,3,H,W) in [-1,1], so the peak is 2."""
    error = (images - reconstructions.clamp(-1, 1)).double().square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4.0 / error.clamp(min=1e-12))
