"""What a record may hold: a table with one entry a field, looked up by the names in `encode.fields`.

To add one: its name in raphael/base/records.py and in FieldName (raphael/base/config/data.py), an entry below. What it
is computed with is loaded where a field asks for it, so that a system without text needs no text encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.encode.buckets import Size, size_name
from raphael.base.config.params import Config
from raphael.base.config.unet import SIZES as NUM_SIZES
from raphael.base.records import EDGES, LABEL, MOMENTS, PIXELS, SIZES, TEXT, TEXT_MASK, TOKEN_IDS, Fields
from raphael.base.stage import StageError, file_sha256

if TYPE_CHECKING:
    from data_pipeline.encode.labels import Labels
    from raphael.base.config.unet import UNetConfig

AUTOENCODER, TEXT_ENCODER, LABELS = "autoencoder", "text encoder", "labels"  # what fields may need


@dataclass(frozen=True)
class Tools:
    """What fields are computed with; None what no field asked for. device: of torch."""

    config: Config
    preset: Any  # the system's settings
    device: Any
    autoencoder: Any = None
    text: Any = None
    labels: Labels | None = None

    @property
    def unet(self) -> UNetConfig | None:
        """Of the system's settings, where it has one."""
        return getattr(self.preset, "unet", None)

    @property
    def downsampling(self) -> int:
        return 1 if self.autoencoder is None else self.autoencoder.downsampling


@dataclass(frozen=True)
class Pictures:
    """A batch of one bucket: images uint8 (B,H,W,3), fitted; captions; where records hold them labels int32 (B,), and
    sizes int32 (B, 6), as `told_sizes`."""

    images: np.ndarray
    captions: list[str]
    labels: np.ndarray | None = None
    sizes: np.ndarray | None = None

    def __getitem__(self, part: slice) -> Pictures:
        labels, sizes = (None if told is None else told[part] for told in (self.labels, self.sizes))
        return Pictures(self.images[part], self.captions[part], labels, sizes)


@dataclass(frozen=True)
class FieldEncoder:
    """dtype, shape: of one record at a size in px. values: of a batch, (B, *shape) of that dtype. facts: what the
    manifest says of how it came about. needs: what of Tools it asks for."""

    dtype: str
    shape: Callable[[Tools, Size], tuple[int, ...]]
    values: Callable[[Tools, Pictures], np.ndarray]
    facts: Callable[[Tools], dict[str, Any]]
    needs: tuple[str, ...] = ()


def named(config: Config) -> dict[str, FieldEncoder]:
    """The fields that `encode.fields` names, in the table's order."""
    return {name: encoder for name, encoder in ENCODERS.items() if name in config.encode.fields}


def bucket_fields(tools: Tools) -> dict[str, Fields]:
    """What the records of each bucket hold, also of one that gets no image."""
    chosen = named(tools.config)
    return {
        size_name(size): {name: (encoder.dtype, encoder.shape(tools, size)) for name, encoder in chosen.items()}
        for size in tools.config.picture.sizes_px
    }


def _moments_shape(tools: Tools, size: Size) -> tuple[int, ...]:
    factor = tools.downsampling
    return 2 * tools.autoencoder.latent_channels, size[0] // factor, size[1] // factor


def _moments(tools: Tools, pictures: Pictures) -> np.ndarray:
    """Computed where the autoencoder is. Raises StageError where they do not fit float16."""
    import torch

    from raphael.base.precision import without_tf32
    from raphael.objectives.autoencoding import to_network_range

    with torch.inference_mode(), without_tf32():
        pixels = to_network_range(torch.from_numpy(pictures.images).to(tools.autoencoder.device))
        moments = tools.autoencoder.encode_moments(pixels).cpu().numpy()
    half = moments.astype(np.float16)
    if not np.isfinite(half).all():
        raise StageError(
            f"the autoencoder's moments do not fit float16 (largest {np.abs(moments).max():.3g}); train it again with "
            "a larger autoencoder.kl_weight or a lower learning rate"
        )
    return half


def _pixel_facts(tools: Tools) -> dict[str, Any]:
    from raphael.encoders.autoencoder import load_autoencoder

    return {"autoencoder": load_autoencoder(tools.config.autoencoder.pretrained).facts()}


def _tokens(tools: Tools, pictures: Pictures) -> np.ndarray:
    return tools.text.tokenize(pictures.captions).numpy().astype(np.int32)


