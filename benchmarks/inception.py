"""A whole FID of two folders, `raphael evaluate` beside torch-fidelity's command, the same weights file and images.

Both run torch-fidelity's network, so features must agree to rounding; what differs is everything around it: layout in
memory, reading, the distance, and what is kept for the next time. Three questions: features (difference, images/s), the
whole command from two folders to the number (difference, wall seconds), and ours again, for other images, with the
reference's features at hand. Ours gives all of pair-debug/v1 (KID, precision and recall, density and coverage)
in its time, theirs the FID alone. Each command is a process of its own; processor seconds stand beside wall seconds,
since a core that others use too moves the latter.

Without --weights the network has random weights in the published file's form: times are the same, the number is no FID.
With fewer images than 2048 dimensions torch-fidelity's eigenvalues of a singular product carry an error of their own
(docs/evaluation.md, "Exactness"), so the difference of such a run is not ours alone.

    python benchmarks/inception.py [--n 2000] [--weights FILE] [--images DIR --reference DIR] [--home DIR] [--quick]

With --home a run that was ended goes on: a command that ended is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from _machine import judged, keep, within

from raphael.base.stage import read_json, write_json
from raphael.evaluate.features.image_folder import ImageFolder, Preparation
from raphael.evaluate.features.spaces import open_network

PROJECT = Path(__file__).resolve().parent.parent
PHOTOGRAPHS = PROJECT.parent / "shared" / "data" / "coco"  # where the machine has them
BATCH = 50
FIDELITY = "from torch_fidelity.fidelity import main; main()"


def random_weights(path: Path) -> Path:
    """A file in the form of torch-fidelity's, with weights that keep the size of activations from layer to layer."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    torch.save({}, path)
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None):
        network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(path))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return path


def fill_folder(folder: Path, n: int, side_px: int, seed: int, photographs: Path) -> Path:
    """n PNGs of one size: crops of photographs where there are any, else smooth random fields."""
    from PIL import Image

    if folder.is_dir() and len(list(folder.iterdir())) == n:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng, sources = np.random.default_rng(seed), sorted(photographs.glob("*.jpg"))
    for index in range(n):
        if sources:
            with Image.open(sources[index % len(sources)]) as photograph:
                photograph = photograph.convert("RGB")
            edge = int(min(photograph.size) * rng.uniform(0.5, 1.0))
            left, top = (int(rng.integers(0, length - edge + 1)) for length in photograph.size)
            image = photograph.crop((left, top, left + edge, top + edge)).resize((side_px, side_px))
        else:
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8 + 8 * seed, 3), np.uint8))
            image = coarse.resize((side_px, side_px), Image.Resampling.BICUBIC)
        image.save(folder / f"{index:05d}.png", compress_level=1)
    return folder


