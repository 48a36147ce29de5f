"""The one training loop: every objective, alone or as one of several workers, resumed bit for bit.

The loop knows nothing of images. An objective brings its parameters and a function from a batch to named losses; the
loop brings order, updates, EMA, checkpoints and numbers. Progress is counted in images.

Several workers: where a torch.distributed process group is up, each rank runs this same function with its `World`.
Every rank's slice has the same length, so the mean over ranks of the losses is the mean over the global batch, and the
update is that of world size 1 up to rounding. DDP runs with find_unused_parameters: a parameter that no sample of a
rank used gives a zero there and nobody waits for it; one that no rank used gets no gradient, as at world size 1. (It
also keeps DDP's buckets fixed from the first step on, without which a resumed run would sum in another order.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from raphael.base.checkpoint.home import CheckpointHome
from raphael.base.config.params import LoopConfig
from raphael.base.randomness import SampleRng
from raphael.train.batches import Batches
from raphael.train.distributed.parallel import Replica, prepare
from raphael.train.distributed.watchdog import Watchdog
from raphael.train.distributed.world import World
from raphael.train.faults import BadSteps, TrainingError
from raphael.train.meter import Meter
from raphael.train.optim.optimizer import clip_gradients, learning_rate
from raphael.train.saver import Saver
from raphael.train.state import State
from raphael.train.stopping import StopRequest

__all__ = ["Hooks", "Objective", "TrainingError", "World", "train"]


class Objective(Protocol):
    """An nn.Module. Parameters with requires_grad are what is trained.

    objective(batch, rng) -> {"loss": scalar to minimise, a mean over the batch; further losses and statistics by name,
    of any shape that is the same at every step}. All randomness comes from `rng`, so that it belongs to the sample.

    Every value is a mean over the batch, so that it is one over passes, ranks and steps, too. A statistic `x` of a part
    of the batch alone is 0 for the other samples, and `x.share` says how large the part was: logged is their ratio, and
    nothing where the part was empty. flops_per_image, where the objective has it: of a training step of one image.
    """

    def __call__(self, batch: dict[str, Tensor], rng: SampleRng) -> dict[str, Tensor]: ...


class Data(Protocol):
    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]: ...


class Tracker(Protocol):
    def log(self, metrics: dict[str, float], step: int) -> None: ...


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """What others do beside the loop, on rank 0 only.

    on_log(metrics, images): a point was logged. on_sample(images, weights): generate images; the objective has these
    weights, each of sample_weights in turn ("raw", "ema" ...). It is called on every rank where weights are sharded,
    since a forward then needs all; rank 0 keeps them. heldout() -> losses of the weights that the objective has, by
    name; it is called on every rank, for the raw weights and every EMA, and must change nothing.
    progress(images): a step ended. say(line): something a person should read. enough(points): whether to end before
    num_images, asked of the held-out points, or of the logged ones where nothing is held out; on every rank, so it must
    be a function of them alone (raphael/train/start.py).

    about: what every checkpoint's meta says of its making (revision, data, configuration). best_by: the held-out metric
    by whose lowest value a checkpoint is the best, such as "heldout/ema/denoise"; "": none is.
    """

    on_log: Callable[[dict[str, float], int], None] = _nothing
    on_sample: Callable[[int, str], None] = _nothing
    sample_weights: tuple[str, ...] = ("ema",)
    heldout: Callable[[], dict[str, float]] | None = None
    progress: Callable[[int], None] = _nothing
    say: Callable[[str], None] = print
    enough: Callable[[list[dict[str, float]]], bool] = lambda _: False
    about: dict[str, Any] = field(default_factory=dict)
    best_by: str = ""


def train(
    objective: nn.Module,
    data: Data,
    loop: LoopConfig,
    seed: int,
    *,
    folder: str | Path,
    tracker: Tracker | None = None,
    world: World = World(),  # noqa: B008 (frozen)
    hooks: Hooks = Hooks(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Train `objective` on `data` for loop.num_images images, resuming from the newest checkpoint in `folder` if any.

    data: len() and batch(indices) -> arrays (B, ...); bucket_counts where samples have several shapes: a step is then
    of one shape (raphael/train/batches.py). batches(seed, batch_size, rank, world_size) where its samples come in
    another order than all of them epoch by epoch (raphael/train/phases.py). ahead(indices) where they have to be
    fetched: those of the next step.
    folder: of the checkpoints, shared by all ranks; the newest loop.keep_checkpoints stay, and the best.
    tracker: gets every logged point once (step = images). Points are means over the steps since the one before.

    Returns {"images", "history" (list of points, each with "images" and "train/<name>"), "heldout" (the same with
    "heldout/<weights>/<name>"), "ema" (EMA weights by name) and further EMAs}; the objective holds the last
    weights. Nothing in it depends on time, rank or restarts.

    SIGTERM and Ctrl-C: the step ends, a checkpoint is written, then SystemExit(143) or KeyboardInterrupt. (With several
    workers they agree at the next point logged.) From the notice on that a machine will be taken (World.preempted),
    every point logged has a checkpoint.

    Raises TrainingError (raphael/train/faults.py), CheckpointError (of other settings, damaged, or no room to write),
    WorkerLost.
    """
    rank_0 = world.rank == 0
    say = hooks.say if rank_0 else _nothing
    prepare(objective.to(world.device).train(), world)
    buckets = getattr(data, "bucket_counts", ())
    # a data set may bring an order of its own (raphael/train/phases.py)
    ordered = getattr(data, "batches", None) or functools.partial(Batches, num_samples=len(data), buckets=buckets)
    batches = ordered(seed=seed, batch_size=loop.batch_size, rank=world.rank, world_size=world.size)
    order = {"seed": seed, "num_samples": len(data)} | ({"buckets": list(buckets)} if len(buckets) > 1 else {})
    if (sha256 := getattr(data, "sha256", None)) is not None:
        order["data_sha256"] = sha256
    state = State(objective, loop, order, world)
    home = CheckpointHome(folder, loop.keep_checkpoints)
    if rank_0:
        home.sweep()
    resumed_at = None
    if (newest := home.find(hooks.say, world.rank, world.size, world.any)) is not None:
        for note in state.unpack(newest, where=folder):
            say(note)
        resumed_at = state.images
        if resumed_at < loop.num_images:
            say(f"resuming from the checkpoint at {resumed_at:,} images")
    replica = Replica(objective, world, loop.precision)
    ahead = getattr(data, "ahead", None)
    faults = BadSteps(state, world, batches, data, Path(folder), say)
    meter = Meter(world, loop.num_images, state.images, getattr(objective, "flops_per_image", 0.0))
    if state.images < loop.num_images:
        say(replica.outlook(state))

    with Saver(home, world) as saver, StopRequest() as stop, Watchdog(world, hooks.say) as watchdog:
        while True:
            # Periodic work. At the very image count of a checkpoint it was all done before that was written.
            watchdog.at("between two steps", state.images)
            done = state.images >= loop.num_images or _enough(hooks, state)
            stopping, hurried = stop.requested and world.size == 1, False
            if state.images != resumed_at:
                if state.summed_steps and (done or _due(loop.log_every_images, state)):
                    faults.check()
                    stopping, hurried = world.any(stop.requested), world.preempted()
                    point = _mean_over_ranks(state, world)
                    point["train/learning_rate"] = learning_rate(state.images, loop)
                    state.history.append({"images": state.images, **point})
                    state.sums, state.summed_steps = {}, 0
                    done = done or _enough(hooks, state)
                    if rank_0:
                        shown = {**point, **meter.point(state.images)}
                        if tracker is not None:
                            tracker.log(shown, state.images)
                        hooks.on_log(shown, state.images)
                samples = rank_0 or world.sharded
                if samples and loop.sample_every_images and (done or _due(loop.sample_every_images, state)):
                    for name in hooks.sample_weights:
                        with meter.paused(), state.using(name), replica.sampling():
                            hooks.on_sample(state.images, name)
                if hooks.heldout and loop.heldout_every_images and (done or _due(loop.heldout_every_images, state)):
                    losses = {}
                    for name in state.kinds:
                        with meter.paused(), state.using(name), replica.sampling():
                            losses |= {f"heldout/{name}/{key}": value for key, value in hooks.heldout().items()}
                    state.heldout.append({"images": state.images, **losses})
                    done = done or _enough(hooks, state)
                    if rank_0 and tracker is not None:
                        tracker.log(losses, state.images)
                if state.images and (done or stopping or hurried or _due(loop.checkpoint_every_images, state)):
                    faults.check()
                    if state.summed_steps:
                        _share_sums(state, world)
                    if rank_0 or world.sharded:
                        with meter.paused():
                            groups, meta = state.pack(rank_0)
                            meta |= {"about": hooks.about, **_score(hooks, state)}
                            saver.save(state.images, groups, meta)

            # Stop test.
            if done:
                break
            if stopping:
                saver.wait()
                say(f"stopped as asked; the checkpoint at {state.images:,} images is where the same command resumes")
                stop.leave()
            saver.check()

            # Step.
            watchdog.at("reading its batch", state.images)
            epochs, indices = batches.own(state.step)
            rng = SampleRng(seed, epochs, indices)
            with meter.waiting():
                arrays = data.batch(indices)
            if ahead is not None:
                ahead(batches.own(state.step + 1)[1])
            batch = {name: torch.from_numpy(array).to(world.device) for name, array in arrays.items()}
            watchdog.at("computing", state.images)
            outputs = replica.gradients(batch, rng)
            norm = clip_gradients(state.parameters.values(), loop.clip_norm)
            bad = faults.judge(outputs["loss"], norm)
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(state.images + loop.batch_size, loop)
            state.optimizer.step(bad)
            state.optimizer.zero_grad()

            # State.
            state.add({**outputs, "gradient_norm": norm}, bad)
            state.images += loop.batch_size
            state.update_emas()
            if rank_0:
                hooks.progress(state.images)

    emas = {name: ema.weights() for name, ema in state.emas.items()}
    return {"images": state.images, "history": state.history, "heldout": state.heldout, **emas}