def _text(tools: Tools, pictures: Pictures) -> np.ndarray:
    """The captions' tokens by the frozen encoder. Raises StageError where they do not fit float16."""
    ids = tools.text.tokenize(pictures.captions).to(next(tools.text.parameters()).device)
    tokens = tools.text.encode(ids).context.cpu().numpy()
    half = tokens.astype(np.float16)
    if not np.isfinite(half).all():
        raise StageError(
            f"the text encoder's tokens do not fit float16 (largest {np.abs(tokens).max():.3g}); leave text out of "
            "encode.fields, or train it again with a lower clip.loop.learning_rate"
        )
    return half


def _text_mask(tools: Tools, pictures: Pictures) -> np.ndarray:
    return tools.text.mask_of(tools.text.tokenize(pictures.captions)).numpy().astype(np.uint8)


def _text_facts(tools: Tools) -> dict[str, Any]:
    (empty,) = tools.text.tokenize([""]).tolist()
    return {"text_encoder": {**tools.text.facts(), "empty_token_ids": empty}}


def _edges(tools: Tools, pictures: Pictures) -> np.ndarray:
    from raphael.encoders.edges.detectors import edge_map

    encode, (height, width) = tools.config.encode, pictures.images.shape[1:3]
    told = encode.edge_detector, encode.edge_threshold, encode.edge_weights, tools.device
    return edge_map(pictures.images, edge_sides(tools, (height, width)), *told)


def edge_sides(tools: Tools, size: Size) -> tuple[int, ...]:
    """(h, w) of the largest attention map: the latent's side at the first level with attention."""
    levels = tools.unet.attention_levels if tools.unet else ()
    if not levels:
        raise StageError(
            f"{tools.config.model.preset}: got no attention_levels, expected at least one to have edges for; or leave "
            "edges out of encode.fields"
        )
    factor = tools.downsampling * 2 ** min(levels)
    return tuple(max(1, side // factor) for side in size)


def edge_weights(config: Config) -> list[Path]:
    """The file of a learned edge detector, an input like the others; none where the detector needs no weights."""
    if EDGES not in config.encode.fields or not config.encode.edge_weights:
        return []
    path = Path(config.encode.edge_weights).expanduser()
    if not path.is_file():
        raise StageError(f"encode.edge_weights: got {str(path)!r}, which is no file here; expected pidinet's .pth")
    return [path]


def _edge_facts(tools: Tools) -> dict[str, Any]:
    """Which detector made the edge maps, and by which weights."""
    config = tools.config
    detector = f"{config.encode.edge_detector} threshold={config.encode.edge_threshold:g} max-pooled"
    detector += "".join(f" weights={file_sha256(path)[:16]}" for path in edge_weights(config))
    sides = {size_name(size): list(edge_sides(tools, size)) for size in config.picture.sizes_px}
    return {"edge_detector": detector, "edge_sides": sides}


ENCODERS: dict[str, FieldEncoder] = {
    MOMENTS: FieldEncoder(
        "float16", _moments_shape, _moments, lambda tools: {"autoencoder": tools.autoencoder.facts()}, (AUTOENCODER,)
    ),
    PIXELS: FieldEncoder(
        "uint8",
        lambda tools, size: (3, *size),
        lambda tools, pictures: pictures.images.transpose(0, 3, 1, 2),
        _pixel_facts,
    ),
    TOKEN_IDS: FieldEncoder(
        "int32", lambda tools, size: (tools.text.context_length,), _tokens, _text_facts, (TEXT_ENCODER,)
    ),
    TEXT: FieldEncoder(
        "float16", lambda tools, size: (tools.text.context_length, tools.text.dim), _text, _text_facts, (TEXT_ENCODER,)
    ),
    TEXT_MASK: FieldEncoder(
        "uint8", lambda tools, size: (tools.text.context_length,), _text_mask, _text_facts, (TEXT_ENCODER,)
    ),
    EDGES: FieldEncoder("uint8", edge_sides, _edges, _edge_facts),
    LABEL: FieldEncoder(
        "int32",
        lambda tools, size: (),
        lambda tools, pictures: pictures.labels,
        lambda tools: tools.labels.facts(),
        (LABELS,),
    ),
    SIZES: FieldEncoder(
        "int32",
        lambda tools, size: (NUM_SIZES,),
        lambda tools, pictures: pictures.sizes,
        lambda tools: {SIZES: "original height, width; cropped above, left; height, width; px"},
    ),
}
