"""Stable Diffusion 1 and 2 in one file, as CompVis and AUTOMATIC1111 write it, in diffusers' names and folders.

Everything that tensors tell is read off them. What they do not: 32 groups in norms, heads (8 in version 1, of width 64
in 2 and in text towers), the noise schedule, and whether version 2 predicts eps or v, which a .yaml beside the file
says, or the user. The tokenizer is CLIP's, which open_clip brings along.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raphael.base.stage import StageError, write_json
from raphael.systems.exchange.compvis_text import write_text

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]
Prediction = Literal["eps", "v"]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
READ = (UNET, VAE, CLIP, OPEN_CLIP)
SCALING = 0.18215  # of kl-f8's latents, in every Stable Diffusion 1 and 2 (Rombach et al., their configurations)
GROUPS, HEADS, HEAD_WIDTH = 32, 8, 64
OTHERS = {  # a beginning of a name -> what such a file is
    "conditioner.embedders.": "Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "control_model.": "a ControlNet",
    "lora_unet_": "a LoRA (raphael generate --lora reads it)",
    "unet.": "a LoRA of diffusers, or a part of one of its folders",
    "encoder.": "an autoencoder alone",
    "down_blocks.": "a U-Net of diffusers alone",
    "text_model.": "a text encoder alone",
}
RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_RES = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


@dataclass(frozen=True)
class Shape:
    """What the names of a U-Net tell."""

    channels: list[int]
    res_blocks: int
    attention: list[int]  # levels


def is_wanted(name: str) -> bool:
    return name.startswith(READ)


def expect_layout(names: list[str], file: Path) -> Literal[1, 2]:
    """The version. Raises StageError that says what was recognised in a file of another kind."""
    found = {prefix: any(name.startswith(prefix) for name in names) for prefix in READ}
    other = next((kind for prefix, kind in OTHERS.items() if any(name.startswith(prefix) for name in names)), "")
    if not other and found[UNET] and found[VAE] and (found[CLIP] or found[OPEN_CLIP]):
        return 1 if found[CLIP] else 2
    what = {UNET: "a U-Net", VAE: "an autoencoder", CLIP: "CLIP's text tower", OPEN_CLIP: "open_clip's text tower"}
    known = [what[prefix] for prefix in READ if found[prefix]]
    firsts = ", ".join(sorted({name.split(".")[0] for name in names})[:4])
    told = f"it is {other}" if other else f"its names begin with {firsts}"
    raise StageError(
        f"{file}: recognised {', '.join(known) or 'nothing'}; {told}; expected Stable Diffusion 1 or 2 in one file, "
        "with U-Net, autoencoder and text tower"
    )


def unpack(tensors: Tensors, file: Path, folder: Path, prediction: Prediction | None) -> None:
    """Write what a file holds as a folder of diffusers. Raises StageError, one line."""
    from safetensors.torch import save_file

    version = expect_layout(list(tensors), file)
    predicted = prediction or _said_beside(file) or ("eps" if version == 1 else None)
    if predicted is None:
        raise StageError(
            f"{file}: Stable Diffusion 2 predicts eps (512 px) or v (768 px), which its tensors do not tell; say "
            f"--prediction, or put its configuration beside it as {file.with_suffix('.yaml').name}"
        )
    try:
        shape = shape_of(_below(tensors, UNET))
        unet, vae = unet_tensors(_below(tensors, UNET), shape), vae_tensors(_below(tensors, VAE))
        configs = unet_config(unet, shape, version, predicted), vae_config(vae)
        write_text(_below(tensors, CLIP if version == 1 else OPEN_CLIP), version, folder)
    except (KeyError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        raise StageError(
            f"{file}: is no whole Stable Diffusion {version}: {reason} is absent or of another form"
        ) from None
    for name, part, config in (("unet", unet, configs[0]), ("vae", vae, configs[1])):
        (folder / name).mkdir(parents=True)
        held = {key: tensor.float().contiguous() for key, tensor in part.items()}
        save_file(held, folder / name / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        write_json(folder / name / "config.json", config)
    (folder / "scheduler").mkdir()
    noise = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    words = {"eps": "epsilon", "v": "v_prediction"}
    write_json(folder / "scheduler/scheduler_config.json", {**noise, "prediction_type": words[predicted]})


def _said_beside(file: Path) -> Prediction | None:
    """Of the configuration beside the file, by AUTOMATIC1111's rule: the same name, .yaml."""
    import yaml

    beside = file.with_suffix(".yaml")
    if not beside.is_file():
        return None
    try:
        params = yaml.safe_load(beside.read_text(encoding="utf-8"))["model"]["params"]
        return "v" if params.get("parameterization", "eps") == "v" else "eps"
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError):
        raise StageError(f"{beside}: got no configuration of Stable Diffusion, expected model.params in it") from None


