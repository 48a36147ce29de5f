"""Every metric on two pairs of folders made from COCO's photographs, beside somebody else's program or a naive loop.

val2017 against train2017, and val2017 against itself written as JPEG of quality 50, under pair-debug/v1, by
`raphael evaluate`. The peers begin with the images' files: Pillow crops and scales them, torch-fidelity runs its own
Inception over them and gives FID, KID, precision and recall; open_clip scores one image and one caption at a time.
The Frechet distance of both networks is also taken in the span of the rows (SciPy's root where there are enough), all
others by loops over pairs, from the features. Weights of Inception are random, in torch-fidelity's form: what is shown
is that the numbers are right, not what they mean.

    python benchmarks/coco_pairs.py [--clip FOLDER] [--inception FILE] [--n N] [--without-inception] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _machine import keep, within
from inception import PHOTOGRAPHS, PROJECT, random_weights

from raphael.base.stage import read_json
from raphael.cli.main import main as raphael
from raphael.evaluate.features.cache import embed_folder
from raphael.evaluate.features.image_folder import ImageFolder
from raphael.evaluate.features.spaces import open_network
from raphael.evaluate.metrics.frechet import Features
from raphael.evaluate.protocols.protocol import load_protocol

PROTOCOL = "pair-debug/v1"
SIDE_PX = 256


@dataclass(frozen=True)
class Pair:
    """What is compared: photographs as they are. captions: one per image of `images`, in the order of names."""

    name: str
    images: Path
    reference: Path
    captions: list[str]


def take(source: Path, to: Path, n: int, jpeg_quality: int = 0) -> Path:
    """The first n photographs (0: all) by name: links, or written again as JPEG of that quality."""
    from PIL import Image

    to.mkdir(parents=True)
    files = sorted(source.glob("*.jpg"))
    for path in files[: n or len(files)]:
        if jpeg_quality:
            with Image.open(path) as photograph:
                photograph.convert("RGB").save(to / path.name, quality=jpeg_quality)
        else:
            (to / path.name).symlink_to(path.resolve())
    return to


def captions_of(folder: Path, annotations: Path) -> list[str]:
    """COCO's caption of the lowest annotation id for each photograph of a folder, in the order of names."""
    data = json.loads(annotations.read_text(encoding="utf-8"))
    ids = {entry["file_name"]: entry["id"] for entry in data["images"]}
    rows = sorted(data["annotations"], key=lambda row: -row["id"])  # the lowest is written last
    captions = {row["image_id"]: " ".join(row["caption"].split()) for row in rows}
    return [captions[ids[path.name]] for path in sorted(folder.iterdir())]


def pairs(home: Path, n: int) -> list[Pair]:
    val = take(PHOTOGRAPHS / "val2017", home / "val2017", n)
    train = take(PHOTOGRAPHS / "train2017", home / "train2017", n)
    jpeg = take(PHOTOGRAPHS / "val2017", home / "val2017-q50", n, 50)
    captions = captions_of(val, PHOTOGRAPHS / "captions_val2017_subset.json")
    return [Pair("val, train", val, train, captions), Pair("val, val as JPEG q50", val, jpeg, captions)]


