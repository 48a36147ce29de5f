import json
import subprocess
import sys
from dataclasses import fields, replace
from typing import get_args

import numpy as np
import pytest
import torch
from truth.tiny_raphael import write_pipeline

from raphael.config import GenerateConfig, SamplerName, load_config
from raphael.diffusion.schedule import Schedule
from raphael.generate.pipeline import RaphaelPipeline, picture_seeds
from raphael.preset import DiffusionConfig
from raphael.sampling import Parts, Sampling, draw_images, draw_latents, image_grid, sampling_of
from raphael.stage import StageError

ROUNDING = 2e-3  # of latents of order 1: kernels differ between batch sizes in the last bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return write_pipeline(tmp_path_factory.mktemp("model") / "raphael")


@pytest.fixture(scope="module")
def pipeline(folder):
    return RaphaelPipeline.from_pretrained(folder)


def test_a_prompt_becomes_pictures_of_the_trained_size(pipeline):
    images = pipeline("a red circle", num_inference_steps=2, num_images_per_prompt=2).images
    assert [image.size for image in images] == [(32, 32)] * 2
    assert np.any(np.asarray(images[0]) != np.asarray(images[1]))


def test_the_same_seed_draws_the_same_bytes_and_another_seed_does_not(pipeline):
    first, again, other = (pipeline("a star", num_inference_steps=2, seed=seed).images[0] for seed in (5, 5, 6))
    assert first.tobytes() == again.tobytes() != other.tobytes()


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_a_picture_is_the_same_whatever_stands_beside_it_in_the_batch(pipeline, sampler):
    parts, settings = pipeline.parts(), Sampling(sampler, 3, 3.0)
    prompts, seeds = [f"prompt {i}" for i in range(7)], [(3, i) for i in range(7)]
    together = draw_latents(parts, prompts, seeds, settings)
    alone = torch.cat([draw_latents(parts, prompts[i : i + 2], seeds[i : i + 2], settings) for i in range(0, 7, 2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=ROUNDING)


def test_batches_of_one_size_give_the_very_same_bytes_in_any_order(pipeline):
    parts, settings = pipeline.parts(), Sampling("ddpm", 3, 3.0)
    prompts, seeds = [f"prompt {i}" for i in range(8)], [(3, i) for i in range(8)]
    forward = draw_images(parts, prompts, seeds, settings, batch_size=4)
    second_half = draw_images(parts, prompts[4:], seeds[4:], settings, batch_size=4)
    assert np.array_equal(forward[4:], second_half)


def test_guidance_of_one_batch_equals_two_forwards_put_together_by_hand(pipeline):
    """One step of DDIM from sigma to 0 is the guided estimate of x_0 itself: D(null) + s (D(c) - D(null))."""
    parts = pipeline.parts()
    drawn = {scale: draw_latents(parts, ["a ring"], [(0, 0)], Sampling("ddim", 1, scale)) for scale in (0.0, 1.0, 5.0)}
    torch.testing.assert_close(drawn[5.0], drawn[0.0] + 5 * (drawn[1.0] - drawn[0.0]), rtol=1e-4, atol=1e-3)


def test_guidance_acts_inside_its_interval_alone(pipeline):
    """Two steps of DDIM, at timesteps 999 and 499: guided in the first only, in the second only, in both, in none."""
    parts = pipeline.parts()

    def draw(scale, *interval):
        return draw_latents(parts, ["a ring"], [(0, 0)], Sampling("ddim", 2, scale, guidance_interval=interval))

    everywhere, nowhere = draw(5.0, 0.0, 1.0), draw(1.0, 0.0, 1.0)
    early, late = draw(5.0, 0.6, 1.0), draw(5.0, 0.0, 0.6)
    assert torch.equal(draw(5.0, 0.6, 0.7), nowhere)
    assert len({tensor.numpy().tobytes() for tensor in (everywhere, nowhere, early, late)}) == 4
    with pytest.raises(ValueError, match="guidance_interval: got 0.7 to 0.2"):
        draw(5.0, 0.7, 0.2)


def test_a_threshold_keeps_the_drawn_values_within_its_bound(pipeline):
    parts, free = pipeline.parts(), Sampling("ddim", 3, 9.0)
    wild = draw_latents(parts, ["a ring"], [(0, 0)], free)
    for kind in ("static", "dynamic"):
        bounded = draw_latents(parts, ["a ring"], [(0, 0)], replace(free, threshold=kind, threshold_bound=0.5))
        assert bounded.abs().max() <= 0.5 * (1 + 1e-6) < wild.abs().max()


def test_a_model_trained_to_zero_terminal_snr_draws_from_pure_noise(pipeline):
    parts = replace(pipeline.parts(), schedule=Schedule(replace(pipeline.diffusion, zero_terminal_snr=True)))
    for sampler in get_args(SamplerName):
        latents = draw_latents(parts, ["a ring"], [(0, 0)], Sampling(sampler, 3, 3.0))
        assert torch.isfinite(latents).all()


def test_eta_reaches_the_sampler_under_diffusers_name(pipeline):
    pipeline.sampler = "ddim"
    try:
        calm, wild = (pipeline("a", num_inference_steps=3, eta=eta, output_type="np").images for eta in (0.0, 1.0))
    finally:
        pipeline.sampler = "dpmpp_2m"
    assert not np.array_equal(calm, wild)
    with pytest.raises(ValueError, match="eta: got 1 with sampler dpmpp_2m"):
        pipeline("a", num_inference_steps=1, eta=1.0)


def test_every_setting_of_drawing_comes_from_the_settings_file():
    config = load_config(write_pipeline.__globals__["ROOT"] / "params.yaml").generate
    changed = replace(
        config, sampler="ddim", steps=3, eta=0.5, guidance_scale=2.0, guidance_interval=(0.1, 0.9),
        threshold="dynamic", threshold_percentile=90.0, threshold_bound=2.0, precision="bf16",
    )  # fmt: skip
    drawn = sampling_of(changed)
    assert all(getattr(drawn, field.name) == getattr(changed, field.name) for field in fields(Sampling))
    assert all(getattr(drawn, field.name) != getattr(Sampling(), field.name) for field in fields(Sampling))


def test_settings_of_drawing_that_contradict_each_other_are_refused():
    config = load_config(write_pipeline.__globals__["ROOT"] / "params.yaml").generate
    assert isinstance(config, GenerateConfig)
    with pytest.raises(ValueError, match="eta: got 0.5 with sampler heun"):
        replace(config, sampler="heun", eta=0.5)
    with pytest.raises(ValueError, match="guidance_interval: got .*expected two shares"):
        replace(config, guidance_interval=(0.9, 0.1))
    with pytest.raises(ValueError, match="zero_terminal_snr: got true with prediction eps"):
        DiffusionConfig(1000, "linear", 1e-4, 0.02, "eps", True)


def test_without_guidance_a_negative_prompt_changes_nothing_and_with_it_it_does(pipeline):
    def draw(scale, negative):
        return pipeline("a", negative, num_inference_steps=1, guidance_scale=scale, output_type="np").images

    assert np.array_equal(draw(1.0, None), draw(1.0, "blue"))
    assert not np.array_equal(draw(4.0, None), draw(4.0, "blue"))


def test_generators_give_their_seed_as_in_diffusers(pipeline):
    generators = [torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)]
    assert picture_seeds(0, generators, 2) == [(7, 0), (8, 0)]
    assert picture_seeds(0, generators[0], 2) == [(7, 0), (7, 1)]
    with pytest.raises(ValueError, match="one for each of 3 pictures"):
        picture_seeds(0, generators, 3)


def test_another_size_can_be_asked_for_and_one_that_does_not_fit_is_an_error(pipeline):
    assert pipeline("a", num_inference_steps=1, height=48, width=64).images[0].size == (64, 48)
    assert pipeline("a", num_inference_steps=1, height=24, width=40).images[0].size == (40, 24)
    assert pipeline("a", num_inference_steps=1).images[0].size == (32, 32)  # the first that was trained at
    with pytest.raises(ValueError, match="multiples of 8"):
        pipeline("a", height=30)
    with pytest.raises(ValueError, match="output_type"):
        pipeline("a", output_type="jpeg")
    with pytest.raises(ValueError, match="steps"):
        pipeline("a", num_inference_steps=0)


def test_an_empty_prompt_is_the_unconditional_picture_and_no_prompt_is_an_error(pipeline):
    """D(null) + s (D(c) - D(null)) with c = null is D(null), whatever the scale."""
    guided, free = (pipeline("", num_inference_steps=2, guidance_scale=s, output_type="np").images for s in (7.0, 0.0))
    np.testing.assert_allclose(guided, free, atol=2 / 255)
    assert not np.array_equal(guided, pipeline("a ring", num_inference_steps=2, output_type="np").images)
    with pytest.raises(ValueError, match="prompt: got nothing to draw, expected a text or a list of texts"):
        pipeline([])


def test_a_prompt_longer_than_the_context_is_cut_and_its_closing_token_kept(pipeline):
    length = pipeline.text_encoder.context_length
    fits = "red " * (length - 2)  # with the opening and the closing token
    ids = pipeline.text_encoder.tokenize([fits, fits + "and a thousand other words " * 50])
    assert torch.equal(ids[0], ids[1]) and pipeline.text_encoder.tokens_of(fits)[-1] == "<end>"
    one, other = (
        pipeline(text, num_inference_steps=1, output_type="np").images for text in (fits, fits + "blue " * 99)
    )
    assert np.array_equal(one, other)
    with pytest.raises(ValueError, match=rf"token ids: got \(1, {length + 1}\), expected \(B, {length}\)"):
        pipeline.text_encoder.encode(torch.zeros(1, length + 1, dtype=torch.long))


def test_a_nan_in_one_picture_s_noise_stays_in_that_picture(pipeline, monkeypatch):
    from raphael.sampling import PictureNoise

    start = PictureNoise.start

    def broken(self):
        noise = start(self)
        noise[0, 0, 0, 0] = float("nan")
        return noise

    parts, settings = pipeline.parts(), Sampling("ddim", 2, 3.0)
    whole = draw_latents(parts, ["a ring", "a star"], [(0, 0), (0, 1)], settings)
    monkeypatch.setattr(PictureNoise, "start", broken)
    latents = draw_latents(parts, ["a ring", "a star"], [(0, 0), (0, 1)], settings)
    assert latents[0].isnan().all() and torch.equal(latents[1], whole[1])


def test_what_is_inside_has_one_map_per_word_and_one_route_per_block(pipeline):
    result = pipeline(["a red circle", "CAT"], num_inference_steps=1, collect=True)
    inside = result.insight
    blocks, tokens = pipeline.unet.num_blocks, pipeline.text_encoder.context_length
    assert inside.attention.shape == (2, tokens, 8, 8)
    assert inside.edges.shape == (2, 8, 8)
    assert inside.routes.shape == (2, blocks, tokens)
    real = [i for i, word in enumerate(inside.words[0]) if word]
    assert [inside.words[0][i] for i in real] == ["<start>", "a", "red", "circle", "<end>"]
    assert np.allclose(inside.attention[0, real].max((1, 2)), 1)
    assert 0 <= inside.edges.min() and inside.edges.max() <= 1


def test_drawing_leaves_a_network_in_training_as_it_was(pipeline):
    parts: Parts = pipeline.parts()
    pipeline.unet.train()
    draw_latents(parts, ["a"], [(0, 0)], Sampling("ddim", 1, 1.0))
    assert pipeline.unet.training
    pipeline.unet.eval()


def test_a_checkpoint_that_is_absent_or_of_another_shape_says_so_in_one_line(folder, tmp_path):
    with pytest.raises(StageError, match="no such folder"):
        RaphaelPipeline.from_pretrained(tmp_path / "nothing")
    other = write_pipeline(tmp_path / "raphael")
    from raphael.checkpoint import read_checkpoint, write_checkpoint

    groups, meta = read_checkpoint(other)
    meta["unet"]["channels"] = [32, 32]
    write_checkpoint(other, groups, meta)
    with pytest.raises(StageError) as error:
        RaphaelPipeline.from_pretrained(other)
    assert "expected" in str(error.value) and "\n" not in str(error.value)


def test_a_grid_holds_every_picture_where_it_belongs():
    pictures = [np.full((8, 8, 3), value, np.uint8) for value in (10, 20, 30)]
    grid = np.asarray(image_grid(pictures, columns=2, margin_px=2))
    assert grid.shape == (22, 22, 3)
    assert (grid[2:10, 2:10] == 10).all() and (grid[2:10, 12:20] == 20).all() and (grid[12:20, 2:10] == 30).all()
    assert (grid[12:20, 12:20] == 255).all()
    with pytest.raises(ValueError, match="no pictures"):
        image_grid([], 2)


@pytest.mark.parametrize("caption", ["m" * 60, "W W W W W W W W W W W W W W W W W", "a plain wide word, drawn " * 9])
def test_a_caption_stays_below_its_own_picture(caption):
    pictures = [np.zeros((8, 8, 3), np.uint8)] * 2
    empty, told = (np.asarray(image_grid(pictures, columns=2, captions=texts)) for texts in (["", ""], [caption, ""]))
    changed = np.argwhere((empty != told).any(-1))
    assert changed[:, 1].max() < 4 + 160 <= changed[:, 0].min()


def test_the_command_draws_prints_and_repeats_itself(folder, tmp_path):
    from raphael.cli import main

    arguments = [
        "generate",
        "a red circle",
        "a star",
        "--seed",
        "7",
        "--steps",
        "2",
        "--num-images",
        "2",
        "--checkpoint",
        str(folder),
    ]
    assert main([*arguments, "--out", str(tmp_path / "a")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "b"), "--num-images", "2"]) == 0
    content = json.loads((tmp_path / "a/images.json").read_text())
    assert [entry["prompt"] for entry in content["images"]] == ["a red circle"] * 2 + ["a star"] * 2
    assert content["settings"] | {"sampler": "dpmpp_2m", "eta": 0.0, "threshold": "none"} == content["settings"]
    more = "--sampler ddim --eta 0.5 --guidance-interval 0.2 0.9 --threshold static --threshold-bound 3".split()
    assert main([*arguments, "--out", str(tmp_path / "c"), *more]) == 0
    settings = json.loads((tmp_path / "c/images.json").read_text())["settings"]
    assert settings["guidance_interval"] == [0.2, 0.9] and settings["threshold_bound"] == 3.0
    assert (tmp_path / "c/00000.png").read_bytes() != (tmp_path / "a/00000.png").read_bytes()
    for entry in content["images"]:
        assert (tmp_path / "a" / entry["file"]).read_bytes() == (tmp_path / "b" / entry["file"]).read_bytes()


