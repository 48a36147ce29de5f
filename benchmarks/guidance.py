"""Guidance by gradients: how well guides see noised images, what a classifier does to a DDPM, CLIP beside its rival.

1. Accuracy of classifiers (six shapes; on pixels of a DDPM and latents of `scenes`) and of a noised CLIP (latents of
   `scenes`, 64 captions) at timesteps 200, 500 and 800, on records kept out.
2. Classifier guidance 0 to 10 of both models' unconditional branch: shape read as asked, precision and recall beside
   drawn images (random features; Wilson's intervals of both shares).
3. On the model that comes with the package, CLIP guidance (of the conditional branch, scale 1) beside classifier-free
   guidance: all that the prompt states read right, colours alone, Frechet distance in random features. GLIDE (arXiv
   2112.10741) finds by human judges that classifier-free guidance wins though CLIP guidance scores higher by a CLIP. At
   equal CLIP score: the curve of classifier-free guidance, interpolated over its score, beside each point of CLIP
   guidance, up to the scale where it is highest; 95 % intervals of the difference by a bootstrap over prompts.

--home FOLDER is where models are trained on first use (a DDPM, two classifiers, a CLIP: 25 minutes of one core) and
kept. Writes results/guidance-<device>-<yyyymm>.json, unless --quick.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from _machine import judged, keep

from data_pipeline.source.scene_captions import caption, heldout_prompts
from data_pipeline.source.scene_drawing import draw
from data_pipeline.source.scenes import LAYOUT_SHARES, SHAPES, scene_of_row
from raphael.base.config.params import load_config
from raphael.base.config.sampling import Sampling
from raphael.base.images.fit import fit
from raphael.base.records import LABEL, MOMENTS, NO_LABEL, PIXELS, TOKEN_IDS, Records, RecordWriter
from raphael.base.stage import Stage, read_json, write_json
from raphael.evaluate.features.random_net import RandomNet
from raphael.evaluate.metrics.frechet import frechet_distance
from raphael.evaluate.metrics.intervals import wilson
from raphael.evaluate.metrics.neighbours import precision_recall
from raphael.evaluate.scenes.attributes import wrong_attributes
from raphael.evaluate.scenes.classes import shape_of
from raphael.evaluate.scenes.reader import judge, read_scene
from raphael.generate.pipeline import Pipeline, RaphaelPipeline
from raphael.systems import train_stage
from raphael.systems.guides.guide import Guide, load_guide
from raphael.systems.guides.training import GuideJob, settings_of, train_guide
from raphael.train.loop import Hooks

PROJECT = Path(__file__).resolve().parents[1]
SINGLE = {name: float(name == "single") for name in LAYOUT_SHARES}
HELDOUT_SHARE, DDPM_PX, SCENES_PX = 0.12, 32, 64
WEIGHTS = (0.0, 1.0, 2.0, 4.0, 7.0, 10.0)
CLIP_WEIGHTS = (0.5, 1.0, 2.0, 4.0, 8.0)
SCALES = (1.0, 1.3, 1.6, 2.5, 4.0)
SUITES = ("single", "relation", "count", "text")  # of the held-out prompts
SMALL = {"network.channels": [8, 16], "network.attention_levels": [1], "network.head_dim": 8, "num_heldout": 16}


def scenes(count: int, shares: dict[str, float], first: int = 0) -> Iterator[Any]:
    return (scene_of_row(0, row, (SCENES_PX, SCENES_PX), HELDOUT_SHARE, shares) for row in range(first, first + count))


def fitted(scene: Any, side: int) -> np.ndarray:
    return fit(draw(scene), side, side, side != SCENES_PX)


def write_records(folder: Path, values: dict[str, np.ndarray], facts: dict[str, Any], side: int) -> Records:
    if not (folder / "manifest.json").is_file():
        fields = {name: (str(value.dtype), value.shape[1:]) for name, value in values.items()}
        count = len(next(iter(values.values())))
        with RecordWriter(
            folder, {f"{side}x{side}": fields}, {"picture": {"sizes_px": [[side, side]]}, **facts}
        ) as out:
            out.append([f"{row:09d}" for row in range(count)], values, f"{side}x{side}")
    return Records(folder)


def ddpm(home: Path, images: int, count: int) -> tuple[Pipeline, Records]:
    """A DDPM of six shapes by the settings of params.ddpm.yaml, and its records."""
    home.mkdir(parents=True, exist_ok=True)
    base, own = (yaml.safe_load((PROJECT / name).read_text()) for name in ("params.yaml", "params.ddpm.yaml"))
    del base["train"]["settings"]
    said = merged(base, own)
    loop = {"num_images": images, "sample_every_images": 0, "warmup_images": min(640, images // 2)}
    said = merged(said, {"train": {"num_workers": 0, "loop": loop}})
    (home / "params.yaml").write_text(yaml.safe_dump(said))
    config = load_config(home / "params.yaml")
    classes = sorted(SHAPES)
    if not (home / "data/records/manifest.json").is_file():
        drawn = list(scenes(count, SINGLE))
        pixels = np.stack([fitted(scene, DDPM_PX).transpose(2, 0, 1) for scene in drawn])
        labels = np.array([classes.index(scene.things[0].shape) for scene in drawn], np.int32)
        from raphael.base.strict import to_dict

        facts = {LABEL: {"from": "scenes", "classes": classes}, "picture": to_dict(config.picture)}
        write_records(home / "data/records", {PIXELS: pixels, LABEL: labels}, facts, DDPM_PX)
        write_json(home / "data/source/prompts.json", {"source": "scenes", "prompts": [{"prompt": "circle"}]})
    if not (home / "models/raphael/manifest.json").is_file():
        here = os.getcwd()
        os.chdir(home)
        try:
            train_stage.run(config, Stage("train", home, system="ddpm"))
        finally:
            os.chdir(here)
    return RaphaelPipeline.from_pretrained(home / "models/raphael"), Records(home / "data/records")


def merged(below: dict, above: dict) -> dict:
    both = {name: merged(below[name], above[name]) for name in below if isinstance(above.get(name), dict)}
    return {**below, **above, **both}


def captioned(home: Path, pipeline: Pipeline, count: int) -> Records:
    """Drawn scenes with captions, encoded by the model's own encoders."""
    if (home / "data/records/manifest.json").is_file():
        return Records(home / "data/records")
    import torch

    moments, texts = [], []
    for start in range(0, count, 100):
        some = list(scenes(min(100, count - start), LAYOUT_SHARES, start))
        texts += [caption(scene, random.Random(f"0/caption/{start + row}"))[0] for row, scene in enumerate(some)]
        images = torch.from_numpy(np.stack([fitted(scene, SCENES_PX) for scene in some])).permute(0, 3, 1, 2)
        with torch.no_grad():
            moments.append(pipeline.autoencoder.encode_moments(images.float() / 127.5 - 1).half().numpy())
    ids = pipeline.text_encoder.tokenize(texts).numpy().astype(np.int32)
    named = [[number for number, shape in enumerate(sorted(SHAPES)) if shape in text] for text in texts]
    labels = np.array([found[0] if len(found) == 1 else NO_LABEL for found in named], np.int32)
    facts = {"autoencoder": pipeline.autoencoder.facts(), LABEL: {"from": "captions", "classes": sorted(SHAPES)}}
    values = {MOMENTS: np.concatenate(moments), TOKEN_IDS: ids, LABEL: labels}
    return write_records(home / "data/records", values, facts, SCENES_PX)


