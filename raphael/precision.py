"""Which arithmetic a matrix product runs in: fp32, bf16, or what the processor is fast at."""

from __future__ import annotations

import torch


def autocast(precision: str, device: str | torch.device) -> torch.autocast:
    """`with autocast("auto", "cpu"):` precision is "fp32", "bf16" or "auto": bf16 where it is native."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=wants_bf16(precision, device))


def wants_bf16(precision: str, device: str | torch.device) -> bool:
    return precision == "bf16" or (precision == "auto" and native_bf16(torch.device(device).type))


def native_bf16(kind: str) -> bool:
    """Whether the device multiplies bfloat16 itself. A CPU without such instructions converts, slower than fp32."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported()
    if kind != "cpu":
        return False
    # no public question exists for these (torch 2.15); one that goes away answers "no", which is only slower
    answers = (getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(answer() for answer in answers)
