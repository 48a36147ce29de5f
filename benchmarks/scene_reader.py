"""Is what `raphael/evaluate/scenes/reader.py` reads what was drawn? 2,000 fresh scenes, and what is taken for what.

Scenes are held-out ones of a seed that nothing else uses, a quarter of each suite, stored at five sizes and scaled as
the encoder scales them. Matrices are counts {drawn: {read: n}}: shapes and their colours of scenes with one object,
styles and background colours of all, relations of those with two, counts and words of those that ask for them.

    python benchmarks/scene_reader.py [--scenes 2000] [--quick]
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from _machine import judged, keep
from PIL import Image

from data_pipeline.source import scene_drawing, scenes
from raphael.evaluate.metrics.intervals import wilson
from raphael.evaluate.scenes.reader import ATTRIBUTES, SceneReading, judge, read_scene

SEED, SIDE_PX = 20261122, 64
RELATIONS = ("left of", "right of", "above", "below")
NONE = "nothing"
Matrix = dict[str, dict[str, int]]


def fresh(suite: str, number: int) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """(image (64, 64, 3) uint8, truth) of held-out scenes."""
    out = []
    for index in range(number):
        scene = scenes.heldout_scene(SEED, suite, index, SIDE_PX, 0.3)
        scene = scenes.at_side(scene, (64, 80, 96, 112, 128)[index % 5])
        picture = scene_drawing.draw(scene).resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
        out.append((np.asarray(picture), scene.truth()))
    return out


def read_as(reading: SceneReading, truth: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """{attribute: (drawn, read)} of what one scene can tell."""
    pairs = {
        "background_colour": (truth["background"]["colour"], reading.background_colour),
        "style": (truth["style"], reading.style or NONE),
        "count": (str(truth["count"]), str(reading.count)),
    }
    if len(truth["objects"]) == 1:
        drawn, found = truth["objects"][0], reading.objects[0] if reading.objects else None
        pairs["shape"] = (drawn["shape"], found.shape if found else NONE)
        pairs["shape_colour"] = (drawn["colour"], found.colour if found else NONE)
    if truth["relation"]:
        kinds = [kind for kind in RELATIONS if holds(reading, truth, kind)]
        pairs["relation"] = (truth["relation"]["kind"], " and ".join(kinds) or NONE)
    if truth["text"]:
        pairs["text"] = (truth["text"], reading.text or NONE)
    return pairs


def holds(reading: SceneReading, truth: dict[str, Any], kind: str) -> bool:
    return bool(judge(reading, truth | {"relation": truth["relation"] | {"kind": kind}})["relation"])


def measure(per_suite: int) -> tuple[list[dict[str, Any]], dict[str, Matrix], float]:
    """Rows {attribute, right, asked, share, low, high}, the matrices, and milliseconds an image."""
    verdicts: dict[str, list[bool]] = {attribute: [] for attribute in ATTRIBUTES}
    counts: dict[str, Counter[tuple[str, str]]] = {attribute: Counter() for attribute in ATTRIBUTES}
    seconds = 0.0
    for suite in scenes.SUITES:
        for picture, truth in fresh(suite, per_suite):
            started = time.perf_counter()
            reading = read_scene(picture)
            seconds += time.perf_counter() - started
            for attribute, verdict in judge(reading, truth).items():
                if verdict is not None:
                    verdicts[attribute].append(verdict)
            for attribute, pair in read_as(reading, truth).items():
                counts[attribute][pair] += 1
    rows = []
    for attribute, ones in verdicts.items():
        low, high = wilson(sum(ones), len(ones))
        rows.append({"attribute": attribute, "right": sum(ones), "asked": len(ones), "share": float(np.mean(ones))})
        rows[-1] |= {"low": low, "high": high}
    matrices = {attribute: matrix_of(found) for attribute, found in counts.items()}
    return rows, matrices, 1000 * seconds / (per_suite * len(scenes.SUITES))


def matrix_of(found: Counter[tuple[str, str]]) -> Matrix:
    matrix: Matrix = {}
    for (drawn, read), number in sorted(found.items()):
        matrix.setdefault(drawn, {})[read] = number
    return matrix


def plot(matrices: dict[str, Matrix], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(17, 8.5), layout="constrained")
    for axis, (attribute, matrix) in zip(axes.flat, matrices.items(), strict=False):
        drawn = sorted(matrix)
        read = drawn + sorted({name for row in matrix.values() for name in row} - set(drawn))
        table = np.array([[matrix[a].get(b, 0) for b in read] for a in drawn], float)
        axis.imshow(np.sqrt(table), cmap="Blues")
        for (row, column), value in np.ndenumerate(table):
            if value:
                colour = "white" if value > table.max() / 3 else "black"
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)
        axis.set_xticks(range(len(read)), read, rotation=90, fontsize=7)
        axis.set_yticks(range(len(drawn)), drawn, fontsize=7)
        axis.set_title(attribute.replace("_", " "), fontsize=9)
        axis.set_xlabel("read", fontsize=8)
        axis.set_ylabel("drawn", fontsize=8)
    for axis in axes.flat[len(matrices) :]:
        axis.axis("off")
    figure.savefig(file, dpi=90)
    print(f"kept in benchmarks/results/{file.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="40 scenes, and nothing is kept")
    arguments = parser.parse_args()
    number = 40 if arguments.quick else arguments.scenes
    rows, matrices, ms = measure(number // len(scenes.SUITES))
    for row in rows:
        print("  ".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    print(f"{ms:.1f} ms a picture")
    if not arguments.quick:
        cases = [
            judged(
                f"{row['attribute']} read right, of {row['asked']:,} (limit 98 %)",
                row["share"],
                0.98,
                "share",
                ">= 1.0",
            )
            for row in rows
        ]
        file = keep("scene_reader", rows, cases, seed=SEED, ms_a_picture=round(ms, 2), matrices=matrices)
        plot(matrices, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
