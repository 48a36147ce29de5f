"""Which arithmetic a matrix product runs in: fp32, bf16, or what the processor is fast at."""

from __future__ import annotations

import contextlib

import torch


def autocast(precision: str | None, device: str | torch.device) -> contextlib.AbstractContextManager:
    """`with autocast("auto", "cpu"):` precision is "fp32", "bf16" or "auto": bf16 where it is native.

    None: whatever the caller has entered stays, an autocast of his own included.
    """
    if precision is None:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=wants_bf16(precision, device))


def wants_bf16(precision: str, device: str | torch.device) -> bool:
    return precision == "bf16" or (precision == "auto" and native_bf16(torch.device(device).type))


def native_bf16(kind: str) -> bool:
    """Whether the device multiplies bfloat16 itself. What has no such instructions converts, slower than fp32."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return False
    # no public question exists for these (torch 2.15); one that goes away answers "no", which is only slower
    answers = (getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(answer() for answer in answers)


def without_tf32() -> contextlib.AbstractContextManager:
    """Inside, cuDNN's convolutions are true float32. torch lets them round their inputs to 10 bits, which is as much
    as what is stored in float16 keeps. (torch's matrix products are float32 unless somebody asked for less.)

    cudnn.flags() sets every flag, those that are not named to its own defaults: without `enabled` it turns cuDNN off.
    """
    cudnn = torch.backends.cudnn
    return cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    )
