"""Prompts longer than the context, cut and read by chunks, on the model that comes with the package.

Scenes of two objects on a plain ground, told in forms of which some are longer than the 30 tokens that it reads; what
it drew is read by the project's scene reader. Shares have Wilson's 95 % intervals.

Writes results/long_prompts-<device>-<yyyymm>.json, unless --quick.
"""

from __future__ import annotations

import argparse
import warnings
from collections import defaultdict
from dataclasses import replace

import numpy as np
from _machine import judged, keep
from edits import Found, Subject, rows_of, subjects

from raphael.encoders.weighted import CutPromptWarning
from raphael.evaluate.scenes.reader import read_scene
from raphael.generate.pipeline import Pipeline, RaphaelPipeline

PAIR, GROUND = "a {c1} {s1} left of a {c2} {s2}", "on a plain {b} background"
FILLER = "flat style, in a flat style, flat style, flat style, in a flat style, flat style, "
FORMS = {
    "short": f"{PAIR} {GROUND}, flat style",
    "all behind filler": f"{FILLER}{PAIR} {GROUND}",
    "background behind filler": f"{PAIR}, {FILLER}{GROUND}",
    "said twice": f"{PAIR} {GROUND}, flat style, {PAIR} {GROUND}, flat style",
}


def measure(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    names = ("c1", "s1", "c2", "s2", "b")
    for form, text in FORMS.items():
        prompts = [text.format(**dict(zip(names, subject, strict=True))) for subject in every]
        for how in ("cut", "chunks"):
            if how == "chunks" and form == "short":
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CutPromptWarning)
                sampling = replace(pipeline.defaults, long_prompts=how)
                images = pipeline(prompts, sampling=sampling, output_type="np").images
            for image, (c1, s1, c2, s2, b) in zip(np.uint8(np.rint(images * 255)), every, strict=True):
                scene = read_scene(image)
                things = {thing.colour: thing for thing in scene.objects}
                both = len(scene.objects) == 2 and c1 in things and c2 in things
                ground = scene.background_colour == b
                shapes = both and (things[c1].shape, things[c2].shape) == (s1, s2)
                sides = both and bool(things[c1].centre[0] < things[c2].centre[0])
                found[f"{form}, {how}: background"].append(ground)
                found[f"{form}, {how}: both colours"].append(both)
                found[f"{form}, {how}: all"].append(ground and shapes and sides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one scene in two steps; keeps nothing")
    parser.add_argument("-n", type=int, default=24, help="scenes (default: %(default)s)")
    arguments = parser.parse_args()
    pipeline = RaphaelPipeline.from_pretrained("scenes")
    if arguments.quick:
        pipeline.defaults = replace(pipeline.defaults, steps=2)
    found: Found = defaultdict(list)
    measure(pipeline, subjects(1 if arguments.quick else arguments.n), found)
    rows = list(rows_of(found))
    for row in rows:
        print(f"{row['case']:<46}{row['value']:>6.2f}  ({row['low']:.2f} to {row['high']:.2f})  n {row['n']}")
    if not arguments.quick:
        mean = {row["case"]: row["value"] for row in rows}
        wrong = [[1 - mean[f"{form}, {how}: all"] for how in ("chunks", "cut")] for form in list(FORMS)[1:]]
        summary = [
            judged(f"{form}: wrong, chunks beside cut", *pair, "share", "<= 1.0")
            for form, pair in zip(list(FORMS)[1:], wrong, strict=True)
            if pair[1]
        ]
        keep("long_prompts", rows, summary, model=pipeline.identity)


if __name__ == "__main__":
    main()
