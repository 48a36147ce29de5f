"""The type of a network's weights in memory and in what is exported: float32, or bfloat16 for its matrices."""

from __future__ import annotations

from typing import Any

import torch

KEPT_WHOLE = (".gate.", "text_layers.")  # of a network in bfloat16 stays float32


def is_halved(name: str, tensor: torch.Tensor) -> bool:
    """Whether a weight of the network may be bfloat16, stored or in memory: its matrices and kernels.

    Not the gates and what reads the text for them: a route is a choice, which a rounding turns over. Not vectors
    (norms, biases): they are few, and small errors of them add up over a whole image.
    """
    return tensor.is_floating_point() and tensor.ndim > 1 and not any(part in name for part in KEPT_WHOLE)


def expect_type(dtype: Any) -> None:
    """Raises ValueError for what a network cannot be held in."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"torch_dtype: got {dtype}, expected torch.float32 or torch.bfloat16")


def cast(pipeline: Any, dtype: Any) -> None:
    """A pipeline's network to that type. Raises ValueError."""
    expect_type(dtype)
    if dtype == torch.bfloat16:
        halve(pipeline.unet)
        pipeline.precision = "bf16"
        return
    if pipeline.dtype == torch.bfloat16:
        pipeline.precision = None
    pipeline.unet.float()


def halve(unet: torch.nn.Module) -> None:
    for name, parameter in unet.named_parameters():
        if is_halved(name, parameter):
            parameter.data = parameter.data.bfloat16()
