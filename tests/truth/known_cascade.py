"""A pipeline whose second network is a function, for what is measured of it alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from raphael.base.config.sampling import Sampling
from raphael.diffusion.cascade import enlarged, shrunk


def known_cascade(enlarge: Any = lambda low, rows, level: enlarged(low, 2), side: int = 64) -> Any:
    """Of images of side x side; enlarge(low, rows, level) -> images at twice the side. It samples at the level 0.25."""

    def called(low, texts, seeds, sampling):
        return enlarge(low, [index for _, index in seeds], sampling.augmentation)

    return SimpleNamespace(
        meta={"picture": {"sizes_px": [[side, side]]}}, downsampling=2, device="cpu", identity="a model",
        defaults=Sampling(augmentation=0.25), encode_images=lambda images: shrunk(images, 2), enlarge=called,
        upsampler=SimpleNamespace(factor=2),
    )  # fmt: skip
