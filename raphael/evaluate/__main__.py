"""Measure the drawn pictures: what they show (exact, for scenes), how well they fit their prompts, how far they are
from real ones. Writes reports/evaluate.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.config import Config
from raphael.evaluate.findings import by_suite, log_evaluation, worth_looking_at
from raphael.evaluate.prompts import list_sha256
from raphael.stage import Stage, StageError, main, read_json

if TYPE_CHECKING:
    import numpy as np

GENERATED = Path("data/generated")
MODEL = Path("models/raphael")
SHARDS = Path("data/shards")
CAPTIONS = Path("data/captions/captions.parquet")
RETRIEVAL_CHOICES = 20


def run(config: Config, stage: Stage) -> None:
    drawn = read_json(GENERATED / "images.json")
    entries = drawn["images"]
    pictures = [load_picture(GENERATED / entry["file"]) for entry in entries]
    facts: dict[str, Any] = {"model": drawn["model"], "settings": drawn["settings"]}
    facts["prompts"] = list_sha256(entries)
    wrong: list[list[str]] | None = None
    if any(entry.get("truth") for entry in entries):
        from raphael.evaluate.attributes import score, wrong_attributes

        readings = _read(stage, pictures)
        facts |= score(entries, readings)
        pairs = zip(entries, readings, strict=True)
        wrong = [wrong_attributes(entry, reading) if entry.get("truth") else [] for entry, reading in pairs]
    facts |= compare(config, stage, entries, pictures)
    facts["failures"] = worth_looking_at(entries, facts.pop("cosines", None), wrong)
    stage.report(len(entries), len(entries), **facts)
    log_evaluation(config, stage, facts, entries, pictures)


def compare(config: Config, stage: Stage, entries: list[dict[str, Any]], pictures: list[np.ndarray]) -> dict[str, Any]:
    """CLIP score, retrieval, Frechet distance and nearest training pictures; what cannot be had says why.

    cosines: each picture's with its prompt, (n,), where there is a CLIP.
    """
    import numpy as np

    from raphael.evaluate import clip_score as cs
    from raphael.evaluate.features import FeatureSpace, inception_space, network_sha256
    from raphael.evaluate.intervals import bootstrap_mean
    from raphael.evaluate.references import reference_pictures

    scorer, suffix, reason = scoring_clip(config)
    facts: dict[str, Any] = {}
    space = inception_space(config.evaluate.fid_inception_weights) if config.evaluate.fid_inception_weights else None
    if scorer is None:
        facts["clip_score"] = None
        facts["clip_score_absent_because"] = reason
        if space is None:
            return facts
    clip_space = scorer and FeatureSpace(f"fd_clip{suffix}", lambda batch: np.asarray(scorer.embed_images(batch)))
    height, width = pictures[0].shape[:2]
    reference = list(reference_pictures(SHARDS, CAPTIONS, config.evaluate.max_reference_images, height, width))
    spaces = [item for item in (space, clip_space) if item]
    with stage.progress((len(pictures) + len(reference)) * len(spaces), "images") as bar:
        for item in spaces:
            ours, features = item.statistics(pictures, bar.update)
            theirs, real = item.statistics(reference, bar.update)
            facts[item.metric(len(pictures))] = round(ours.distance(theirs), 6)
            facts[f"{item.metric(len(pictures))}_reference"] = f"{len(reference)} training pictures"
    if scorer is None:
        return facts
    prompts = [entry["prompt"] for entry in entries]
    texts = np.asarray(scorer.embed_texts(prompts))
    name = f"clip_score{suffix}"
    facts[name] = round(cs.clip_score(features, texts), 6)
    facts["cosines"] = (features.astype(np.float64) * texts).sum(1)
    if len(set(prompts)) > 1:
        facts[f"{name}_interval"] = [round(end, 6) for end in bootstrap_mean(facts["cosines"], prompts)]
    facts[f"{name}_by_suite"] = by_suite(entries, facts["cosines"])
    facts["scorer"] = network_sha256(scorer.model)[:16]
    if len(pictures) > 1:
        facts[f"{name}_of_other_prompts"] = round(cs.clip_score_of_others(features, texts), 6)
    choices = min(RETRIEVAL_CHOICES, len(pictures))
    facts[f"retrieval_of_{choices}"] = round(cs.retrieval(features, texts, choices), 6)
    facts["nearest_training_picture_cosine"] = round(float(cs.nearest(features, real).mean()), 6)
    return facts


def scoring_clip(config: Config) -> tuple[Any, str, str]:
    """(scorer or None, "" or "_self", why there is none). "_self": the scoring CLIP also conditioned the drawing."""
    from raphael.encoders.image import load_clip

    if config.evaluate.scoring_clip:
        return load_clip(config.evaluate.scoring_clip), "", ""
    try:
        return load_clip(MODEL / "text_encoder"), "_self", ""
    except (StageError, ValueError) as error:
        return None, "_self", f"the text encoder has no picture side ({error}); name a CLIP in evaluate.scoring_clip"


def load_picture(path: Path) -> np.ndarray:
    """uint8 (H, W, 3). Raises StageError for a file that is missing or broken."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise StageError(f"{path}: no such picture though images.json lists it; run the stage generate again") from None
    except (OSError, SyntaxError) as error:  # Pillow's answer to a truncated or broken PNG
        raise StageError(f"{path}: not a whole picture ({error}); delete it and run the stage generate again") from None


def _read(stage: Stage, pictures: list[np.ndarray]) -> list[Any]:
    from raphael.evaluate.attributes import read_scene

    readings = []
    with stage.progress(len(pictures), "pictures read") as bar:
        for picture in pictures:
            readings.append(read_scene(picture))
            bar.update(1)
    return readings


if __name__ == "__main__":
    raise SystemExit(main("evaluate", run, __doc__))
