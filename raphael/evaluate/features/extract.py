"""The feature space of the Frechet distance, and its honest name: `fid` only from the published Inception weights."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raphael.base.stage import StageError, file_sha256

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

BATCH = 50
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # the name ends in the start of the content's sha256
INCEPTION_SHA256 = "6726825d"
INCEPTION_FROM = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


@dataclass(frozen=True)
class FeatureSpace:
    """name: "fid" for Inception, else "fd_<features>". embed: uint8 (B, H, W, 3) -> (B, D).

    network: a sha256 of the weights; "": not asked for.
    """

    name: str
    embed: Callable[[np.ndarray], np.ndarray]
    network: str = ""

    def metric(self, n: int) -> str:
        """Distances of different n are not comparable, so n is in the name."""
        return f"{self.name}_{n}"

    def rows(self, images: Iterable[np.ndarray], tick: Callable[[int], None] = lambda n: None) -> np.ndarray:
        """Features of images, (n, D) float32, in batches of BATCH. Raises ValueError where there are none."""
        rows = []
        for batch in batches(images):
            rows.append(np.asarray(self.embed(batch), np.float32))
            tick(len(batch))
        if not rows:
            raise ValueError("got no images, expected at least 2 for a distance")
        return np.concatenate(rows)


def inception_space(
    weights: str, key: str = "evaluate.fid_inception_weights", device: torch.device | str = "cpu"
) -> FeatureSpace:
    """torch-fidelity's Inception, from a weights file, on a device, in float32 without TF32.

    key: what the messages call the setting. Its name is "fid" only where the file is the published one, else
    "fd_inception_<hash>". Raises StageError where it is absent or another file.
    """
    import torch

    from raphael.base.precision import without_tf32

    if not Path(weights).is_file():
        instead = ', or "" for the Frechet distance of the CLIP' if "." in key else ""
        raise StageError(
            f"{key}: {weights}: no such file; expected torch-fidelity's {INCEPTION_FILE}: where there is a network, "
            f"fetch {INCEPTION_FROM} and put it there{instead}"
        )
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        torch.load(
            weights, map_location="cpu", weights_only=True
        )  # torch-fidelity's own load would run a pickle's code
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    except (RuntimeError, KeyError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise StageError(f"{key}: {weights}: not torch-fidelity's weights ({_short(error)})") from None
    device = torch.device(device)
    # on a processor convolutions take two thirds of the time with channels last, which is how the pixels come
    network.to(device, memory_format=torch.channels_last if device.type == "cpu" else torch.contiguous_format)

    @torch.inference_mode()
    def embed(images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(device)
        if device.type != "cpu":
            pixels = pixels.contiguous()
        with without_tf32():
            return network(pixels)[0].cpu().numpy()

    sha256 = file_sha256(weights)
    name = "fid" if sha256.startswith(INCEPTION_SHA256) else f"fd_inception_{sha256[:8]}"
    return FeatureSpace(name, embed, sha256)


def embeds(embed: Callable[[Any], Tensor]) -> Callable[[Any], np.ndarray]:
    """A CLIP's embed_images or embed_texts, in float32 without TF32, its vectors brought here."""
    from raphael.base.precision import without_tf32

    def act(items: Any) -> np.ndarray:
        with without_tf32():
            return embed(items).cpu().numpy()

    return act


def network_sha256(network: nn.Module) -> str:
    """A hash of every parameter and buffer: the name, shape, type and bytes, in order of name."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def batches(images: Iterable[np.ndarray], size: int = BATCH) -> Iterator[np.ndarray]:
    """Stack images (H, W, 3) into batches (B, H, W, 3). Raises ValueError where sizes differ."""
    batch: list[np.ndarray] = []
    shape = None
    for image in images:
        shape = shape or image.shape
        if image.shape != shape:
            raise ValueError(f"got images of {shape} and {image.shape}, expected one size")
        batch.append(image)
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
