"""How well images fit their prompts by a CLIP, how near they are to the reference, how they look to LAION's head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raphael.base.stage import StageError
from raphael.evaluate.metric import Found, Number
from raphael.evaluate.metrics import clip_score as cs
from raphael.evaluate.metrics.intervals import bootstrap_mean
from raphael.evaluate.subject import Pair, Subject

RETRIEVAL_CHOICES = 20


def embedded(subject: Subject, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """The images' and their prompts' embeddings, (n, D) each, of unit norm."""
    images, texts = pair.ours.array(), subject.texts(pair.network)
    return (images, texts) if subject.rules.clip_norm == "float32" else (_unit(images), _unit(texts))


def cosines(subject: Subject, pair: Pair) -> np.ndarray:
    """Each image's cosine with its prompt, float64 (n,)."""
    images, texts = embedded(subject, pair)
    return (np.asarray(images, np.float64) * np.asarray(texts, np.float64)).sum(1)


def clip_score(subject: Subject) -> Found:
    """With its 95 % interval over prompts, by suite, and beside it the score with everyone else's prompt."""
    found, prompts = Found(), subject.prompts or []
    for pair in subject.clips:
        name, sha256 = f"clip_score{_of(pair)}", pair.network.network
        images, texts = embedded(subject, pair)
        values = cosines(subject, pair)
        low, high = bootstrap_mean(values, prompts) if len(set(prompts)) > 1 else (None, None)
        found.numbers.append(Number(name, cs.clip_score(images, texts), sha256, low, high))
        if len(values) > 1:
            others = cs.clip_score_of_others(images, texts)
            found.numbers.append(Number(f"{name}_of_other_prompts", others, sha256))
        if subject.entries:
            found.facts[f"{name}_by_suite"] = by_suite(subject.entries, values)
    return found


def retrieval(subject: Subject) -> Found:
    found = Found()
    for pair in subject.clips:
        images, texts = embedded(subject, pair)
        choices = min(RETRIEVAL_CHOICES, len(images))
        value = cs.retrieval(images, texts, choices)
        found.numbers.append(Number(f"retrieval_of_{choices}{_beside(pair)}", value, pair.network.network))
    return found


def nearest_reference(subject: Subject) -> Found:
    """Mean cosine with the nearest reference image: near 1 is memory."""
    found = Found()
    for pair in subject.clips:
        if pair.theirs is not None:
            value = float(cs.nearest(pair.ours.array(), pair.theirs.array()).mean())
            name = f"nearest_training_picture_cosine{_beside(pair)}"
            found.numbers.append(Number(name, value, pair.network.network))
    return found


def aesthetic(subject: Subject) -> Found:
    """The mean of LAION's head over the images, its 95 % interval over prompts. V1 and V2 are different scales."""
    import torch

    found, head = Found(), subject.head()
    for pair in subject.clips:
        try:
            scores = head(torch.from_numpy(np.asarray(pair.ours.array()))).double().numpy()
        except ValueError as error:
            raise StageError(
                f"the aesthetic head: {error}; name the CLIP it was trained on (evaluate.scoring_clip, --features)"
            ) from None
        groups = subject.prompts or list(range(len(scores)))
        low, high = bootstrap_mean(scores, groups) if len(set(groups)) > 1 else (None, None)
        name = f"aesthetic_{head.version}{_beside(pair)}"
        found.numbers.append(Number(name, float(scores.mean()), pair.network.network, low, high))
    return found


def by_suite(entries: Sequence[dict[str, Any]], values: np.ndarray) -> dict[str, dict[str, Any]]:
    """{suite: {images, value, low, high}}: mean cosine, its 95 % bootstrap interval (null for a single prompt)."""
    found = {}
    suites = [entry.get("suite", "") for entry in entries]
    for suite in dict.fromkeys(suites):
        rows = [index for index, name in enumerate(suites) if name == suite]
        prompts = [entries[index]["prompt"] for index in rows]
        low, high = bootstrap_mean(values[rows], prompts) if len(set(prompts)) > 1 else (None, None)
        mean = float(values[rows].mean())
        found[suite] = {"pictures": len(rows), "value": mean, "low": low, "high": high}
        found[suite] = {k: round(v, 6) if isinstance(v, float) else v for k, v in found[suite].items()}
    return found


def _of(pair: Pair) -> str:
    """What stands behind `clip_score`: of fd_clip_self "_self", of fd_clip nothing."""
    return pair.network.name.removeprefix("fd_clip")


def _beside(pair: Pair) -> str:
    """The same for names that are known without a network: "" where it is the workspace's own."""
    return "" if _of(pair) in ("", "_self") else _of(pair)


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
