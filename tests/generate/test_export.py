"""Every form is read by the library it is meant for, and comes back to the last bit."""

import json
import pickle

import numpy as np
import pytest
import torch
from truth.tiny_raphael import write_pipeline

from raphael.base.checkpoint.folder import CheckpointError, read_checkpoint
from raphael.base.config.preset import DiffusionConfig
from raphael.base.stage import StageError
from raphael.base.strict import to_dict
from raphael.diffusion.schedule import Schedule
from raphael.generate.pipeline import RaphaelPipeline
from raphael.net.condition import Condition
from raphael.systems.exchange.export import export, scheduler_config
from raphael.systems.exchange.import_model import diffusion_from, import_model

PROMPTS = ["a red circle left of a blue star", "", "Two GREEN rings, a photo's edge"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    return write_pipeline(tmp_path_factory.mktemp("model") / "raphael")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return export(model, tmp_path_factory.mktemp("out") / "diffusers", "diffusers")


@pytest.fixture(scope="module")
def single(model, tmp_path_factory):
    return export(model, tmp_path_factory.mktemp("single"), "safetensors")


@pytest.mark.parametrize("form", ["folder", "single"])
def test_what_is_exported_and_imported_again_is_equal_and_draws_the_same_bytes(form, model, tmp_path, request):
    import_model(request.getfixturevalue(form), tmp_path / "back")
    (before, meta), (after, back) = read_checkpoint(model, ["ema"]), read_checkpoint(tmp_path / "back", ["ema"])
    assert before["ema"].keys() == after["ema"].keys()
    assert all(torch.equal(tensor, after["ema"][name]) for name, tensor in before["ema"].items())
    assert all(back[name] == value for name, value in meta.items())
    drawn = [
        np.asarray(RaphaelPipeline.from_pretrained(place)(PROMPTS[0], num_inference_steps=2).images[0])
        for place in (model, tmp_path / "back")
    ]
    assert np.array_equal(*drawn)


def test_diffusers_decodes_with_the_exported_autoencoder_as_we_do(model, folder):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False).eval()
    own = RaphaelPipeline.from_pretrained(model).autoencoder
    assert vae.config.scaling_factor == own.scaling_factor
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        theirs = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample
        assert torch.equal(theirs.clamp(-1, 1), own.decode(latents))


def test_transformers_reads_texts_with_the_exported_encoder_as_we_do(model, folder):
    from transformers import AutoTokenizer, CLIPTextModel

    own = RaphaelPipeline.from_pretrained(model).text_encoder
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    ids = tokenizer(PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, own.tokenize(PROMPTS))
    with torch.no_grad():
        states = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(states, own.encode(ids).context, rtol=1e-4, atol=1e-5)


DIFFUSIONS = [
    DiffusionConfig(1000, schedule, 0.00085, 0.012, prediction, zero)
    for schedule in ("linear", "scaled_linear", "cosine")
    for prediction, zero in (("eps", False), ("v", False), ("v", True), ("x0", False))
]


