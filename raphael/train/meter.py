"""How fast a training goes and what it takes: numbers that depend on the machine, so no part of its history.

MFU, the share of the device's dense bf16 peak that useful work makes (PaLM, arXiv 2204.02311, appendix B): the
floating-point operations of one training image, counted and not measured (recomputed blocks count once), times images
per second.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

import torch

from raphael.train.distributed.world import World

# TFLOP/s, dense bf16, from NVIDIA's data sheets (SXM). A PCIe or NVL card of Hopper is slower: better no MFU than a
# wrong one.
PEAKS = {"A100": 312.0, "H100": 989.0, "H200": 989.0}
SLOWER = ("PCIE", "NVL")


def peak_tflops(name: str) -> float | None:
    """Of a device by the name that the driver gives it; None where it is not known."""
    kind = next((kind for kind in PEAKS if kind in name.upper()), None)
    if kind is None or (kind != "A100" and any(word in name.upper() for word in SLOWER)):
        return None
    return PEAKS[kind]


class Meter:
    """Asked when a point is logged; each interval reaches from one question to the next, without what was paused.

    flops_per_image: of a training step, forward and backward; 0: not known. Rank 0's view: rates are of all workers
    together, the rest is its own. Asks the device for nothing that would have to wait for it.
    """

    def __init__(self, world: World, num_images: int, images: int, flops_per_image: float = 0.0):
        self.world, self.num_images, self.flops_per_image = world, num_images, flops_per_image
        self.on_gpu = torch.device(world.device).type == "cuda"
        self.peak = peak_tflops(torch.cuda.get_device_name(world.device)) if self.on_gpu else None
        self.images = images
        self._begin()

    def _begin(self) -> None:
        self.since_s, self.paused_s, self.waited_s = time.perf_counter(), 0.0, 0.0

    def point(self, images: int) -> dict[str, float]:
        """Of the interval that ends here.

        images_per_s; time_left_s at that rate; loader_wait, the share of the time that the loop waited for its batch
        (on a GPU that may still have been computing meanwhile: an upper bound of its idle time); memory_gb, the peak so
        far of the GPU's memory, or of this process' main memory; where the operations are known tflop_per_s of one
        worker, and where the device's peak is known, too, mfu.
        """
        elapsed_s = max(1e-9, time.perf_counter() - self.since_s - self.paused_s)
        rate = (images - self.images) / elapsed_s
        found = {
            "images_per_s": rate,
            "time_left_s": max(0, self.num_images - images) / max(rate, 1e-9),
            "loader_wait": self.waited_s / elapsed_s,
            "memory_gb": self._memory_bytes() / 1e9,
        }
        if self.flops_per_image:
            found["tflop_per_s"] = rate * self.flops_per_image / self.world.size / 1e12
            if self.peak is not None:
                found["mfu"] = found["tflop_per_s"] / self.peak
        self.images = images
        self._begin()
        return {f"train/{name}": value for name, value in found.items()}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, time does not count: images, checkpoints."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self.paused_s += time.perf_counter() - started_s

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the loop waits for its batch."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self.waited_s += time.perf_counter() - started_s

    def _memory_bytes(self) -> int:
        if self.on_gpu:
            return torch.cuda.max_memory_allocated(self.world.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB
