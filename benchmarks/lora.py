"""What 32 drawings of a shape that the model never saw teach it: as an adapter, and by training every weight.

The model that comes with the package knows six shapes; the thirty-two show a seventh, a ring, in six of the ten
colours. Asked is a ring in the four other colours, and the six old shapes on held-out prompts; the project's reader
judges, shares have Wilson's 95 % intervals. All trainings have the settings that `raphael train` gives them but for
those that an arm names, on the same images in the same order; with prior preservation half of what is seen are the
model's own images of the old shapes. Seconds are of training alone, MiB of weights, gradients, moments and EMA.

Writes results/lora-<device>-<yyyymm>.json, unless --quick; --only measures some arms and keeps the file's other rows.
Docs: docs/guides/lora.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from _machine import judged, keep, within

from data_pipeline.source.scene_captions import caption, heldout_prompts
from data_pipeline.source.scene_drawing import draw
from data_pipeline.source.scenes import COLOURS, STYLES, Scene, Thing, scene_of_row
from flows.finetune import Request, make
from raphael.base.config.params import load_config
from raphael.base.images.grid import image_grid
from raphael.base.records import MOMENTS, TOKEN_IDS, RecordWriter
from raphael.base.strict import to_dict
from raphael.encoders.autoencoder import load_autoencoder
from raphael.encoders.text import load_text_encoder
from raphael.evaluate.metrics.intervals import wilson
from raphael.evaluate.scenes.reader import judge, read_scene
from raphael.generate.pipeline import RaphaelPipeline
from raphael.pretrained.find import HOME
from raphael.systems.export import finished, write_export
from raphael.systems.job import Folders, TrainingJob
from raphael.systems.lora.file import LORA_FILE
from raphael.systems.worker import train_part
from raphael.train.loop import World

NEW = "ring"
HELD_OUT = ("yellow", "cyan", "pink", "black")  # colours of rings that no training image has
IMAGES, SIDE_PX = 32, 64
MODEL = HOME / "scenes"
ADAPTER, EVERY, KEPT = "adapter", "every weight", "adapter on all targets, prior preservation"
CEILING = "drawings through the autoencoder"
RATE, BATCH = 3e-3, 8  # of the last
PRIOR = 64  # of the model's own images; the thirty-two come twice in an epoch then


@dataclass(frozen=True)
class Arm:
    """rank 0: every weight is trained. changes: of the settings. prior: the model's own images beside."""

    rank: int
    changes: dict[str, Any] = field(default_factory=dict)
    prior: int = 0


def ring(number: int, colours: tuple[str, ...], stream: str) -> Scene:
    rng = random.Random(f"{stream}/{number}")
    colour = rng.choice(colours)
    background = rng.choice([name for name in COLOURS if name != colour])
    place = (0.5 + rng.uniform(-0.05, 0.05), 0.5 + rng.uniform(-0.05, 0.05))
    thing = Thing(NEW, colour, None, "solid", place, rng.uniform(0.44, 0.6))
    style = rng.choices(list(STYLES), list(STYLES.values()))[0]
    return Scene(SIDE_PX, style, background, "plain", (thing,), "single", None, None, f"{stream}/brush/{number}")


def examples() -> tuple[list[Any], list[str]]:
    """Images and captions to train on."""
    scenes = [ring(n, tuple(name for name in COLOURS if name not in HELD_OUT), "train") for n in range(IMAGES)]
    return [draw(scene) for scene in scenes], [caption(s, random.Random(f"words/{n}"))[0] for n, s in enumerate(scenes)]


def own_examples(count: int) -> tuple[list[Any], list[str]]:
    """Images of the old shapes that the model itself makes, of prompts as it was trained on, and those prompts."""
    scenes = (scene_of_row(1, row, (SIDE_PX, SIDE_PX), 0.12) for row in itertools.count())
    single = itertools.islice((scene for scene in scenes if scene.layout == "single"), count)
    texts = [caption(scene, random.Random(f"own/{n}"))[0] for n, scene in enumerate(single)]
    return (RaphaelPipeline.from_pretrained("scenes")(texts, seed=3).images if texts else []), texts


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, (image, text) in enumerate(zip(*examples(), strict=True)):
        image.save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(text)


