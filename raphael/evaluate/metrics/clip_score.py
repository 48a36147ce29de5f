"""How well images and prompts fit, by a CLIP: functions of embeddings of unit norm, float64 throughout."""

from __future__ import annotations

import numpy as np


def clip_score(images: np.ndarray, texts: np.ndarray) -> float:
    """Mean cosine of image i with prompt i; (n, D) each, unit norm. Raises ValueError for other shapes or NaN.

    (Hessel et al., arXiv 2104.08718, without its factor of 2.5 and its cut at 0, as papers since report it.)
    """
    images, texts = _checked(images, texts)
    return float((images * texts).sum(1).mean())


def clip_score_of_others(images: np.ndarray, texts: np.ndarray) -> float:
    """The same with every prompt but the image's own: what a model that ignores its prompt would reach."""
    images, texts = _checked(images, texts)
    n = len(images)
    if n < 2:
        raise ValueError(f"got {n} images, expected at least 2")
    return float((images.sum(0) @ texts.sum(0) - (images * texts).sum()) / (n * (n - 1)))


def retrieval(images: np.ndarray, texts: np.ndarray, choices: int) -> float:
    """Share of images whose own prompt is the nearest of `choices`, in consecutive groups; ties count against.

    Equal prompts within a group are one choice. Chance is about 1 / choices.
    """
    images, texts = _checked(images, texts)
    groups = [slice(start, start + choices) for start in range(0, len(images) - choices + 1, choices)]
    if not groups:
        raise ValueError(f"got {len(images)} images, expected at least {choices}, the choices of one group")
    hits = 0
    for group in groups:
        similarity = images[group] @ texts[group].T
        same = np.isclose(texts[group] @ texts[group].T, 1.0, atol=1e-9)
        own = np.diag(similarity)
        hits += int((np.where(same, -np.inf, similarity).max(1) < own).sum())
    return hits / (len(groups) * choices)


def nearest(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosine of each image (n, D) with the nearest of the others (m, D) -> (n,)."""
    images, others = np.asarray(images, np.float64), np.asarray(others, np.float64)
    return (images @ others.T).max(1)


def _checked(images: np.ndarray, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    images, texts = np.asarray(images, np.float64), np.asarray(texts, np.float64)
    if images.shape != texts.shape or images.ndim != 2 or not len(images):
        raise ValueError(f"got images {images.shape} and prompts {texts.shape}, expected the same (n, D), n >= 1")
    if not (np.isfinite(images).all() and np.isfinite(texts).all()):
        raise ValueError("got NaN or infinity among the embeddings, expected finite numbers")
    return images, texts
