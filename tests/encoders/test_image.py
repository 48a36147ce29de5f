import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from raphael.base.config.params import load_config
from raphael.encoders.clip import CLIP_MEAN, CLIP_STD, build_clip, normaliser, save_clip
from raphael.encoders.image import from_open_clip, load_clip
from raphael.encoders.pretrained import PretrainedError


@pytest.fixture(scope="module")
def clip(project):
    config = load_config(project / "params.yaml").clip
    config = dataclasses.replace(
        config, text_width=32, text_layers=1, image_width=32, image_layers=1, embed_dim=24, image_size_px=32
    )
    torch.manual_seed(0)
    clip = build_clip(config)
    clip.model.eval()
    return clip


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_embeddings_have_unit_norm_and_do_not_depend_on_the_batch(clip):
    scorer = from_open_clip(clip, "test")
    pictures = np.stack([picture(32, 32, seed) for seed in range(70)])
    together = scorer.embed_images(pictures)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(70))
    torch.testing.assert_close(scorer.embed_images(pictures[66:67])[0], together[66], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scorer.embed_texts(["a red circle", ""]).norm(dim=1), torch.ones(2))


def test_preprocessing_is_that_of_torchvision_for_clip(clip):
    from torchvision.transforms import v2

    scorer = from_open_clip(clip, "test")
    image = Image.fromarray(picture(47, 80))
    steps = [v2.Resize(32, v2.InterpolationMode.BICUBIC), v2.CenterCrop(32), v2.ToImage(),
             v2.ToDtype(torch.float32, scale=True), v2.Normalize(CLIP_MEAN, CLIP_STD)]  # fmt: skip
    ours = scorer.normalise(torch.from_numpy(scorer._fit(image).copy())[None])[0]
    assert (ours - v2.Compose(steps)(image)).abs().max() < 0.15  # one pixel of rounding in the crop at most


def test_normaliser_against_the_formula_and_its_refusals():
    pixels = torch.from_numpy(picture(2, 3))[None]
    ours = normaliser(CLIP_MEAN, CLIP_STD)(pixels)
    assert ours.shape == (1, 3, 2, 3)
    expected = (float(pixels[0, 1, 2, 0]) / 255 - CLIP_MEAN[0]) / CLIP_STD[0]
    assert float(ours[0, 0, 1, 2]) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="expected uint8"):
        normaliser(CLIP_MEAN, CLIP_STD)(pixels.float())


def test_a_saved_scorer_comes_back_and_a_grey_pil_image_is_taken(clip, tmp_path):
    save_clip(clip, tmp_path)
    scorer = load_clip(tmp_path)
    grey = Image.fromarray(picture(40, 40)).convert("L")
    truth = from_open_clip(clip, "x").embed_images([grey.convert("RGB")])
    torch.testing.assert_close(scorer.embed_images([grey]), truth)


def test_wrong_images_and_a_t5_are_refused(clip):
    scorer = from_open_clip(clip, "test")
    with pytest.raises(ValueError, match="expected PIL images or uint8"):
        scorer.embed_images(np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="nothing to embed"):
        scorer.embed_texts([])
    with pytest.raises(PretrainedError, match="evaluate.scoring_clip"):
        load_clip("t5:somewhere")
