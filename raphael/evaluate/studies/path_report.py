"""`raphael paths CHECKPOINT --out DIR`: the path analysis as numbers, images and a section for the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from raphael.base.stage import write_json
from raphael.evaluate.report.pages import page_environment
from raphael.evaluate.studies.path_classifier import FOLDS, TREES, Reading, difference, read_words
from raphael.evaluate.studies.path_figures import accuracy_chart, confusion_chart, time_route_chart, word_map
from raphael.evaluate.studies.paths import (
    KINDS,
    PAPER,
    load_pipeline,
    load_words,
    paths_of,
    trained_gates,
    untrained_gates,
    word_vectors,
)

TEMPLATES = Path(__file__).resolve().parents[1] / "report" / "templates"
MOST_CONFUSED = 5


def analyse(
    checkpoint: str | Path, out: Path, untrained: int, rounds: int, seed: int, device: str = "cpu"
) -> dict[str, Any]:
    """Write paths.json, PNGs and section.html to `out`; print the table. Raises StageError and ValueError."""
    from tqdm import tqdm

    from raphael.evaluate.report.routes import time_table

    if untrained < 2 or rounds < 1:
        raise ValueError(f"got {untrained} sets of untrained gates and {rounds} rounds, expected at least 2 and 1")
    words, pipeline = load_words(), load_pipeline(checkpoint, device)
    gates, experts = trained_gates(pipeline), pipeline.unet.config.num_space_experts
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "model": pipeline.identity,
        "blocks": len(gates),
        "experts": experts,
        "folds": FOLDS,
        "rounds": rounds,
        "seed": seed,
        "classifier": TREES,
        "token": "the last one of the word",
        "kinds": {},
    }
    paths, readings = {}, {}
    steps = sum(len(part.words) * len(part.sentences) * (2 + untrained) for part in words.values())
    with tqdm(total=steps, unit=" samples", desc="paths", dynamic_ncols=True) as bar:
        for kind, part in words.items():
            _, labels, sentences = part.samples()
            vectors = word_vectors(pipeline, part, bar.update)
            paths[kind] = paths_of(gates, vectors)
            read = []
            for chosen in [gates, *(untrained_gates(gates, seed + number) for number in range(untrained))]:
                found = paths[kind] if chosen is gates else paths_of(chosen, vectors)
                read.append(
                    (read_words(found, labels, sentences, experts, seed, rounds), len(np.unique(found, axis=0)))
                )
                bar.update(len(labels))
            readings[kind] = read[0][0]
            report["kinds"][kind] = numbers(part.words, read)
    for kind, part in words.items():
        confusion_chart(out / f"confusion-{kind}.png", readings[kind].confusion(), part.words, kind)
    report["map"] = word_map(out / "words.png", {kind: (words[kind].words, paths[kind]) for kind in words}, experts)
    accuracy_chart(out / "accuracy.png", report["kinds"])
    time_route_chart(out / "times.png", time_table(pipeline, pipeline.diffusion.num_steps))
    write_json(out / "paths.json", report)
    (out / "section.html").write_text(section(report, out), encoding="utf-8")
    print(f"{table(report)}\n{out}: paths.json, section.html and six figures")
    return report


def numbers(words: tuple[str, ...], read: list[tuple[Reading, int]]) -> dict[str, Any]:
    """read: (reading, number of different paths) of the trained gates, then of each set of untrained ones."""
    (trained, different), others = read[0], read[1:]
    centre, low, high = difference(trained, [reading for reading, _ in others])
    confusion = trained.confusion()
    np.fill_diagonal(confusion, 0.0)
    worst = np.argsort(-confusion, axis=None, kind="stable")[:MOST_CONFUSED]
    pairs = [divmod(int(place), len(words)) for place in worst]
    return {
        "words": len(words),
        "sentences": int(trained.sentences.max()) + 1,
        "chance": 1 / len(words),
        "trained": {"accuracy": trained.accuracy, "folds": trained.by_fold(), "different_paths": different},
        "untrained": [
            {"accuracy": reading.accuracy, "folds": reading.by_fold(), "different_paths": count}
            for reading, count in others
        ],
        "difference": {"mean": centre, "low": low, "high": high},
        "most_confused": [[words[i], words[j], float(confusion[i, j])] for i, j in pairs if confusion[i, j] > 0],
    }


def table(report: dict[str, Any]) -> str:
    lines = [
        f"words read back from paths of {report['blocks']} blocks with {report['experts']} experts each "
        f"(model {report['model']}; {report['folds']} folds of whole sentences)",
        f"  {'':<12}{'chance':>8}{'untrained gates':>20}{'trained':>9}{'difference [95 %]':>26}{'paper':>9}",
    ]
    for kind, found in report["kinds"].items():
        others = [part["accuracy"] for part in found["untrained"]]
        gain = found["difference"]
        spread = f"{min(others):.1%} to {max(others):.1%}"
        change = f"{100 * gain['mean']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"
        lines.append(
            f"  {found['words']:>3} {kind:<11}{found['chance']:>5.1%}{spread:>20}"
            f"{found['trained']['accuracy']:>9.1%}{change:>26}{PAPER.get(kind, ''):>9}"
        )
    return "\n".join(lines)


def section(report: dict[str, Any], folder: Path) -> str:
    """An HTML section, complete in itself (images inside), in the classes of the report's style sheet."""
    import base64

    pictures = {
        path.stem: f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        for path in sorted(folder.glob("*.png"))
    }
    environment = page_environment()
    return environment.get_template("paths.html").render(report=report, pictures=pictures, paper=PAPER, names=KINDS)
