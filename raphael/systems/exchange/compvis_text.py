"""The text tower of a single file as transformers' CLIPTextModel, and CLIP's tokenizer, which no such file holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from raphael.encoders.to_transformers import END, LAYER, PAD, clip_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

HEAD_WIDTH = 64  # of both versions' towers
LAYERS = "encoder.layers."


def write_text(tower: dict[str, Tensor], version: int, folder: Path) -> None:
    """Write text_encoder/ and tokenizer/. Raises KeyError, RuntimeError where the tower is not whole.

    Version 2 reads the state before the last layer (Stable Diffusion 2's release notes): its folder has one layer less.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    from raphael.encoders.light.clip_text import tokenizer_module

    tensors = clip_names(tower) if version == 1 else open_clip_names(tower)
    vocabulary, width = tensors["embeddings.token_embedding.weight"].shape
    tokenizer = tokenizer_module().SimpleTokenizer()
    length = len(tensors["embeddings.position_embedding.weight"])
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=len(tensors[f"{LAYERS}0.mlp.fc1.weight"]),
        num_hidden_layers=1 + max(int(name.split(".")[2]) for name in tensors if name.startswith(LAYERS)),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=length,
        hidden_act="quick_gelu" if version == 1 else "gelu",
        bos_token_id=tokenizer.sot_token_id,
        eos_token_id=tokenizer.eot_token_id,
        pad_token_id=tokenizer.eot_token_id if version == 1 else 0,
    )
    model = CLIPTextModel(config)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    model.save_pretrained(folder / "text_encoder", safe_serialization=True)
    clip_tokenizer(tokenizer, length, END if version == 1 else PAD).save_pretrained(folder / "tokenizer")


def clip_names(tower: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {name: name.removeprefix("text_model.") for name in tower}
    return {ours: tower[name] for name, ours in names.items() if not ours.endswith("position_ids")}


def open_clip_names(tower: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {
        "embeddings.token_embedding.weight": tower["token_embedding.weight"],
        "embeddings.position_embedding.weight": tower["positional_embedding"],
        "final_layer_norm.weight": tower["ln_final.weight"],
        "final_layer_norm.bias": tower["ln_final.bias"],
    }
    blocks = {int(name.split(".")[2]) for name in tower if name.startswith("transformer.resblocks.")}
    for index in range(len(blocks) - 1):
        theirs, ours = f"transformer.resblocks.{index}", f"{LAYERS}{index}"
        for kind in ("weight", "bias"):
            for one, other in LAYER.items():
                found[f"{ours}.{other}.{kind}"] = tower[f"{theirs}.{one}.{kind}"]
            for part, value in zip("qkv", tower[f"{theirs}.attn.in_proj_{kind}"].chunk(3), strict=True):
                found[f"{ours}.self_attn.{part}_proj.{kind}"] = value.contiguous()
    return found
