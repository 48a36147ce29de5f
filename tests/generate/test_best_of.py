"""Re-ranking by CLIP, against scores counted one by one."""

import json

import numpy as np
import pytest
import torch

from raphael import RaphaelPipeline
from raphael.cli.main import main
from raphael.encoders.image import ClipScorer, load_clip

PROMPTS = ["a red circle", "a blue star"]
CALL = {"num_inference_steps": 3, "seed": 4}


@pytest.fixture(scope="module")
def pipeline():
    torch.set_num_threads(1)
    return RaphaelPipeline.from_pretrained("scenes")


def test_the_best_are_those_whose_cosines_are_largest(pipeline):
    scorer = load_clip(pipeline.source.folder / "text_encoder")
    found = pipeline.best_of(3, PROMPTS, num_images_per_prompt=2, **CALL)
    every = pipeline(PROMPTS, num_images_per_prompt=6, **CALL).images
    for row, prompt in enumerate(PROMPTS):
        text = scorer.embed_texts([prompt])[0]
        scores = [float(scorer.embed_images([image])[0] @ text) for image in every[6 * row : 6 * row + 6]]
        best = sorted(range(6), key=lambda i: -scores[i])[:2]
        assert [index - 6 * row for index in found.indices[2 * row : 2 * row + 2]] == best
        for place, index in enumerate(best):
            image = found.images[2 * row + place]
            assert np.array_equal(np.asarray(image), np.asarray(every[6 * row + index]))
            assert found.scores[2 * row + place] == pytest.approx(scores[index], abs=1e-5)


def test_the_best_of_one_is_the_plain_image(pipeline):
    found, plain = pipeline.best_of(1, PROMPTS, **CALL), pipeline(PROMPTS, **CALL)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(found.images, plain.images, strict=True))
    (images,) = pipeline.best_of(1, PROMPTS, return_dict=False, **CALL)
    assert len(images) == 2


def test_another_scorer_judges_where_one_is_given_and_ties_go_to_the_first(pipeline):
    class Even(ClipScorer):
        def __init__(self):
            torch.nn.Module.__init__(self)

        def embed_images(self, images):
            return torch.ones(len(images), 1)

        def embed_texts(self, texts):
            return torch.ones(len(texts), 1)

    assert pipeline.best_of(3, PROMPTS, clip=Even(), **CALL).indices == [0, 3]


def test_what_cannot_be_judged_is_refused(pipeline):
    with pytest.raises(ValueError, match="best_of: got 0, expected a number of images from 1 on"):
        pipeline.best_of(0, "a")
    with pytest.raises(ValueError, match="best_of: got output_type 'np', expected pil"):
        pipeline.best_of(2, "a", output_type="np")
    with pytest.raises(ValueError, match="collect: got true with best_of"):
        pipeline.best_of(2, "a", collect=True)
    from raphael.systems.pipeline import Pipeline

    with pytest.raises(ValueError, match="has no CLIP of its own, expected one: clip=, or --clip"):
        Pipeline.scorer(pipeline)


def test_the_command_keeps_the_best_and_tells_its_score(pipeline, tmp_path):
    command = ["generate", *PROMPTS, "--checkpoint", "scenes", "--steps", "3", "--seed", "4", "--best-of", "3"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    entries = json.loads((tmp_path / "images.json").read_text())["images"]
    found = pipeline.best_of(3, PROMPTS, **CALL)
    assert [entry["index"] for entry in entries] == found.indices
    assert [entry["clip_score"] for entry in entries] == pytest.approx(found.scores, abs=1e-5)
    again = [
        "generate",
        "--checkpoint",
        "scenes",
        "--from",
        str(tmp_path / "00001.png"),
        "--out",
        str(tmp_path / "again"),
    ]
    assert main(again) == 0
    (file,) = (tmp_path / "again").glob("*.png")
    assert file.read_bytes() == (tmp_path / "00001.png").read_bytes()
