"""Teach the watermark detector on clean photographs, examine it on others, and write it with its report.

    python -m data_pipeline.tools.watermark_model --pictures DIR --out FILE.safetensors

The network learns place by place where a mark can be seen (it is drawn, so its place is known), from pairs of windows
with and without it. A tenth of the photographs choose the threshold and three tenths are the examination; neither is
ever taught from. The examination has fonts and words that were not taught, every kind of mark on every photograph, at
three stored sizes. Beside the model lies FILE.json: precision, recall, area under the curve, threshold, by kind and by
stored size. A detector that is near chance is not written: docs/data.md says what has been measured.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.tools.watermarks import KINDS, draw
from raphael.base.stage import StageError, one_clear_line, write_json

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    from data_pipeline.score.watermark_net import WatermarkModel, WatermarkNet

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
MIN_PHOTOGRAPHS = 20
KEPT_SIDE_PX = 320  # photographs are held in memory at this short side
SIZES_PX = (96, 192, 320)  # of the examination: the short side as a shard would store it
BATCH = 16
WINDOW_PX = 96  # of the pieces that are taught; whole images are scored
SEEN = 8  # of 255: a mark that changes a place by less is not there to be seen, and not asked for
MUON_RATE, ADAMW_RATE = 1e-2, 4e-3
SHARPNESSES = (0.5, 1.0, 2.0, 4.0)
MIN_YOUDEN = 0.3  # recall less false alarms, below which a detector is worse than none


def fit(photographs: list[Image.Image], num_images: int, seed: int = 0) -> WatermarkModel:
    """A detector taught on `num_images` images, half of them with a mark drawn on. Its threshold is not chosen
    yet."""
    import torch
    from tqdm import tqdm

    from data_pipeline.score.watermark_net import WatermarkModel, WatermarkNet, loss
    from raphael.base.precision import autocast

    torch.manual_seed(seed)
    net = WatermarkNet().to(memory_format=torch.channels_last)
    steps = max(1, num_images // BATCH)
    optimizers = _optimizers(net)
    batches = _batches(photographs, steps, random.Random(seed))
    for step, (images, marked, masks) in enumerate(tqdm(batches, "watermark", steps, unit=" batches", mininterval=2.0)):
        share = min(1.0, 10 * (step + 1) / steps) * (1 - step / steps)  # up in a tenth, then down to nothing
        with autocast("auto", "cpu"):
            logits, places = net(images)
        error = loss(logits, places, marked, masks)
        for optimizer, rate in optimizers:
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.zero_grad()
        error.backward()
        for optimizer, _ in optimizers:
            optimizer.step()
    return WatermarkModel(net)


def _optimizers(net: WatermarkNet) -> list[tuple[torch.optim.Optimizer, float]]:
    """(optimizer, highest rate): Muon for convolutions, AdamW for the rest."""
    import torch

    from raphael.train.optim.muon import Muon, is_muon_shape

    matrices = [parameter for parameter in net.parameters() if is_muon_shape(parameter)]
    others = [parameter for parameter in net.parameters() if not is_muon_shape(parameter)]
    adamw = torch.optim.AdamW(others, ADAMW_RATE, weight_decay=0.0)
    return [(Muon(matrices, MUON_RATE), MUON_RATE), (adamw, ADAMW_RATE)]


def choose_threshold(model: WatermarkModel, photographs: list[Image.Image], seed: int = 1) -> float:
    """Choose the soft maximum's sharpness, and move the scores so that 0.5 is where recall less false alarms is largest
    on these photographs. Returns the probability, before the move, that is the
    threshold."""
    import numpy as np
    import torch

    images, kinds, _ = examination(photographs, seed, unseen=False)
    marked = np.array([kind != "" for kind in kinds])
    maps, found = model.maps(images), []
    for sharpness in SHARPNESSES:
        model.net.sharpness = torch.tensor(sharpness)
        found.append((*best_threshold(model.of_maps(maps), marked), sharpness))
    _, threshold, sharpness = max(found)
    model.net.sharpness, model.net.shift = torch.tensor(sharpness), torch.tensor(threshold)
    return 1 / (1 + math.exp(-threshold))


def best_threshold(logits: np.ndarray, marked: np.ndarray) -> tuple[float, float]:
    """(Youden's J, recall less false alarms; the logit at which it is largest).

    Not F1: of a weak detector its best is where nearly everything is flagged, and clean images are most of a list.
    """
    import numpy as np

    order = np.argsort(-logits)
    hits, alarms = np.cumsum(marked[order]), np.cumsum(~marked[order])
    gain = hits / marked.sum() - alarms / (~marked).sum()
    best = int(np.argmax(gain))
    following = logits[order[min(best + 1, len(logits) - 1)]]
    return float(gain[best]), float((logits[order[best]] + following) / 2)


def examination(
    photographs: list[Image.Image], seed: int, unseen: bool
) -> tuple[list[Image.Image], list[str], list[int]]:
    """(images, kind of mark or "", short side px): each photograph clean and with each kind, at the stored sizes in
    turn."""
    images, kinds, sizes = [], [], []
    for number, photograph in enumerate(photographs):
        for place, kind in enumerate(("", *KINDS)):
            side = SIZES_PX[(number + place) % len(SIZES_PX)]
            rng = random.Random(f"{seed} {number} {kind}")
            image = draw(photograph, kind, rng, unseen)[0] if kind else photograph
            images.append(stored(image, side))
            kinds.append(kind)
            sizes.append(side)
    return images, kinds, sizes


def stored(image: Image.Image, short_px: int, quality: int = 95) -> Image.Image:
    """As a shard holds it: brought down to this short side, and once through JPEG."""
    from PIL import Image

    scale = min(1.0, short_px / min(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    body = io.BytesIO()
    image.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR).save(
        body, "jpeg", quality=quality
    )
    return Image.open(body, formats=("JPEG",)).convert("RGB")


def examine(model: WatermarkModel, photographs: list[Image.Image], seed: int = 2) -> dict[str, Any]:
    """Precision and recall at the threshold on photographs, fonts and words that were not taught.

    Precision is that of as many clean images as marked ones; at another share of marked images p it is
    recall p / (recall p + false_alarms (1 - p)). Shares come with 95 % Wilson intervals.
    """
    import numpy as np

    images, kinds, sizes = examination(photographs, seed, unseen=True)
    scores = model.scores(images)
    flagged = scores >= 0.5
    kinds, sizes = np.array(kinds), np.array(sizes)
    clean = kinds == ""

    def line(marked: np.ndarray, unmarked: np.ndarray) -> dict[str, Any]:
        recall, alarms = float(flagged[marked].mean()), float(flagged[unmarked].mean())
        low, high = _interval(flagged[marked])
        return {
            "pictures": int(marked.sum()),
            "auc": round(auc(scores[marked], scores[unmarked]), 4),
            "recall": round(recall, 4),
            "recall_95": [round(low, 4), round(high, 4)],
            "precision": round(recall / (recall + alarms), 4) if recall + alarms else None,
        }

    low, high = _interval(flagged[clean])
    return {
        "photographs": len(photographs),
        "false_alarms": round(float(flagged[clean].mean()), 4),
        "false_alarms_95": [round(low, 4), round(high, 4)],
        "all": line(~clean, clean),
        "by_kind": {kind: line(kinds == kind, clean) for kind in KINDS},
        "by_size_px": {str(side): line(~clean & (sizes == side), clean & (sizes == side)) for side in SIZES_PX},
    }


def auc(marked: np.ndarray, clean: np.ndarray) -> float:
    """The share of pairs, one marked and one clean image, of which the marked one scores higher; ties count half."""
    return float((marked[:, None] > clean).mean() + 0.5 * (marked[:, None] == clean).mean())


def read_photographs(folder: Path) -> list[tuple[str, Image.Image]]:
    """(name, RGB image) of every image below the folder, in an order that only the names decide."""
    from PIL import Image

    from data_pipeline.common.images import FORMATS
    from raphael.base.images.colours import as_seen

    if not folder.is_dir():
        raise StageError(f"{folder}: no such folder; expected one with photographs that have no watermark")
    files = [file for file in folder.rglob("*") if file.suffix.lower() in EXTENSIONS]
    if len(files) < MIN_PHOTOGRAPHS:
        raise StageError(f"{folder}: got {len(files)} images, expected at least {MIN_PHOTOGRAPHS} clean photographs")
    found = []
    for file in sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest()):
        with Image.open(file, formats=FORMATS) as image:
            image = as_seen(image)
        scale = max(min(1.0, KEPT_SIDE_PX / min(image.size)), WINDOW_PX / min(image.size))
        found.append((file.name, image.resize((round(image.width * scale), round(image.height * scale)))))
    return found


def drawn_scenes(number: int, seed: int) -> list[Image.Image]:
    """Images of the embedded corpus; some have words in them that are no watermark."""
    from data_pipeline.source.scene_drawing import draw as draw_scene
    from data_pipeline.source.scenes import scene_of_row

    return [draw_scene(scene_of_row(seed, row, (192, 320), 0.12)) for row in range(number)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="a folder of clean photographs, at best hundreds")
    parser.add_argument("--out", type=Path, required=True, help="the model, a .safetensors file")
    parser.add_argument("--images", type=int, default=80000, help="images to teach (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=60, help="drawn scenes among the taught (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    with one_clear_line("watermark") as outcome:
        if arguments.out.suffix != ".safetensors":
            raise StageError(f"--out: got {arguments.out}, expected a name that ends in .safetensors")
        report = build(arguments)
        whole = report["examination"]
        print(f"recall {whole['all']['recall']:.3f}, precision {whole['all']['precision']}, kept in {arguments.out}")
        for kind, line in whole["by_kind"].items():
            print(f"  {kind:6} recall {line['recall']:.3f}, precision {line['precision']}")
    return outcome.status


def build(arguments: argparse.Namespace) -> dict[str, Any]:
    """Teach, choose, examine, write the model and its report; returns the report."""
    found = read_photographs(arguments.pictures)
    taught, choosing, examined = split([image for _, image in found])
    started_s = time.process_time()
    model = fit(taught + drawn_scenes(arguments.scenes, arguments.seed), arguments.images, arguments.seed)
    teaching_s = time.process_time() - started_s
    threshold = choose_threshold(model, choosing)
    report = {
        "photographs": {"taught": len(taught), "threshold": len(choosing), "examined": len(examined)},
        "scenes": arguments.scenes,
        "images": arguments.images,
        "seed": arguments.seed,
        "parameters": sum(parameter.numel() for parameter in model.net.parameters()),
        "cpu_seconds": round(teaching_s, 1),
        "threshold": round(threshold, 4),
        "sharpness": float(model.net.sharpness),
        "examination": examine(model, examined),
    }
    if arguments.scenes:  # other scenes than those taught
        scores = model.scores([stored(image, 96) for image in drawn_scenes(100, arguments.seed + 1)])
        report["false_alarms_on_scenes"] = round(float((scores >= 0.5).mean()), 4)
    write_json(arguments.out.with_suffix(".json"), report)
    refuse_chance(report["examination"])
    model.save(arguments.out)
    return report


def refuse_chance(examination: dict[str, Any]) -> None:
    """Raise StageError for a detector that hardly tells marked images from clean ones: it is not written."""
    recall, alarms = examination["all"]["recall"], examination["false_alarms"]
    if recall - alarms < MIN_YOUDEN:
        raise StageError(
            f"the detector flags {recall:.1%} of marked and {alarms:.1%} of clean images it has not seen, expected a "
            f"difference of at least {MIN_YOUDEN:.0%}: only its report is written; teach more images (--images) "
            "or more photographs (--pictures)"
        )


def split(photographs: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """(to teach, to choose the threshold, to examine): six, one and three tenths."""
    first, second = round(0.6 * len(photographs)), round(0.7 * len(photographs))
    return photographs[:first], photographs[first:second], photographs[second:]


def _batches(
    photographs: list[Image.Image], steps: int, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """images uint8 (B,3,96,96), marked float (B,), masks float (B,12,12): each crop with and without its mark.

    Drawing a mark costs more than looking at it: of each drawn image two crops are taken.
    """
    import numpy as np
    import torch

    for step in range(steps):
        images, masks = [], []
        for number in range(BATCH // 4):
            kind = KINDS[(step * (BATCH // 4) + number) % len(KINDS)]
            for clean, marked, mask in _pairs(rng.choice(photographs), kind, rng):
                images += [clean, marked]
                masks += [np.zeros_like(mask), mask]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        yield pixels, torch.arange(len(images)) % 2.0, torch.from_numpy(np.stack(masks))


def _pairs(photograph: Image.Image, kind: str, rng: random.Random) -> Iterator[tuple[np.ndarray, ...]]:
    """Two windows, each (clean, marked: uint8 (96,96,3); mask: float32 (12,12), see `loss`), both with some mark."""
    import numpy as np
    from PIL import Image, ImageChops

    from data_pipeline.score.watermark_net import STRIDE, sized

    crop = _crop(photograph, rng)
    marked, mask = draw(crop, kind, rng)
    change = ImageChops.difference(crop, marked)
    side, quality = round(rng.uniform(WINDOW_PX, 340)), rng.randint(70, 97)
    small = [sized(stored(image, side, quality)) for image in (crop, marked)]
    shape = small[0].shape[1::-1]
    seen = np.asarray(change.resize(shape, Image.Resampling.BOX)).max(2)
    drawn = np.asarray(mask.resize(shape, Image.Resampling.BOX))
    rows, columns = np.nonzero(seen > SEEN)
    for _ in range(2):
        top, left = _window(rows, columns, seen.shape, rng)
        window = np.s_[top : top + WINDOW_PX, left : left + WINDOW_PX]
        visible, there = (_cells(part[window], STRIDE) for part in (seen, drawn))
        target = np.where(visible > SEEN, 1.0, np.where(there > 10, np.nan, 0.0)).astype(np.float32)
        yield small[0][window], small[1][window], target


def _window(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int], rng: random.Random) -> tuple[int, int]:
    """Top and left of a window that holds one of the places (rows, columns), anywhere in it; any, if there is none."""
    place = rng.randrange(len(rows)) if len(rows) else None
    corner = []
    for side, among in zip(shape, (rows, columns), strict=True):
        middle = int(among[place]) if place is not None else rng.randrange(side)
        corner.append(min(max(middle - rng.randrange(WINDOW_PX), 0), side - WINDOW_PX))
    return corner[0], corner[1]


def _cells(values: np.ndarray, stride: int) -> np.ndarray:
    """The largest of each square of stride x stride values."""
    height, width = values.shape
    return values.reshape(height // stride, stride, width // stride, stride).max((1, 3))


def _crop(image: Image.Image, rng: random.Random) -> Image.Image:
    """A piece of at least half of each side and 96 px, mirrored half of the time, its brightness and colour changed a
    little."""
    from PIL import ImageEnhance, ImageOps

    width, height = (max(WINDOW_PX, round(side * rng.uniform(0.5, 1.0))) for side in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    crop = image.crop((left, top, left + width, top + height))
    if rng.random() < 0.5:
        crop = ImageOps.mirror(crop)
    crop = ImageEnhance.Brightness(crop).enhance(rng.uniform(0.7, 1.3))
    return ImageEnhance.Color(crop).enhance(rng.uniform(0.6, 1.4))


def _interval(outcomes: np.ndarray) -> tuple[float, float]:
    from raphael.evaluate.metrics.intervals import wilson

    return wilson(int(outcomes.sum()), len(outcomes))
