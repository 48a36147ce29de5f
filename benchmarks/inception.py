"""A whole FID of two folders, ours beside torch-fidelity's, with the same weights file on the same pictures.

Both run the same network (torch-fidelity's Inception), so features must agree to rounding; what differs is everything
around it: reading, batching, the distance, and what is kept for the next time. Three questions: features (difference,
images/s), the whole distance (difference, wall seconds), and the same with the reference's features at hand, in either
program's own cache.

Without --weights the network has random weights in the published file's form: times are the same, the number is no FID.
With fewer pictures than 2048 dimensions torch-fidelity's eigenvalues of a singular product carry an error of their own
(docs/evaluation.md, "Exactness"), so the difference of such a run is not ours alone.

    python benchmarks/inception.py [--n 2500] [--weights FILE] [--images DIR --reference DIR] [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from _machine import judged, keep, within

from raphael.evaluate.feature_cache import embed_folder
from raphael.evaluate.picture_folder import PictureFolder, Preparation
from raphael.evaluate.spaces import open_network

AS_THEY_ARE = (Preparation("none", 0), 0)
BATCH = 50


def random_weights(path: Path) -> Path:
    """Inception's weights as torch-fidelity's constructor draws them, in the form of its file."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    torch.save({}, path)
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None):
        network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)
    return path


def draw_folder(folder: Path, n: int, side_px: int, seed: int) -> Path:
    """n smooth random pictures as PNG."""
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        coarse.resize((side_px, side_px), Image.Resampling.BICUBIC).save(folder / f"{index:05d}.png")
    return folder


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    value = action()
    return time.perf_counter() - started, value


def features_side_by_side(images: Path, weights: Path) -> dict[str, Any]:
    """The first batches through both; relative difference: the largest one over the features' root mean square."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    pictures = np.stack(list(PictureFolder.read(images).pictures(AS_THEY_ARE[0], files=slice(0, 2 * BATCH))))
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

    ours.embed(pictures[:2]), run_theirs()  # both warm
    ours_s, mine = timed(run_ours)
    theirs_s, other = timed(run_theirs)
    scale = float(np.sqrt((other.astype(np.float64) ** 2).mean()))
    return {
        "what": "features",
        "n": len(pictures),
        "relative_difference": float(np.abs(mine - other).max()) / scale,
        "ours_images_per_s": round(len(pictures) / ours_s, 2),
        "torch_fidelity_images_per_s": round(len(pictures) / theirs_s, 2),
    }


def whole_distance(images: Path, reference: Path, weights: Path, home: Path) -> list[dict[str, Any]]:
    """From two folders to a number: the first time, and again with other pictures' reference at hand."""
    import torch
    from torch_fidelity import calculate_metrics

    network = open_network(f"inception:{weights}")

    def ours(cache: Path) -> float:
        def statistics(folder: Path) -> Any:
            (features,) = embed_folder(PictureFolder.read(folder), AS_THEY_ARE, [network], cache)
            return features.statistics()

        return statistics(images).distance(statistics(reference))

    def theirs(name: str | None) -> float:
        options = {"input2_cache_name": name} if name else {}
        found = calculate_metrics(
            input1=str(images), input2=str(reference), fid=True, verbose=False, cuda=torch.cuda.is_available(),
            batch_size=BATCH, feature_extractor_weights_path=str(weights), cache=bool(name),
            cache_root=str(home / "theirs"), **options,
        )  # fmt: skip
        return float(found["frechet_inception_distance"])

    n = [len(PictureFolder.read(folder).files) for folder in (images, reference)]
    rows = []
    first = (timed(lambda: ours(home / "ours")), timed(lambda: theirs(None)))
    embed_folder(PictureFolder.read(reference), AS_THEY_ARE, [network], home / "kept")
    theirs("reference")  # fills its cache
    cached = (timed(lambda: ours(home / "kept")), timed(lambda: theirs("reference")))
    for what, ((ours_s, mine), (theirs_s, other)) in {"whole": first, "reference cached": cached}.items():
        rows.append(
            {
                "what": what,
                "n": n,
                "ours": mine,
                "torch_fidelity": other,
                "relative_difference": abs(mine - other) / abs(other),
                "ours_s": round(ours_s, 3),
                "torch_fidelity_s": round(theirs_s, 3),
                "times": round(theirs_s / ours_s, 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2500, help="pictures of each folder drawn here")
    parser.add_argument("--side-px", type=int, default=256)
    parser.add_argument("--images", type=Path, help="a folder of pictures instead, all of one size")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--weights", type=Path, help="torch-fidelity's file; default: random weights in its form")
    parser.add_argument("--quick", action="store_true", help="four pictures: does it run at all")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        n, side = (4, 64) if arguments.quick else (arguments.n, arguments.side_px)
        images = arguments.images or draw_folder(home / "a", n, side, 0)
        reference = arguments.reference or draw_folder(home / "b", n, side, 1)
        weights = arguments.weights or random_weights(home / "random.pth")
        rows = [features_side_by_side(images, weights), *whole_distance(images, reference, weights, home)]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if not arguments.quick:
        features, whole, cached = rows
        rates = features["ours_images_per_s"], features["torch_fidelity_images_per_s"]
        summary = [
            judged("Inception features; peer: torch-fidelity", *rates, "images/s", ">= 1.0"),
            within("features, relative difference", features["relative_difference"], 1e-5, "share"),
            judged("whole distance; peer: torch-fidelity", whole["ours_s"], whole["torch_fidelity_s"], "s", "<= 1.0"),
            within("whole distance, relative difference", whole["relative_difference"], 1e-4, "share"),
            judged("reference cached; peer: torch-fidelity, cached", cached["ours_s"], cached["torch_fidelity_s"], "s"),
            judged("reference cached; peer: whole", cached["ours_s"], whole["torch_fidelity_s"], "s", "<= 0.55"),
        ]
        keep("inception", rows, summary, weights="random" if arguments.weights is None else arguments.weights.name)


if __name__ == "__main__":
    main()
