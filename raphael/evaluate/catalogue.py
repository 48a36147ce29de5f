"""Every metric there is, by name. A protocol (protocols/*.yaml, a system's evaluate.yaml) says which are measured."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from raphael.base.strict import ConfigError
from raphael.evaluate.instruments import enlarging
from raphael.evaluate.instruments import measured as instruments
from raphael.evaluate.metric import Metric
from raphael.evaluate.metrics import of_features, of_prompts
from raphael.evaluate.scenes import classes, truth
from raphael.evaluate.subject import (
    CAPTION_MODEL,
    CLIP,
    FEATURES,
    HEAD,
    LABELS,
    MODEL,
    PROMPTS,
    REFERENCE,
    SCENES,
    TEXT_MODEL,
    TRUTH,
)

METRICS = (  # in the order in which they are measured and told
    Metric(
        "scenes", "higher", (TRUTH,), truth.scenes, "share of images that show what their prompt states, by attribute",
        r"(background_colour|shape_colour|shape|relation|count|text|style|picture)_accuracy",
    ),
    Metric("asked_and_read", None, (TRUTH,), truth.asked_and_read, "what was read where what was asked"),
    Metric("relation_parts", None, (TRUTH,), truth.relation_parts, "where a relation of two objects breaks"),
    Metric(
        "class_accuracy", "higher", (LABELS,), classes.class_accuracy, "share of images that show their label",
        r"class_accuracy",
    ),
    Metric(
        "class_ceiling", None, (LABELS, SCENES), classes.class_ceiling,
        "the same of drawn images at the size of the generated ones", r"class_accuracy_ceiling",
    ),
    Metric(
        "frechet", "lower", (FEATURES, REFERENCE), of_features.frechet,
        "squared Frechet distance of features to the reference", r"(fid|fd_.+)_\d+",
    ),
    Metric("kid", "lower", (FEATURES, REFERENCE), of_features.kid, "unbiased polynomial MMD", r"kid(_.+)?"),
    Metric("cmmd", "lower", (CLIP, REFERENCE), of_features.cmmd, "MMD of CLIP embeddings", r"cmmd(_.+)?"),
    Metric(
        "precision_recall", "higher", (FEATURES, REFERENCE), of_features.precision_recall,
        "share of each set within the other's nearest-neighbour balls", r"(precision|recall)(_.+)?",
    ),
    Metric(
        "density_coverage", "higher", (FEATURES, REFERENCE), of_features.density_coverage,
        "the same, counted by the reference's balls", r"(density|coverage)(_.+)?",
    ),
    Metric(
        "clip_score", "higher", (CLIP, PROMPTS), of_prompts.clip_score, "mean cosine of image and prompt",
        r"clip_score(_.+)?(?<!_of_other_prompts)",
    ),
    Metric(
        "retrieval", "higher", (CLIP, PROMPTS), of_prompts.retrieval, "an image finds its own prompt among so many",
        r"retrieval_of_\d+(_.+)?",
    ),
    Metric(
        "nearest_reference", None, (CLIP, REFERENCE), of_prompts.nearest_reference,
        "mean cosine with the nearest reference image; near 1 is memory", r"nearest_training_picture_cosine(_.+)?",
    ),
    Metric(
        "aesthetic", "higher", (CLIP, HEAD), of_prompts.aesthetic, "mean of LAION's aesthetic head",
        r"aesthetic_v\d(_.+)?",
    ),
    Metric(
        "ceiling", None, (SCENES, TEXT_MODEL), instruments.ceiling, "scenes of true images, drawn and decoded",
        pieces=instruments.CEILING,
    ),
    Metric(
        "probe", "higher", (SCENES, CAPTION_MODEL), instruments.probe, "how often the true caption has the lower loss",
        pieces=instruments.PROBE,
    ),
    Metric(
        "knockouts", None, (SCENES, TEXT_MODEL), instruments.knockouts, "the loss without one part of the network",
        pieces=instruments.KNOCKOUTS,
    ),
    Metric(
        "timestep_loss", "lower", (SCENES, MODEL), instruments.timestep_loss,
        "denoising loss of drawn held-out scenes, mean over ten timesteps", r"timestep_loss",
    ),
    Metric(
        "upsampler", "higher", (SCENES, MODEL), enlarging.upsampler, "a second network alone, enlarging drawn scenes",
        rf"{enlarging.GAIN}|{enlarging.READ}",
    ),
    Metric(
        "swap", None, (SCENES, TEXT_MODEL), instruments.swap, "whose facts are shown when texts are exchanged",
        pieces=instruments.SWAP,
    ),
)  # fmt: skip
NAMES = tuple(metric.name for metric in METRICS)


def metric_named(name: str, where: str = "metric") -> Metric:
    """Raises ConfigError that says the nearest names. where: what the message calls the place."""
    for metric in METRICS:
        if metric.name == name:
            return metric
    raise ConfigError(f"{where}: got {name!r}, {nearest(name, NAMES)}")


def metrics_named(names: Iterable[str], where: str = "metric") -> list[Metric]:
    """In the order of METRICS, each once, whatever the order of the names."""
    wanted = {metric_named(name, where).name for name in names}
    return [metric for metric in METRICS if metric.name in wanted]


def metric_of(key: str) -> Metric | None:
    """The metric that a number's name belongs to ("fd_clip_self_200": frechet), None for what is no number of one."""
    return next((metric for metric in METRICS if metric.keys and re.fullmatch(metric.keys, key)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """ "did you mean A or B? expected one of ..." """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}expected one of {', '.join(known)}"
