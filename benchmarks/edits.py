"""What each edit of raphael/edit does on the model that comes with the package, read by the project's scene reader.

Prompts are random: two colours of objects, two shapes, a background, seed i for the i-th. `without` is the same prompt
and seed without the edit. Change is the mean over pixels in levels of 255; outside: more than 2 px from the source's
object; IoU: of the objects, told from the background by colour distance. Shares have Wilson's 95 % intervals.

Writes results/edits-<device>-<yyyymm>.json, unless --quick. Docs: docs/guides/edit.md.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from _machine import keep, within

from raphael.edit.invert import reconstruct
from raphael.edit.known import image_to_image, inpaint, outpaint
from raphael.edit.paint import paint
from raphael.edit.rewrite import Keep, refine, replace, reweight
from raphael.edit.run import How, with_sampling
from raphael.edit.sheets import style_sheet
from raphael.edit.switch import switch
from raphael.edit.vary import variations
from raphael.evaluate.metrics.intervals import wilson
from raphael.evaluate.scenes.reader import read_scene
from raphael.generate.pipeline import Pipeline, RaphaelPipeline

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
STYLES = {"flat": "flat style", "outline": "outline drawing", "ink": "ink drawing", "pixel": "pixel art"}
Found = defaultdict[str, list[float]]
Subject = tuple[str, str, str, str, str]  # colour, shape, another colour, another shape, background


def subjects(n: int) -> list[Subject]:
    rng = random.Random(0)
    return [(*_mixed(rng.sample(COLOURS, 3), rng.sample(SHAPES, 2)),) for _ in range(n)]


def _mixed(colours: list[str], shapes: list[str]) -> Subject:
    return colours[0], shapes[0], colours[1], shapes[1], colours[2]


def scene(colour: str, shape: str, background: str) -> str:
    return f"a {colour} {shape} on a {background} background, flat style"


def read(image: np.ndarray) -> tuple[str | None, str | None]:
    """Colour and shape of the largest object."""
    objects = read_scene(image).objects
    return (objects[0].colour, objects[0].shape) if objects else (None, None)


def drawn(pipeline: Pipeline, prompt: str, seed: int) -> np.ndarray:
    return np.asarray(pipeline(prompt, seed=seed).images[0])


def body(image: np.ndarray) -> np.ndarray:
    """(H, W) bool: far from the frame's median colour."""
    pixels = image.astype(float)
    frame = np.concatenate([side.reshape(-1, 3) for side in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:])])
    return np.linalg.norm(pixels - np.median(frame, 0), axis=2) > 44


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def outside(one: np.ndarray, other: np.ndarray) -> float:
    import cv2

    away = ~cv2.dilate(body(one).astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    return float(np.abs(one.astype(float) - other)[away].mean())


def change(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other).mean())


