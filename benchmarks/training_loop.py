"""What the training loop costs: against a plain script, against itself without its extras, and through Ray Train.

Four ways to train the demo's network (preset tiny, AdamW, batch 16) on the same records in memory, in turn, each turn a
process of its own, one thread:

plain     a script in the manner of diffusers' examples: DataLoader, torch's random numbers, clip, AdamW, diffusers'
          EMAModel, loss.item() for the progress bar; the same objective, so that the network's work is the same
ours      raphael.train.loop at the demo's paces: points to MLflow (SQLite), EMA, checkpoints
bare      ours without EMA, points and checkpoints (but the last)
ray       ours by one Ray Train worker

Times are per step, means from the first step after --warm to the last; of each way the best turn counts. Two runs of
one way differ by up to 7 %, more than the extras cost, so ours and bare run --pairs times more, and the median of the
pairs' ratios counts; and the extras are timed by themselves, within `ours`: seconds in the calls for the EMA, the
points and the checkpoints, and processor time of the thread that writes those. Writes
results/training_loop-<device>-<yyyymm>.json, unless --quick.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from _machine import judged, keep

from raphael.base.config.params import Config, load_config
from raphael.base.records import EDGES, MOMENTS, TOKEN_IDS, Records, RecordWriter
from raphael.base.stage import read_json, write_json
from raphael.base.strict import to_dict

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("plain", "ours", "bare", "ray")
COUNT = 1024
NEVER = 10**12


def make_workspace(folder: Path) -> None:
    """The demo's sizes with random encoders and random records, and everything that a training reads."""
    import torch

    from raphael.encoders.autoencoder import build_autoencoder
    from raphael.encoders.clip import build_clip, save_clip
    from raphael.encoders.text import load_text_encoder

    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    config = load_config(folder / "params.yaml")
    torch.manual_seed(0)
    autoencoder = build_autoencoder(config.autoencoder)
    autoencoder.set_scaling(1.0, 0.0)
    autoencoder.save(folder / "models/autoencoder")
    save_clip(build_clip(config.clip), folder / "models/clip")
    text, rng = load_text_encoder(folder / "models/clip"), np.random.default_rng(0)
    side = config.picture.height_px // autoencoder.downsampling
    channels = autoencoder.latent_channels
    fields = {
        MOMENTS: ("float16", (2 * channels, side, side)),
        TOKEN_IDS: ("int32", (text.context_length,)),
        EDGES: ("uint8", (side, side)),
    }
    captions = [f"a {('red', 'green', 'blue')[i % 3]} {('circle', 'square')[i % 2]}" for i in range(COUNT)]
    arrays = {
        MOMENTS: rng.standard_normal((COUNT, 2 * channels, side, side)).astype(np.float16),
        TOKEN_IDS: text.tokenize(captions).numpy().astype(np.int32),
        EDGES: rng.integers(0, 256, (COUNT, side, side)).astype(np.uint8),
    }
    with RecordWriter(folder / "data/records", fields, {"picture": to_dict(config.picture)}) as writer:
        writer.append([f"{i:09d}" for i in range(COUNT)], arrays)
    write_json(folder / "data/source/prompts.json", {"source": "scenes", "prompts": []})


def settings(folder: Path, way: str, steps: int) -> Config:
    """AdamW for all; no images while training, which are a pause and not a cost."""
    config = load_config(folder / "params.yaml")
    loop = config.train.loop
    changes = {"optimizer": "adamw", "num_images": steps * loop.batch_size, "sample_every_images": 0}
    if way == "bare":
        changes |= {"ema_decay": 0.0, "log_every_images": NEVER, "checkpoint_every_images": NEVER}
    return replace(config, train=replace(config.train, loop=replace(loop, **changes)))


class TimedData:
    """Records that know how long they were waited for."""

    def __init__(self, records: Records):
        self.records, self.waited_s = records, 0.0

    def __len__(self) -> int:
        return len(self.records)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        started_s = time.perf_counter()
        batch = self.records.batch(indices)
        self.waited_s += time.perf_counter() - started_s
        return batch


