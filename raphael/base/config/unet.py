"""The shape of a U-Net, whatever its blocks are: raphael/net/unet.py reads these fields and no others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from raphael.base.strict import Range, later

Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
SIZES = 6  # numbers that tell an image's sizes: raphael/base/images/fit.py, `told_sizes`


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Levels of res-blocks, those of `attention_levels` with a transformer block behind each; what goes in and out.

    A network that reads no text leaves `context_dim` at 0. The fields made by `later` leave older checkpoints and the
    names of older work as they are.
    """

    latent_channels: Count = 4  # of x: of latents, or 3 of pixels
    out_channels: Whole = later(0)  # of the prediction; 0: as x has
    channels: tuple[int, ...]  # one per level; each but the last halves the map
    res_blocks: Count  # per level on the way down; one more on the way up
    attention_levels: tuple[int, ...]
    head_dim: Count
    num_heads: Whole = 0  # of every attention, whatever its width; 0: width / head_dim
    norm_groups: Count
    context_dim: Whole = 0  # width of the text tokens; 0: the network reads none
    context_length: Whole = 0  # tokens of a caption, padding included
    pooled_text: bool = False  # res-blocks also read the caption as a whole
    text_layers: Whole = 0  # bidirectional layers over the frozen tokens, of heads of head_dim
    text_pool: bool = later(False)  # res-blocks read the caption as one vector, which attention pools (Imagen)
    # of a side, joined into channels before the first convolution: a network on pixels then computes on smaller maps
    patch_px: Count = later(1)
    # Further inputs. Each begins at zero: a trained network gains one without changing what it computes
    vector_dim: Whole = later(0)  # of a vector added to the timestep's embedding: a label, an image's embedding
    # px of an image to one of x: the vector is then SIZES numbers, its sizes and crop (SDXL); 0: it is told none
    size_px: Whole = later(0)
    picture_channels: Whole = later(0)  # of a picture joined to x: a low-resolution one, a masked one and its mask
    level_embedding: bool = later(False)  # the network is told how much the picture was augmented
    inpainting: bool = later(False)  # the picture is what is known of x_0 (raphael/net/inputs.py); none: nothing is

    @property
    def num_blocks(self) -> int:
        """Transformer blocks: of each attention level res_blocks down and one more up, and the middle's."""
        levels = [level for level in range(len(self.channels)) if level in self.attention_levels]
        return (2 * self.res_blocks + 1) * len(levels) + 1

    @property
    def predicted_channels(self) -> int:
        return self.out_channels or self.latent_channels

    @property
    def multiple(self) -> int:
        """What height and width of x are multiples of: the patch, and a halving between two levels."""
        return self.patch_px * 2 ** (len(self.channels) - 1)

    def head_width(self, width: int) -> int:
        """Of one attention head in a block of that width."""
        return width // self.num_heads if self.num_heads else self.head_dim

    def __post_init__(self) -> None:
        if bool(self.context_dim) != bool(self.context_length):
            raise ValueError(
                f"context_dim: got {self.context_dim} with context_length {self.context_length}, expected both, or 0 "
                "twice for a network without text"
            )
        if not self.context_dim and (self.pooled_text or self.text_layers or self.text_pool):
            got = "text_pool" if self.text_pool else "pooled_text or text_layers"
            raise ValueError(f"context_dim: got 0 with {got}, expected the width of their tokens")
        if self.inpainting and self.picture_channels != self.latent_channels + 1:
            raise ValueError(
                f"picture_channels: got {self.picture_channels} with inpainting, expected {self.latent_channels + 1}: "
                "a mask and x_0"
            )
        if self.size_px and self.vector_dim != SIZES:
            raise ValueError(
                f"vector_dim: got {self.vector_dim} with size_px {self.size_px}, expected {SIZES}: height and width "
                "before scaling, what was cropped above and to the left, height and width"
            )
        if (self.text_layers or self.text_pool) and self.context_dim % self.head_dim:
            got = f"text_layers {self.text_layers}" if self.text_layers else "text_pool"
            raise ValueError(
                f"context_dim: got {self.context_dim} with {got}, expected a multiple of head_dim {self.head_dim}: its "
                "heads have that width"
            )
        if not self.channels:
            raise ValueError("channels: got an empty list, expected one width per level")
        for level in self.attention_levels:
            if not 0 <= level < len(self.channels):
                raise ValueError(f"attention_levels: got {level}, expected 0 to {len(self.channels) - 1}, a level")
        for width in self.channels:
            if width % self.norm_groups:
                raise ValueError(f"channels: got {width}, expected a multiple of norm_groups {self.norm_groups}")
        for level in {*self.attention_levels, len(self.channels) - 1}:  # the middle has a transformer block too
            got, name = self.channels[level], "num_heads" if self.num_heads else "head_dim"
            if got % getattr(self, name):
                raise ValueError(f"channels: got {got}, expected a multiple of {name} {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class PlainUNetConfig(UNetConfig):
    """With plain transformer blocks (raphael/net/plain.py): self-attention, cross-attention where there is text."""

    expansion: Annotated[float, Range(0)] = 0.0  # hidden width of a block's feed-forward / its width; 0: it has none
    activation: Literal["gelu", "geglu"] = "gelu"  # geglu: two hidden halves, one a gate
    joined_text: bool = later(False)  # one attention over the map and the text, as Imagen's base; else one each
    self_attention: bool = later(True)  # false: blocks read the text alone, as Imagen's last super-resolution model

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.joined_text and not (self.context_dim and self.self_attention):
            raise ValueError("joined_text: got true, expected a context_dim and self_attention to join")


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Of a text transformer that is trained with a U-Net (raphael/net/captions): the U-Net's context_length is the
    length of its captions, context_dim its width."""

    vocabulary: Whole = 0  # token vectors; 0: one for each token of the training's captions, and one for all others
    layers: Count
    head_dim: Count
