"""A job's work: what is asked of a model in memory, and what is told of it. No HTTP and no queue is known here, so that
a thread and a replica on another machine do it alike."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from raphael.base.config.sampling import Sampling
from raphael.diffusion.samplers import SAMPLERS
from raphael.diffusion.sampling import decode_images, encode_texts
from raphael.edit.run import How, Session, looking_on
from raphael.encoders.weighted import cut_prompts
from raphael.generate.metadata import Made, batch_of, chunk
from raphael.serve import edits, inside
from raphael.serve.bodies import ImagesBody, SamplingBody
from raphael.serve.door.problems import Problem, of_value_error
from raphael.serve.images import b64, data_uri, png
from raphael.serve.info import told_sampling

if TYPE_CHECKING:
    from raphael.diffusion.sampling import Parts
    from raphael.generate.pipeline import Pipeline
    from raphael.serve.models import Served

IMAGES, INSIDE, EDIT = "images", "inside", "edits/"


class Stopped(Exception):  # noqa: N818  no error: somebody cancelled the job
    """Raised by a Watch where its job is not wanted any more."""


class Watch(Protocol):
    """Whom work tells how far it is. Any call may raise Stopped or Problem, which ends the work."""

    def waiting(self) -> None:
        """It has not begun, or not again: its time is not counted. Raises Stopped."""

    def evaluation(self) -> None:
        """The network is about to be asked once more."""

    def step(self, done: int, sigma: float | None, previews: Callable[[], list[str]]) -> None:
        """So many steps are done; told again where only the previews are new. previews: the estimate of each image, of
        an edit all rows that it draws at one time, as a data URI; costs a decoding if called."""


@dataclass(frozen=True)
class Task:
    """kind: "images", "inside" or "edits/<kind>". body: checked, with a model and a seed. images: its uploads, decoded,
    which the body holds no more. watched: whether somebody may look on; from afar it cannot be known step by step."""

    kind: str
    model: str
    body: SamplingBody
    images: dict[str, Any] = field(default_factory=dict)
    watched: bool = False

    def steps(self, how: Sampling) -> int:
        """How many steps it will tell of: of images their own, of what else is drawn the network's evaluations."""
        if self.kind == IMAGES:
            return how.steps
        evaluations = SAMPLERS[how.sampler].evaluations
        if self.kind == INSIDE:
            return evaluations(how.steps)
        kind = edits.KINDS[self.kind.removeprefix(EDIT)]
        return kind.passes(self.body) * evaluations(how.steps) + kind.more(
            self.body, how.steps, evaluations(2) - evaluations(1)
        )


def perform(served: Served, task: Task, watch: Watch) -> dict[str, Any]:
    """The answer's JSON without the id; warnings: of prompts that were cut. Raises Problem for what the model refuses,
    and what the watch raises."""
    started_s = time.perf_counter()
    act = {IMAGES: _generate, INSIDE: _inspect}.get(task.kind, _edit)
    try:
        with cut_prompts() as warnings, _attended(served.pipeline, watch, task.kind):
            answer = act(served, task, watch)
    except ValueError as error:  # ConfigError, too
        raise of_value_error(error, type(task.body).model_fields) from None
    seconds = {"generate": round(time.perf_counter() - started_s, 4)}
    settings = _settings(served, task)
    return {"model": task.model, **answer, "settings": settings, "warnings": warnings, "seconds": seconds}


def _generate(served: Served, task: Task, watch: Watch) -> dict[str, Any]:
    """Images as `raphael generate` makes them, to the byte: one batch, PNGs that say how they were made."""
    pipeline, body, how = served.pipeline, task.body, served.info.sampling(task.body)
    assert isinstance(body, ImagesBody)
    parts = pipeline.parts(body.height, body.width)

    def callback(step: int, sigma: float, x: torch.Tensor, x0: torch.Tensor) -> None:
        watch.step(step + 1, sigma, lambda: [data_uri(png(image)) for image in decode_images(parts, x0)])

    images = pipeline(
        body.prompt,
        body.negative_prompt or None,
        num_images_per_prompt=body.n,
        sampling=how,
        seed=body.seed,
        height=body.height,
        width=body.width,
        callback=callback,
    ).images
    answers = []
    for index, image in enumerate(images):
        first, batch = batch_of([body.prompt] * body.n, index, pipeline.batch_size)
        size = (image.height, image.width)
        made = Made(pipeline.identity, body.seed, first, index - first, batch, body.negative_prompt, how, size)
        answers.append({"index": index, "seed": body.seed, "b64_png": b64(png(image, chunk(made)))})
    return {"images": answers}