def asked(n: int) -> dict[str, list[dict[str, Any]]]:
    """Prompts with their truth: rings in the colours that were held out, and the old shapes."""
    rings = []
    for number in range(n):
        text, truth = caption(ring(number, HELD_OUT, "asked"), random.Random(f"asked/{number}"), complete=True)
        rings.append({"prompt": text, "truth": truth})
    old = [entry for entry in heldout_prompts(0, n, SIDE_PX, 0.12) if entry["suite"] == "single"]
    return {NEW: rings, "old shapes": old}


def measure(pipeline: RaphaelPipeline, prompts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    found, pipeline.precision = {}, "auto"
    for name, entries in prompts.items():
        images = pipeline([entry["prompt"] for entry in entries], seed=1).images
        found |= shares(name, images, entries)
    return found


def shares(name: str, images: list[Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    verdicts = [judge(read_scene(np.asarray(i)), e["truth"]) for i, e in zip(images, entries, strict=True)]
    for attribute in ("shape", "shape_colour", "background_colour"):
        hits = sum(bool(verdict[attribute]) for verdict in verdicts)
        low, high = wilson(hits, len(entries))
        found[f"{name}: {attribute}"] = {"share": hits / len(entries), "n": len(entries), "low": low, "high": high}
    return found


def ceiling(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What a model that had learned all could reach: drawings of what is asked for, after the autoencoder."""
    import torch

    from raphael.diffusion.sampling import as_bytes
    from raphael.encoders.autoencoder import encode_images

    drawn = np.stack([np.asarray(draw(ring(number, HELD_OUT, "asked"))) for number in range(len(entries))])
    autoencoder = load_autoencoder(MODEL / "autoencoder")
    with torch.inference_mode():
        images = as_bytes(autoencoder.decode(encode_images(autoencoder, drawn, (SIDE_PX, SIDE_PX))))
    return shares(NEW, list(images), entries)


def write_records(folder: Path, picture: Any, prior: int) -> None:
    """The images as the stage encode makes them: moments and token ids."""
    import torch

    (images, texts), (own, own_texts) = examples(), own_examples(prior)
    times = max(1, prior // IMAGES)
    images, texts = images * times + own, texts * times + own_texts
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        moments = load_autoencoder(MODEL / "autoencoder").encode_moments(pixels).numpy().astype(np.float16)
    tokens = load_text_encoder(MODEL / "text_encoder").tokenize(texts).numpy().astype(np.int32)
    fields = {MOMENTS: ("float16", moments.shape[1:]), TOKEN_IDS: ("int32", tokens.shape[1:])}
    with RecordWriter(folder, fields, {"picture": to_dict(picture)}) as writer:
        writer.append([f"{number:09d}" for number in range(len(texts))], {MOMENTS: moments, TOKEN_IDS: tokens})


def train(folder: Path, num_images: int, arm: Arm) -> dict[str, Any]:
    """Train in `folder` with the settings of `raphael train`; what it leaves lies in folder/export."""
    write_images(folder / "images")
    own = {"train.num_workers": 0, **arm.changes}
    request = Request("scenes", folder / "images", folder / "space", num_images, None, 0, own, lora=arm.rank)
    config = load_config(make(request) / "params.yaml")
    records, work = folder / "data/records", folder / "work"
    write_records(records, config.picture, arm.prior)
    work.mkdir()
    (folder / "models").mkdir()
    for name, part in (("autoencoder", "autoencoder"), ("clip", "text_encoder")):
        (folder / "models" / name).symlink_to(MODEL / part, target_is_directory=True)
    folders = Folders.of(folder, work)
    began_s = time.perf_counter()
    train_part(TrainingJob(config, folders), World())
    seconds = time.perf_counter() - began_s
    told = folders.events.read_text(encoding="utf-8")
    write_export(config, folders, finished(config, folders))
    (held,) = re.findall(r"= ([\d,.]+) MiB a worker", told)
    return {"seconds": seconds, "MiB": float(held.replace(",", ""))}


def arms(rates: list[float]) -> dict[str, Arm]:
    everywhere = {"train.lora.targets": ["attention", "experts", "text_layers", "convolutions"]}
    recipe = {**everywhere, "train.loop.learning_rate": RATE, "train.loop.batch_size": BATCH}
    further = {f"every weight, rate {rate:g}": Arm(0, {"train.loop.learning_rate": rate}) for rate in rates}
    return {ADAPTER: Arm(8), EVERY: Arm(0), KEPT: Arm(8, recipe, PRIOR), **further}


def measured(arm: Arm, count: int, prompts: dict[str, list[dict[str, Any]]], folder: Path) -> dict[str, Any]:
    facts = train(folder, count, arm)
    pipeline = RaphaelPipeline.from_pretrained("scenes" if arm.rank else folder / "work/export")
    if arm.rank:
        pipeline.load_lora_weights(folder / "work/export" / LORA_FILE)
        facts["bytes"] = (folder / "work/export" / LORA_FILE).stat().st_size
    found = measure(pipeline, prompts)
    show(pipeline, prompts)
    return {**found, **facts, "images_seen": count, "of_them_its_own": 0.5 if arm.prior else 0.0}


def show(pipeline: RaphaelPipeline, prompts: dict[str, list[dict[str, Any]]]) -> None:
    """Some of the images that were judged, for whoever looks (not committed)."""
    texts = [entry["prompt"] for entries in prompts.values() for entry in entries[:10]]
    file = Path(tempfile.gettempdir()) / "lora-images.png"
    image_grid(pipeline(texts, seed=1).images, 10, texts).save(file)
    print(file, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps and images: does it run")
    parser.add_argument("--num-images", type=int, default=3200, help="seen by each training (default: %(default)s)")
    parser.add_argument("--n", type=int, default=200, help="prompts of each kind (default: %(default)s)")
    parser.add_argument("--rate", type=float, nargs="*", default=[], help="further rates of training every weight")
    parser.add_argument("--only", nargs="*", metavar="ARM", help="these arms, or before; other rows stay")
    given = parser.parse_args()
    count, n = (64, 4) if given.quick else (given.num_images, given.n)
    prompts, rows = asked(n), earlier() if given.only else {}
    with tempfile.TemporaryDirectory() as temporary:
        for number, (name, arm) in enumerate(arms(given.rate).items()):
            if given.only and name not in given.only:
                continue
            arm = replace(arm, prior=min(arm.prior, 2)) if given.quick else arm
            rows[name] = measured(arm, count, prompts, Path(temporary) / str(number))
            print(json.dumps({name: rows[name]}, indent=1), flush=True)
    if not given.only or CEILING in given.only:
        rows[CEILING] = ceiling(prompts[NEW])
        print(json.dumps({CEILING: rows[CEILING]}, indent=1), flush=True)
    if not given.only or "before" in given.only:
        rows["before"] = measure(RaphaelPipeline.from_pretrained("scenes"), prompts)
        print(json.dumps({"before": rows["before"]}, indent=1), flush=True)
    if not given.quick:
        keep("lora", [{"arm": name, **row} for name, row in rows.items()], summed(rows))


def earlier() -> dict[str, Any]:
    """The rows of the newest file of results, by arm, each with when and on what it was measured."""
    files = sorted((Path(__file__).parent / "results").glob("lora-*.json"))
    told = json.loads(files[-1].read_text()) if files else {"results": []}
    of_all = {name: told[name] for name in ("measured", "processor", "images_seen") if name in told}
    return {row.pop("arm"): {**of_all, **row} for row in told["results"]}


def summed(rows: dict[str, Any]) -> list[dict[str, Any]]:
    def share(arm: str, name: str) -> float:
        return rows[arm][name]["share"]

    new, old = f"{NEW}: shape", "old shapes: shape"
    best = KEPT if KEPT in rows else ADAPTER
    lost = max(1e-9, share("before", old) - share(best, old))
    beside = "adapter beside every weight"
    both = [
        (f"{NEW} right, {beside}", share(ADAPTER, new), share(EVERY, new) or 1e-9, "share"),
        (f"old shapes right, {beside}", share(ADAPTER, old), share(EVERY, old), "share"),
        (f"seconds, {beside}", rows[ADAPTER]["seconds"], rows[EVERY]["seconds"], "s"),
        (f"memory, {beside}", rows[ADAPTER]["MiB"], rows[EVERY]["MiB"], "MiB"),
    ]
    return [
        judged(f"ring right, {best}, beside 60 %", share(best, new), 0.6, "share", ">= 1.0"),
        within(f"points of the old shapes lost, {best}", lost, 0.03, "share"),
        *(judged(*row) for row in both),
    ]


if __name__ == "__main__":
    main()
