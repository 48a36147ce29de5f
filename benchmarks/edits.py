"""What each edit of raphael/edit does on the model that comes with the package, read by the project's scene reader.

Prompts are random: two colours of objects, two shapes, a background, seed i for the i-th. `without` is the same prompt
and seed without the edit. Change is the mean over pixels in levels of 255; outside: more than 2 px from the source's
object; IoU: of the objects, told from the background by colour distance. Shares have Wilson's 95 % intervals.

Each measure is the kind of `raphael edit` (remove: of inpaint) that its cases begin with. Prompts: 73 where 95 % is
asked for (80 where some show no second object), 40 where 90 % is, so that none wrong has an interval above what is
asked for; 24 of the others.

Writes results/edits-<device>-<yyyymm>.json, unless --quick; with --only the rows of the others stay as they are there.
Docs: docs/guides/edit.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from _edit_scenes import (
    Subject,
    body,
    change,
    drawn,
    other,
    outside,
    overlap,
    pictured,
    read,
    scene,
    step,
    subjects,
    two_objects,
)
from _machine import keep, result_file, within

from raphael.edit.invert import reconstruct
from raphael.edit.known import image_to_image, inpaint, outpaint
from raphael.edit.paint import paint
from raphael.edit.rewrite import Keep, refine, replace, reweight
from raphael.edit.run import How, with_sampling
from raphael.edit.sheets import style_sheet
from raphael.edit.switch import switch
from raphael.edit.vary import interpolate, variations
from raphael.evaluate.metrics.intervals import wilson
from raphael.evaluate.scenes.reader import read_scene
from raphael.generate.pipeline import Pipeline, RaphaelPipeline

STYLES = {"flat": "flat style", "outline": "outline drawing", "ink": "ink drawing", "pixel": "pixel art"}
Found = defaultdict[str, list[float]]


def switch_(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    for share in (0.0, 0.07, 0.3, 0.6, 0.8, 1.0):
        for seed, (c1, s1, c2, s2, b) in enumerate(every):
            got = read(switch(pipeline, scene(c1, s1, b), scene(c2, s2, b), share, How(seed)).result[0])
            found[f"switch {share:g}: colour of prompt 2"].append(got[0] == c2)
            found[f"switch {share:g}: shape of prompt 2"].append(got[1] == s2)


def image_(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    for seed, (c1, s1, _, s2, b) in enumerate(every):
        source = drawn(pipeline, scene(c1, s1, b), seed)
        for strength in (0.3, 0.6, 0.8):
            got = image_to_image(pipeline, source, scene(c1, s2, b), strength, How(1000 + seed)).result[0]
            found[f"image {strength:g}: new shape"].append(read(got)[1] == s2)
            found[f"image {strength:g}: mean change"].append(change(got, source))


def inpaint_(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    """The right one of two becomes another; the prompt names both; no feathering, so that the seam is the model's."""
    for seed, (c1, s1, c2, s2, b) in enumerate(every):
        made = two_objects(pipeline, (c1, s1, c2, s2, b), seed)
        if made is None:
            continue
        source, mask = made
        new = other(c1, s1, c2, s2, b)
        prompt = f"a {c1} {s1} left of a {new[0]} {new[1]} on a plain {b} background, flat style"
        got = inpaint(pipeline, source, mask, prompt, How(1000 + seed), feather_px=0).result[0]
        seen = read_scene(got)
        things = [(thing.colour, thing.shape) for thing in seen.objects]
        found["inpaint: new object as asked for"].append(new in things)
        found["inpaint: the other is as it was"].append((c1, s1) in things)
        found["inpaint: these two and no other"].append(sorted(things) == sorted([(c1, s1), new]))
        found["inpaint: background"].append(seen.background_colour == b)
        found["inpaint: seam"].append(step(got, mask))
        found["inpaint: seam, the picture's own"].append(step(source, mask))


