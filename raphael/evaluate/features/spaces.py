"""Feature networks by what a user writes: "inception:FILE", "taesd:FOLDER", "random", any CLIP (encoders/image.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raphael.base.stage import StageError
from raphael.evaluate.features.extract import FeatureSpace, embeds, inception_space, network_sha256

if TYPE_CHECKING:
    import torch

RANDOM = "random"  # without weights: raphael/evaluate/features/random_net.py
CMMD_SIDE_PX, CMMD_DIM = 336, 768  # of CLIP ViT-L/14-336, the network that defines CMMD


@dataclass(frozen=True)
class Network(FeatureSpace):
    """A feature space that also knows its kind, and, for a CLIP, how to embed texts (list -> (B, D), unit norm)."""

    kind: str = ""
    embed_texts: Callable[[list[str]], np.ndarray] | None = None
    defines_cmmd: bool = False

    def name_of(self, metric: str) -> str:
        """The metric's name with the network in it where it is not the one that the name stands for."""
        if metric == "frechet":
            return self.name
        standard = self.defines_cmmd if metric == "cmmd" else self.name == "fid"
        return metric if standard else f"{metric}_{self.name.removeprefix('fd_')}"


def open_network(spec: str, key: str = "--features", device: torch.device | str = "cpu") -> Network:
    """On a device. Raises StageError, one line, for weights that are absent or do not fit; key: how the message calls
    the option."""
    kind, _, rest = spec.partition(":")
    if kind == "inception":
        space = inception_space(rest, key, device)
        return Network(space.name, space.embed, space.network, "inception")
    if kind == "taesd":
        return _taesd(rest, key, device)
    if spec == RANDOM:
        return _random(device)
    return _clip(spec, key, device)


def _clip(spec: str, key: str, device: torch.device | str) -> Network:
    from raphael.encoders.image import load_clip

    try:
        scorer = load_clip(spec)
    except StageError as error:
        raise StageError(f"{key}: {error}; or inception:FILE, taesd:FOLDER, random") from None
    scorer.to(device)
    sha256 = network_sha256(scorer.model)
    name = scorer.name if scorer.name != "own" else sha256[:8]
    is_l14_336 = scorer.image_size_px == CMMD_SIDE_PX and _width(scorer) == CMMD_DIM
    return Network(
        f"fd_clip_{_plain(name)}", embeds(scorer.embed_images), sha256, "clip", embeds(scorer.embed_texts), is_l14_336
    )


def _width(scorer: Any) -> int:
    return int(scorer.embed_texts(["a"]).shape[1])


def _taesd(folder: str, key: str, device: torch.device | str) -> Network:
    """Mean and deviation of each latent channel of TAEF2's encoder: features without semantics, for trying things."""
    import torch

    from raphael.base.precision import without_tf32
    from raphael.encoders.taesd import load_tiny

    try:
        network = load_tiny(folder).eval().to(device)
    except ValueError as error:
        raise StageError(f"{key}: {error}") from None

    @torch.inference_mode()
    def embed(images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255
        with without_tf32():
            latents = network.encode(pixels).flatten(2)
        return torch.cat([latents.mean(2), latents.std(2)], dim=1).cpu().numpy()

    return Network("fd_taesd", embed, network_sha256(network), "taesd")


def _random(device: torch.device | str) -> Network:
    import torch

    from raphael.base.precision import without_tf32
    from raphael.evaluate.features.random_net import DIM, RandomNet

    network = RandomNet().to(device)

    def embed(images: np.ndarray) -> np.ndarray:
        with without_tf32():
            return network(torch.from_numpy(np.ascontiguousarray(images))).cpu().numpy()

    return Network(f"fd_random{DIM}", embed, network_sha256(network), "random")


def _plain(name: str) -> str:
    """A name that can stand in a metric's: letters, digits, dash, underscore."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name.lower())