def switching(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    for share in (0.0, 0.07, 0.3, 0.6, 0.8, 1.0):
        for seed, (c1, s1, c2, s2, b) in enumerate(every):
            got = read(switch(pipeline, scene(c1, s1, b), scene(c2, s2, b), share, How(seed)).result[0])
            found[f"switch {share:g}: colour of prompt 2"].append(got[0] == c2)
            found[f"switch {share:g}: shape of prompt 2"].append(got[1] == s2)


def known(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    hole = np.zeros((64, 64), bool)
    hole[10:54, 10:54] = True
    for seed, (c1, s1, c2, s2, b) in enumerate(every):
        source, how = drawn(pipeline, scene(c1, s1, b), seed), How(1000 + seed)
        for strength in (0.3, 0.6, 0.8):
            got = image_to_image(pipeline, source, scene(c1, s2, b), strength, how).result[0]
            found[f"image {strength:g}: new shape"].append(read(got)[1] == s2)
            found[f"image {strength:g}: mean change"].append(change(got, source))
        got = inpaint(pipeline, source, hole, scene(c2, s2, b), how).result[0]
        found["inpaint: new shape and colour"].append(read(got) == (c2, s2))
        found["inpaint: background"].append(read_scene(got).background_colour == b)
        wide = outpaint(pipeline, source[8:56, 8:56], scene(c1, s1, b), (8, 8, 8, 8), how).result[0]
        found["outpaint 48 to 64 px: background"].append(read_scene(wide).background_colour == b)
        found["outpaint 48 to 64 px: one object, the same"].append(
            read_scene(wide).count == 1 and read(wide) == (c1, s1)
        )
        wide = outpaint(pipeline, source, scene(c1, s1, b), (0, 16, 0, 16), how).result[0]
        ends = [read_scene(part).background_colour == b for part in (wide[:, :64], wide[:, -64:])]
        found["outpaint 64 to 96 px: background at both ends"].append(all(ends))


def removing(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    """The right one of two; the mask is its bounding square and 3 px."""
    for seed, (c1, s1, c2, s2, b) in enumerate(every):
        two = f"a {c1} {s1} left of a {c2} {s2} on a plain {b} background, flat style"
        source = drawn(pipeline, two, seed)
        gone = [thing for thing in read_scene(source).objects if thing.colour == c2]
        if len(gone) != 1:
            continue
        (x, y), half = gone[0].centre, gone[0].extent / 2 + 3 / 64
        top, bottom, left, right = (max(0, round(64 * edge)) for edge in (y - half, y + half, x - half, x + half))
        mask = np.zeros((64, 64), bool)
        mask[top:bottom, left:right] = True
        got = read_scene(inpaint(pipeline, source, mask, f"a plain {b} background", How(1000 + seed)).result[0])
        found["remove: one object left"].append(got.count == 1)
        found["remove: the other is as it was"].append([(o.colour, o.shape) for o in got.objects[:1]] == [(c1, s1)])
        found["remove: background"].append(got.background_colour == b)


def rewriting(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    ways = {
        "replace": lambda c1, c2: Keep(),
        "replace, all steps": lambda c1, c2: Keep(1.0, 1.0),
        "replace, blend": lambda c1, c2: Keep(1.0, 1.0, blend=(c1, c2), threshold=0.6),
    }
    for seed, (c1, s1, c2, _, b) in enumerate(every):
        for name, keep_of in ways.items():
            edited = replace(pipeline, scene(c1, s1, b), scene(c2, s1, b), How(seed), keep_of(c1, c2))
            _compared(name, edited, (c2, s1), found)
        plain = f"a {c1} {s1} on a {b} background"
        edited = refine(pipeline, plain, f"{plain}, pixel art", How(seed))
        _compared("refine", edited, (c1, s1), found)
        found["refine: style"].append(read_scene(edited.result[0]).style == "pixel")
        for factor in (-1.0, 3.0):
            edited = reweight(pipeline, f"a {c1} {s1} on a {b} background", {c1: factor}, How(seed))
            found[f"reweight colour by {factor:g}: colour"].append(read(edited.result[0])[0] == c1)
            found[f"reweight colour by {factor:g}: change"].append(change(edited.result[0], edited.source[0]))
        source = drawn(pipeline, scene(c1, s1, b), seed)
        how = with_sampling(pipeline, How(seed), steps=30)
        edited = replace(pipeline, scene(c1, s1, b), scene(c2, s1, b), how, Keep(), source)
        _compared("replace in a picture", edited, (c2, s1), found)
        again = reconstruct(pipeline, source, scene(c1, s1, b), how)
        own = again.shown["its own decoding"][0]
        found["reconstruct: change from its decoding"].append(change(again.result[0], own))
        found["reconstruct: without the cure"].append(change(again.without[0], own))


def _compared(name: str, edited: Any, wanted: tuple[str, str], found: Found) -> None:
    source, result, without = edited.source[0], edited.result[0], edited.without[0]
    found[f"{name}: right"].append(read(result) == wanted)
    for side, image in (("", result), (" without", without)):
        found[f"{name}: IoU{side}"].append(overlap(body(source), body(image)))
        found[f"{name}: change outside{side}"].append(outside(source, image))


PAINTINGS = {  # arguments of `paint`
    "as eDiff-I's": {"weight": 0.5, "away": 0.0, "arrange": 0},
    "away": {"weight": 0.5, "arrange": 0},
    "arranged": {"weight": 0.5, "away": 0.0},
    "both": {},
    "both, weight 0.25": {"weight": 0.25},
    "both, weight 1": {"weight": 1.0},
}


def painting(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    left = np.zeros((64, 64), bool)
    left[18:46, 2:30] = True
    for seed, (c1, s1, c2, s2, b) in enumerate(every):
        prompt = f"a {c1} {s1} and a {c2} {s2} on a {b} background, flat style"
        regions = {f"{c1} {s1}": left[:, ::-1].copy(), f"{c2} {s2}": left}
        for name, arguments in PAINTINGS.items():
            edited = paint(pipeline, prompt, regions, how=How(seed), **arguments)
            sides = ((f"paint {name}", edited.result[0]), ("not painted", edited.without[0]))
            for side, image in sides if name == "both" else sides[:1]:
                things = {thing.colour: thing for thing in read_scene(image).objects}
                right = c1 in things and c2 in things and bool(things[c1].centre[0] > things[c2].centre[0])
                found[f"{side}: wrong sides"].append(not right)
                found[f"{side}: both as asked for"].append(
                    right and len(things) == 2 and (things[c1].shape, things[c2].shape) == (s1, s2)
                )
                for colour, middle in ((c1, 48), (c2, 16)):
                    found[f"{side}: IoU of region and object"].append(
                        _boxes(things[colour], (middle / 64, 0.5), 28 / 64) if colour in things else 0.0
                    )


def _boxes(thing: Any, centre: tuple[float, float], extent: float) -> float:
    """IoU of an object's bounding square and another, in shares of the side."""
    sides = []
    for one, other in zip(thing.centre, centre, strict=True):
        low = max(one - thing.extent / 2, other - extent / 2)
        sides.append(max(0.0, min(one + thing.extent / 2, other + extent / 2) - low))
    common = sides[0] * sides[1]
    return common / (thing.extent**2 + extent**2 - common)


def varying(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    for seed, (c1, s1, _, _, b) in enumerate(every):
        for strength in (0.2, 0.5):
            edited = variations(pipeline, scene(c1, s1, b), strength, How(seed))
            found[f"vary {strength:g}: colour and shape kept"].append(read(edited.result[0]) == (c1, s1))
            found[f"vary {strength:g}: change"].append(change(edited.result[0], edited.source[0]))
        sheet = style_sheet(pipeline, f"a {c1} {s1} on a {b} background", list(STYLES.values()), How(seed))
        for row, style in enumerate(STYLES):
            found[f"style {style}: read"].append(read_scene(sheet.result[row]).style == style)
            found[f"style {style}: colour and shape kept"].append(read(sheet.result[row]) == (c1, s1))


MEASURES: tuple[Callable[[Pipeline, list[Subject], Found], None], ...] = (
    switching,
    known,
    removing,
    rewriting,
    painting,
    varying,
)


def rows_of(found: Found) -> Iterator[dict[str, Any]]:
    for case, values in found.items():
        row: dict[str, Any] = {"case": case, "value": round(float(np.mean(values)), 4), "n": len(values)}
        if isinstance(values[0], bool):
            row["low"], row["high"] = (round(end, 4) for end in wilson(sum(values), len(values)))
        yield row


def judged_rows(mean: dict[str, float]) -> list[dict[str, Any]]:
    """What the edits were meant to reach, as shares that are wrong."""
    limits = {
        "outpaint 48 to 64 px: background": 0.05,
        "remove: background": 0.05,
        "replace: right": 0.1,
        "replace, all steps: IoU": 0.1,
        "vary 0.2: colour and shape kept": 0.1,
    }
    rows = [within(f"wrong, {case}", 1 - mean[case], limit, "share") for case, limit in limits.items()]
    third = max(mean["not painted: wrong sides"] / 3, 1e-9)
    rows.append(within("paint: wrong sides", mean["paint both: wrong sides"], third, "share"))
    missed = 1 - mean["paint both: IoU of region and object"]
    rows.append(within("paint: 1 - IoU of region and object", missed, 0.5, "share"))
    third = max(mean["replace, blend: change outside without"] / 3, 1e-9)
    rows.append(within("replace, blend: change outside", mean["replace, blend: change outside"], third, "levels"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one prompt, a step or two; keeps nothing")
    parser.add_argument("-n", type=int, default=24, help="prompts (default: %(default)s)")
    names = [measure.__name__ for measure in MEASURES]
    parser.add_argument("--only", choices=names, help="one measure; keeps nothing")
    arguments = parser.parse_args()
    pipeline = RaphaelPipeline.from_pretrained("scenes")
    if arguments.quick:
        pipeline.defaults = with_sampling(pipeline, How(), steps=2).sampling
    found: Found = defaultdict(list)
    for measure in MEASURES:
        if arguments.only in (None, measure.__name__):
            measure(pipeline, subjects(1 if arguments.quick else arguments.n), found)
    rows = list(rows_of(found))
    for row in rows:
        ends = f"  ({row['low']:.2f} to {row['high']:.2f})" if "low" in row else ""
        print(f"{row['case']:<58}{row['value']:>8.3f}{ends}  n {row['n']}")
    if not (arguments.quick or arguments.only):
        keep("edits", rows, judged_rows({row["case"]: row["value"] for row in rows}), model=pipeline.identity)


if __name__ == "__main__":
    main()
