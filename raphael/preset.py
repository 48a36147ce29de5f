"""Sizes of networks, as frozen dataclasses that mirror raphael/presets/<name>.yaml.

`load_preset` is strict (raphael/strict.py). params.yaml names a preset in `model.preset`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from raphael.strict import ConfigError, Range, load, read_yaml

PRESETS = Path(__file__).parent / "presets"

Share = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(1)]
Positive = Annotated[float, Range(1e-12)]


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser's shape. Each attention level's blocks are self-attention, cross-attention, Time-MoE, Space-MoE."""

    latent_channels: Count
    channels: tuple[int, ...]  # one per level; each but the last halves the map
    res_blocks: Count  # per level on the way down; one more on the way up
    attention_levels: tuple[int, ...]
    head_dim: Count
    norm_groups: Count
    context_dim: Count
    context_length: Count  # n_y: tokens of a caption, padding included
    time_layer: Literal["moe", "dense", "none"]  # dense: a plain feed-forward where the mixture stands
    space_layer: Literal["moe", "dense", "none"]
    num_space_experts: Count
    num_time_experts: Count
    expansion: Positive  # hidden width of an expert / width of the block
    dense_expansion: Positive  # hidden width of a dense layer / width of the block
    dense_activation: Literal["gelu", "geglu"]  # geglu: two hidden halves, one the gate, as in Stable Diffusion
    mask_source: Literal["mean_of_heads", "max_of_heads"]  # M, of the cross-attention heads; the paper does not say
    mask_threshold: Share  # alpha: M_hat = [M >= alpha * max M]
    gate_hidden: Annotated[float, Range(0.01)]  # hidden width of a gate / width of its input
    gate_noise: Annotated[float, Range(0)]  # standard deviation of eps, added after the softmax, in training only
    gate_gradient: Literal["straight_through", "none"]  # "none" is the printed formula: argmax, so gates never learn
    mean_over: Literal["all_tokens", "real_tokens"]  # the paper's 1/n_y is all 77; tiny leaves padding out
    edge_channels: Count
    edge_layers: Annotated[int, Range(2)]
    edge_tokens: Literal["all", "last", "none"]  # whose maps the edge head reads; last: the closing token's, figure 7
    # shows it; none: no edge heads
    moe_residual: bool  # h + MoE(h) around both mixtures; the paper writes none
    moe_norm: bool  # LayerNorm per pixel before both mixtures; the paper writes none
    pooled_text: bool  # res-blocks also read the caption as a whole (not in the paper; gates never do)
    # What Stable Diffusion's own U-Net has; with defaults, since checkpoints from before do not name them
    num_heads: Annotated[int, Range(0)] = 0  # of every attention, whatever its width; 0: width / head_dim
    proj_in: bool = False  # a 1x1 convolution after a block's first norm, and that norm's eps 1e-6
    expert_activation: Literal["gelu", "geglu"] = "gelu"  # geglu: as dense_activation

    @property
    def num_blocks(self) -> int:
        """Transformer blocks: of each attention level res_blocks down and one more up, and the middle's."""
        levels = [level for level in range(len(self.channels)) if level in self.attention_levels]
        return (2 * self.res_blocks + 1) * len(levels) + 1

    def __post_init__(self) -> None:
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


@dataclass(frozen=True)
class DiffusionConfig:
    num_steps: Annotated[int, Range(2)]  # T
    schedule: Literal["linear", "scaled_linear", "cosine"]
    beta_start: Positive
    beta_end: Positive
    prediction: Literal["eps", "v"]
    zero_terminal_snr: bool  # the last timestep is pure noise, alpha_bar = 0; asks for prediction v

    def __post_init__(self) -> None:
        if self.zero_terminal_snr and self.prediction == "eps":
            raise ValueError(
                "zero_terminal_snr: got true with prediction eps, expected v: the last input is eps and nothing else"
            )


@dataclass(frozen=True)
class TextTowerConfig:
    """The text encoder that the denoiser's context comes from: open_clip's text transformer of these sizes."""

    architecture: str  # open_clip's name for it, whose weights fit; "": trained here, as params.yaml's clip
    context_length: Count
    width: Count
    heads: Count
    layers: Count
    embed_dim: Count


@dataclass(frozen=True)
class VaeConfig:
    """The KL autoencoder that the latents come from (diffusers' AutoencoderKL)."""

    channels: tuple[int, ...]  # one per resolution; each but the last halves the picture
    layers_per_block: Count
    norm_groups: Count
    attention: bool  # in the middle, as in Stable Diffusion; those trained here have convolutions only


@dataclass(frozen=True)
class Preset:
    """raphael/presets/<name>.yaml"""

    unet: UNetConfig
    diffusion: DiffusionConfig
    text: TextTowerConfig
    vae: VaeConfig
    sizes_px: tuple[tuple[int, ...], ...]  # [height, width] of the pictures that it is meant for

    def __post_init__(self) -> None:
        for what, text, unet in (
            ("context_length", self.text.context_length, self.unet.context_length),
            ("width", self.text.width, self.unet.context_dim),
        ):
            if text != unet:
                raise ValueError(f"text.{what}: got {text}, expected {unet}, what the unet reads")
        multiple = 2 ** (len(self.vae.channels) + len(self.unet.channels) - 2)
        for size in self.sizes_px:
            if len(size) != 2 or any(side < multiple or side % multiple for side in size):
                raise ValueError(f"sizes_px: got {list(size)}, expected [height, width], multiples of {multiple}")
        if not self.sizes_px:
            raise ValueError("sizes_px: got an empty list, expected at least one [height, width]")


def load_preset(name: str) -> Preset:
    """The preset of that name, or the file at that path. Raises ConfigError that lists the names."""
    path = Path(name) if name.endswith(".yaml") else PRESETS / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in PRESETS.glob("*.yaml")))
        raise ConfigError(f"model.preset: got {name!r}, expected one of {names}, or the path of a .yaml file")
    return load(Preset, read_yaml(path), str(path))
