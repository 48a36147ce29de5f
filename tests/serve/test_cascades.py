"""A model of two networks behind the server: it ends early in the second, too, and offers no edit that it cannot."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from truth.cascade_workspace import SIDE, captions
from truth.tiny_cascade import write_cascade

from raphael.serve.bodies import ImagesBody
from raphael.serve.door.problems import Problem
from raphael.serve.edits import BY_ATTENTION, KINDS
from raphael.serve.info import Catalogue
from raphael.serve.models import open_models
from raphael.serve.server import local_perform
from raphael.serve.work import IMAGES, Stopped, Task

HOW = {"seed": 4, "num_inference_steps": 2, "upsampler_steps": 3}


class Counting:
    """A Watch that ends its job at its `last` evaluation."""

    def __init__(self, last: int = 10**9):
        self.last, self.evaluations = last, 0

    def waiting(self) -> None:
        return

    def evaluation(self) -> None:
        self.evaluations += 1
        if self.evaluations >= self.last:
            raise Stopped

    def step(self, done: int, sigma: Any, previews: Any) -> None:
        previews()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("cascade")
    return open_models([str(write_cascade(folder / "two", folder / "workspace"))], "cpu")


def test_a_job_ends_in_the_second_network_as_in_the_first(models):
    task, whole = Task(IMAGES, "two", ImagesBody(prompt=captions()[0], **HOW)), Counting()
    answer = local_perform(models)(task, whole)
    assert answer["settings"]["upsampler_steps"] == 3 and answer["settings"]["until"] == "end"
    base = Counting()
    local_perform(models)(Task(IMAGES, "two", ImagesBody(prompt=captions()[0], until="base", **HOW)), base)
    assert whole.evaluations - base.evaluations >= 3, "every step of the second is told before it is made"
    with pytest.raises(Stopped):
        local_perform(models)(task, Counting(last=whole.evaluations))


def test_it_offers_the_edits_that_it_can_and_they_answer(models, running):
    info = models["two"].info
    assert set(info.edits) == set(KINDS) - set(BY_ATTENTION)
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    body = {"image": base64.b64encode(stream.getvalue()).decode(), "prompt": captions()[0], "strength": 0.5, **HOW}
    with running(Catalogue((info,)), local_perform(models)) as served:
        answer = served.client.post("/v1/edits/image", json=body)
        assert answer.status_code == 200, answer.text
        result = answer.json()["images"][0]["result"]
        assert Image.open(io.BytesIO(base64.b64decode(result))).size == (SIDE, SIDE)
        refused = served.client.post("/v1/edits/image", json={**body, "until": "base"})
        assert refused.status_code == 422 and refused.json()["field"] == "until", refused.text
        two = {"prompt": captions()[0], "words": {"red": 2.0}, **HOW}
        assert served.client.post("/v1/edits/reweight", json=two).status_code in (404, 422)


def test_a_sampler_of_ones_choice_leaves_the_options_of_the_models_own(models):
    from dataclasses import replace

    info = replace(models["two"].info, defaults=replace(models["two"].info.defaults, sampler="ddim", eta=0.5))
    assert info.sampling(ImagesBody(prompt="x", sampler="euler")).eta == 0.0
    assert info.sampling(ImagesBody(prompt="x")).eta == 0.5
    with pytest.raises(Problem, match="eta"):
        info.sampling(ImagesBody(prompt="x", sampler="euler", eta=0.5))


def test_options_of_cascades_are_refused_of_other_models_before_anything_waits(models):
    from dataclasses import replace

    info = replace(models["two"].info, cascade=False)
    with pytest.raises(Problem, match="upsampler_steps: got 5"):
        info.check(KINDS["vary"].body(prompt="x", upsampler_steps=5))