@pytest.mark.parametrize("diffusion", DIFFUSIONS, ids=lambda d: f"{d.schedule}-{d.prediction}-{d.zero_terminal_snr}")
def test_diffusers_schedulers_have_our_alphas(diffusion, tmp_path):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

    config = scheduler_config(to_dict(diffusion))
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    ours = Schedule(diffusion)
    for kind in (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler):
        theirs = kind.from_pretrained(tmp_path)
        assert (
            theirs.config.prediction_type
            == {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[diffusion.prediction]
        )
        # they multiply a thousand factors in float32; at zero terminal SNR two of them keep 2^-24 instead of 0
        torch.testing.assert_close(theirs.alphas_cumprod.double(), ours.alpha_bar, rtol=1e-4, atol=1e-6)
    theirs = DDIMScheduler.from_pretrained(tmp_path)
    theirs.set_timesteps(10)
    sigmas = ours.sampling_sigmas(10)[:-1]
    assert torch.equal(sigmas, ours.sigma[theirs.timesteps])
    assert diffusion_from(config, tmp_path) == diffusion


@pytest.mark.parametrize(("schedule", "prediction"), [("edm", "edm"), ("linear", "flow")])
def test_noise_and_predictions_that_diffusers_schedulers_do_not_share_are_refused(schedule, prediction):
    diffusion = to_dict(DiffusionConfig(1000, schedule, 0.00085, 0.012, prediction, False))
    with pytest.raises(
        StageError, match="diffusers: got a model with diffusion.(schedule edm|prediction flow), expected"
    ):
        scheduler_config(diffusion)


def test_the_header_of_the_single_file_says_what_it_is(single, model):
    from safetensors import safe_open

    with safe_open(single, "pt") as stored:
        header = stored.metadata()
    meta = json.loads(header["meta"])
    assert meta["unet"] == read_checkpoint(model, [])[1]["unet"] and meta["weights"] == "ema"
    assert {"git_revision", "records_sha256", "checkpoint_sha256"} <= header.keys()
    assert len(header["checkpoint_sha256"]) == 64


def test_pickles_are_refused_everywhere_and_never_read(model, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    bomb = tmp_path / "model.pt"
    bomb.write_bytes(pickle.dumps(Bomb()))
    for part in ("unet", "vae"):
        (tmp_path / "sd" / part).mkdir(parents=True)
        (tmp_path / "sd" / part / "config.json").write_text("{}")
    (tmp_path / "sd/unet/diffusion_pytorch_model.bin").write_bytes(bomb.read_bytes())
    for act in (
        lambda: export(bomb, tmp_path / "a", "diffusers"),
        lambda: import_model(bomb, tmp_path / "b"),
        lambda: import_model(tmp_path / "sd", tmp_path / "c"),
        lambda: RaphaelPipeline.from_pretrained(bomb),
    ):
        with pytest.raises(
            (StageError, CheckpointError), match="a pickle, which can run code when it is read: refused"
        ):
            act()
    assert not (tmp_path / "exploded").exists()


def test_a_damaged_or_foreign_file_is_one_line(single, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(single.read_bytes()[:1000])
    with pytest.raises(StageError, match="damaged, or no safetensors"):
        import_model(cut, tmp_path / "x")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(StageError, match="recognised nothing; its names begin with a; expected Stable"):
        import_model(tmp_path / "other.safetensors", tmp_path / "x")
    save_file({"../a:b": torch.zeros(1)}, cut, metadata={"form": "raphael-single/1", "files": "{}", "meta": "{}"})
    with pytest.raises(StageError, match="a place outside the folder: refused"):
        import_model(cut, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(StageError, match="is there already"):
        import_model(single, tmp_path)


def test_a_stable_diffusion_folder_becomes_a_pipeline_that_generates(folder, tmp_path):
    """A tiny one of diffusers' own classes, with the exported encoders beside its U-Net."""
    import shutil

    from diffusers import UNet2DConditionModel

    source = tmp_path / "sd"
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(folder / part, source / part)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        norm_num_groups=8,
        attention_head_dim=4,
        sample_size=8,
    ).eval()
    unet.save_pretrained(source / "unet", safe_serialization=True)
    said = import_model(source, tmp_path / "out", "sd-debug")
    assert "generates what the U-Net it came from generates" in said
    moved = tmp_path / "moved"
    (tmp_path / "out").rename(moved)  # its pointer to the text encoder moves along
    pipeline = RaphaelPipeline.from_pretrained(moved)
    x, t, cond = torch.randn(1, 4, 8, 8), torch.tensor([500]), pipeline.encode(["a red circle"])
    with torch.no_grad():
        mine, true = pipeline.unet(x, t, Condition(cond.tokens)).prediction, unet(x, t, cond.tokens).sample
    torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)