def test_the_command_draws_at_the_size_that_is_asked_for(folder, tmp_path, capsys):
    from PIL import Image

    from raphael.cli import main

    command = ["generate", "a red circle", "--steps", "1", "--checkpoint", str(folder), "--out", str(tmp_path)]
    assert main([*command, "--size", "24x40"]) == 0
    assert Image.open(tmp_path / "00000.png").size == (40, 24)  # Pillow's order is width, height
    assert json.loads((tmp_path / "images.json").read_text())["settings"]["size_px"] == [24, 40]
    capsys.readouterr()
    assert main([*command, "--size", "20x40"]) == 1
    assert "got a picture of 20 x 40 px, expected multiples of 8" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--size", "24"])
    assert "got '24', expected HxW such as 64x96" in capsys.readouterr().err


def test_a_model_trained_at_one_size_only_may_name_it_by_its_sides():
    from raphael.generate.pipeline import drawn_size

    assert drawn_size({"height_px": 48, "width_px": 64}) == (48, 64)
    assert drawn_size({"sizes_px": [[24, 40], [32, 32]]}) == (24, 40)


def test_the_command_shows_routes_and_parameters(folder, pipeline, capsys, tmp_path):
    from raphael.cli import main

    command = ["routes", "a red circle", "--checkpoint", str(folder), "--out", str(tmp_path / "routes.json")]
    assert main(command) == 0
    printed, blocks = capsys.readouterr().out, pipeline.unet.num_blocks
    assert "circle" in printed and f"a path has {blocks} entries" in printed
    saved = json.loads((tmp_path / "routes.json").read_text())
    assert saved["path_length"] == blocks and all(len(entry["experts"]) == blocks for entry in saved["words"])
    steps = pipeline.diffusion.num_steps
    assert saved["times"]["timesteps"] == list(range(steps))
    assert [len(row) for row in saved["times"]["experts"]] == [steps] * blocks
    assert main([*command, "--json"]) == 0
    words = json.loads(capsys.readouterr().out)["words"]
    assert [entry["word"] for entry in words] == ["<start>", "a", "red", "circle", "<end>"]
    assert main(["info", "--checkpoint", str(folder)]) == 0
    assert "space experts" in capsys.readouterr().out
    assert main(["info", "--preset", "tiny"]) == 0


