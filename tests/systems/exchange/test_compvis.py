"""Single files of Stable Diffusion 1 and 2 at small width, against diffusers' own converter and pipeline."""

import pytest
import torch
from safetensors.torch import save_file
from truth.compvis_layout import small

from raphael.base.checkpoint.folder import read_checkpoint
from raphael.base.stage import StageError
from raphael.generate.pipeline import RaphaelPipeline
from raphael.systems.exchange import compvis
from raphael.systems.exchange.compvis_text import clip_names, open_clip_names
from raphael.systems.exchange.import_model import import_model

PRESET = "sd-debug"


@pytest.fixture(scope="module", params=[1, 2])
def model(request):
    return small(request.param)


def held(tensors):
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("single") / f"v{model.version}.safetensors"
    save_file(held(model.single), path)
    return path


@pytest.fixture(scope="module")
def pipeline(file, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "raphael"
    import_model(file, out, PRESET, prediction="eps")
    return RaphaelPipeline.from_pretrained(out)


def same(got, expected):
    assert got.keys() == expected.keys(), sorted(got.keys() ^ expected.keys())[:3]
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_the_u_net_is_what_diffusers_converter_makes_of_it(model):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    own = compvis._below(model.single, compvis.UNET)
    shape = compvis.shape_of(own)
    got = compvis.unet_tensors(own, shape)
    same(got, convert_ldm_unet_checkpoint(dict(model.single), dict(model.unet.config)))
    same(got, model.unet.state_dict())
    config = compvis.unet_config(got, shape, model.version, "eps")
    for key in ("block_out_channels", "layers_per_block", "cross_attention_dim", "in_channels", "norm_num_groups"):
        assert config[key] == (list(v) if isinstance(v := model.unet.config[key], tuple) else v), key
    for key in ("down_block_types", "up_block_types"):
        assert config[key] == list(model.unet.config[key]), key


def test_the_autoencoder_is_what_diffusers_converter_makes_of_it(model):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    got = compvis.vae_tensors(compvis._below(model.single, compvis.VAE))
    same(got, convert_ldm_vae_checkpoint(dict(model.single), dict(model.vae.config)))
    same(got, model.vae.state_dict())
    config = compvis.vae_config(got)
    assert config["block_out_channels"] == list(model.vae.config.block_out_channels)
    assert config["layers_per_block"] == 2 and config["latent_channels"] == 4 and config["scaling_factor"] == 0.18215


def test_the_text_tower_is_the_one_it_came_from(model):
    if model.version == 1:
        got = clip_names(compvis._below(model.single, compvis.CLIP))
    else:
        got = open_clip_names(compvis._below(model.single, compvis.OPEN_CLIP))
    same(got, model.text.state_dict())


def test_texts_are_read_as_by_the_tower_and_clips_tokenizer(model, pipeline):
    ids = pipeline.text_encoder.tokenize(["a red circle"])
    assert ids.shape == (1, 77) and ids[0, 0] == 49406 and ids[0, 4] == 49407
    assert ids[0, 1:4].tolist() == [320, 736, 7117]  # CLIP's own numbers of "a red circle"
    assert ids[0, 5] == (49407 if model.version == 1 else 0)
    with torch.no_grad():
        assert torch.equal(pipeline.text_encoder.encode(ids).context, model.text(ids).last_hidden_state)


def test_latents_are_those_of_diffusers_pipeline(model, pipeline):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    theirs = StableDiffusionPipeline(
        vae=model.vae, text_encoder=model.text, tokenizer=pipeline.text_encoder.tokenizer, unet=model.unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "latents": latents, "height": 64, "width": 64}
    expected = theirs("a red circle", output_type="latent", **call).images
    pipeline.scheduler = DDIMScheduler.from_config(scheduler.config)
    got = pipeline("a red circle", output_type="latent", **call).images
    assert torch.allclose(got, expected, atol=1e-3), (got - expected).abs().max()
    with torch.no_grad():
        image = model.vae.decode(expected / 0.18215).sample.clamp(-1, 1)
        assert torch.allclose(pipeline.decode(expected), image, atol=1e-4)


def test_a_ckpt_with_a_callback_of_a_library_that_is_not_here_gives_the_same_model(model, file, pipeline, tmp_path):
    """As published files do: pytorch_lightning's callbacks beside the state_dict."""
    import sys
    import types

    library = types.ModuleType("pytorch_lightning_of_then")
    library.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": library.__name__})
    callback = library.ModelCheckpoint()
    callback.best = torch.ones(2)
    sys.modules[library.__name__] = library
    try:
        saved = {"state_dict": model.single, "callbacks": {library.ModelCheckpoint: callback}, "global_step": 470000}
        torch.save(saved, tmp_path / "model.ckpt")
    finally:
        del sys.modules[library.__name__]
    with pytest.raises(Exception, match="pytorch_lightning_of_then"):
        torch.load(tmp_path / "model.ckpt", weights_only=True)
    import_model(tmp_path / "model.ckpt", tmp_path / "out", PRESET, prediction="eps")
    same(read_checkpoint(tmp_path / "out", ["ema"])[0]["ema"], pipeline.unet.state_dict())


def test_version_2_asks_what_it_predicts_and_reads_it_beside_the_file(model, tmp_path):
    if model.version == 1:
        pytest.skip("version 1 predicts eps")
    file = tmp_path / "v2.safetensors"
    save_file(held(model.single), file)
    with pytest.raises(StageError, match="predicts eps .* or v .* say --prediction, or put its .* as v2.yaml"):
        import_model(file, tmp_path / "out", PRESET)
    file.with_suffix(".yaml").write_text("model: {params: {parameterization: v}}")
    import_model(file, tmp_path / "out", PRESET)
    assert RaphaelPipeline.from_pretrained(tmp_path / "out").diffusion.prediction == "v"
    file.with_suffix(".yaml").write_text("- 1")
    with pytest.raises(StageError, match="got no configuration of Stable Diffusion"):
        import_model(file, tmp_path / "again", PRESET)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["conditioner.embedders.0.a", "model.diffusion_model.a"], "recognised a U-Net; it is Stable Diffusion XL"),
        (["lora_unet_a.lora_down.weight"], "recognised nothing; it is a LoRA"),
        (
            ["first_stage_model.a", "model.diffusion_model.b"],
            "recognised a U-Net, an autoencoder; its names",
        ),
        (["q.w", "p"], "recognised nothing; its names begin with p, q; expected Stable Diffusion 1 or 2"),
        (["model.diffusion_model.x", "first_stage_model.y", "cond_stage_model.transformer.z"], "is no whole Stable"),
    ],
)
def test_another_file_is_one_line_that_says_what_was_recognised(names, message, tmp_path):
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(StageError, match=message) as caught:
        import_model(tmp_path / "a.safetensors", tmp_path / "out", PRESET)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
