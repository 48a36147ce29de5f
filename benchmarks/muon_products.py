"""Muon's five rounds of Newton-Schulz in bfloat16 and in float32, on this processor: which `native_bf16` should choose.

    python benchmarks/muon_products.py

Writes results/muon_products-<device>-<yyyymm>.json, unless --quick.
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import torch
from _machine import judged, keep

from raphael.base.precision import native_bf16
from raphael.train.optim import muon

SHAPES = ((4, 96, 864), (4, 96, 96), (2, 192, 1728))  # convolutions of 3 x 3 and matrices of the demos' networks


def seconds(matrices: torch.Tensor, bf16: bool, rounds: int) -> float:
    """Of processor time of one call, the median."""
    taken = []
    with mock.patch.object(muon, "native_bf16", lambda kind: bf16):
        muon.orthogonalised(matrices)
        for _ in range(rounds):
            began = time.process_time()
            muon.orthogonalised(matrices)
            taken.append(time.process_time() - began)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one call each; keeps nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, summary = [], []
    for shape in SHAPES:
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        half, whole = (seconds(matrices, bf16, 1 if arguments.quick else 5) for bf16 in (True, False))
        case = f"{shape[0]} matrices of {shape[1]} x {shape[2]}"
        rows.append({"case": case, "bfloat16_s": round(half, 6), "float32_s": round(whole, 6)})
        chosen, other = (half, whole) if native_bf16("cpu") else (whole, half)
        summary.append(judged(f"{case}, what is chosen beside the other", chosen, other, "s", "<= 1.0"))
        print(rows[-1])
    if not arguments.quick:
        keep("muon_products", rows, summary, native_bf16=native_bf16("cpu"))


if __name__ == "__main__":
    main()
