"""A text encoder as transformers' own folders, for programs that know no open_clip.

open_clip's text tower is CLIPTextModel under other names; what our denoiser reads, the states after the final norm, is
its `last_hidden_state`. The tokenizer pads with "!", id 0, as open_clip does (and Stable Diffusion 2's folder): that
makes "!" a special token there, so prompts with an exclamation mark get other ids than here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raphael.base.stage import StageError
from raphael.encoders.text import OpenClipText, TextEncoder

PAD, START, END = "!", "<|startoftext|>", "<|endoftext|>"
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def save_transformers(encoder: TextEncoder, model_folder: Path, tokenizer_folder: Path) -> str:
    """Write both folders. Returns the class of the model. Raises StageError for a tower of another build."""
    if isinstance(encoder, OpenClipText):
        model, tokenizer = clip_text_model(encoder), clip_tokenizer(encoder.tokenizer, encoder.context_length)
    else:
        model, tokenizer = encoder.model, encoder.tokenizer
    model.save_pretrained(model_folder, safe_serialization=True)
    tokenizer.save_pretrained(tokenizer_folder)
    return type(model).__name__


def clip_text_model(encoder: OpenClipText) -> nn.Module:
    """transformers' CLIPTextModel with the weights of open_clip's tower."""
    from transformers import CLIPTextConfig, CLIPTextModel

    blocks = encoder.transformer.resblocks
    activation = type(blocks[0].mlp.gelu).__name__
    if activation not in ("GELU", "QuickGELU"):
        raise StageError(f"text encoder: got activation {activation}, expected GELU or QuickGELU, which CLIP has")
    vocabulary, width = encoder.token_embedding.weight.shape
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        max_position_embeddings=encoder.context_length,
        hidden_act="gelu" if activation == "GELU" else "quick_gelu",
        layer_norm_eps=encoder.ln_final.eps,
        bos_token_id=encoder.tokenizer.sot_token_id,
        eos_token_id=encoder.tokenizer.eot_token_id,
        pad_token_id=0,
    )
    model = CLIPTextModel(config)
    model.load_state_dict(_renamed(encoder))
    return model.eval()


@torch.no_grad()
def _renamed(encoder: OpenClipText) -> dict[str, Tensor]:
    state = {
        "embeddings.token_embedding.weight": encoder.token_embedding.weight,
        "embeddings.position_embedding.weight": encoder.positional_embedding[: encoder.context_length],
        "final_layer_norm.weight": encoder.ln_final.weight,
        "final_layer_norm.bias": encoder.ln_final.bias,
    }
    for index, block in enumerate(encoder.transformer.resblocks):
        theirs, own = f"encoder.layers.{index}", block.state_dict()
        for mine, other in LAYER.items():
            for kind in ("weight", "bias"):
                state[f"{theirs}.{other}.{kind}"] = own[f"{mine}.{kind}"]
        for kind in ("weight", "bias"):
            for part, value in zip("qkv", own[f"attn.in_proj_{kind}"].chunk(3), strict=True):
                state[f"{theirs}.self_attn.{part}_proj.{kind}"] = value
    return {name: value.detach().clone() for name, value in state.items()}


def clip_tokenizer(ours: Any, length: int, pad: str = PAD) -> Any:
    """transformers' CLIPTokenizer with the vocabulary of open_clip's `ours`, for texts of `length` tokens."""
    from transformers import CLIPTokenizer

    special = {ours.sot_token_id: START, ours.eot_token_id: END}
    vocabulary = {special.get(index, piece): index for piece, index in ours.encoder.items()}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=sorted(ours.bpe_ranks, key=ours.bpe_ranks.get),
        pad_token=pad,
        model_max_length=length,
    )
