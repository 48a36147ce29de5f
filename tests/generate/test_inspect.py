"""Looking inside: the image is the pipeline's own, arrays have their shapes, and say what the network did."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from truth.tiny_raphael import write_pipeline

from raphael.base.config.sampling import Sampling
from raphael.base.images.grid import grid_tiles
from raphael.edit.pictures import FRAME, LARGE, paths, write_figures
from raphael.evaluate.report.figures import heat_overlay
from raphael.generate.pipeline import RaphaelPipeline

PROMPT = "a red circle on blue"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    torch.set_num_threads(1)
    return RaphaelPipeline.from_pretrained(write_pipeline(tmp_path_factory.mktemp("model") / "raphael"))


def how(sampler="dpmpp_2m"):
    return Sampling(steps=3, guidance_scale=2.0, sampler=sampler)


@pytest.fixture(scope="module")
def inside(pipeline):
    return pipeline.inspect(PROMPT, 5, how())


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun"])
def test_the_image_is_the_pipelines_own_to_the_bit(pipeline, sampler):
    plain = pipeline(PROMPT, sampling=how(sampler), seed=5, output_type="np").images[0]
    seen = pipeline.inspect(PROMPT, 5, how(sampler))
    assert np.array_equal(seen.image, np.uint8(np.rint(plain * 255)))
    assert len(seen.sigmas) == 3 and np.array_equal(seen.x0[-1], seen.image)
    assert (np.diff(seen.timesteps) < 0).all()


def test_every_array_has_the_shape_that_is_written(pipeline, inside):
    blocks, sizes = pipeline.unet.num_blocks, pipeline.unet.attention_maps_px(8, 8)
    steps, tokens = 3, 7
    assert inside.words == ["<start>", "a", "red", "circle", "on", "blue", "<end>"]
    assert inside.cross.shape == (steps, blocks, 8, 8, tokens) and inside.masks.shape == inside.cross.shape
    assert [maps.shape for maps in inside.self_attention] == [(steps, h * w, h * w) for h, w in sizes]
    assert inside.edges.shape[0] == steps and inside.edges.shape[2:] == (8, 8)
    assert inside.space_routes.shape == (blocks, tokens) and inside.time_routes.shape == (blocks, steps)
    assert inside.x0.shape == (steps, 32, 32, 3)


def test_attention_over_all_words_is_whole_and_routes_are_the_gates_own(pipeline, inside):
    np.testing.assert_allclose(inside.cross.sum(-1), 1, atol=1e-5)
    for maps in inside.self_attention:
        np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    cond = pipeline.encode([PROMPT])
    routes = pipeline.unet.space_routes(cond.tokens, cond.mask)[:, 0, :7]
    assert np.array_equal(inside.space_routes, routes.numpy())
    times = pipeline.unet.time_routes(torch.from_numpy(inside.timesteps).float())
    assert np.array_equal(inside.time_routes, times.numpy())


def test_a_words_mask_is_its_attention_above_the_share_of_its_peak(pipeline, inside):
    """Of maps of the largest size, where nothing is enlarged; the network joins the heads as its preset says."""
    if pipeline.unet.config.mask_source != "mean_of_heads":
        pytest.skip("the heads' maximum is not kept")
    threshold = pipeline.unet.config.mask_threshold
    maps = inside.cross[:, 0]
    expected = maps >= threshold * maps.max((1, 2), keepdims=True)
    near = np.abs(maps - threshold * maps.max((1, 2), keepdims=True)) < 1e-6
    assert (inside.masks[:, 0] == expected)[~near].all()


def test_figures_arrays_and_the_forming_image_are_written(inside, tmp_path):
    files = {path.name for path in write_figures(inside, tmp_path)}
    assert files == {"inside.npz", "inside.json", "words.png", "levels.png", "self.png", "inside.png", "forming.webp"}
    with np.load(tmp_path / "inside.npz") as arrays:
        assert np.array_equal(arrays["cross"], inside.cross)
        shapes = json.loads((tmp_path / "inside.json").read_text())["shapes"]
        assert {name: list(arrays[name].shape) for name in arrays} == shapes
    movie = Image.open(tmp_path / "forming.webp")
    assert movie.n_frames == 3
    movie.seek(2)
    assert np.array_equal(np.asarray(movie.convert("RGB"))[::2, ::2], inside.image)


def test_edges_stand_beside_each_words_attention_region_and_experts_all_framed(pipeline, inside):
    sheet = np.asarray(paths(inside))
    heads, words = inside.edges.shape[1], len(inside.words)
    kinds = 1 + bool(inside.masks.shape[1]) + bool(len(inside.space_routes))
    columns = kinds * (8 // kinds)
    first = -(-(2 + heads) // columns) * columns  # a word begins in a row of its own
    tiles = grid_tiles(sheet, first + kinds * words, columns)
    drawn = [*tiles[: 2 + heads], *tiles[first:]]
    assert all((edge == FRAME).all() for tile in drawn for edge in (tile[0], tile[-1], tile[:, 0], tile[:, -1]))
    assert all((tile == 255).all() for tile in tiles[2 + heads : first])
    scale = len(tiles[0]) // (LARGE * len(inside.image))
    for place in range(words):
        attention = inside.cross[-1].mean(0)[..., place]
        expected = heat_overlay(inside.image.repeat(LARGE, 0).repeat(LARGE, 1), attention / attention.max())
        found = tiles[first + kinds * place][::scale, ::scale]
        assert np.array_equal(found[1:-1, 1:-1], expected[1:-1, 1:-1])


def test_a_prompt_that_would_be_cut_is_refused(pipeline):
    with pytest.raises(ValueError, match="prompt: got 27 tokens, expected at most 14"):
        pipeline.inspect("a red circle " * 9)