def _below(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def shape_of(unet: Tensors) -> Shape:
    channels, attention, counts, index = [], [], [0], 1
    while f"input_blocks.{index}.0.op.weight" in unet or f"input_blocks.{index}.0.in_layers.2.weight" in unet:
        if f"input_blocks.{index}.0.op.weight" in unet:
            counts.append(0)
        else:
            level = len(counts) - 1
            if not counts[-1]:
                channels.append(len(unet[f"input_blocks.{index}.0.in_layers.2.weight"]))
                attention += [level] if f"input_blocks.{index}.1.norm.weight" in unet else []
            counts[-1] += 1
        index += 1
    if len(set(counts)) != 1 or not counts[0]:
        raise KeyError(f"input_blocks with {counts} res-blocks a level")
    return Shape(channels, counts[0], attention)


def unet_names(shape: Shape) -> Iterator[tuple[str, str]]:
    """(their module, diffusers') of a U-Net, down to layers with weights, but for those inside transformer blocks."""
    yield from (("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"))
    yield from (("input_blocks.0.0", "conv_in"), ("out.0", "conv_norm_out"), ("out.2", "conv_out"))
    last, index = len(shape.channels) - 1, 1
    for level in range(last + 1):
        for j in range(shape.res_blocks):
            yield from _res(f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{j}")
            if level in shape.attention:
                yield f"input_blocks.{index}.1", f"down_blocks.{level}.attentions.{j}"
            index += 1
        if level < last:
            yield f"input_blocks.{index}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            index += 1
    yield from _res("middle_block.0", "mid_block.resnets.0")
    yield "middle_block.1", "mid_block.attentions.0"
    yield from _res("middle_block.2", "mid_block.resnets.1")
    for index in range((last + 1) * (shape.res_blocks + 1)):
        up, j = divmod(index, shape.res_blocks + 1)
        level = last - up
        yield from _res(f"output_blocks.{index}.0", f"up_blocks.{up}.resnets.{j}")
        if level in shape.attention:
            yield f"output_blocks.{index}.1", f"up_blocks.{up}.attentions.{j}"
        if level and j == shape.res_blocks:
            yield (
                f"output_blocks.{index}.{2 if level in shape.attention else 1}.conv",
                f"up_blocks.{up}.upsamplers.0.conv",
            )


def _res(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{theirs}.{one}", f"{ours}.{other}") for one, other in RES.items())


def unet_tensors(unet: Tensors, shape: Shape) -> Tensors:
    return _renamed(unet, dict(unet_names(shape)))


def _renamed(tensors: Tensors, names: dict[str, str]) -> Tensors:
    """By the longest beginning of a name that `names` knows. Raises KeyError for one that it does not know."""
    found = {}
    for name, tensor in tensors.items():
        module = name
        while module and module not in names:
            module = module.rpartition(".")[0]
        if not module:
            raise KeyError(name)
        found[names[module] + name.removeprefix(module)] = tensor
    return found


def unet_config(unet: Tensors, shape: Shape, version: int, prediction: Prediction) -> dict[str, Any]:
    kinds = [
        "CrossAttnDownBlock2D" if level in shape.attention else "DownBlock2D" for level in range(len(shape.channels))
    ]
    up = ["CrossAttnUpBlock2D" if level in shape.attention else "UpBlock2D" for level in range(len(shape.channels))]
    deep = next(name for name in unet if name.endswith("attn2.to_k.weight"))
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": unet["conv_in.weight"].shape[1],
        "out_channels": len(unet["conv_out.weight"]),
        "block_out_channels": shape.channels,
        "layers_per_block": shape.res_blocks,
        "down_block_types": kinds,
        "up_block_types": up[::-1],
        "cross_attention_dim": unet[deep].shape[1],
        "attention_head_dim": HEADS if version == 1 else [width // HEAD_WIDTH for width in shape.channels],
        "norm_num_groups": GROUPS,
        "sample_size": 96 if prediction == "v" else 64,
        "use_linear_projection": version == 2,
    }


def vae_tensors(vae: Tensors) -> Tensors:
    """Their decoder counts its levels from the image, diffusers' from the latents; attention's kernels are matrices."""
    vae = {name: tensor for name, tensor in vae.items() if name.startswith(("encoder.", "decoder.", "quant", "post_"))}
    levels = _count(vae, "encoder.down.{}.block.0.conv1.weight")
    names = {name: name for name in ("quant_conv", "post_quant_conv")}
    for side in ("encoder", "decoder"):
        names |= {f"{side}.{end}": f"{side}.{end}" for end in ("conv_in", "conv_out")}
        names[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        for number in (1, 2):
            names |= _vae_res(f"{side}.mid.block_{number}", f"{side}.mid_block.resnets.{number - 1}")
        attention = f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0"
        names |= {f"{attention[0]}.{one}": f"{attention[1]}.{other}" for one, other in VAE_ATTENTION.items()}
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for theirs, ours, change in ((f"encoder.down.{level}", down, "down"), (f"decoder.up.{level}", up, "up")):
            for j in range(_count(vae, f"{theirs}.block.{{}}.conv1.weight")):
                names |= _vae_res(f"{theirs}.block.{j}", f"{ours}.resnets.{j}")
            names[f"{theirs}.{change}sample.conv"] = f"{ours}.{change}samplers.0.conv"
    found = _renamed(vae, names)
    flat = {name for name in found if ".attentions." in name and name.endswith(".weight") and found[name].dim() > 2}
    return {name: tensor.flatten(1) if name in flat else tensor for name, tensor in found.items()}


def _vae_res(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{one}": f"{ours}.{other}" for one, other in VAE_RES.items()}


def _count(tensors: Tensors, name: str) -> int:
    return next(number for number in range(len(tensors) + 1) if name.format(number) not in tensors)


def vae_config(vae: Tensors) -> dict[str, Any]:
    levels = _count(vae, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": vae["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [len(vae[f"encoder.down_blocks.{n}.resnets.0.conv1.weight"]) for n in range(levels)],
        "layers_per_block": _count(vae, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": GROUPS,
        "act_fn": "silu",
        "scaling_factor": SCALING,
        "sample_size": 512,
    }
