"""Adapters on a pipeline: off they leave no bit behind, on they are what plain arithmetic on the weights gives."""

import json

import numpy as np
import pytest
import torch
from truth.tiny_adapter import made_pairs
from truth.tiny_raphael import small_unet, write_pipeline

from raphael.base.checkpoint.folder import read_checkpoint
from raphael.base.stage import StageError
from raphael.cli.main import main
from raphael.generate.pipeline import RaphaelPipeline
from raphael.net.lora.sites import Pair
from raphael.net.moe.from_diffusers import load_diffusers
from raphael.net.moe.unet import RaphaelUNet
from raphael.systems.lora.file import Header, write_lora

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("model") / "raphael")


def adapter(path, seed):
    pairs = made_pairs(("attention", "experts"), seed=seed)
    return write_lora(path, pairs, Header("", 2, 2.0)), pairs


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [adapter(folder / f"{seed}.safetensors", seed) for seed in (1, 2)]


def image(pipeline):
    return np.asarray(pipeline(PROMPT, num_inference_steps=2, seed=3).images[0])


def weights(pipeline):
    return {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_at_weight_0_and_after_unloading_every_bit_is_the_bases(model, files):
    pipeline = RaphaelPipeline.from_pretrained(model)
    before, drawn, identity = weights(pipeline), image(pipeline), pipeline.identity
    pipeline.load_lora_weights(files[0][0], "a")
    assert not np.array_equal(image(pipeline), drawn) and pipeline.identity != identity
    pipeline.set_adapters("a", 0.0)
    assert same(weights(pipeline), before) and np.array_equal(image(pipeline), drawn)
    assert pipeline.identity == identity
    pipeline.set_adapters("a", 0.7)
    pipeline.unload_lora_weights()
    assert same(weights(pipeline), before) and np.array_equal(image(pipeline), drawn)
    assert pipeline.adapters == {} and pipeline.identity == identity


def test_several_add_up_each_by_its_weight(model, files):
    pipeline = RaphaelPipeline.from_pretrained(model)
    expected = {name: tensor.double() for name, tensor in weights(pipeline).items()}
    for (file, pairs), name, weight in zip(files, "ab", (0.5, -1.5), strict=True):
        pipeline.load_lora_weights(file, name)
        for site, pair in pairs.items():
            matrix = expected[site.parameter] if site.expert is None else expected[site.parameter][site.expert]
            matrix += weight * (pair.alpha / pair.rank) * pair.up.double() @ pair.down.double()
    pipeline.set_adapters(["a", "b"], [0.5, -1.5])
    assert pipeline.adapters == {"a": 0.5, "b": -1.5}
    for name, tensor in weights(pipeline).items():
        assert torch.allclose(tensor.double(), expected[name], atol=1e-6), name
    pipeline.set_adapters(["b"])
    assert pipeline.adapters == {"a": 0.0, "b": 1.0}


def test_fused_it_stays_is_saved_and_can_be_taken_back_until_it_is_unloaded(model, files, tmp_path):
    pipeline = RaphaelPipeline.from_pretrained(model)
    before = weights(pipeline)
    pipeline.load_lora_weights(files[0][0])
    with pytest.raises(ValueError, match="got adapters, expected fused ones"):
        pipeline.save_pretrained(tmp_path / "saved")
    pipeline.fuse_lora(0.5)
    pipeline.unfuse_lora()
    pipeline.set_adapters("default_0", 0.0)
    assert same(weights(pipeline), before)
    pipeline.set_adapters("default_0")
    pipeline.fuse_lora(0.5)
    pipeline.unload_lora_weights()
    assert not same(weights(pipeline), before)
    pipeline.save_pretrained(tmp_path / "saved")
    again = RaphaelPipeline.from_pretrained(tmp_path / "saved")
    assert same(weights(again), weights(pipeline)) and np.array_equal(image(again), image(pipeline))


def test_what_cannot_be_is_said(model, files):
    pipeline = RaphaelPipeline.from_pretrained(model)
    for method, arguments in (("set_adapters", ("a",)), ("fuse_lora", ()), ("unfuse_lora", ())):
        with pytest.raises(ValueError, match=f"{method}: got no adapters"):
            getattr(pipeline, method)(*arguments)
    pipeline.load_lora_weights(files[0][0], "a")
    with pytest.raises(ValueError, match="got 'a', which is loaded already"):
        pipeline.load_lora_weights(files[1][0], "a")
    with pytest.raises(ValueError, match="got 'c', expected some of a"):
        pipeline.set_adapters("c")
    with pytest.raises(ValueError, match="got nan, expected a finite number"):
        pipeline.set_adapters("a", float("nan"))
    with pytest.raises(ValueError, match="got 2 for 1 names"):
        pipeline.set_adapters(["a"], [1.0, 2.0])
    with pytest.raises(ValueError, match="lora_scale: got inf"):
        pipeline.fuse_lora(float("inf"))


def test_in_bfloat16_the_base_comes_back_too(model, files):
    pipeline = RaphaelPipeline.from_pretrained(model, torch_dtype=torch.bfloat16)
    before = weights(pipeline)
    pipeline.load_lora_weights(files[0][0])
    assert pipeline.dtype == torch.bfloat16 and not same(weights(pipeline), before)
    pipeline.unload_lora_weights()
    assert same(weights(pipeline), before)


def test_an_adapter_of_stable_diffusion_fits_a_model_in_its_shape():
    """Truth: their U-Net with the sum already in its weights, read by the import of Stable Diffusion."""
    from diffusers import UNet2DConditionModel

    from raphael.net.moe.from_diffusers import config_from
    from raphael.systems.lora.names import stable_diffusion_names

    torch.manual_seed(0)
    theirs = UNet2DConditionModel(
        block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, attention_head_dim=2,
        norm_num_groups=8, sample_size=8,
    )  # fmt: skip
    unet = RaphaelUNet(config_from(dict(theirs.config), small_unet()))
    state = theirs.state_dict()
    load_diffusers(unet, state)
    names = stable_diffusion_names(unet)
    linear = {path for path, module in theirs.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linear <= names.keys()
    generator = torch.Generator().manual_seed(1)
    mine = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    for path in sorted(names):
        weight = state[f"{path}.weight"]
        down = torch.randn(2, *weight.shape[1:], generator=generator)
        up = torch.randn(len(weight), 2, *(1,) * (weight.dim() - 2), generator=generator)
        pair = Pair(down, up, 1.0)
        for site in names[path]:
            site.of(mine[site.parameter]).add_(pair.delta())
        state[f"{path}.weight"] = weight + 0.5 * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    load_diffusers(unet, state)
    for name, parameter in unet.named_parameters():
        if "space_moe.experts" not in name:  # the second place, which begins from the first half alone
            assert torch.allclose(mine[name], parameter, atol=1e-5), name


def test_generate_takes_several_and_tells_of_them(model, files, tmp_path):
    out = tmp_path / "images"
    chosen = ["--lora", f"{files[0][0]}:0.5", "--lora", str(files[1][0])]
    asked = ["generate", PROMPT, "--checkpoint", str(model), "--steps", "2", "--out"]
    assert main([*asked, str(out), *chosen]) == 0
    told = json.loads((out / "images.json").read_text())
    assert [item["weight"] for item in told["settings"]["lora"]] == [0.5, 1.0]
    assert main([*asked, str(tmp_path / "plain")]) == 0
    plain = json.loads((tmp_path / "plain/images.json").read_text())
    assert plain["model"] != told["model"] and "lora" not in plain["settings"]
    again = ["generate", "--from", str(out / "00000.png"), "--checkpoint", str(model), "--out", str(tmp_path / "again")]
    assert main([*again, *chosen]) == 0
    assert (tmp_path / "again/00000.png").read_bytes() == (out / "00000.png").read_bytes()
    assert main(again) == 1


@pytest.mark.parametrize("weight", ["nan", "inf", "much"])
def test_a_weight_that_is_no_number_is_refused(model, files, weight, capsys):
    with pytest.raises(SystemExit):
        main(["generate", PROMPT, "--checkpoint", str(model), "--lora", f"{files[0][0]}:{weight}"])
    assert "expected FILE or FILE:WEIGHT, the weight a finite number" in capsys.readouterr().err


def test_merged_by_command_and_extracted_again_it_is_the_same_sum(model, files, tmp_path, capsys):
    file, pairs = files[0]
    assert main(["lora", "merge", "--from", str(model), "--lora", f"{file}:0.5", "--out", str(tmp_path / "m")]) == 0
    base = read_checkpoint(model, ["ema"])[0]["ema"]
    tuned = read_checkpoint(tmp_path / "m", ["ema"])[0]["ema"]
    command = ["lora", "extract", str(tmp_path / "m"), "--base", str(model), "--out", str(tmp_path / "x.safetensors")]
    assert main([*command, "--rank", "2", "--targets", "attention", "experts"]) == 0
    assert "100.0%" in capsys.readouterr().out
    pipeline = RaphaelPipeline.from_pretrained(model)
    pipeline.load_lora_weights(tmp_path / "x.safetensors")
    for name, tensor in weights(pipeline).items():
        assert torch.allclose(tensor, tuned[name], atol=1e-5), name
    assert any(not torch.equal(base[site.parameter], tuned[site.parameter]) for site in pairs)


def test_extraction_says_what_it_cannot_take(model, files, tmp_path, capsys):
    command = ["lora", "extract", str(model), "--base", str(model), "--out", str(tmp_path / "x.safetensors")]
    assert main(command) == 1 and "got no difference" in capsys.readouterr().err
    assert main([*command, "--rank", "40"]) == 1 and "expected at most 16" in capsys.readouterr().err
    other = ["lora", "extract", str(model), "--base", "scenes", "--out", str(tmp_path / "x.safetensors")]
    assert main(other) == 1 and "is no fine-tuned scenes" in capsys.readouterr().err


def test_info_names_rank_and_form(files, capsys):
    assert main(["lora", "info", str(files[0][0]), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ranks"] == [2] and told["form"] == "kohya" and told["factors"] == [1.0]
    assert told["parameters"] == sum(p.down.numel() + p.up.numel() for p in files[0][1].values())
    assert main(["lora", "info", str(files[0][0])]) == 0
    assert main(["lora", "merge", "--from", "scenes", "--out", "x"]) == 1
    with pytest.raises(StageError):
        RaphaelPipeline.from_pretrained("scenes").load_lora_weights(files[0][0])