def test_the_command_ends_in_one_line_where_there_is_no_checkpoint(tmp_path, capsys):
    from raphael.cli import main

    assert main(["generate", "a", "--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("module", ["raphael.cli", "raphael.generate", "raphael.evaluate", "raphael.evaluate.report"])
def test_help_answers_without_loading_torch(module):
    code = "import sys, runpy; sys.argv = ['x', '--help']\n"
    code += f"try: runpy.run_module('{module}', run_name='__main__')\nexcept SystemExit: pass\n"
    code += (
        "heavy = {'torch', 'cv2', 'pyarrow', 'mlflow', 'PIL'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=write_pipeline.__globals__["ROOT"]
    )


def test_a_file_of_prompts_is_drawn_as_one_call_would_and_goes_on_where_it_was_killed(folder, tmp_path, capsys):
    from raphael.cli import main
    from raphael.generate import jobs
    from raphael.stage import write_json

    listed = [{"prompt": f"thing {i}", "suite": "s", "truth": None, "reference": f"r{i}"} for i in range(3)]
    write_json(tmp_path / "list.json", {"protocol": "p/v1", "prompts": [*listed, {"prompt": "own seed", "seed": 9}]})
    options = ["--checkpoint", str(folder), "--steps", "1", "--seed", "4", "--num-images", "2", "--batch-size", "4"]
    command = ["generate", "--prompts", str(tmp_path / "list.json"), *options, "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert "8 pictures of 4 prompts" in capsys.readouterr().out
    listing = json.loads((tmp_path / "whole" / "images.json").read_text())
    assert [entry["index"] for entry in listing["images"]] == list(range(8))
    assert [entry.get("reference") for entry in listing["images"]] == ["r0", "r0", "r1", "r1", "r2", "r2", None, None]
    assert listing["settings"]["seed"] == 4 and listing["model"]
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.png")}
    assert drawn["00006.png"] == drawn["00007.png"], "both have the prompt's own seed"

    assert main(["generate", *(entry["prompt"] for entry in listed), *options, "--out", str(tmp_path / "line")]) == 0
    for index in range(4):  # of the first batch, which is the same in both calls
        assert (tmp_path / "line" / f"{index:05d}.png").read_bytes() == drawn[f"{index:05d}.png"]

    with pytest.MonkeyPatch.context() as patch:
        draw = jobs.draw_jobs
        patch.setattr(jobs, "draw_jobs", lambda *a: (draw(*a), (_ for _ in ()).throw(KeyboardInterrupt))[0])
        assert main([*command, str(tmp_path / "killed")]) == 130
    assert len(list((tmp_path / "killed").glob("*.png"))) == 4
    assert main([*command, str(tmp_path / "killed")]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "killed").glob("*.png")} == drawn
    capsys.readouterr()
    assert main([*command, str(tmp_path / "killed"), "--steps", "2"]) == 1
    assert "holds other pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "arguments", "says"),
    [
        ("", [], "got no prompts"),
        ("{", [], "not readable as prompts"),
        ('{"prompts": [{"text": "a"}]}', [], "not readable as prompts (KeyError)"),
        ('{"prompts": [{"prompt": "a"}]}', ["a star"], "got both, expected prompts"),
        ('{"prompts": [{"prompt": "a"}]}', ["--show-edges"], "--show-edges: got it with --prompts"),
    ],
)
def test_a_file_that_holds_no_prompts_is_one_clear_line(tmp_path, capsys, content, arguments, says):
    from raphael.cli import main

    file = tmp_path / ("list.json" if content else "list.txt")
    file.write_text(content, encoding="utf-8")
    assert main(["generate", *arguments, "--prompts", str(file), "--out", str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and says in errors[0]
    assert main(["generate", "--out", str(tmp_path / "out")]) == 1
    assert "got neither" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
