"""The light networks against the libraries whose weights they hold: the same bits."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from truth.tiny_raphael import ROOT

from raphael.base.config.params import AutoencoderConfig, load_config
from raphael.encoders.autoencoder import build_autoencoder, load_autoencoder
from raphael.encoders.clip import build_clip, load_clip_folder, save_clip
from raphael.encoders.light.clip_text import TextTower, tokenizer_module
from raphael.encoders.light.kl import KlNetwork, load_kl
from raphael.encoders.text import OpenClipText, load_text_encoder
from raphael.pretrained.find import find_pipeline

TEXTS = ["a red circle left of a blue star", "", "ÆTHER!! don't &amp; won't 12345", "word " * 99]


def rand(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def shape():
    return load_config(ROOT / "params.yaml").autoencoder


@pytest.mark.parametrize(
    ("channels", "layers", "groups", "latent"), [((16, 32, 32), 1, 1, 4), ((8, 16), 2, 4, 3), ((8,), 1, 8, 2)]
)
def test_the_light_autoencoder_is_diffusers_to_the_bit(tmp_path, shape, channels, layers, groups, latent):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    config = replace(shape, channels=channels, layers_per_block=layers, norm_groups=groups, latent_channels=latent)
    assert isinstance(config, AutoencoderConfig)
    try:
        built = build_autoencoder(config)
    except ValueError:  # too narrow for a linear start
        built = None
    if built is None:
        network = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=channels, layers_per_block=layers, latent_channels=latent, norm_num_groups=groups,
            mid_block_add_attention=False, force_upcast=False,
        )  # fmt: skip
        network.save_pretrained(tmp_path / "kl")
    else:
        built.save(tmp_path / "kl")
    theirs = AutoencoderKL.from_pretrained(tmp_path / "kl", low_cpu_mem_usage=False).eval()
    ours = load_kl(tmp_path / "kl")
    assert isinstance(ours, KlNetwork) and ours.state_dict().keys() == theirs.state_dict().keys()
    images, latents = rand(3, 3, 32, 24), 3 * rand(3, latent, 8, 6)
    with torch.no_grad():
        assert torch.equal(ours.encode(images).latent_dist.parameters, theirs.encode(images).latent_dist.parameters)
        assert torch.equal(ours.decode(latents).sample, theirs.decode(latents).sample)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours.decode(latents).sample, theirs.decode(latents).sample)


def test_a_light_autoencoder_is_saved_to_the_bytes_of_diffusers(tmp_path, shape):
    torch.manual_seed(0)
    built = build_autoencoder(shape)
    built.save(tmp_path / "a")
    loaded = load_autoencoder(tmp_path / "a")
    assert isinstance(loaded.network, KlNetwork)
    loaded.save(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    weights = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert first == second


def test_an_autoencoder_with_attention_is_left_to_diffusers(tmp_path):
    from diffusers import AutoencoderKL

    network = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    network.save_pretrained(tmp_path)
    assert load_kl(tmp_path) is None and isinstance(load_autoencoder(tmp_path).network, AutoencoderKL)


def test_the_light_text_tower_and_tokenizer_are_open_clips_to_the_bit(tmp_path):
    torch.manual_seed(0)
    clip = build_clip(load_config(ROOT / "params.yaml").clip)
    save_clip(clip, tmp_path)
    theirs = OpenClipText(load_clip_folder(tmp_path)).eval().requires_grad_(False)
    ours = load_text_encoder(tmp_path)
    assert isinstance(load_clip_folder(tmp_path, text_only=True).model, TextTower)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ids = theirs.tokenize(TEXTS)
    assert torch.equal(ids, ours.tokenize(TEXTS))
    for found, wanted in zip(ours.encode(ids), theirs.encode(ids), strict=True):
        assert torch.equal(found, wanted)
    assert ours.tokens_of(TEXTS[0]) == theirs.tokens_of(TEXTS[0])


def test_the_tokenizer_alone_is_open_clips_own_file():
    code = (
        "import sys\nfrom raphael.encoders.light.clip_text import tokenizer_module\n"
        "alone = tokenizer_module().SimpleTokenizer()\nassert 'open_clip' not in sys.modules\n"
        "from open_clip.tokenizer import SimpleTokenizer\nimport torch\n"
        f"texts = {TEXTS!r}\n"
        "assert torch.equal(alone(texts, context_length=16), SimpleTokenizer()(texts, context_length=16))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    import open_clip.tokenizer

    assert tokenizer_module() in (open_clip.tokenizer, sys.modules.get("raphael.encoders.light.open_clip_tokenizer"))


def test_generating_with_the_shipped_model_imports_neither_diffusers_nor_open_clip():
    code = (
        "import sys\nfrom raphael import RaphaelPipeline\n"
        "RaphaelPipeline.from_pretrained('scenes')('a red circle', num_inference_steps=1)\n"
        "slow = {'diffusers', 'open_clip', 'transformers', 'timm', 'torch._dynamo', 'sympy', 'torchvision', 'scipy'}\n"
        "sys.exit(str(slow & set(sys.modules)) if slow & set(sys.modules) else 0)"
    )
    assert find_pipeline("scenes").is_dir()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
