"""Stable Diffusion 1 and 2 at small width with random weights, as diffusers' models and as CompVis' single file.

The names of the single file are written down here by the numbers of the full layout (four levels of two res-blocks);
diffusers' own converter takes them back, which the tests see to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VOCABULARY, LENGTH = 49408, 77
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


@dataclass
class Small:
    """The models of a small Stable Diffusion; single: the file's tensors."""

    version: int
    unet: Any
    vae: Any
    text: Any
    single: dict


def small(version: int) -> Small:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(version)
    down, up = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    own = (
        {"attention_head_dim": 8}
        if version == 1
        else {"attention_head_dim": (1, 1, 2, 2), "use_linear_projection": True}
    )
    unet = UNet2DConditionModel(
        block_out_channels=(32, 32, 64, 64) if version == 1 else (64, 64, 128, 128), down_block_types=down,
        up_block_types=up, layers_per_block=2, cross_attention_dim=64, norm_num_groups=32, sample_size=8, **own,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 64), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4, norm_num_groups=32,
    )  # fmt: skip
    special = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407 if version == 1 else 0}
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1,
        max_position_embeddings=LENGTH, hidden_act="quick_gelu" if version == 1 else "gelu", **special,
    ))  # fmt: skip
    for model in (unet, vae, text):
        for parameter in model.parameters():  # norms away from one and zero, else a mistaken order would not show
            if parameter.dim() == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    single = {f"model.diffusion_model.{k}": v for k, v in unet_as_compvis(unet.state_dict()).items()}
    single |= {f"first_stage_model.{k}": v for k, v in vae_as_compvis(vae.state_dict()).items()}
    single |= (clip_as_compvis if version == 1 else open_clip_as_compvis)(text.state_dict())
    single |= {"betas": torch.zeros(1000), "model_ema.decay": torch.tensor(0.9)}
    return Small(version, unet.eval(), vae.eval(), text.eval(), single)


def unet_as_compvis(state: dict) -> dict:
    middle = ("resnets.0", "attentions.0", "resnets.1")
    places = {f"mid_block.{ours}": f"middle_block.{number}" for number, ours in enumerate(middle)}
    for level in range(4):
        for j in range(2):
            places[f"down_blocks.{level}.resnets.{j}"] = f"input_blocks.{3 * level + j + 1}.0"
            places[f"down_blocks.{level}.attentions.{j}"] = f"input_blocks.{3 * level + j + 1}.1"
        for j in range(3):
            places[f"up_blocks.{level}.resnets.{j}"] = f"output_blocks.{3 * level + j}.0"
            places[f"up_blocks.{level}.attentions.{j}"] = f"output_blocks.{3 * level + j}.1"
        places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{3 * (level + 1)}.0.op"
        places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.conv"
    found = {}
    for name, tensor in state.items():
        for ours, theirs in {**places, **UNET_ENDS}.items():
            if name.startswith(f"{ours}."):
                rest = name.removeprefix(f"{ours}.")
                if "resnets" in ours:
                    part, _, kind = rest.rpartition(".")
                    rest = f"{RESNET[part]}.{kind}"
                found[f"{theirs}.{rest}"] = tensor
                break
    assert len(found) == len(state)
    return found


def vae_as_compvis(state: dict) -> dict:
    found = {}
    for name, tensor in state.items():
        theirs = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        for level in range(4):
            for j in range(3):
                theirs = theirs.replace(f"encoder.down_blocks.{level}.resnets.{j}.", f"encoder.down.{level}.block.{j}.")
                theirs = theirs.replace(f"decoder.up_blocks.{level}.resnets.{j}.", f"decoder.up.{3 - level}.block.{j}.")
            theirs = theirs.replace(f"down_blocks.{level}.downsamplers.0.", f"down.{level}.downsample.")
            theirs = theirs.replace(f"up_blocks.{level}.upsamplers.0.", f"up.{3 - level}.upsample.")
        theirs = theirs.replace("mid_block.resnets.0.", "mid.block_1.").replace("mid_block.resnets.1.", "mid.block_2.")
        if "mid_block.attentions.0." in theirs:
            side, _, rest = theirs.partition(".mid_block.attentions.0.")
            part, _, kind = rest.rpartition(".")
            theirs = f"{side}.mid.attn_1.{ATTENTION[part]}.{kind}"
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        found[theirs] = tensor
    return found


def clip_as_compvis(state: dict) -> dict:
    import torch

    found = {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in state.items()}
    positions = torch.arange(LENGTH)[None]
    return {**found, "cond_stage_model.transformer.text_model.embeddings.position_ids": positions}


def open_clip_as_compvis(state: dict) -> dict:
    """With one layer more, which version 2 does not read."""
    import torch

    before = "cond_stage_model.model."
    found = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": torch.eye(64),
        "logit_scale": torch.tensor(1.0),
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for index in range(3):
        ours, theirs = f"encoder.layers.{min(index, 1)}", f"transformer.resblocks.{index}"
        for kind in ("weight", "bias"):
            joined = [state[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(joined) + (index == 2)
            for one, other in names.items():
                found[f"{theirs}.{other}.{kind}"] = state[f"{ours}.{one}.{kind}"] + (index == 2)
    return {f"{before}{name}": tensor for name, tensor in found.items()}