def guide_of(home: Path, kind: str, pipeline: Pipeline, records: Records, changes: dict[str, Any]) -> Guide:
    folder = home / kind / "guide"
    if not (folder / "manifest.json").is_file():
        job = GuideJob(kind, pipeline, records, settings_of(kind, pipeline.space == "pixels", changes))
        hooks = Hooks(on_log=lambda point, images: print(f"  {kind}: {images:,} {_told(point)}", flush=True))
        train_guide(job, home / kind, hooks)
    return load_guide(f"{kind}:{folder}")


def _told(point: dict[str, float]) -> str:
    return f"loss {point['train/loss']:.3f} accuracy {point['train/accuracy']:.3f} {point['train/images_per_s']:.0f}/s"


def once(file: Path, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows that were measured already by a run that was ended, or measured now."""
    if not file.is_file():
        write_json(file, make())
    return read_json(file)


def share(case: str, hits: int, n: int, **more: Any) -> dict[str, Any]:
    low, high = wilson(hits, n)
    return {"case": case, "value": round(hits / n, 4), "low": round(low, 4), "high": round(high, 4), "n": n, **more}


def accuracies(guide: Guide, what: str) -> list[dict[str, Any]]:
    return [share(f"{what} at t = {t}: right", one["hits"], one["n"]) for t, one in guide.meta["heldout"].items()]


def features(images: np.ndarray) -> np.ndarray:
    import torch

    return RandomNet()(torch.from_numpy(images)).numpy()


def drawn(pipeline: Pipeline, prompts: list[str], **call: Any) -> np.ndarray:
    images = pipeline(prompts, output_type="np", **call).images
    return np.uint8(np.rint(images * 255))


@dataclass(frozen=True)
class Curve:
    """Of which model: its name, what it draws by itself, at which side, how it is sampled, and the weights asked."""

    name: str
    shares: dict[str, float]
    side: int
    sampling: Sampling
    weights: tuple[float, ...]
    scales: tuple[float, ...]


def classifier_curve(pipeline: Pipeline, guide: Guide, each: int, curve: Curve) -> list[dict[str, Any]]:
    """The unconditional branch alone (guidance_scale 0) with the classifier, and classifier-free guidance beside it.

    Reference: drawn scenes as the model learned them. Shape as asked: of the largest object."""
    asked = sorted(SHAPES) * each
    prompts = asked if pipeline.system == "ddpm" else [f"a {shape}" for shape in asked]
    real = [(scene, fitted(scene, curve.side)) for scene in scenes(max(len(prompts), 24), curve.shares, first=10**6)]
    of_real, rows = features(np.stack([image for _, image in real])), []
    cases: list[tuple[str, dict[str, Any]]] = [
        (f"classifier, weight {weight:g}", {"guidance_scale": 0.0, "guidance": guide, "guidance_weight": weight})
        for weight in curve.weights
    ]
    cases += [(f"classifier-free, scale {scale:g}", {"guidance_scale": scale}) for scale in curve.scales]
    for case, how in cases:
        images = drawn(pipeline, prompts, sampling=curve.sampling, **how)
        right = sum(shape_of(read_scene(image)) == shape for image, shape in zip(images, asked, strict=True))
        found = precision_recall(features(images), of_real)
        rows.append(share(f"{curve.name}: {case}: shape as asked", right, len(prompts)))
        rows += [
            share(f"{curve.name}: {case}: {name}", round(value * n), n)
            for (name, value), n in zip(found.items(), (len(prompts), len(real)), strict=True)
        ]
        print(f"  {rows[-3]['case']} {rows[-3]['value']:.3f}, recall {rows[-1]['value']:.3f}", flush=True)
    single = [(scene.things[0].shape, image) for scene, image in real if len(scene.things) == 1]
    ceiling = sum(shape_of(read_scene(image)) == shape for shape, image in single)
    return [*rows, share(f"{curve.name}: drawn images: shape read right", ceiling, len(single))]


Outcomes = dict[str, np.ndarray]  # of each prompt: "score" (the cosine), "whole", "colour"


def outcomes(images: np.ndarray, entries: list[dict[str, Any]], scorer: Any) -> Outcomes:
    seen, texts = scorer.embed_images(images), scorer.embed_texts([entry["prompt"] for entry in entries])
    readings = [read_scene(image) for image in images]
    whole = [not wrong_attributes(entry, reading) for entry, reading in zip(entries, readings, strict=True)]
    colour = [bool(judge(reading, entry["truth"])["shape_colour"]) for entry, reading in zip(entries, readings)]
    score = (seen * texts).sum(1).cpu().numpy()
    return {"score": score.astype(float), "whole": np.array(whole, float), "colour": np.array(colour, float)}


def clip_beside_free(
    pipeline: Pipeline, guide: Guide, n: int, points: tuple[tuple[float, ...], ...]
) -> list[dict[str, Any]]:
    """n: prompts of each suite. points: (scales of classifier-free guidance, weights of CLIP guidance)."""
    listed = heldout_prompts(0, n, SCENES_PX, HELDOUT_SHARE, "guidance/")
    entries = [entry for entry in listed if entry["suite"] in SUITES]
    scorer, prompts = pipeline.scorer(), [entry["prompt"] for entry in entries]
    real = features(np.stack([fitted(scene, SCENES_PX) for scene in scenes(max(400, 2 * n), LAYOUT_SHARES, 10**6)]))
    scales, weights = points
    free = {scale: {"guidance_scale": scale} for scale in scales}
    clip = {w: {"guidance_scale": 1.0, "guidance": guide, "guidance_weight": w} for w in weights}
    rows, found = [], {}
    for name, cases in (("classifier-free, scale", free), ("CLIP, weight", clip)):
        for value, how in cases.items():
            images = drawn(pipeline, prompts, **how)
            told = found[name, value] = outcomes(images, entries, scorer)
            low, high = interval(lambda rows, told=told: told["score"][rows].mean(), len(prompts))
            score = {"value": round(float(told["score"].mean()), 4), "low": low, "high": high, "n": len(prompts)}
            rows.append({"case": f"{name} {value:g}: CLIP score", **score})
            for what in ("whole", "colour"):
                rows.append(share(f"{name} {value:g}: {what} right", int(told[what].sum()), len(prompts)))
            rows.append({"case": f"{name} {value:g}: Frechet distance", "value": distance(features(images), real)})
    pairs = [found["classifier-free, scale", scale] for scale in scales]
    for w in weights:
        rows += at_equal_score(f"CLIP, weight {w:g}", found["CLIP, weight", w], pairs)
    return rows


def distance(one: np.ndarray, other: np.ndarray) -> float:
    sides = [(rows.mean(0), np.cov(rows, rowvar=False)) for rows in (one.astype(float), other.astype(float))]
    return round(float(frechet_distance(*sides[0], *sides[1])), 4)


def at_equal_score(name: str, clip: Outcomes, free: list[Outcomes]) -> Iterator[dict[str, Any]]:
    """Classifier-free guidance less CLIP guidance, where both have the CLIP score of the latter. free: by rising scale;
    beyond the scale of the highest score more guidance only loses, so the curve ends there. `inside`: whether
    classifier-free guidance reaches that score at all; where it does not, its nearest end stands there."""
    for what in ("whole", "colour"):

        def less(rows: np.ndarray, what: str = what) -> float:
            scores = [one["score"][rows].mean() for one in free]
            rising = range(int(np.argmax(scores)) + 1)
            values = [free[number][what][rows].mean() for number in rising]
            order = sorted(rising, key=scores.__getitem__)
            at = np.interp(clip["score"][rows].mean(), [scores[k] for k in order], [values[k] for k in order])
            return float(at) - float(clip[what][rows].mean())

        n = len(clip["score"])
        low, high = interval(less, n)
        scores = [one["score"].mean() for one in free]
        told = {"value": round(less(np.arange(n)), 4), "low": low, "high": high, "n": n}
        inside = bool(scores[0] <= clip["score"].mean() <= max(scores))
        yield {"case": f"classifier-free less {name}, equal CLIP score: {what} right", **told, "inside": inside}


def interval(of: Callable[[np.ndarray], float], n: int) -> tuple[float, float]:
    """95 % by the percentiles of 1000 resamples of n prompts."""
    rng = np.random.default_rng(0)
    values = [of(rng.integers(0, n, n)) for _ in range(1000)]
    low, high = np.percentile(values, (2.5, 97.5))
    return round(float(low), 4), round(float(high), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="models of a few steps; keeps nothing")
    parser.add_argument("--home", type=Path, help="where models are kept (default: a folder that goes with the run)")
    parser.add_argument("--ddpm-images", type=int, default=88_000, help="of its training (default: %(default)s)")
    parser.add_argument("--classifier-images", type=int, help="of its training (default: as classifier.yaml says)")
    parser.add_argument("--only", choices=("scenes", "ddpm"), help="one model; kept as guidance_<model>")
    parser.add_argument("-n", type=int, default=60, help="prompts of a suite, images of a class (default: %(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home, rows, facts = (given.home or Path(temporary)).resolve(), [], {}
        few = {**SMALL, "loop.num_images": 128, "loop.warmup_images": 32, "loop.log_every_images": 64}
        few = few if given.quick else {}
        for name, section in (("scenes", of_scenes), ("ddpm", of_ddpm)):
            if given.only in (None, name):
                rows += section(given, home, few, facts)
    for row in rows:
        ends = f"  ({row['low']:.3f} to {row['high']:.3f})  n {row['n']}" if "low" in row else ""
        print(f"{row['case']:<88}{row['value']:>8.3f}{ends}{'' if row.get('inside', True) else '  beyond its reach'}")
    if not given.quick:
        keep("guidance" + (f"_{given.only}" if given.only else ""), rows, summary_of(rows), **facts)


def of_scenes(
    given: argparse.Namespace, home: Path, few: dict[str, Any], facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """The model that comes with the package: both guides on latents."""
    quick, n = given.quick, 2 if given.quick else given.n
    pipeline = RaphaelPipeline.from_pretrained("scenes")
    records = captioned(home / "scenes", pipeline, 200 if quick else 16_000)
    clip = guide_of(home / "scenes", "clip", pipeline, records, few)
    points = ((1.0, 2.0), (2.0,)) if quick else (SCALES, CLIP_WEIGHTS)
    rows = once(home / f"clip_{n}.json", lambda: clip_beside_free(pipeline, clip, n, points))
    classifier = guide_of(home / "scenes", "classifier", pipeline, records, changed(given) | few)
    curve = Curve("scenes", LAYOUT_SHARES, SCENES_PX, pipeline.defaults, (0.0, 10.0) if quick else WEIGHTS, (1.0,))
    more = once(home / f"scenes_{n}.json", lambda: classifier_curve(pipeline, classifier, n, curve))
    facts |= {"model": pipeline.identity, "scenes_guides": [classifier.name, clip.name]}
    seen = [*accuracies(classifier, "scenes: classifier"), *accuracies(clip, "scenes: CLIP")]
    return [*seen, *more, *rows]


def of_ddpm(given: argparse.Namespace, home: Path, few: dict[str, Any], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A DDPM of classes whose label is never told."""
    quick, n = given.quick, 2 if given.quick else given.n
    pipeline, records = ddpm(home / "ddpm", 64 if quick else given.ddpm_images, 200 if quick else 12_000)
    classifier = guide_of(home / "ddpm", "classifier", pipeline, records, changed(given) | few)
    sampling = replace(pipeline.defaults, sampler="ddim", steps=25, threshold="static")
    curve = Curve("ddpm", SINGLE, DDPM_PX, sampling, (0.0, 10.0) if quick else WEIGHTS, (1.0, 2.0, 4.0))
    rows = once(home / f"ddpm_{n}.json", lambda: classifier_curve(pipeline, classifier, n, curve))
    facts |= {"ddpm": pipeline.identity, "ddpm_images": pipeline.meta["images_seen"], "ddpm_guide": classifier.name}
    return [*accuracies(classifier, "ddpm: classifier"), *rows]


def changed(given: argparse.Namespace) -> dict[str, Any]:
    return {"loop.num_images": given.classifier_images} if given.classifier_images else {}


def summary_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is hoped for: the shape that is asked for, of its ceiling; recall falls."""
    value, found = {row["case"]: row["value"] for row in rows}, []
    for name in ("scenes", "ddpm"):
        asked = [value[case] for case in value if case.startswith(f"{name}: classifier, weight") and "as asked" in case]
        if not asked:
            continue
        target = ">= 0.85" if name == "ddpm" else ""
        ceiling = value[f"{name}: drawn images: shape read right"]
        found.append(
            judged(f"{name}: shape as asked by a classifier, of its ceiling", max(asked), ceiling, "share", target)
        )
        ends = [max(value[f"{name}: classifier, weight {weight:g}: recall"], 1e-9) for weight in (10.0, 0.0)]
        found.append(judged(f"{name}: recall at weight 10 beside 0", *ends, "share", "<= 1.0"))
    return found


if __name__ == "__main__":
    main()