def _enough(hooks: Hooks, state: State) -> bool:
    return hooks.enough(state.history if hooks.heldout is None else state.heldout)


def _score(hooks: Hooks, state: State) -> dict[str, Any]:
    """By what a checkpoint may be the best: the held-out loss, where it was measured at this very image count."""
    point = state.heldout[-1] if state.heldout else {}
    if point.get("images") != state.images or hooks.best_by not in point:
        return {}
    return {"score": {"metric": hooks.best_by, "value": point[hooks.best_by]}}


def _due(every: int, state: State) -> bool:
    """Whether the step that ended here reached or crossed a multiple of `every`; true at 0 images."""
    return state.images == 0 or state.images // every > (state.images - state.loop.batch_size) // every


def _mean_over_ranks(state: State, world: World) -> dict[str, float]:
    """The interval's means over its good steps, vectors spread over names: train/<name>, train/<name>/<i>,
    train/<name>/<i>.<j> ... and train/skipped, the number of the others. Without a good step that is all.

    Of a part of the samples (see Objective) the mean is over these alone: sum over sum, not a mean of means.
    """
    _share_sums(state, world)
    skipped = float(state.sums["skipped"])
    point = {"train/skipped": skipped}
    good = state.summed_steps - skipped
    means = {name: (total.double() / good).cpu().numpy() for name, total in state.sums.items()} if good else {}
    for name in sorted(name for name in means if name != "skipped" and not name.endswith(".share")):
        mean, share = means[name], means.get(f"{name}.share")
        for place in np.ndindex(mean.shape):
            if share is not None and share[place] == 0:
                continue
            suffix = "/" + ".".join(map(str, place)) if place else ""
            point[f"train/{name}{suffix}"] = float(mean[place] if share is None else mean[place] / share[place])
    return point


def _share_sums(state: State, world: World) -> None:
    """Replace every rank's sums by their mean over ranks. One message; the device waits only here."""
    if world.size == 1:
        return
    names = sorted(state.sums)
    flat = world.sum(torch.cat([state.sums[name].reshape(-1) for name in names])) / world.size
    parts = flat.split([state.sums[name].numel() for name in names])
    state.sums = {name: part.reshape(state.sums[name].shape).clone() for name, part in zip(names, parts, strict=True)}
