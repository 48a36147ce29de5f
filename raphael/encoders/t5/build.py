"""A small T5 (Raffel et al., arXiv 1910.10683), transformers' T5ForConditionalGeneration; its encoder is what a
denoiser reads, as transformers' T5EncoderModel in a folder that `t5:PATH` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from raphael.base.config.params import T5Config


def build_t5(config: T5Config, vocabulary: int) -> nn.Module:
    """Encoder and decoder with weights drawn by transformers from torch's own generator."""
    from transformers import T5Config as Theirs
    from transformers import T5ForConditionalGeneration

    sizes: dict[str, Any] = {"d_model": config.width, "d_kv": config.width // config.heads, "d_ff": config.hidden}
    return T5ForConditionalGeneration(
        Theirs(
            vocab_size=vocabulary,
            **sizes,
            num_heads=config.heads,
            num_layers=config.layers,
            num_decoder_layers=1,
            dropout_rate=0.0,  # whose masks would not belong to a sample
            feed_forward_proj="gated-gelu",  # of T5 v1.1, which Imagen's is
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def save_encoder(t5: nn.Module, folder: Path) -> None:
    """The encoder of a T5ForConditionalGeneration as a T5EncoderModel: config.json and model.safetensors."""
    from transformers import T5EncoderModel

    encoder = T5EncoderModel(t5.config)
    encoder.load_state_dict(
        {name: tensor for name, tensor in t5.state_dict().items() if name.startswith(("shared.", "encoder."))}
    )
    encoder.save_pretrained(folder)