def perform_together(served: Served, tasks: list[Task], watches: list[Watch]) -> list[dict[str, Any] | Exception]:
    """The answers to requests of images with equal settings (`equal`), sampled as one batch; in the place of an answer
    the Problem or Stopped that ended its task alone. Raises ValueError for what the model refuses of one of them.

    Beside others an image has other last bits than alone, so its PNG tells of itself and of no neighbour: those are
    somebody else's words.
    """
    pipeline, how, first = served.pipeline, served.info.sampling(tasks[0].body), tasks[0].body
    crowd, started_s = Crowd(watches, [task.body.n for task in tasks]), time.perf_counter()
    parts = pipeline.parts(first.height, first.width, pipeline.reader(how))
    warned = [_cut(parts, [task.body.prompt, first.negative_prompt]) for task in tasks]  # each of its own words alone
    try:
        with cut_prompts(), _attended(pipeline, crowd, IMAGES):
            images = pipeline(
                [task.body.prompt for task in tasks for _ in range(task.body.n)],
                first.negative_prompt or None,
                sampling=how,
                seed=[(task.body.seed, number) for task in tasks for number in range(task.body.n)],
                height=first.height,
                width=first.width,
                callback=lambda step, sigma, x, x0: crowd.drawn(
                    step + 1, sigma, lambda rows: [data_uri(png(image)) for image in decode_images(parts, x0[rows])]
                ),
            ).images
    except AllEnded:
        return list(crowd.ended)
    seconds = {"generate": round(time.perf_counter() - started_s, 4)}
    answers: list[dict[str, Any] | Exception] = []
    for task, rows, warnings, ended in zip(tasks, crowd.rows, warned, crowd.ended, strict=True):
        told, seed, own = [], task.body.seed, (task.body.prompt,)
        for number, image in enumerate(images[rows]):
            size = (image.height, image.width)
            made = Made(pipeline.identity, seed, number, 0, own, first.negative_prompt, how, size)
            told.append({"index": number, "seed": seed, "b64_png": b64(png(image, chunk(made)))})
        answer = {"model": task.model, "images": told, "settings": _settings(served, task), "warnings": warnings}
        answers.append(ended or {**answer, "seconds": seconds})
    return answers


def _cut(parts: Parts, prompts: list[str]) -> list[str]:
    """What is told of those that are too long."""
    with cut_prompts() as warnings:
        encode_texts(parts, prompts)
    return warnings


def equal(served: Served, task: Task) -> tuple | None:
    """What requests that may be sampled together have in common; None of what is drawn alone."""
    body = task.body
    if task.kind != IMAGES or not isinstance(body, ImagesBody):
        return None
    return task.model, served.info.sampling(body), body.negative_prompt, body.height, body.width


class AllEnded(Exception):  # noqa: N818  no error of its own
    """Nobody waits for this batch any more."""


class Crowd:
    """The Watch of one batch of several tasks. What ends one of them (its watch raises) is kept in `ended` and spoils
    nothing for the others; once all have ended, so does the batch."""

    def __init__(self, watches: list[Watch], counts: list[int]):
        self.watches = watches
        self.ended: list[Exception | None] = [None] * len(watches)
        ends = list(itertools.accumulate(counts))
        self.rows = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]

    def waiting(self) -> None:
        self._each(lambda watch, rows: watch.waiting())

    def evaluation(self) -> None:
        self._each(lambda watch, rows: watch.evaluation())

    def step(self, done: int, sigma: float | None, previews: Callable[[], list[str]]) -> None:
        self.drawn(done, sigma, lambda rows: previews()[rows])

    def drawn(self, done: int, sigma: float | None, previews: Callable[[slice], list[str]]) -> None:
        """A step. previews: of those rows."""
        self._each(lambda watch, rows: watch.step(done, sigma, lambda: previews(rows)))

    def _each(self, tell: Callable[[Watch, slice], None]) -> None:
        for place, (watch, rows) in enumerate(zip(self.watches, self.rows, strict=True)):
            if self.ended[place] is None:
                try:
                    tell(watch, rows)
                except (Stopped, Problem) as ending:
                    self.ended[place] = ending
        if all(self.ended):
            raise AllEnded


def _inspect(served: Served, task: Task, watch: Watch) -> dict[str, Any]:
    body = task.body
    seen = served.pipeline.inspect(body.prompt, body.seed, served.info.sampling(body), body.negative_prompt)
    return inside.answer(served.pipeline, seen)


def _edit(served: Served, task: Task, watch: Watch) -> dict[str, Any]:
    kind = task.kind.removeprefix(EDIT)
    return edits.answer(kind, edits.KINDS[kind].act(served.pipeline, task.body, task.images, _how(served, task)))


def _how(served: Served, task: Task) -> How:
    body = task.body
    return How(body.seed, body.n, served.info.sampling(body), body.negative_prompt)


def _settings(served: Served, task: Task) -> dict[str, Any]:
    """All that the answer depends on, by the names of a request: sent again, it gives the same bytes."""
    body = task.body
    told = body.model_dump(include={"prompt", "negative_prompt", "seed", "n"})
    if task.kind == IMAGES:
        height, width = (getattr(body, name) or own for name, own in zip(("height", "width"), served.info.size))
        told |= {"height": height, "width": width}
    return {"model": task.model, **told, **told_sampling(served.info.sampling(body), served.info.cascade)}


@contextlib.contextmanager
def _attended(pipeline: Pipeline, watch: Watch, kind: str) -> Iterator[None]:
    """Inside, the watch is told of every evaluation of a network before it is made, of a cascade's second and of one
    that inpaints, too: where a job can end early, whatever draws. What is no images tells of it as a step, too; an
    edit's last estimates stay its previews until its next ones, since more than one evaluation may lie between."""
    done, sigma, shown = 0, None, []

    def before(*_: Any) -> None:
        nonlocal done
        watch.evaluation()
        if kind != IMAGES:
            done += 1
            watch.step(done, sigma, lambda: shown)

    def drawn(session: Session, its_sigma: float, x0: torch.Tensor) -> None:
        nonlocal sigma, shown
        sigma, shown = its_sigma, []  # nobody is shown those of an earlier step

        def previews() -> list[str]:
            nonlocal shown
            shown = [data_uri(png(image)) for image in session.decode(x0)]
            return shown

        watch.step(done, sigma, previews)

    networks = {id(net): net for net in (*pipeline.networks.values(), pipeline.unet, pipeline.painting().unet)}
    handles = [net.register_forward_pre_hook(before) for net in networks.values()]
    try:
        with looking_on(drawn):
            yield
    finally:
        for handle in handles:
            handle.remove()