def features_side_by_side(images: Path, weights: Path, rounds: int) -> dict[str, Any]:
    """Two batches through both, in turns; relative difference: the largest one over the features' root mean square."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    first = ImageFolder.read(images).prepared(Preparation("none", 0), files=slice(0, 2 * BATCH))
    pictures = np.stack(list(first))
    ours = open_network(f"inception:{weights}")
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs.eval().to(device)

    def run_theirs() -> np.ndarray:
        with torch.no_grad():
            parts = torch.from_numpy(pictures).permute(0, 3, 1, 2).split(BATCH)
            return torch.cat([theirs(part.to(device))[0].cpu() for part in parts]).numpy()

    def run_ours() -> np.ndarray:
        return np.concatenate([ours.embed(pictures[start : start + BATCH]) for start in range(0, len(pictures), BATCH)])

    acts = {"ours": run_ours, "theirs": run_theirs}
    rows = {name: act() for name, act in acts.items()}  # and both are warm
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(rounds):
        for name, act in acts.items():
            started = time.perf_counter()
            act()
            seconds[name].append(time.perf_counter() - started)
    scale = float(np.sqrt((rows["theirs"].astype(np.float64) ** 2).mean()))
    return {
        "what": "features",
        "n": len(pictures),
        "relative_difference": float(np.abs(rows["ours"] - rows["theirs"]).max()) / scale,
        "ours_images_per_s": round(len(pictures) / min(seconds["ours"]), 2),
        "torch_fidelity_images_per_s": round(len(pictures) / min(seconds["theirs"]), 2),
    }


def command_seconds(name: str, command: list[str], home: Path) -> dict[str, Any]:
    """Run it in `home`, once for all: {wall_s, processor_s, output}. Exits where it fails."""
    done = home / f"{name}.json"
    if done.is_file():
        return read_json(done)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    started = time.perf_counter()
    with (home / f"{name}.out").open("w") as output, (home / f"{name}.err").open("w") as errors:
        child = subprocess.Popen([sys.executable, *command], cwd=home, env=environment, stdout=output, stderr=errors)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.perf_counter() - started
    if child.returncode:
        raise SystemExit(f"{name} ended with status {child.returncode}: {(home / f'{name}.err').read_text()[-2000:]}")
    facts = {"wall_s": round(wall_s, 2), "processor_s": round(usage.ru_utime + usage.ru_stime, 2)}
    write_json(done, {**facts, "output": (home / f"{name}.out").read_text()})
    return read_json(done)


def renamed(folder: Path, to: Path) -> Path:
    """The same images in the same order under other names: no cache knows them."""
    to.mkdir(exist_ok=True)
    for path in ImageFolder.read(folder).files:
        link = to / f"again-{path.name}"
        if not link.is_symlink():
            link.symlink_to(path.resolve())
    return to


def whole_distance(images: Path, reference: Path, weights: Path, home: Path) -> list[dict[str, Any]]:
    """From two folders to a number: the first time, and for other images with the reference's features at hand."""
    import torch

    device = ["--gpu", "0"] if torch.cuda.is_available() else ["--cpu"]
    if not (home / "ours-whole.json").is_file():
        shutil.rmtree(home / "ours", ignore_errors=True)  # half of an ended run would be a head start
    theirs = ["-c", FIDELITY, "--fid", "--json", *device, "--batch-size", str(BATCH), "--no-cache"]
    theirs += ["--feature-extractor-weights-path", str(weights), "--input1", str(images), "--input2", str(reference)]
    rows = []
    for what, drawn in (("whole", images), ("reference cached", renamed(images, home / "again"))):
        file = f"numbers-{what.replace(' ', '-')}.json"
        ours = ["-m", "raphael.cli", "evaluate", "--images", str(drawn), "--reference", str(reference)]
        ours += ["--features", f"inception:{weights}", "--cache", str(home / "ours"), "--out", file]
        mine = command_seconds(f"ours-{what.replace(' ', '-')}", ours, home)
        other = command_seconds("theirs", theirs, home)  # the second time it is known
        got = next(row for row in read_json(home / file)["numbers"] if row["name"].startswith(("fid_", "fd_")))
        expected = json.loads(other["output"][other["output"].index("{") :])["frechet_inception_distance"]
        rows.append(
            {
                "what": what,
                "n": [got["n"], got["n_reference"]],
                "ours": got["value"],
                "torch_fidelity": expected,
                "relative_difference": abs(got["value"] - expected) / abs(expected),
                **{f"ours_{key}": mine[key] for key in ("wall_s", "processor_s")},
                **{f"torch_fidelity_{key}": other[key] for key in ("wall_s", "processor_s")},
            }
        )
    return rows


def summary_of(features: dict[str, Any], whole: dict[str, Any], cached: dict[str, Any]) -> list[dict[str, Any]]:
    rates = features["ours_images_per_s"], features["torch_fidelity_images_per_s"]
    both = ("ours_wall_s", "torch_fidelity_wall_s")
    n = whole["n"][0]
    return [
        judged("Inception features; peer: torch-fidelity", *rates, "images/s", ">= 1.0"),
        within("features, relative difference", features["relative_difference"], 1e-5, "share"),
        judged(f"whole command, n {n}; peer: torch-fidelity's", *(whole[key] for key in both), "s", "<= 1.0"),
        within("whole command, relative difference", whole["relative_difference"], 1e-4, "share"),
        judged(
            "whole command, processor seconds; peer: torch-fidelity's",
            whole["ours_processor_s"], whole["torch_fidelity_processor_s"], "s", "<= 1.0",
        ),
        judged("reference cached; peer: torch-fidelity's whole", *(cached[key] for key in both), "s", "<= 0.55"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000, help="pictures of each folder made here")
    parser.add_argument("--side-px", type=int, default=256)
    parser.add_argument("--images", type=Path, help="a folder of images instead, all of one size")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--weights", type=Path, help="torch-fidelity's file; default: random weights in its form")
    parser.add_argument("--home", type=Path, help="where images, caches and what is done are kept; default: nowhere")
    parser.add_argument("--note", default="", help="what else the machine did meanwhile, for the result")
    parser.add_argument("--quick", action="store_true", help="four images: does it run at all")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = arguments.home or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        home = home.resolve()
        n, side = (4, 64) if arguments.quick else (arguments.n, arguments.side_px)
        images = arguments.images or fill_folder(home / "a", n, side, 0, PHOTOGRAPHS / "val2017")
        reference = arguments.reference or fill_folder(home / "b", n, side, 1, PHOTOGRAPHS / "train2017")
        weights = arguments.weights or random_weights(home / "random.pth")
        if not (home / "features.json").is_file():
            rows = features_side_by_side(images, weights.resolve(), 1 if arguments.quick else 3)
            write_json(home / "features.json", rows)
        rows = [read_json(home / "features.json"), *whole_distance(images, reference, weights.resolve(), home)]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if not arguments.quick:
        facts = {"weights": "random" if arguments.weights is None else arguments.weights.name, "note": arguments.note}
        keep("inception", rows, summary_of(*rows), **facts)


if __name__ == "__main__":
    main()
