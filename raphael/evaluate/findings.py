"""What an evaluation leaves beside its numbers: scores by suite, failures worth looking at, its place in MLflow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raphael.config import Config
from raphael.evaluate.intervals import bootstrap_mean
from raphael.stage import Stage, read_json

if TYPE_CHECKING:
    from raphael.registry import Judgement

MODEL = Path("models/raphael")
LOWEST_SCORES, MOST_WRONG = 10, 10  # two rows of the report
GRID_PICTURES = 32
GRID = "evaluate/first_pictures"  # the series of grids in MLflow
NOT_OF_THE_PROTOCOL = {"batch_size", "precision"}  # of the settings of drawing: they change roundings
JUDGED_BY = ("picture_accuracy", "clip_score", "clip_score_self")  # the first that was measured


def by_suite(entries: Sequence[dict[str, Any]], cosines: np.ndarray) -> dict[str, dict[str, Any]]:
    """{suite: {pictures, value, low, high}}: mean cosine, its 95 % bootstrap interval (null for a single prompt)."""
    found = {}
    suites = [entry.get("suite", "") for entry in entries]
    for suite in dict.fromkeys(suites):
        rows = [index for index, name in enumerate(suites) if name == suite]
        prompts = [entries[index]["prompt"] for index in rows]
        low, high = bootstrap_mean(cosines[rows], prompts) if len(set(prompts)) > 1 else (None, None)
        mean = float(cosines[rows].mean())
        found[suite] = {"pictures": len(rows), "value": mean, "low": low, "high": high}
        found[suite] = {k: round(v, 6) if isinstance(v, float) else v for k, v in found[suite].items()}
    return found


def worth_looking_at(
    entries: Sequence[dict[str, Any]], cosines: np.ndarray | None, wrong: Sequence[list[str]] | None
) -> dict[str, Any]:
    """The pictures that fit their prompts worst, and those with the most stated attributes wrong; in that order.

    -> {lowest_clip_score: [{file, prompt, value}], most_wrong: [{file, prompt, wrong}], wrong: {attribute: count}}
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
    return found


def judgement_of(facts: dict[str, Any]) -> Judgement | None:
    """The number by which this evaluation says which model is best, with its protocol; None where there is none."""
    from raphael.registry import Judgement, protocol_sha256

    for name in JUDGED_BY:
        if facts.get(name) is None:
            continue
        low, high = facts.get(f"{name}_interval") or (facts.get(f"{name}_low"), facts.get(f"{name}_high"))
        if low is None:
            continue
        judge = "scene reader" if name == "picture_accuracy" else facts["scorer"]
        settings = {key: value for key, value in facts["settings"].items() if key not in NOT_OF_THE_PROTOCOL}
        protocol = protocol_sha256(prompts=facts["prompts"], settings=settings, judge=judge)
        return Judgement(protocol, name, facts[name], low, high)
    return None


def log_evaluation(
    config: Config, stage: Stage, facts: dict[str, Any], entries: list[dict[str, Any]], pictures: list[np.ndarray]
) -> None:
    """Into a run of this evaluation and into the one that trained the model: the numbers of the top level, the report,
    the first pictures as a grid, and pictures with their prompts as a table. The numbers also go to the checkpoint's
    logged model, and decide whether it is the best.

    The step is the number of images the model has seen, as in training. A later evaluation of the same model (another
    seed) is another point of that step, with a later time.
    """
    from raphael.checkpoint import checkpoint_sha256
    from raphael.registry import logged_model, promote
    from raphael.tracking import tracker_of_evaluation, tracker_of_model

    metrics, table = tracked_numbers(facts), picture_table(entries, pictures, facts["settings"]["seed"])
    sha256, name = checkpoint_sha256(MODEL), config.tracking.experiment
    trained = tracker_of_model(config, stage.root, sha256)
    own = tracker_of_evaluation(config, stage.root, sha256, trained.run_id)
    step = int(read_json(MODEL / "meta.json").get("images_seen", 0))
    model_id = logged_model(trained, name, stage.root / MODEL, sha256, {"preset": config.model.preset})
    for tracker, of_model in ((trained, model_id), (own, None)):  # the model's own page has each number once
        tracker.log(metrics, step=step, again=True, model_id=of_model)
        tracker.dataset("prompts", facts["prompts"], "data/generated", "evaluation")
        tracker.image(GRID, first_pictures(pictures), step, again=True)
        tracker.table("evaluate_pictures", table)
        tracker.artifact(stage.root / "reports" / "evaluate.json")
    judgement = judgement_of(facts)
    if judgement and (decided := promote(trained, name, sha256, judgement)):
        print(f"evaluate: {decided}")
    own.close()
    trained.close()


def tracked_numbers(facts: dict[str, Any]) -> dict[str, float]:
    """The numbers of reports/evaluate.json's top level, and those of chance, under their keys in MLflow."""
    numbers = {f"evaluate/{key}": float(value) for key, value in facts.items() if isinstance(value, (int, float))}
    chance = {f"evaluate/chance/{key}": value for key, value in facts.get("chance", {}).items()}
    return numbers | {key: value for key, value in chance.items() if value is not None}


def first_pictures(pictures: Sequence[np.ndarray]) -> Any:
    """The first pictures, uint8 (H, W, 3), in a grid -> PIL.Image."""
    from raphael.sampling import image_grid

    return image_grid(pictures[:GRID_PICTURES], columns=8)


def picture_table(entries: list[dict[str, Any]], pictures: list[np.ndarray], seed: int) -> dict[str, list[Any]]:
    """Columns for MLflow's table of pictures: the same prompts and seeds of two runs stand side by side there."""
    from PIL import Image

    rows = _spread(len(entries), GRID_PICTURES)
    return {
        "prompt": [entries[row]["prompt"] for row in rows],
        "seed": [f"{entries[row].get('seed', seed)}/{entries[row]['index']}" for row in rows],
        "picture": [Image.fromarray(pictures[row]) for row in rows],
    }


def _spread(count: int, most: int) -> list[int]:
    return list(range(count)) if count <= most else [index * count // most for index in range(most)]
