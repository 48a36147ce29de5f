from dataclasses import replace

import pytest
import torch
import yaml

from raphael.base.config.params import load_config
from raphael.base.config.preset import load_preset, preset_names
from raphael.net.moe.mixtures import SpaceMoE
from raphael.summary.model import (
    active_parameters,
    build_parts,
    count_flops,
    model_text,
    num_parameters,
    runs,
    unet_flops,
)

SIZES = {"tiny": (1e6, 30e6), "small": (90e6, 115e6), "sd": (2.1e9, 2.25e9), "raphael-3b": (2.85e9, 3.15e9)}


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_has_the_parameters_of_its_name_in_all_three_parts(name):
    parts = build_parts(load_preset(name))
    assert SIZES[name][0] <= sum(map(num_parameters, parts.values())) <= SIZES[name][1]
    assert all(parameter.is_meta for part in parts.values() for parameter in part.parameters())


def test_the_real_parts_have_the_published_numbers_of_parameters():
    parts = build_parts(load_preset("sd"))
    assert num_parameters(parts["text tower"]) == 354_032_640  # open_clip, docs/model_profile.csv: 354.03 M
    assert num_parameters(parts["autoencoder"]) == 83_653_863  # Stable Diffusion's kl-f8
    import open_clip

    text, own = open_clip.get_model_config("ViT-g-14")["text_cfg"], load_preset("sd").text
    assert own.architecture == "ViT-g-14"
    assert text == {"context_length": 77, "vocab_size": 49408, "width": own.width, "heads": own.heads, "layers": 24}


def test_the_papers_nine_sizes_are_those_of_the_real_presets():
    nine = "448x832 512x768 512x704 640x640 576x640 640x576 704x512 768x512 832x448".split()
    for name in ("sd", "raphael-3b"):
        assert ["x".join(map(str, size)) for size in load_preset(name).sizes_px] == nine


@pytest.mark.parametrize(("preset", "overlay"), [("tiny", None), ("tiny-debug", "params.debug.yaml")])
def test_presets_for_parts_trained_here_name_the_parts_that_the_settings_train(preset, overlay, project):
    config, own = load_config(project / "params.yaml"), load_preset(preset)
    clip, vae = config.clip, config.autoencoder
    if overlay:
        changed = yaml.safe_load((project / overlay).read_text())
        sizes = {key: value for key, value in changed["clip"].items() if key != "loop"}
        clip, vae = replace(clip, **sizes), replace(vae, channels=tuple(changed["autoencoder"]["channels"]))
    text = own.text
    assert (text.context_length, text.width, text.heads) == (clip.context_length, clip.text_width, clip.text_heads)
    assert (text.layers, text.embed_dim) == (clip.text_layers, clip.embed_dim)
    assert (own.vae.channels, own.vae.layers_per_block) == (vae.channels, vae.layers_per_block)
    assert own.vae.norm_groups == vae.norm_groups and own.unet.latent_channels == vae.latent_channels


@pytest.mark.parametrize("name", sorted({*preset_names()} - {"tiny", "tiny-debug"}))
def test_every_real_preset_has_a_debug_size_of_the_same_blocks(name):
    if not name.endswith("-debug"):
        with torch.device("meta"):
            from raphael.net.moe.unet import RaphaelUNet

            assert (
                RaphaelUNet(load_preset(name).unet).num_blocks
                == RaphaelUNet(load_preset(f"{name}-debug").unet).num_blocks
            )


def test_a_network_with_text_layers_and_positions_is_counted_with_them():
    preset = load_preset("scenes")
    plain = replace(preset, unet=replace(preset.unet, text_layers=0, positions="none"))
    C, N = preset.unet.context_dim, preset.unet.context_length
    layer = N * 2 * (3 * C * C + C * C + 8 * C * C) + 2 * 2 * N * N * C  # four linear layers, both products
    assert unet_flops(preset, (64, 64)) - unet_flops(plain, (64, 64)) == preset.unet.text_layers * layer


def test_flops_of_a_space_moe_are_those_of_its_formula():
    P, D, C, N, K = 64, 32, 24, 7, 3
    with torch.device("meta"):
        moe = SpaceMoE(D, C, K).eval()
        flops = count_flops(lambda: moe(torch.empty(1, P, D), torch.empty(1, N, C), torch.empty(1, P, N)))
    experts, gate = K * P * 2 * (2 * 4 * D * D), N * 2 * (C * C + C * K)
    counting = 2 * P * N * K + 2 * (2 * P * K * D) + 2 * K * 4 * D * D  # counts, both small products, e_k(0)
    assert flops == experts + gate + counting


def test_active_parameters_leave_out_the_idle_time_experts_and_the_edge_heads():
    unet = build_parts(load_preset("tiny-debug"))["unet"]
    idle = 0
    for name, parameter in unet.named_parameters():
        if "time_moe.experts" in name:
            idle += parameter[1:].numel()
        elif "edge_head" in name:
            idle += parameter.numel()
    assert active_parameters(unet) == num_parameters(unet) - idle


def test_the_flops_of_a_preset_grow_with_the_image():
    preset = load_preset("tiny-debug")
    parts = build_parts(preset)
    small, large = (count_flops(runs(preset, parts, size)["decode"]) for size in ((32, 32), (64, 32)))
    assert large == 2 * small  # convolutions only


def test_the_command_prints_the_tree_the_total_the_flops_and_the_memory(capsys):
    from raphael.cli.main import main

    assert main(["model", "show", "small-debug"]) == 0
    printed = capsys.readouterr().out
    total = sum(map(num_parameters, build_parts(load_preset("small-debug")).values()))
    assert f"total: {total} parameters\n" in printed
    for expected in ("RaphaelBlock", "SpaceMoE", "active in a denoising step", "64 x 64", "AdamW", "text tower"):
        assert expected in printed
    assert main(["model", "show", "huge"]) == 1
    assert "expected one of demo, demo-debug, raphael-3b" in capsys.readouterr().err
    assert "448" in model_text("raphael-3b").split("GFLOP")[1]
