"""What a preset is made of, from the meta device: every part is really built, none of it takes memory.

Tree with shapes, parameters, floating-point operations for each image size (torch's FlopCounterMode, a multiply-add
counts 2), and the memory of a training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from raphael.base.config.preset import Preset, load_preset
from raphael.net.block import Block
from raphael.net.condition import Condition
from raphael.net.moe.parts import active_parameters, num_parameters
from raphael.net.moe.unet import RaphaelUNet

CLIP_VOCABULARY = 49408
# bf16 training with AdamW: bytes a trained parameter
TRAINING_BYTES = {"weights, bf16": 2, "gradients, bf16": 2, "master weights, fp32": 4, "AdamW moments, fp32": 8}
TREE_DEPTH = 3


def build_parts(preset: Preset) -> dict[str, nn.Module]:
    """U-Net, text tower and autoencoder of a preset on the meta device."""
    from diffusers import AutoencoderKL
    from open_clip.transformer import TextTransformer

    text, vae, levels = preset.text, preset.vae, len(preset.vae.channels)
    with torch.device("meta"):
        return {
            "unet": RaphaelUNet(preset.unet).eval(),
            "text tower": TextTransformer(
                context_length=text.context_length,
                vocab_size=CLIP_VOCABULARY,
                width=text.width,
                heads=text.heads,
                layers=text.layers,
                output_dim=text.embed_dim,
            ).eval(),
            "autoencoder": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                block_out_channels=tuple(vae.channels),
                layers_per_block=vae.layers_per_block,
                latent_channels=preset.unet.latent_channels,
                norm_num_groups=vae.norm_groups,
                mid_block_add_attention=vae.attention,
            ).eval(),
        }


def runs(preset: Preset, parts: dict[str, nn.Module], size_px: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """What is done for one image of that size (height, width), part by part."""
    factor = 2 ** (len(preset.vae.channels) - 1)
    config = preset.unet
    latent = (1, config.latent_channels, *(side // factor for side in size_px))
    context = (1, config.context_length, config.context_dim)

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=dtype)

    return {
        "unet": lambda: parts["unet"](meta(*latent), meta(1), Condition(meta(*context))),
        "text tower": lambda: parts["text tower"](meta(1, config.context_length, dtype=torch.int64)),
        "encode": lambda: parts["autoencoder"].encode(meta(1, 3, *size_px)),
        "decode": lambda: parts["autoencoder"].decode(meta(*latent)),
    }


@torch.no_grad()
def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of one call. Space-MoE is counted at full cover: every expert on every pixel."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def unet_flops(preset: Preset, size_px: tuple[int, ...]) -> int:
    """Of one denoising step of one image (height, width)."""
    with torch.device("meta"):
        unet = RaphaelUNet(preset.unet).eval()
    return count_flops(runs(preset, {"unet": unet}, size_px)["unet"])


def training_memory(trained: int, frozen: int) -> dict[str, int]:
    """Bytes by purpose, without activations. trained: parameters of the U-Net; frozen: of the other parts, in bf16."""
    memory = {name: each * trained for name, each in TRAINING_BYTES.items()}
    memory["EMA weights, fp32"] = 4 * trained
    memory["text tower and autoencoder, bf16"] = 2 * frozen
    return memory


@torch.no_grad()
def tree(name: str, module: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Lines of the module tree, each with its class, parameters, and the shape that it gives out in `run`."""
    shapes: dict[nn.Module, list[int]] = {}

    def note(owner: nn.Module, _: Any, out: Any) -> None:
        if (shape := _shape(out)) is not None:
            shapes[owner] = shape

    hooks = [child.register_forward_hook(note) for child in module.modules()]
    run()
    for hook in hooks:
        hook.remove()
    lines: list[str] = []
    _walk(name, module, 0, shapes, lines)
    return lines


def _walk(name: str, module: nn.Module, depth: int, shapes: dict[nn.Module, list[int]], lines: list[str]) -> None:
    shape = "x".join(map(str, shapes[module])) if module in shapes else ""
    label = f"{'  ' * depth}{name} {type(module).__name__}"
    lines.append(f"  {label:<56}{num_parameters(module):>15,}  {shape}".rstrip())
    deeper = TREE_DEPTH + (1 if isinstance(module, Block) else 0)
    for child_name, child in module.named_children():
        if depth + 1 < deeper and num_parameters(child):
            _walk(child_name, child, depth + 1, shapes, lines)


def _shape(out: Any) -> list[int] | None:
    """Of the first tensor in a module's output."""
    if isinstance(out, Tensor):
        return list(out.shape)
    values = out if isinstance(out, (tuple, list)) else vars(out).values() if hasattr(out, "__dict__") else ()
    return next((list(value.shape) for value in values if isinstance(value, Tensor)), None)


def model_text(name: str) -> str:
    """All of it as text. Raises ConfigError for a preset that is not there."""
    preset = load_preset(name)
    parts = build_parts(preset)
    counts = {part: num_parameters(module) for part, module in parts.items()}
    first = runs(preset, parts, preset.sizes_px[0])
    height, width = preset.sizes_px[0]
    lines = [f"preset {name}: module, parameters, shape of the output for one image of {height} x {width} px", ""]
    lines += tree("unet", parts["unet"], first["unet"]) + tree("text", parts["text tower"], first["text tower"])
    lines += tree("encode", parts["autoencoder"].encoder, first["encode"])
    lines += tree("decode", parts["autoencoder"].decoder, first["decode"])
    trained, active = counts["unet"], active_parameters(parts["unet"])
    tower = f" ({preset.text.architecture})" if preset.text.architecture else ""
    lines += ["", f"transformer blocks: {parts['unet'].num_blocks}"]
    lines += [f"{part}{tower if part == 'text tower' else ''}: {count:,} parameters" for part, count in counts.items()]
    lines += [f"total: {sum(counts.values())} parameters"]
    lines += [f"active in a denoising step: {active:,} parameters of the U-Net's {trained:,}", ""]
    lines += flops_lines(preset, parts)
    lines += ["", "memory for training the U-Net, without activations:"]
    memory = training_memory(trained, sum(counts.values()) - trained)
    lines += [f"  {what:<36}{size / 1e9:>9.2f} GB" for what, size in memory.items()]
    lines += [f"  {'sum':<36}{sum(memory.values()) / 1e9:>9.2f} GB"]
    return "\n".join(lines)


def flops_lines(preset: Preset, parts: dict[str, nn.Module]) -> list[str]:
    columns = ("U-Net step", "training step", "text", "encode", "decode")
    lines = ["GFLOP for one image (a training step is three forwards; Space-MoE at full cover):"]
    lines += ["  height x width" + "".join(f"{column:>15}" for column in columns)]
    for size in preset.sizes_px:
        flops = {part: count_flops(run) for part, run in runs(preset, parts, size).items()}
        row = (flops["unet"], 3 * flops["unet"], flops["text tower"], flops["encode"], flops["decode"])
        lines += [f"  {size[0]:>6} x {size[1]:<5}" + "".join(f"{value / 1e9:>15,.2f}" for value in row)]
    return lines
