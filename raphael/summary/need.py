"""What a training will need, before it starts: memory by arithmetic, time by a few passes of the real network.

Memory is that of this project's loop: fp32 weights under autocast, gradients, the optimizer's moments, EMA, frozen
encoders, and what the backward pass keeps, which is counted tensor by tensor on the meta device.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from raphael.net.condition import Condition
from raphael.net.moe.unet import RaphaelUNet
from raphael.summary.model import num_parameters, unet_flops

if TYPE_CHECKING:
    from raphael.base.config.preset import Preset

# bytes of state a trained parameter: muon's matrices have one moment, adafactor's rows and columns next to nothing
MOMENTS = {"adamw": 8, "muon": 4, "adafactor": 0}
AUTOCAST = 0.6  # of the fp32 bytes that are kept, under bf16: norms, softmaxes and routes stay in fp32
RECOMPUTED = 0.35  # of what is kept, where blocks are computed again: their inputs, and one block at a time
PROCESS_BYTES = {"cpu": 700 << 20, "cuda": 900 << 20}  # of Python and torch; of a CUDA context
OVERHEAD = 1.2  # of a step over the network's own passes: text, optimizer, EMA
TIMED_FLOPS, GUESSED_FLOPS_PER_S = 5e11, 3e10  # a forward that costs more is not timed on a CPU; what a core does


@dataclass(frozen=True)
class Setup:
    """What of the settings decides the need. trained: parameters; emas: that lie on the device."""

    images: int  # in one pass
    trained: int
    optimizer: str
    emas: int
    bf16: bool
    recompute: bool


@dataclass(frozen=True)
class Model:
    """A network at a size (height, width): its parameters, those of the frozen encoders, bytes kept for the backward
    pass of one image (fp32)."""

    preset: Preset
    size_px: tuple[int, int]
    parameters: int
    frozen: int
    kept: int


def measured(preset: Preset, size_px: tuple[int, int], frozen: int) -> Model:
    """frozen: parameters of text encoder and autoencoder."""
    with torch.device("meta"):
        unet = RaphaelUNet(preset.unet).train()
    return Model(preset, size_px, num_parameters(unet), frozen, kept_bytes(unet, preset, size_px))


def kept_bytes(unet: RaphaelUNet, preset: Preset, size_px: tuple[int, int]) -> int:
    """What autograd keeps of one image's forward, without the weights: every storage once."""
    weights = {tensor.untyped_storage()._cdata for tensor in [*unet.parameters(), *unet.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in weights:
            kept[storage] = tensor  # held, so that no other storage gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = unet(*inputs(preset, size_px, 1, next(unet.parameters()).device))
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def inputs(preset: Preset, size_px: tuple[int, int], images: int, device: Any) -> tuple[Any, Any, Condition]:
    factor = 2 ** (len(preset.vae.channels) - 1)
    config = preset.unet
    latent = torch.randn(images, config.latent_channels, *(side // factor for side in size_px), device=device)
    timesteps = torch.full((images,), 500.0, device=device)
    tokens = torch.randn(images, config.context_length, config.context_dim, device=device)
    return latent, timesteps, Condition(tokens)


def memory_bytes(model: Model, setup: Setup, device: str) -> dict[str, int]:
    """Bytes by purpose."""
    kept = model.kept * setup.images * (AUTOCAST if setup.bf16 else 1.0) * (RECOMPUTED if setup.recompute else 1.0)
    return {
        "weights": 4 * model.parameters,
        "gradients": 4 * setup.trained,
        f"moments of {setup.optimizer}": MOMENTS[setup.optimizer] * setup.trained,
        "EMA weights": 4 * setup.trained * setup.emas,
        "text encoder and autoencoder": 4 * model.frozen,
        "kept for the backward pass": int(kept),
        "process": PROCESS_BYTES["cpu" if device == "cpu" else "cuda"],
    }


def device_bytes(device: torch.device) -> int:
    """Of the GPU; of this machine's memory, what is free, or this container's limit."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    available = psutil.virtual_memory().available
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = file.read().strip()
        return min(available, int(limit)) if limit.isdigit() else available
    except OSError:
        return available


def seconds_per_image(model: Model, images: int, device: torch.device) -> tuple[float, float]:
    """(of a training step, of one forward) in seconds an image, timed here; guessed from the FLOPs where timing them
    would take long."""
    flops = unet_flops(model.preset, model.size_px)
    if device.type == "cpu" and flops > TIMED_FLOPS:
        forward = flops / (GUESSED_FLOPS_PER_S * (os.cpu_count() or 1))
        return 3 * forward * OVERHEAD, forward
    with torch.random.fork_rng(devices=[]):
        unet = RaphaelUNet(model.preset.unet).to(device)
        given = inputs(model.preset, model.size_px, images, device)

    def pass_s(train: bool) -> float:
        began_s = time.monotonic()
        with torch.set_grad_enabled(train), torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
            out = unet.train(train)(*given).prediction
            if train:
                out.float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.monotonic() - began_s) / images

    pass_s(True)  # the first one allocates
    return pass_s(True) * OVERHEAD, pass_s(False)