def outpaint_(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    for seed, (c1, s1, _, _, b) in enumerate(every):
        source, how = drawn(pipeline, scene(c1, s1, b), seed), How(1000 + seed)
        wide = outpaint(pipeline, source[8:56, 8:56], scene(c1, s1, b), (8, 8, 8, 8), how).result[0]
        seen = read_scene(wide)
        found["outpaint 48 to 64 px: background"].append(seen.background_colour == b)
        found["outpaint 48 to 64 px: one object, the same"].append(seen.count == 1 and read(wide) == (c1, s1))
        wide = outpaint(pipeline, source, scene(c1, s1, b), (0, 16, 0, 16), how).result[0]
        ends = [read_scene(part).background_colour == b for part in (wide[:, :64], wide[:, -64:])]
        found["outpaint 64 to 96 px: background at both ends"].append(all(ends))


def remove_(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    for seed, (c1, s1, c2, s2, b) in enumerate(every):
        made = two_objects(pipeline, (c1, s1, c2, s2, b), seed)
        if made is None:
            continue
        source, mask = made
        ground = np.median(source[:4].reshape(-1, 3), 0)
        for name, strength in (("remove", 0.4), ("remove, strength 1", 1.0)):
            how, prompt = How(1000 + seed), f"a plain {b} background"
            image = inpaint(pipeline, source, mask, prompt, how, strength=strength).result[0]
            got = read_scene(image)
            found[f"{name}: one object left"].append(got.count == 1)
            found[f"{name}: the other is as it was"].append(
                [(o.colour, o.shape) for o in got.objects[:1]] == [(c1, s1)]
            )
            found[f"{name}: background"].append(got.background_colour == b)
            streak = np.linalg.norm(image.astype(float) - ground, axis=2)[mask] > 44
            found[f"{name}: share of the hole that is not ground"].append(float(streak.mean()))


REPLACINGS = {  # what is kept; None: by default
    "replace": None,
    "replace, cross 0.8, self 0.4": Keep(),
    "replace, all steps": Keep(1.0, 1.0),
}


def replace_(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    for seed, (c1, s1, c2, s2, b) in enumerate(every):
        for name, keeping in REPLACINGS.items():
            edited = replace(pipeline, scene(c1, s1, b), scene(c2, s1, b), How(seed), keeping)
            _compared(name, edited, (c2, s1), found)
        edited = replace(pipeline, scene(c1, s1, b), scene(c1, s2, b), How(seed))
        found["replace a shape: right"].append(read(edited.result[0]) == (c1, s2))
        found["replace a shape: change outside"].append(outside(edited.source[0], edited.result[0]))
        found["replace a shape: change outside without"].append(outside(edited.source[0], edited.without[0]))


def refine_(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    for seed, (c1, s1, _, _, b) in enumerate(every):
        plain = f"a {c1} {s1} on a {b} background"
        edited = refine(pipeline, plain, f"{plain}, pixel art", How(seed))
        _compared("refine", edited, (c1, s1), found)
        found["refine: style"].append(read_scene(edited.result[0]).style == "pixel")


def reweight_(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    for seed, (c1, s1, _, _, b) in enumerate(every):
        for factor in (-1.0, 3.0):
            edited = reweight(pipeline, f"a {c1} {s1} on a {b} background", {c1: factor}, How(seed))
            found[f"reweight colour by {factor:g}: colour"].append(read(edited.result[0])[0] == c1)
            found[f"reweight colour by {factor:g}: change"].append(change(edited.result[0], edited.source[0]))


def reconstruct_(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    """Pictures that no model has drawn, from their own noise again, and a colour replaced in them; twice the steps."""
    for seed, (c1, s1, c2, s2, b) in enumerate(every):
        source = pictured((c1, s1, c2, s2, b), seed)
        how = with_sampling(pipeline, How(seed), steps=2 * pipeline.defaults.steps)
        edited = replace(pipeline, scene(c1, s1, b), scene(c2, s1, b), how, image=source)
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


def paint_(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
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
    for one, its in zip(thing.centre, centre, strict=True):
        low = max(one - thing.extent / 2, its - extent / 2)
        sides.append(max(0.0, min(one + thing.extent / 2, its + extent / 2) - low))
    common = sides[0] * sides[1]
    return common / (thing.extent**2 + extent**2 - common)


def vary_(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    for seed, (c1, s1, _, _, b) in enumerate(every):
        for strength in (0.2, 0.5):
            edited = variations(pipeline, scene(c1, s1, b), strength, How(seed))
            found[f"vary {strength:g}: colour and shape kept"].append(read(edited.result[0]) == (c1, s1))
            found[f"vary {strength:g}: change"].append(change(edited.result[0], edited.source[0]))


def interpolate_(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    """A quarter, half and three quarters of the way, from seed to seed and prompt to prompt: one colour, two shapes."""
    for seed, (c1, s1, _, s2, b) in enumerate(every):
        how, prompt = How(seed, num_images=5), scene(c1, s1, b)
        ways = {
            "seed to seed": interpolate(pipeline, prompt, target_seed=1000 + seed, how=how),
            "prompt to prompt": interpolate(pipeline, prompt, scene(c1, s2, b), how=how),
        }
        for name, edited in ways.items():
            seen = [read(image) for image in edited.result]
            colours = [colour == c1 for colour, _ in seen[1:-1]]
            found[f"interpolate {name}: colour kept all the way"].append(all(colours))
            found[f"interpolate {name}: share of images with the colour"].append(float(np.mean(colours)))
            shapes = [shape in (s1, s2 if name == "prompt to prompt" else s1) for _, shape in seen[1:-1]]
            found[f"interpolate {name}: an end's shape all the way"].append(all(shapes))
            found[f"interpolate {name}: colour at both ends"].append(seen[0][0] == c1 == seen[-1][0])


def styles_(pipeline: Pipeline, every: list[Subject], found: Found) -> None:
    for seed, (c1, s1, _, _, b) in enumerate(every):
        sheet = style_sheet(pipeline, f"a {c1} {s1} on a {b} background", list(STYLES.values()), How(seed))
        for row, style in enumerate(STYLES):
            found[f"styles, {style}: read"].append(read_scene(sheet.result[row]).style == style)
            found[f"styles, {style}: colour and shape kept"].append(read(sheet.result[row]) == (c1, s1))


Measure = Callable[[Pipeline, list[Subject], Found], None]
MEASURES: dict[str, tuple[Measure, int]] = {  # kind -> what measures it, prompts
    "switch": (switch_, 24),
    "image": (image_, 24),
    "inpaint": (inpaint_, 40),
    "outpaint": (outpaint_, 73),
    "remove": (remove_, 80),  # a few pictures show no second object
    "replace": (replace_, 40),
    "refine": (refine_, 24),
    "reweight": (reweight_, 24),
    "reconstruct": (reconstruct_, 24),
    "paint": (paint_, 24),
    "vary": (vary_, 40),
    "interpolate": (interpolate_, 40),
    "styles": (styles_, 24),
}
ASKED = {  # shares that are wrong, at most
    "inpaint: new object as asked for": 0.1,
    "inpaint: the other is as it was": 0.1,
    "outpaint 48 to 64 px: background": 0.05,
    "remove: background": 0.05,
    "replace: right": 0.1,
    "vary 0.2: colour and shape kept": 0.1,
    "interpolate seed to seed: colour kept all the way": 0.1,
    "interpolate prompt to prompt: colour kept all the way": 0.1,
}


def rows_of(found: Found) -> Iterator[dict[str, Any]]:
    for case, values in found.items():
        row: dict[str, Any] = {"case": case, "value": round(float(np.mean(values)), 4), "n": len(values)}
        if isinstance(values[0], bool):
            row["low"], row["high"] = (round(end, 4) for end in wilson(sum(values), len(values)))
        yield row


def judged_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the edits were meant to reach, as shares that are wrong; so what the 95 % interval still allows."""
    by_case = {row["case"]: row for row in rows}
    found = []
    for case, limit in ASKED.items():
        if case in by_case:
            found.append(within(f"wrong, {case}", 1 - by_case[case]["value"], limit, "share"))
            right, count = round(by_case[case]["value"] * by_case[case]["n"]), by_case[case]["n"]
            found.append(within(f"wrong at most, {case}", 1 - wilson(right, count)[0], limit, "share"))
    for case, peer, unit, part in (
        ("replace: change outside", "replace: change outside without", "levels", 1 / 3),
        ("paint both: wrong sides", "not painted: wrong sides", "share", 1 / 3),
    ):
        if case in by_case:
            found.append(within(case, by_case[case]["value"], max(by_case[peer]["value"] * part, 1e-9), unit))
    for case, limit in (("replace: IoU", 0.1), ("paint both: IoU of region and object", 0.5)):
        if case in by_case:
            found.append(within(f"1 - {case}", 1 - by_case[case]["value"], limit, "share"))
    return found


def others(identity: str, measured: list[str]) -> list[dict[str, Any]]:
    """Rows of the result file that the same model's other measures left there."""
    file = result_file("edits")
    if not file.exists():
        return []
    kept = json.loads(file.read_text(encoding="utf-8"))
    return [row for row in kept["results"] if kept["model"] == identity and row.get("measure") not in (None, *measured)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one prompt, a step or two; keeps nothing")
    parser.add_argument("-n", type=int, help="prompts (default: as many as what is asked for needs)")
    parser.add_argument("--only", nargs="+", choices=MEASURES, help="these; the rows of others stay as they are")
    arguments = parser.parse_args()
    pipeline = RaphaelPipeline.from_pretrained("scenes")
    if arguments.quick:
        pipeline.defaults = with_sampling(pipeline, How(), steps=2).sampling
    for name, (measure, n) in MEASURES.items():
        if arguments.only and name not in arguments.only:
            continue
        found: Found = defaultdict(list)
        measure(pipeline, subjects(1 if arguments.quick else arguments.n or n), found)
        now = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
        rows = [{"measure": name, **row, "measured": now} for row in rows_of(found)]
        for row in rows:
            ends = f"  ({row['low']:.2f} to {row['high']:.2f})" if "low" in row else ""
            print(f"{row['case']:<58}{row['value']:>8.3f}{ends}  n {row['n']}")
        if not arguments.quick:
            rows += others(pipeline.identity, [name])
            rows.sort(key=lambda row: list(MEASURES).index(row["measure"]))
            keep("edits", rows, judged_rows(rows), model=pipeline.identity)


if __name__ == "__main__":
    main()
