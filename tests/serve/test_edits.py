"""Every kind of edit over HTTP is the function of raphael/edit on the same pixels; looking inside tells what it saw."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raphael.base.config.sampling import Sampling
from raphael.edit.known import inpaint
from raphael.edit.paint import paint
from raphael.edit.run import How
from raphael.serve.edits import KINDS

SOURCE, TARGET = "a red circle on blue", "a red star on blue"
HOW = {"seed": 4, "num_inference_steps": 2, "guidance_scale": 2.0, "sampler": "ddim"}
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
HOLE = np.zeros((32, 32), np.uint8)
HOLE[8:20, 4:16] = 255


def b64(pixels: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def pixels_of(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


PICTURE, MASK = b64(PIXELS), b64(HOLE)
ASKED: dict[str, dict[str, Any]] = {
    "switch": {"prompt": SOURCE, "then": TARGET, "share": 0.5},
    "image": {"image": PICTURE, "prompt": TARGET, "strength": 0.5},
    "inpaint": {"image": PICTURE, "mask": MASK, "prompt": TARGET, "feather": 2},
    "outpaint": {"image": PICTURE, "prompt": TARGET, "margins": [0, 8, 0, 0]},
    "replace": {"prompt": SOURCE, "target": TARGET, "blend": ["circle", "star"], "cross_of": {"star": 0.2}},
    "refine": {"prompt": SOURCE, "target": "a big red circle on blue", "image": PICTURE},
    "reweight": {"prompt": SOURCE, "words": {"red": 2.0}},
    "paint": {"prompt": SOURCE, "regions": [{"phrase": "red circle", "mask": MASK}], "weight": 1},
    "vary": {"prompt": SOURCE, "strength": 0.5},
    "interpolate": {"prompt": SOURCE, "to": TARGET, "to_seed": 9, "n": 3},
    "reconstruct": {"image": PICTURE, "prompt": SOURCE},
    "styles": {"prompt": SOURCE, "styles": ["pixel art", "an ink drawing of {prompt}"]},
}
ROWS = {"interpolate": 3, "styles": 2}


def edited(served: Any, kind: str, **more: Any) -> dict[str, Any]:
    answer = served.client.post(f"/v1/edits/{kind}", json={**HOW, **ASKED[kind], **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_every_kind_is_asked_for_here():
    assert ASKED.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_answers_with_source_result_and_the_result_without_the_edit(tiny, kind):
    told = edited(tiny, kind)
    assert told["kind"] == kind and len(told["labels"]) == 3 and len(told["images"]) == ROWS.get(kind, 1)
    shapes = {pixels_of(image[name]).shape for image in told["images"] for name in ("source", "result", "without")}
    assert len(shapes) == 1
    assert told["facts"]["seed"] == 4 and told["facts"]["steps"] == 2
    assert told["settings"]["seed"] == 4 and told["seconds"]["generate"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_progress_of_every_kind_comes_to_its_end_and_not_before(tiny, kind, monkeypatch):
    """The steps that a job is said to have are the evaluations that it makes."""
    from raphael.serve.work import Task, perform

    body = KINDS[kind].body(**HOW, **ASKED[kind])
    info = tiny.models["tiny"].info
    images = KINDS[kind].read(info, body)
    task, told = Task(f"edits/{kind}", "tiny", body, images), []

    class Watch:
        def waiting(self) -> None:
            return

        evaluation = waiting

        def step(self, done: int, sigma: Any, previews: Any) -> None:
            if told[-1:] != [done]:  # told again where only its previews are new
                told.append(done)

    perform(tiny.models["tiny"], task, Watch())
    assert told == list(range(1, len(told) + 1))
    expected = task.steps(info.sampling(body))
    # image to image leaves out steps, by its strength
    assert len(told) <= expected if kind == "image" else len(told) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_preview_of_every_kind_is_its_result(tiny, kind):
    from raphael.serve.work import Task, perform

    body = KINDS[kind].body(**HOW, **ASKED[kind])
    images = KINDS[kind].read(tiny.models["tiny"].info, body)
    told: list[Any] = []

    class Watch:
        def waiting(self) -> None:
            return

        evaluation = waiting

        def step(self, done: int, sigma: Any, previews: Any) -> None:
            told.append(previews())

    answer = perform(tiny.models["tiny"], Task(f"edits/{kind}", "tiny", body, images), Watch())
    last = [pixels_of(uri.partition(",")[2]) for uri in told[-1]]
    result = pixels_of(answer["images"][-1]["result"])
    drawn = {"inpaint": np.s_[8:20, 4:16], "outpaint": np.s_[:, 32:]}.get(kind, np.s_[:])  # elsewhere it is pasted over
    assert any(np.array_equal(image[drawn], result[drawn]) for image in last)


def test_inpainting_is_the_functions_own_and_keeps_what_is_not_masked(tiny):
    told = edited(tiny, "inpaint")
    how = How(4, 1, Sampling("ddim", 2, 2.0, "fp32"))
    own = inpaint(tiny.models["tiny"].pipeline, PIXELS, HOLE > 0, TARGET, how, 2)
    result = pixels_of(told["images"][0]["result"])
    assert np.array_equal(result, own.result[0])
    assert np.array_equal(result[24:, 24:], PIXELS[24:, 24:]) and not np.array_equal(result, PIXELS)


def test_painting_takes_phrases_with_their_masks(tiny):
    told = edited(tiny, "paint")
    how = How(4, 1, Sampling("ddim", 2, 2.0, "fp32"))
    own = paint(tiny.models["tiny"].pipeline, SOURCE, {"red circle": HOLE > 0}, 1.0, how)
    assert np.array_equal(pixels_of(told["images"][0]["result"]), own.result[0])
    colours = tiny.client.get("/v1/models").json()["region_colours"]  # what the page paints with
    assert (pixels_of(told["images"][0]["source"])[HOLE > 0] == colours[0]).all()
    body = tiny.client.get("/openapi.json").json()["components"]["schemas"]["PaintBody"]["properties"]
    assert len(set(map(tuple, colours))) == body["regions"]["maxItems"]  # one for each


@pytest.mark.parametrize("kind", KINDS)
def test_of_every_kind_it_is_told_what_was_not_read(tiny, kind):
    told = edited(tiny, kind, negative_prompt="a grey star, " * 9)
    assert len(told["warnings"]) == 1 and "the model reads 14" in told["warnings"][0]
    if KINDS[kind].words:  # maps of words are of one context
        answer = tiny.client.post(f"/v1/edits/{kind}", json={**HOW, **ASKED[kind], "long_prompts": "chunks"})
        assert answer.status_code == 422 and answer.json()["field"] == "long_prompts"
    else:
        read = edited(tiny, kind, negative_prompt="a grey star, " * 9, long_prompts="chunks")
        assert read["warnings"] == [] and read["settings"]["long_prompts"] == "chunks"
        assert read["images"] != told["images"]


def test_an_upload_is_scaled_to_the_model_and_a_data_uri_is_the_same(tiny):
    large = b64(PIXELS.repeat(4, 0).repeat(4, 1))
    plain = edited(tiny, "image", strength=0, image=f"data:image/png;base64,{PICTURE}")
    assert np.array_equal(pixels_of(plain["images"][0]["source"]), PIXELS)
    assert pixels_of(edited(tiny, "image", image=large)["images"][0]["source"]).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("kind", "more", "field"),
    [
        ("switch", {"share": 2}, "share"),
        ("inpaint", {"mask": b64(np.zeros((16, 16), np.uint8))}, "mask"),
        ("inpaint", {"mask": b64(np.zeros((32, 32), np.uint8))}, "mask"),
        ("outpaint", {"margins": [0, 8, 0]}, "margins"),
        ("outpaint", {"margins": [0, 7, 0, 0]}, "margins"),
        ("outpaint", {"margins": [0, 4000, 0, 0]}, "margins"),
        ("replace", {"target": "a red star"}, None),
        ("reweight", {"words": {}}, "words"),
        ("reweight", {"words": {"green": 2}}, None),
        ("paint", {"regions": []}, "regions"),
        ("paint", {"regions": [{"phrase": "red circle", "mask": MASK}] * 2}, "regions"),
        ("paint", {"regions": [{"phrase": "red circle", "mask": "?"}]}, "regions.0.mask"),
        ("interpolate", {"n": 1}, "n"),
        ("styles", {"n": 2}, "n"),
        ("vary", {"then": "x"}, "then"),
    ],
)
def test_what_does_not_fit_names_its_field(tiny, kind, more, field):
    answer = tiny.client.post(f"/v1/edits/{kind}", json={**HOW, **ASKED[kind], **more})
    assert answer.status_code == 422, answer.text
    assert answer.json().get("field") == field, answer.text


def test_there_are_the_kinds_that_there_are(tiny):
    assert tiny.client.post("/v1/edits/maps", json={}).status_code == 404
    assert tiny.client.get("/v1/edits/switch").status_code == 405


def test_looking_inside_tells_what_inspect_saw(tiny):
    answer = tiny.client.post("/v1/inside", json={**HOW, "prompt": SOURCE, "num_inference_steps": 3})
    assert answer.status_code == 200, answer.text
    told, pipeline = answer.json(), tiny.models["tiny"].pipeline
    long = tiny.client.post("/v1/inside", json={"prompt": SOURCE, "negative_prompt": "grey, " * 20}).json()
    assert told["warnings"] == [] and len(long["warnings"]) == 1
    own = pipeline.inspect(SOURCE, 4, Sampling("ddim", 3, 2.0, "fp32"))
    assert np.array_equal(pixels_of(told["image"]), own.image)
    assert told["tokens"] == own.words and [step["step"] for step in told["steps"]] == [0, 1, 2]
    assert [told["tokens"][word["first"]] for word in told["words"]] == SOURCE.split()
    assert np.array_equal(pixels_of(told["steps"][1]["x0"]), own.x0[1])
    sizes = pipeline.unet.attention_maps_px(8, 8)
    assert [(block["height"], block["width"]) for block in told["blocks"]] == [tuple(size) for size in sizes]
    for index, block in enumerate(told["blocks"]):
        shape = [3, len(own.words), block["height"], block["width"]]
        cross = np.frombuffer(base64.b64decode(block["cross"]["data"]), np.uint8).reshape(shape)
        factor = own.cross.shape[2] // block["height"]
        seen = np.moveaxis(own.cross[:, index, ::factor, ::factor], -1, 1)
        np.testing.assert_allclose(cross * block["cross"]["max"] / 255, seen, atol=block["cross"]["max"] / 500)
        assert block["masks"]["shape"] == shape and block["space"] == own.space_routes[index].tolist()
        assert block["time"] == own.time_routes[index].tolist()
        assert block["num_space"] == pipeline.unet.config.num_space_experts


def test_a_model_without_words_can_what_needs_none_and_says_what_it_knows(tiny_ddpm):
    """Classes in pixels: no text encoder, no maps."""
    (model,) = tiny_ddpm.client.get("/v1/models").json()["models"]
    assert model["labels"] == ["circle", "star"] and not model["inside"]
    assert set(model["edits"]) == {name for name, kind in KINDS.items() if not kind.words}
    assert {"prompt": "circle", "seed": 0} in model["examples"]

    def status(path: str, **body: Any) -> int:
        return tiny_ddpm.client.post(path, json={"num_inference_steps": 1, "prompt": "star", **body}).status_code

    assert status("/v1/images") == status("/v1/images", prompt="") == 200
    assert status("/v1/edits/switch", then="circle") == 200
    assert status("/v1/edits/image", image=PICTURE) == status("/v1/edits/vary") == 200
    assert status("/v1/edits/replace", target="circle") == status("/v1/inside") == 422
    assert model["long_prompts"] == ["cut"] and status("/v1/images", long_prompts="cut") == 200
    refused = tiny_ddpm.client.post("/v1/images", json={"prompt": "star", "long_prompts": "chunks"})
    assert refused.status_code == 422 and refused.json()["field"] == "long_prompts"
    refused = tiny_ddpm.client.post("/v1/images", json={"prompt": "a star"}).json()
    assert refused["field"] == "prompt" and refused["allowed"] == ["circle", "star"]
