"""What an evaluation leaves beside its numbers: scores by suite, failures worth looking at, its place in MLflow."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raphael.base.config.params import Config
from raphael.base.stage import Stage, read_json
from raphael.evaluate.instruments.measured import tracked

if TYPE_CHECKING:
    from raphael.base.tracking.registry import Judgement

MODEL = Path("models/raphael")
LOWEST_SCORES, MOST_WRONG, BEST = 10, 10, 10  # rows of the report
GRID_IMAGES = 32
GRID = "evaluate/first_pictures"  # the series of grids in MLflow
NOT_OF_THE_PROTOCOL = {"batch_size", "precision"}  # of the settings of sampling: they change roundings
BY_READER = ("picture_accuracy", "class_accuracy")  # of the scene reader
JUDGED_BY = (*BY_READER, "clip_score", "clip_score_self")  # the first that was measured


def worth_looking_at(
    entries: Sequence[dict[str, Any]], cosines: np.ndarray | None, wrong: Sequence[list[str]] | None
) -> dict[str, Any]:
    """The images that fit their prompts worst, those with the most stated attributes wrong, and the best.

    -> {lowest_clip_score: [{file, prompt, value}], most_wrong: [{file, prompt, wrong}], wrong: {attribute: count},
    best: [{file, prompt}]}. Best is nothing wrong, the suites in turn, the higher score first; without a truth the
    score alone.
    """
    found: dict[str, Any] = {"lowest_clip_score": [], "most_wrong": [], "wrong": {}}

    def shown(index: int) -> dict[str, Any]:
        return {"file": entries[index]["file"], "prompt": entries[index]["prompt"]}

    if cosines is not None:
        for index in np.argsort(cosines, kind="stable")[:LOWEST_SCORES]:
            found["lowest_clip_score"].append({**shown(index), "value": round(float(cosines[index]), 6)})
    if wrong is not None:
        counts = Counter(name for names in wrong for name in names)
        found["wrong"] = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
        order = sorted(range(len(entries)), key=lambda index: (-len(wrong[index]), index))
        found["most_wrong"] = [{**shown(i), "wrong": wrong[i]} for i in order[:MOST_WRONG] if wrong[i]]
    return {**found, "best": [shown(i) for i in _best(entries, cosines, wrong)]}


def _best(
    entries: Sequence[dict[str, Any]], cosines: np.ndarray | None, wrong: Sequence[list[str]] | None
) -> list[int]:
    if cosines is None and wrong is None:
        return []
    scores = np.zeros(len(entries)) if cosines is None else cosines
    right = [i for i in range(len(entries)) if wrong is None or not wrong[i]]
    suites: dict[str, list[int]] = {}
    for i in sorted(right, key=lambda i: (-scores[i], i)):
        suites.setdefault("" if wrong is None else entries[i].get("suite", ""), []).append(i)
    turns = itertools.zip_longest(*(suites[name] for name in sorted(suites)))
    return [i for turn in turns for i in turn if i is not None][:BEST]


def judgement_of(facts: dict[str, Any]) -> Judgement | None:
    """The number by which this evaluation says which model is best, with its protocol; None where there is none."""
    from raphael.base.tracking.registry import Judgement, protocol_sha256

    for name in JUDGED_BY:
        if facts.get(name) is None:
            continue
        low, high = facts.get(f"{name}_interval") or (facts.get(f"{name}_low"), facts.get(f"{name}_high"))
        if low is None:
            continue
        judge = "scene reader" if name in BY_READER else facts["scorer"]
        settings = {key: value for key, value in facts["settings"].items() if key not in NOT_OF_THE_PROTOCOL}
        protocol = protocol_sha256(prompts=facts["prompts"], settings=settings, judge=judge)
        return Judgement(protocol, name, facts[name], low, high)
    return None


def log_evaluation(
    config: Config, stage: Stage, facts: dict[str, Any], entries: list[dict[str, Any]], images: list[np.ndarray]
) -> None:
    """Into a run of this evaluation and into the one that trained the model: the numbers of the top level, the report,
    the first images as a grid, and images with their prompts as a table. The numbers also go to the checkpoint's
    logged model, and decide whether it is the best.

    The step is the number of images the model has seen, as in training. A later evaluation of the same model (another
    seed) is another point of that step, with a later time.
    """
    from raphael.base.integrity.contents import model_sha256
    from raphael.base.tracking.registry import logged_model, promote
    from raphael.base.tracking.tracker import tracker_of_evaluation, tracker_of_model

    metrics, table = tracked_numbers(facts), image_table(entries, images, facts["settings"]["seed"])
    sha256, name = model_sha256(MODEL), config.tracking.experiment
    trained = tracker_of_model(config, stage.root, sha256)
    own = tracker_of_evaluation(config, stage.root, sha256, trained.run_id)
    step = int(read_json(MODEL / "meta.json").get("images_seen", 0))
    model_id = logged_model(trained, name, stage.root / MODEL, sha256, {"preset": config.model.preset})
    for tracker, of_model in ((trained, model_id), (own, None)):  # the model's own page has each number once
        tracker.log(metrics, step=step, again=True, model_id=of_model)
        tracker.dataset("prompts", facts["prompts"], "data/generated", "evaluation")
        tracker.image(GRID, first_images(images), step, again=True)
        tracker.table("evaluate_pictures", table)
        tracker.artifact(stage.root / "reports" / "evaluate.json")
    judgement = judgement_of(facts)
    if judgement and (decided := promote(trained, name, sha256, judgement)):
        print(f"evaluate: {decided}")
    own.close()
    trained.close()


def tracked_numbers(facts: dict[str, Any]) -> dict[str, float]:
    """The numbers of reports/evaluate.json's top level, of chance and of the instruments, by their keys in MLflow."""
    numbers = {f"evaluate/{key}": float(value) for key, value in facts.items() if isinstance(value, (int, float))}
    chance = {f"evaluate/chance/{key}": value for key, value in facts.get("chance", {}).items()}
    numbers |= {f"evaluate/{key}": value for key, value in tracked(facts).items()}
    return numbers | {key: value for key, value in chance.items() if value is not None}


def first_images(images: Sequence[np.ndarray]) -> Any:
    """The first images, uint8 (H, W, 3), in a grid -> PIL.Image."""
    from raphael.base.images.grid import image_grid

    return image_grid(images[:GRID_IMAGES], columns=8)


def image_table(entries: list[dict[str, Any]], images: list[np.ndarray], seed: int) -> dict[str, list[Any]]:
    """Columns for MLflow's table of images: the same prompts and seeds of two runs stand side by side there."""
    from PIL import Image

    rows = _spread(len(entries), GRID_IMAGES)
    return {
        "prompt": [entries[row]["prompt"] for row in rows],
        "seed": [f"{entries[row].get('seed', seed)}/{entries[row]['index']}" for row in rows],
        "picture": [Image.fromarray(images[row]) for row in rows],
    }


def _spread(count: int, most: int) -> list[int]:
    return list(range(count)) if count <= most else [index * count // most for index in range(most)]
