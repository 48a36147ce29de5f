"""Measure the drawn pictures: what they show (exact, for scenes), how well they fit their prompts, how far they are
from real ones. Writes reports/evaluate.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.config import Config
from raphael.stage import Stage, StageError, main, read_json

if TYPE_CHECKING:
    import numpy as np

GENERATED = Path("data/generated")
MODEL = Path("models/raphael")
SHARDS = Path("data/shards")
CAPTIONS = Path("data/captions/captions.parquet")
RETRIEVAL_CHOICES = 20
GRID_PICTURES = 32


def run(config: Config, stage: Stage) -> None:
    drawn = read_json(GENERATED / "images.json")
    entries = drawn["images"]
    pictures = [load_picture(GENERATED / entry["file"]) for entry in entries]
    facts: dict[str, Any] = {"model": drawn["model"], "settings": drawn["settings"]}
    if any(entry.get("truth") for entry in entries):
        from raphael.evaluate.attributes import score

        facts |= score(entries, _read(stage, pictures))
    facts |= compare(config, stage, entries, pictures)
    stage.report(len(entries), len(entries), **facts)
    log(config, stage, facts, pictures)


def compare(config: Config, stage: Stage, entries: list[dict[str, Any]], pictures: list[np.ndarray]) -> dict[str, Any]:
    """CLIP score, retrieval, Frechet distance and nearest training pictures; what cannot be had says why."""
    import numpy as np

    from raphael.evaluate import clip_score as cs
    from raphael.evaluate.features import FeatureSpace, inception_space
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
    texts = np.asarray(scorer.embed_texts([entry["prompt"] for entry in entries]))
    name = f"clip_score{suffix}"
    facts[name] = round(cs.clip_score(features, texts), 6)
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


def log(config: Config, stage: Stage, facts: dict[str, Any], pictures: list[np.ndarray]) -> None:
    """Into the run that trained the model: the numbers of the top level, the report and a grid of the first pictures.

    The step is the number of images the model has seen, as in training. A later evaluation of the same model (another
    seed) is another point of that step, with a later time.
    """
    from raphael.checkpoint import checkpoint_sha256
    from raphael.sampling import image_grid
    from raphael.tracking import tracker_of_model

    metrics = {f"evaluate/{key}": float(value) for key, value in facts.items() if isinstance(value, (int, float))}
    metrics |= {f"evaluate/chance/{key}": value for key, value in facts.get("chance", {}).items() if value is not None}
    tracker, step = tracker_of_model(config, stage.root, checkpoint_sha256(MODEL)), images_seen(MODEL)
    tracker.log(metrics, step=step, again=True)
    tracker.image("evaluate/first_pictures", image_grid(pictures[:GRID_PICTURES], columns=8), step, again=True)
    tracker.artifact(stage.root / "reports" / "evaluate.json")
    tracker.close()


def images_seen(model: Path) -> int:
    """How many images the model was trained on, 0 where it does not say."""
    return int(read_json(model / "meta.json").get("images_seen", 0))


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