def prepared(folder: Path, to: Path) -> tuple[Path, int]:
    """Pillow's own crop and Lanczos of each photograph as PNG; and how many of ours differ from it in any byte."""
    from PIL import Image

    ours = ImageFolder.read(folder).prepared(load_protocol(PROTOCOL).pictures.preparation)
    to.mkdir(parents=True, exist_ok=True)
    differ = 0
    for path, mine in zip(sorted(folder.iterdir()), ours, strict=True):
        with Image.open(path) as photograph:
            photograph = photograph.convert("RGB")
        edge = min(photograph.size)
        left, top = ((length - edge) // 2 for length in photograph.size)
        image = photograph.crop((left, top, left + edge, top + edge))
        image = image.resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
        image.save(to / f"{path.stem}.png", compress_level=1)
        differ += not np.array_equal(np.asarray(image), mine)
    return to, differ


def frechet_in_the_span(x: np.ndarray, y: np.ndarray) -> float:
    """The distance for fewer rows than dimensions. The trace term sees both covariances only within the span of the
    smaller set's rows, where both are small, regular matrices: the roots of the eigenvalues of S^1/2 S' S^1/2 there."""
    x, y = sorted((x.astype(np.float64), y.astype(np.float64)), key=len)
    values, basis = np.linalg.eigh(np.cov(x.T))
    values, basis = values[1 - len(x) :], basis[:, 1 - len(x) :]
    within_span = basis.T @ np.cov(y.T) @ basis
    root = np.sqrt(values)
    trace = np.sqrt(np.linalg.eigvalsh(root[:, None] * within_span * root)).sum()
    step = x.mean(0) - y.mean(0)
    return float(step @ step + x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum() - 2 * trace)


def frechet_by_rotations(x: np.ndarray, y: np.ndarray) -> float:
    """The distance without a covariance, an eigenvalue or a float64: the trace term is the sum of the singular values
    of Y X^T over centred rows, found by one-sided Jacobi rotations (Hestenes 1958) in the machine's widest float.

    On 80 bits it is within 1e-12 of a computation with 40 digits on exact sums (photographs against their JPEGs, random
    CLIP: 8.13017164228098e-9), where scipy.linalg.sqrtm is off by 1.2e-6: the distance is 6e-5 of the traces.
    """
    wide = [rows.astype(np.longdouble) for rows in (x, y)]
    step = wide[0].mean(0) - wide[1].mean(0)
    x, y = sorted(((rows - rows.mean(0)) / np.sqrt(np.longdouble(len(rows) - 1)) for rows in wide), key=len)
    rows, resolution = x @ y.T, np.finfo(np.longdouble).eps
    rows = rows[np.argsort(-(rows * rows).sum(1))]  # the longest first: fewer sweeps
    largest = rows[0] @ rows[0]
    turned = True
    while turned:
        turned = False
        for i in range(len(rows) - 1):
            for j in range(i + 1, len(rows)):
                p, q, r = rows[i] @ rows[i], rows[j] @ rows[j], rows[i] @ rows[j]
                if abs(r) <= resolution * np.sqrt(max(p, q) * largest):
                    continue
                turned = True
                zeta = (q - p) / (2 * r)
                tangent = np.copysign(1, zeta) / (abs(zeta) + np.sqrt(1 + zeta * zeta))
                cosine = 1 / np.sqrt(1 + tangent * tangent)
                rows[i], rows[j] = cosine * (rows[i] - tangent * rows[j]), cosine * (tangent * rows[i] + rows[j])
    trace = np.sqrt((rows * rows).sum(1)).sum()
    return float(step @ step + (x * x).sum() + (y * y).sum() - 2 * trace)


def loops(drawn: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """KID of one subset that is everything, precision, recall, density, coverage, CMMD: pair by pair."""
    drawn, real = drawn.astype(np.float64), real.astype(np.float64)

    def distances(a: np.ndarray, b: np.ndarray) -> list[list[float]]:
        return [[math.dist(x, y) for y in b] for x in a]

    across, inside_drawn, inside_real = distances(drawn, real), distances(drawn, drawn), distances(real, real)
    # sorted, a row of a set against itself begins with its own 0
    radius = {k: [sorted(row)[k] for row in inside_real] for k in (3, 5)}
    radius_drawn = [sorted(row)[3] for row in inside_drawn]
    n, m = len(drawn), len(real)

    def gauss(rows: list[list[float]]) -> float:
        # less one everywhere: the ones cancel, and would take eight digits with them
        return math.fsum(math.expm1(-d * d / 200) for row in rows for d in row) / (len(rows) * len(rows[0]))

    return {
        "precision": sum(any(across[i][j] <= radius[3][j] for j in range(m)) for i in range(n)) / n,
        "recall": sum(any(across[i][j] <= radius_drawn[i] for i in range(n)) for j in range(m)) / m,
        "density": sum(across[i][j] <= radius[5][j] for i in range(n) for j in range(m)) / (5 * n),
        "coverage": sum(any(across[i][j] <= radius[5][j] for i in range(n)) for j in range(m)) / m,
        "cmmd": 1000 * (gauss(inside_drawn) + gauss(inside_real) - 2 * gauss(across)),
    }


def kid_by_loops(drawn: np.ndarray, real: np.ndarray, subsets: int, size: int, seed: int) -> float:
    """The unbiased polynomial MMD of arXiv 1801.01401, eq. 4, on the subsets that torch-fidelity draws."""
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = drawn[rng.choice(len(drawn), size, replace=False)].astype(np.float64)
        y = real[rng.choice(len(real), size, replace=False)].astype(np.float64)
        kernels = [(a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
        own = [(kernel.sum() - kernel.trace()) / (size * (size - 1)) for kernel in kernels[:2]]
        values.append(sum(own) - 2 * kernels[2].mean())
    return float(np.mean(values))


def clip_score_one_by_one(images: Path, captions: list[str], clip_folder: Path) -> float:
    """open_clip's own transform and towers, one image and one caption at a time."""
    import torch
    from open_clip.transform import image_transform
    from PIL import Image

    from raphael.encoders.clip import load_clip_folder

    clip = load_clip_folder(clip_folder)
    transform = image_transform(clip.image_size_px, is_train=False, mean=clip.mean, std=clip.std)
    cosines = []
    for path, caption in zip(sorted(images.iterdir()), captions, strict=True):
        with torch.no_grad(), Image.open(path) as image:
            picture = clip.model.encode_image(transform(image.convert("RGB"))[None])[0].double()
            text = clip.model.encode_text(clip.tokenize([caption]))[0].double()
        cosines.append(float(picture @ text / (picture.norm() * text.norm())))
    return math.fsum(cosines) / len(cosines)


def torch_fidelity(images: Path, reference: Path, weights: Path, size: int) -> dict[str, float]:
    """From the images: its own Inception, its own metrics."""
    from torch_fidelity import calculate_metrics

    found = calculate_metrics(
        input1=str(images), input2=str(reference), fid=True, kid=True, prc=True, verbose=False, cuda=False,
        cache_root=str(weights.parent / "theirs"), input1_cache_name=images.name, input2_cache_name=reference.name,
        kid_subset_size=size, feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights),
        batch_size=50,
    )  # fmt: skip
    names = {"frechet": "frechet_inception_distance", "kid": "kernel_inception_distance_mean"}
    return {name: float(found[names.get(name, name)]) for name in (*names, "precision", "recall")}


def torch_fidelity_on(drawn: np.ndarray, real: np.ndarray, size: int) -> dict[str, float]:
    """From our features: its metrics alone."""
    import torch
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    rows = [torch.from_numpy(one.astype(np.float64)) for one in (drawn, real)]
    options = {"kid_subsets": 100, "kid_subset_size": size, "rng_seed": 2020, "kid_kernel": "poly", "verbose": False}
    options |= {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
    found = kid_features_to_metric(*rows, **options)
    found |= prc_features_to_metric(*rows, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False)
    names = {"kid": "kernel_inception_distance_mean"}
    return {name: float(found[names.get(name, name)]) for name in ("kid", "precision", "recall")}


def measured(pair: Pair, home: Path, specs: list[str]) -> dict[str, dict[str, float]]:
    """What `raphael evaluate` says: {network's spec: {metric: value}}."""
    (home / "captions.txt").write_text("\n".join(pair.captions), encoding="utf-8")
    arguments = ["evaluate", "--images", str(pair.images), "--reference", str(pair.reference), "--protocol", PROTOCOL]
    arguments += [word for spec in specs for word in ("--features", spec)]
    arguments += [
        "--prompts",
        str(home / "captions.txt"),
        "--cache",
        str(home / "cache"),
        "--out",
        str(home / "o.json"),
    ]
    if raphael([*arguments, "--params", str(home / "none")]):
        raise SystemExit(f"{pair.name}: raphael evaluate failed; its message is above")
    numbers = read_json(home / "o.json")["numbers"]
    found = {}
    for spec in specs:
        network = open_network(spec)
        name = network.name.removeprefix("fd_")
        own = {number["name"]: number["value"] for number in numbers if number["network"] == network.network}
        found[spec] = {key.replace(f"_{name}", ""): value for key, value in own.items() if not key.startswith("fd_")}
        found[spec]["frechet"] = next(value for key, value in own.items() if key.startswith(("fd_", "fid_")))
        found[spec]["clip_score"] = own.get(f"clip_score_{name.removeprefix('clip_')}", math.nan)
    return found


def compare(pair: Pair, home: Path, specs: list[str]) -> list[dict[str, Any]]:
    """Rows {pair, network, metric, peer, ours, theirs, difference, limit}. limit None: told, not judged."""
    ours = measured(pair, home, specs)
    sides = [prepared(folder, home / "png" / folder.name) for folder in (pair.images, pair.reference)]
    rows = []

    def row(network: str, metric: str, peer: str, mine: float, other: float, limit: float | None) -> None:
        # KID crosses zero: from other features it is judged beside the values of its kernel, which are about 1
        scale = 1.0 if metric == "kid" and peer.endswith("from the pictures") else abs(other) or 1.0
        difference = abs(mine - other) / scale
        facts = {"pair": pair.name, "network": network, "metric": metric, "peer": peer, "ours": mine, "theirs": other}
        rows.append({**facts, "difference": difference, "limit": limit})

    row("none", "pictures that differ in a byte", "Pillow", sum(differ for _, differ in sides), 0, 0.5)
    protocol = load_protocol(PROTOCOL)
    folders = [ImageFolder.read(folder) for folder in (pair.images, pair.reference)]
    for spec in specs:
        network = open_network(spec)
        prepare = (protocol.pictures.preparation, 0)
        drawn, real = (embed_folder(folder, prepare, [network], home / "cache")[0].array() for folder in folders)
        kind, mine, size = network.kind, ours[spec], min(1000, len(drawn), len(real))
        row(kind, "frechet", "rotations, 80 bits", mine["frechet"], frechet_by_rotations(drawn, real), 1e-8)
        if min(len(drawn), len(real)) <= drawn.shape[1]:
            row(kind, "frechet", "in the span of the rows", mine["frechet"], frechet_in_the_span(drawn, real), 1e-6)
        else:  # SciPy's root keeps 1e-11 of the traces, which is no digit of a small distance: told, not judged
            plain = Features(drawn.shape[1]).update(drawn), Features(drawn.shape[1]).update(real)
            row(kind, "frechet", "SciPy's root", mine["frechet"], by_scipy(*plain), None)
        rule = protocol.kid
        row(kind, "kid", "loop", mine["kid"], kid_by_loops(drawn, real, rule.subsets, size, rule.seed), 1e-6)
        for metric, value in loops(drawn, real).items():
            if metric != "cmmd" or kind == "clip":
                row(kind, metric, "loop", mine[metric], value, 1e-6)
        if kind == "clip":
            clip_folder = Path(spec)
            score = clip_score_one_by_one(home / "png" / pair.images.name, pair.captions, clip_folder)
            row(kind, "clip_score", "open_clip, one at a time", mine["clip_score"], score, 1e-6)
        for metric, value in torch_fidelity_on(drawn, real, size).items():
            row(kind, metric, "torch-fidelity, same features", mine[metric], value, 1e-6)
        if kind == "inception":
            weights = Path(spec.partition(":")[2])
            for metric, value in torch_fidelity(sides[0][0], sides[1][0], weights, size).items():
                # its eigenvalues of a singular product are off where rows are fewer than dimensions: told, not judged
                limit = {"frechet": None, "kid": 1e-6}.get(metric, 1e-4)  # features agree to 1e-5
                row(kind, metric, "torch-fidelity, from the pictures", mine[metric], value, limit)
    return rows


def by_scipy(ours: Features, theirs: Features) -> float:
    from scipy.linalg import sqrtm

    step = ours.mean - theirs.mean
    root = np.real(sqrtm(ours.covariance @ theirs.covariance))
    return float(step @ step + np.trace(ours.covariance + theirs.covariance - 2 * root))


def random_clip(folder: Path) -> Path:
    """A CLIP of the demo's size with random weights."""
    import torch

    from raphael.base.config.params import load_config
    from raphael.encoders.clip import build_clip, save_clip

    torch.manual_seed(0)
    save_clip(build_clip(load_config(PROJECT / "params.yaml").clip), folder)
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=Path, help="a folder like models/clip; default: random weights of its size")
    parser.add_argument("--inception", type=Path, help="torch-fidelity's file; default: random weights in its form")
    parser.add_argument("--without-inception", action="store_true")
    parser.add_argument("--n", type=int, default=0, help="photographs of each folder (default: all)")
    parser.add_argument("--quick", action="store_true", help="eight photographs, and nothing is kept")
    arguments = parser.parse_args(argv)
    if not (PHOTOGRAPHS / "val2017").is_dir():
        print(f"{PHOTOGRAPHS}: no photographs beside the project, so nothing to compare")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        specs = [str(arguments.clip or random_clip(home / "clip"))]
        if not arguments.without_inception:
            specs.append(f"inception:{arguments.inception or random_weights(home / 'random.pth')}")
        n = 8 if arguments.quick else arguments.n
        rows = [row for pair in pairs(home, n) for row in compare(pair, home, specs)]
    for row in rows:
        print("  ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in row.values()))
    off = [row for row in rows if row["limit"] is not None and row["difference"] > row["limit"]]
    if not (arguments.quick or arguments.n or arguments.without_inception):
        summary = [
            within(f"{row['pair']}: {row['metric']} ({row['network']}); {row['peer']}", row["difference"], row["limit"],
                   "share")
            for row in rows
            if row["limit"] is not None
        ]  # fmt: skip
        weights = arguments.inception.name if arguments.inception else "random"
        keep("coco-pairs", rows, summary, inception=weights, clip=arguments.clip.name if arguments.clip else "random")
    print(f"{len(rows)} numbers, {len(off)} off their limit")
    return 1 if off else 0


if __name__ == "__main__":
    raise SystemExit(main())