class Stopwatch:
    """Seconds of the calls of some methods, wherever they are called from."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, float]] = []  # (when it began, seconds by the given clock)

    @contextlib.contextmanager
    def on(self, clock: Callable[[], float], owner: type, *names: str) -> Iterator[None]:
        with contextlib.ExitStack() as patches:
            for name in names:
                patches.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name), clock)))
            yield

    def _timed(self, method: Callable[..., Any], clock: Callable[[], float]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            began_s, before_s = time.perf_counter(), clock()
            try:
                return method(*arguments, **named)
            finally:
                self.calls.append((began_s, clock() - before_s))

        return timed

    def share(self, start_s: float, end_s: float) -> float:
        """Of the time from start_s to end_s, in which the calls counted began."""
        return sum(seconds for began_s, seconds in self.calls if start_s <= began_s < end_s) / (end_s - start_s)


@contextlib.contextmanager
def extras_timed() -> Iterator[Stopwatch]:
    """The EMA, the points and the checkpoints. Writing is a thread's: on one core it takes what it computes."""
    from raphael.base.tracking.tracker import MlflowTracker
    from raphael.train.optim.ema import Ema
    from raphael.train.saver import Saver

    watch, wall, own = Stopwatch(), time.perf_counter, time.thread_time
    with watch.on(wall, Ema, "update"), watch.on(wall, MlflowTracker, "log"):
        with watch.on(wall, Saver, "save", "wait"), watch.on(own, Saver, "_write"):
            yield watch


def by_loop(job: tuple[str, str, int], world: Any) -> None:
    """Train by raphael.train.loop; the times of the steps go to <way>.json. Runs here, or in a Ray worker."""
    import torch

    from raphael.base.tracking import tracker as tracking
    from raphael.systems.raphael.training import Folders, build_denoising
    from raphael.train.loop import Hooks, train

    home, way, steps = job
    folder = Path(home)
    config = settings(folder, way, steps)
    torch.set_num_threads(1)  # fit() gives a lone worker all cores: it would be compared with loops on one
    objective, records = build_denoising(config, Folders.of(folder, folder / "work" / way))
    data, ends = TimedData(records), [time.perf_counter()]
    tracker = tracking.NullTracker()
    if way != "bare":
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        run_id = tracking.create_run(config, folder, way)
        tracker = tracking.MlflowTracker(uri, run_id, folder / "work" / f"{run_id}.jsonl")
    hooks = Hooks(progress=lambda images: ends.append(time.perf_counter()), say=lambda line: None)
    with tempfile.TemporaryDirectory() as checkpoints, tracking.closing(tracker), extras_timed() as extras:
        train(objective, data, config.train.loop, 0, folder=checkpoints, tracker=tracker, world=world, hooks=hooks)
    extras_share = extras.share(ends[0], ends[-1])
    write_json(folder / f"{way}.json", {"ends_s": ends, "waited_s": data.waited_s, "extras_share": extras_share})


class PlainRandom:
    """torch's own random numbers where the loop has those of the sample."""

    def __init__(self, batch: int):
        self.batch = batch

    def normal(self, stream: str, shape: tuple[int, ...] = ()) -> Any:
        import torch

        return torch.randn(self.batch, *shape)

    def uniform(self, stream: str, shape: tuple[int, ...] = ()) -> Any:
        import torch

        return torch.rand(self.batch, *shape)


