"""Images over HTTP are those of `raphael generate`, to the byte, and whatever was left out is told so that it can be
asked for again."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raphael.cli.main import main
from raphael.generate.metadata import read_made

ASKED = {"prompt": "a red circle", "seed": 4, "num_inference_steps": 2, "negative_prompt": "blue"}


def made(served: Any, **more: Any) -> dict[str, Any]:
    answer = served.client.post("/v1/images", json={**ASKED, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def pngs(answer: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(image["b64_png"]) for image in answer["images"]]


def pixels(answer: dict[str, Any]) -> list[bytes]:
    """Without the words of how they were made."""
    return [Image.open(io.BytesIO(data)).tobytes() for data in pngs(answer)]


def test_the_images_are_those_of_the_command_line_to_the_byte_and_say_how_they_were_made(tiny, tmp_path):
    answer = made(tiny, n=3, guidance_scale=2.5, sampler="ddim", eta=0.5, width=48, height=24)
    options = ["--steps", "2", "--guidance-scale", "2.5", "--sampler", "ddim", "--eta", "0.5", "--size", "24x48"]
    command = ["generate", ASKED["prompt"], "--seed", "4", "--negative-prompt", "blue", "--num-images", "3", *options]
    assert main([*command, "--device", "cpu", "--checkpoint", str(tiny.folder), "--out", str(tmp_path)]) == 0
    assert pngs(answer) == [(tmp_path / f"{index:05d}.png").read_bytes() for index in range(3)]
    assert [image["index"] for image in answer["images"]] == [0, 1, 2]
    made_as = read_made(io.BytesIO(pngs(answer)[2]))
    assert (made_as.prompt, made_as.seed, made_as.row, made_as.size_px) == (ASKED["prompt"], 4, 2, (24, 48))


def test_the_same_request_gives_the_same_bytes_and_so_do_the_settings_that_were_told(tiny):
    first, again = made(tiny), made(tiny)
    assert pngs(first) == pngs(again) and first["id"] != again["id"]
    assert pngs(made(tiny, seed=5)) != pngs(first)
    told = tiny.client.post("/v1/images", json=first["settings"]).json()
    assert pngs(told) == pngs(first) and told["settings"] == first["settings"]
    assert (first["settings"]["width"], first["settings"]["height"], first["settings"]["n"]) == (32, 32, 1)


def test_a_seed_that_was_left_out_is_drawn_and_told(tiny):
    answers = [made(tiny, seed=None) for _ in range(2)]
    seeds = [answer["settings"]["seed"] for answer in answers]
    assert seeds[0] != seeds[1] and all(0 <= seed < 2**32 for seed in seeds)
    assert pngs(made(tiny, seed=seeds[0])) == pngs(answers[0])


def test_who_accepts_png_gets_the_first_image_alone(tiny):
    answer = tiny.client.post("/v1/images", json={**ASKED, "n": 2}, headers={"Accept": "image/png"})
    assert answer.headers["content-type"] == "image/png" and answer.headers["raphael-seed"] == "4"
    assert answer.content == pngs(made(tiny, n=2))[0]


def test_previews_are_the_estimates_of_each_step_and_change_no_byte(tiny):
    job = tiny.client.post("/v1/images?wait=false", json={**ASKED, "num_inference_steps": 8, "n": 2}).json()["id"]
    previews, result, name = {}, None, ""
    with tiny.client.stream("GET", f"/v1/jobs/{job}/events") as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: ") and name == "step":
                told = json.loads(line.removeprefix("data: "))
                previews[told["step"]] = told["previews"]
            elif line.startswith("data: ") and name == "done":
                result = json.loads(line.removeprefix("data: "))["result"]
    seen = [step for step, images in previews.items() if images]
    assert seen and all(len(previews[step]) == 2 for step in seen)
    assert previews[seen[0]][0].startswith("data:image/png;base64,")
    assert pngs(result) == pngs(made(tiny, num_inference_steps=8, n=2))
    last = Image.open(io.BytesIO(base64.b64decode(previews[seen[-1]][0].partition(",")[2])))
    assert last.size == (32, 32)


def test_what_a_model_does_not_read_of_a_prompt_is_told_each_time_and_chunks_read_it(tiny):
    """Every text once, however many images; who takes no JSON gets it in a header."""
    long = "a red circle, " * 6
    cut = [made(tiny, prompt=f"{long}{end}", negative_prompt=f"{long} grey", n=2) for end in ("blue", "green")]
    assert pixels(cut[0]) == pixels(cut[1])
    for answer, end in zip(cut, ("blue", "green"), strict=True):
        prompt, negative = sorted(answer["warnings"], key=lambda text: "grey" in text)
        assert "the model reads 14" in prompt and prompt.endswith(f"{end}'") and negative.endswith("grey'")
    chunks = [made(tiny, prompt=f"{long}{end}", long_prompts="chunks", n=2) for end in ("blue", "green")]
    assert pixels(chunks[0]) != pixels(chunks[1]) and [answer["warnings"] for answer in chunks] == [[], []]
    again = tiny.client.post("/v1/images", json=chunks[0]["settings"]).json()
    assert again["settings"]["long_prompts"] == "chunks" and pngs(again) == pngs(chunks[0])
    assert made(tiny)["warnings"] == []
    asked = {**ASKED, "prompt": f"{long}\u00e9"}
    answer = tiny.client.post("/v1/images", json=asked, headers={"Accept": "image/png"})
    (text,) = json.loads(answer.headers["raphael-warnings"])
    assert text == tiny.client.post("/v1/images", json=asked).json()["warnings"][0]
    theirs = tiny.client.post("/v1/images/generations", json={"prompt": asked["prompt"]})
    assert set(theirs.json()) == {"created", "data"} and json.loads(theirs.headers["raphael-warnings"]) == [text]
    assert "raphael-warnings" not in tiny.client.post("/v1/images/generations", json={"prompt": "a"}).headers


@pytest.mark.parametrize("size", [None, "auto", "48x24"])
def test_openais_shape_gives_the_same_images(tiny, size):
    asked = {"prompt": ASKED["prompt"], "model": "tiny", "n": 2, "response_format": "b64_json", "seed": 9}
    answer = tiny.client.post("/v1/images/generations", json={**asked, **({"size": size} if size else {})})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert set(told) == {"created", "data"} and len(told["data"]) == 2
    wide = {"width": 48, "height": 24} if size == "48x24" else {}
    own = tiny.client.post("/v1/images", json={"prompt": ASKED["prompt"], "seed": 9, "n": 2, **wide}).json()
    assert [item["b64_json"] for item in told["data"]] == [image["b64_png"] for image in own["images"]]


def test_openais_own_client_generates_and_lists_models(tiny):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    client = openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0)
    answer = client.images.generate(model="tiny", prompt="a red circle", n=2, size="32x32", response_format="b64_json")
    sizes = [Image.open(io.BytesIO(base64.b64decode(item.b64_json))).size for item in answer.data]
    assert sizes == [(32, 32)] * 2
    assert [model.id for model in client.models.list().data] == ["tiny"]
    with pytest.raises(openai.NotFoundError):
        client.images.generate(model="dall-e-3", prompt="x")
    with pytest.raises(openai.UnprocessableEntityError):
        client.images.generate(model="tiny", prompt="x", size="33x32")


def test_a_model_is_told_with_all_that_a_page_needs(tiny):
    told = tiny.client.get("/v1/models").json()
    (model,) = told["models"]
    assert (model["id"], model["system"], model["default"], model["size"]) == ("tiny", "raphael", True, [32, 32])
    assert model["multiple_px"] == 8 and model["max_px"] == 4 * 40 and "dpmpp_2m" in model["samplers"]
    assert model["inside"] and model["labels"] is None and "inpaint" in model["edits"] and model["context_tokens"] == 16
    assert model["defaults"]["num_inference_steps"] == tiny.models["tiny"].pipeline.defaults.steps
    example = model["examples"][0]
    assert tiny.client.post("/v1/images", json={**example, "num_inference_steps": 1}).status_code == 200
    assert {"steps", "n", "prompt_chars", "queue", "size_px"} <= told["limits"].keys()


def test_what_the_model_itself_refuses_is_a_problem_with_its_words(tiny):
    long = "a red circle " * 20  # an edit needs every word
    answer = tiny.client.post("/v1/inside", json={"prompt": long})
    assert answer.status_code == 422 and "at most 14" in answer.json()["detail"] and answer.json()["field"] == "prompt"


def test_the_api_describes_itself_and_its_page_comes_from_here(tiny):
    spec = tiny.client.get("/openapi.json").json()
    assert {"/v1/images", "/v1/edits/inpaint", "/v1/inside", "/v1/images/generations"} <= spec["paths"].keys()
    body = spec["components"]["schemas"]["ImagesBody"]["properties"]
    assert body["n"]["maximum"] == 8 and body["prompt"]["maxLength"] == 1000
    page = tiny.client.get("/docs")
    assert page.status_code == 200 and "://" not in page.text, "an address of another server"
    files = [part.partition('"')[0] for part in page.text.split('"docs/')[1:]]
    assert len(files) == 4
    pytest.importorskip("fastapi_offline", reason="fastapi-offline is not installed: make setup")
    assert {file: tiny.client.get(f"/docs/{file}").status_code for file in files} == dict.fromkeys(files, 200)


def test_an_array_of_levels_is_told_in_bytes():
    from raphael.serve.inside import scaled

    told = scaled(np.array([[0.0, 0.25], [0.5, 0.5]]))
    assert told["shape"] == [2, 2] and told["max"] == 0.5
    assert list(base64.b64decode(told["data"])) == [0, 128, 255, 255]


@pytest.mark.slow
def test_every_example_of_the_shipped_model_shows_what_its_prompt_says():
    """Read by the reader that shares no code with the renderer; the prompts' truths are those of the model's check."""
    from raphael import RaphaelPipeline
    from raphael.evaluate.scenes.reader import judge, read_scene
    from raphael.pretrained.find import find_pipeline
    from raphael.serve.models import examples_of

    folder = find_pipeline("scenes")
    pipeline = RaphaelPipeline.from_pretrained(folder)
    truths = {entry["prompt"]: entry["truth"] for entry in json.loads((folder / "check.json").read_text())["prompts"]}
    examples = examples_of(pipeline, folder)
    assert len(examples) == 8
    for example in examples:
        image = np.asarray(pipeline(example["prompt"], seed=example["seed"]).images[0])
        verdicts = judge(read_scene(image), truths[example["prompt"]])
        assert False not in verdicts.values(), (example, verdicts)


def test_every_option_of_sampling_may_be_asked_for_but_how_the_server_computes(tiny):
    from dataclasses import fields

    from raphael.base.config.sampling import Sampling
    from raphael.serve.bodies import SAMPLING_FIELDS, ImagesBody

    own = {field.name for field in fields(Sampling)}
    assert set(SAMPLING_FIELDS.values()) == own - {"precision"}
    assert SAMPLING_FIELDS.keys() <= ImagesBody.model_fields.keys()
    refused = {"threshold_bound": 0, "eta": 1.5, "guidance_interval": [0.1], "until": "nowhere", "precision": "bf16"}
    for name, value in {**refused, "upsampler_steps": 5, "augmentation": 0.3}.items():  # of cascades, which it is not
        answer = tiny.client.post("/v1/images", json={"prompt": "x", "num_inference_steps": 1, name: value})
        assert answer.status_code == 422 and answer.json()["field"].split(".")[0] == name, answer.text
    asked = {"prompt": "x", "num_inference_steps": 1, "threshold": "static", "threshold_bound": 0.5}
    settings = tiny.client.post("/v1/images", json=asked).json()["settings"]
    assert settings["threshold_bound"] == 0.5 and "upsampler_steps" not in settings