def by_script(folder: Path, steps: int) -> None:
    """The plain script."""
    import torch
    from diffusers.training_utils import EMAModel
    from torch.utils.data import DataLoader, TensorDataset

    from raphael.base.precision import autocast
    from raphael.systems.raphael.training import Folders, build_denoising

    config = settings(folder, "plain", steps)
    loop = config.train.loop
    objective, records = build_denoising(config, Folders.of(folder, folder / "work" / "plain"))
    arrays = records.batch(np.arange(len(records)))
    names = list(arrays)
    dataset = TensorDataset(*(torch.from_numpy(arrays[name]) for name in names))
    loader = DataLoader(dataset, batch_size=loop.batch_size, shuffle=True, drop_last=True)
    unet = objective.unet.train()
    # AdamW's fused kernel is what the loop uses too; torch's default for a CPU is slower
    optimizer = torch.optim.AdamW(unet.parameters(), loop.learning_rate, loop.betas, weight_decay=0.0, fused=True)
    ema = EMAModel(unet.parameters(), decay=loop.ema_decay)
    ends = [time.perf_counter()]
    while len(ends) <= steps:
        for batch in loader:
            with autocast(loop.precision, "cpu"):
                loss = objective(dict(zip(names, batch, strict=True)), PlainRandom(loop.batch_size))["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), loop.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(unet.parameters())
            loss.detach().item()
            ends.append(time.perf_counter())
            if len(ends) > steps:
                break
    write_json(folder / "plain.json", {"ends_s": ends})


def by_ray(folder: Path, steps: int) -> None:
    from raphael.train.distributed.ray_trainer import Cluster, fit

    cluster = Cluster(1, False, f"bench-{time.time_ns()}", folder / "ray")
    fit(by_loop, (str(folder), "ray", steps), cluster)


def run_way(folder: Path, way: str, steps: int) -> None:
    import torch

    from raphael.train.loop import World

    torch.set_num_threads(1)
    if way == "plain":
        by_script(folder, steps)
    elif way == "ray":
        by_ray(folder, steps)
    else:
        by_loop((str(folder), way, steps), World())


def measure(turns: int, pairs: int, steps: int, warm: int) -> dict[str, list[dict[str, float]]]:
    """{way: its turns, each {mean_s, median_s, wait_share, extras_share}}, per step. Turn i of ours and of bare ran one
    after the other, or nearly so."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    rounds = [WAYS] * turns + [("ours", "bare")] * pairs
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        make_workspace(folder)
        for turn, ways in enumerate(rounds):
            for way in ways if turn % 2 == 0 else reversed(ways):
                command = [sys.executable, __file__, "--way", way, "--folder", home, "--steps", str(steps)]
                subprocess.run(command, check=True, cwd=folder)
                said = read_json(folder / f"{way}.json")
                ends = np.array(said["ends_s"])
                each = np.diff(ends)[warm:]
                whole = ends[-1] - ends[0]
                row = {"mean_s": float(each.mean()), "median_s": float(np.median(each))}
                row["wait_share"] = said.get("waited_s", 0.0) / whole
                row["extras_share"] = said.get("extras_share", 0.0)
                found[way].append(row)
                print(f"turn {turn + 1}  {way:<6} {1e3 * row['mean_s']:8.2f} ms a step", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, one turn: does it run at all")
    parser.add_argument("--turns", type=int, default=2, help="of all four ways")
    parser.add_argument("--pairs", type=int, default=5, help="of ours and bare, beside")
    parser.add_argument("--steps", type=int, default=330, help="of a turn; 300 is a checkpoint's pace in the demo")
    parser.add_argument("--warm", type=int, default=10, help="steps that are not counted")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        run_way(arguments.folder, arguments.way, arguments.steps)
        return
    how = (1, 1, 6, 2) if arguments.quick else (arguments.turns, arguments.pairs, arguments.steps, arguments.warm)
    found = measure(*how)
    best = {way: min(rows, key=lambda row: row["mean_s"]) for way, rows in found.items()}
    ratios = [ours["mean_s"] / bare["mean_s"] for ours, bare in zip(found["ours"], found["bare"], strict=True)]
    apart = f"a step with points, average and checkpoints, without: median of {len(ratios)} pairs"
    means = {way: row["mean_s"] for way, row in best.items()}
    wait, extras = best["ours"]["wait_share"], best["ours"]["extras_share"]
    summary = [
        judged("a training step, a plain script", means["ours"], means["plain"], "s", "<= 1.02"),
        judged(apart, statistics.median(ratios), 1.0, "ratio", "<= 1.03"),
        judged("points, average and checkpoints, timed by themselves", extras, 1.0, "share", "<= 0.03"),
        judged("images/s by one Ray worker, the loop alone", 1 / means["ray"], 1 / means["ours"], "steps/s", ">= 0.97"),
        judged("waiting for data, the whole time", wait, 1.0, "share", "<= 0.01"),
    ]
    for row in summary:
        print(f"{row['case']:<76} {row['ratio']:8.4f}  target {row['target']}  {'met' if row['met'] else 'MISSED'}")
    if not arguments.quick:
        rows = [{"way": way, **row} for way, turns in found.items() for row in turns]
        keep("training_loop", rows, summary, steps=arguments.steps, batch=16, preset="tiny", threads_each=1)


if __name__ == "__main__":
    main()
