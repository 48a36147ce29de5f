"""Sizes of networks, as frozen dataclasses that mirror raphael/presets/<name>.yaml.

`load_preset` is strict (raphael/base/strict.py). params.yaml names a preset in `model.preset`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from raphael.base.config.unet import Count, UNetConfig
from raphael.base.strict import LATER, ConfigError, Range, load, read_yaml

PRESETS = Path(__file__).resolve().parents[2] / "presets"

NO_PRESET = "none"  # for systems whose settings all stand in params.yaml
T = TypeVar("T")

Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(1e-12)]


@dataclass(frozen=True, kw_only=True)
class RaphaelUNetConfig(UNetConfig):
    """The denoiser's shape. Each attention level's blocks are self-attention, cross-attention, Time-MoE, Space-MoE.

    A preset names what makes it another network; what is the same in all of them has its value here, the paper's where
    the paper gives one. A checkpoint's meta.json names every field but those that `later` made, at their defaults.
    """

    context_dim: Count = field()
    context_length: Count = field()  # n_y: tokens of a caption, padding included
    time_layer: Literal["moe", "dense", "none"] = "moe"  # dense: a plain feed-forward where the mixture stands
    space_layer: Literal["moe", "dense", "none"] = "moe"
    num_space_experts: Count
    num_time_experts: Count
    expansion: Positive  # hidden width of an expert / width of the block
    dense_expansion: Positive = 4.0  # hidden width of a dense layer / width of the block
    dense_activation: Literal["gelu", "geglu"] = "gelu"  # geglu: two hidden halves, one a gate, as in Stable Diffusion
    # M, of the cross-attention heads; the paper does not say
    mask_source: Literal["mean_of_heads", "max_of_heads"] = "mean_of_heads"
    mask_threshold: Share = 0.2  # alpha: M_hat = [M >= alpha * max M]
    gate_hidden: Annotated[float, Range(0.01)]  # hidden width of a gate / width of its input
    gate_noise: Annotated[float, Range(0)] = 0.01  # deviation of eps, added after the softmax, in training only
    # "none" is the printed formula: argmax, so gates never learn
    gate_gradient: Literal["straight_through", "none"] = "straight_through"
    mean_over: Literal["all_tokens", "real_tokens"]  # the paper's 1/n_y is all 77; tiny leaves padding out
    edge_channels: Count
    edge_layers: Annotated[int, Range(2)] = 5
    # Whose maps the edge head reads; last: the closing token's, figure 7 shows it; none: no edge heads
    edge_tokens: Literal["all", "last", "none"] = "all"
    moe_residual: bool = True  # h + MoE(h) around both mixtures; the paper writes none
    moe_norm: bool = True  # LayerNorm per pixel before both mixtures; the paper writes none
    pooled_text: bool = field()  # not in the paper; gates never read it
    # What Stable Diffusion's own U-Net has
    proj_in: bool = False  # a 1x1 convolution after a block's first norm, and that norm's eps 1e-6
    expert_activation: Literal["gelu", "geglu"] = "gelu"  # geglu: as dense_activation
    # What the paper has not, as text_layers (docs/learning.md); the defaults are the paper's
    positions: Literal["none", "learned"] = "none"  # a vector a place, added to what both attentions read
    positions_side: Count = 16  # side of the latents that the learned vectors stand for; others are interpolated


@dataclass(frozen=True)
class EdmNoiseConfig:
    """Of `schedule: edm` (arXiv 2206.00364, table 1): levels of sampling, and of training, log-normal."""

    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    rho: Positive = 7.0  # spacing of sampling: equal steps of sigma^(1/rho)
    log_sigma_mean: float = -1.2
    log_sigma_std: Positive = 1.2

    def __post_init__(self) -> None:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min: got {self.sigma_min:g}, expected less than sigma_max {self.sigma_max:g}")


@dataclass(frozen=True)
class FlowNoiseConfig:
    """Of `schedule: rectified_flow`: training's time, logit-normal (arXiv 2403.03206, section 3.1)."""

    logit_mean: float = 0.0
    logit_std: Annotated[float, Range(0)] = 1.0  # 0: time is uniform


@dataclass(frozen=True)
class DiffusionConfig:
    num_steps: Annotated[
        int, Range(2)
    ]  # T; edm, rectified_flow, continuous_cosine: the network's times are any real from 0 to T-1
    schedule: Literal["linear", "scaled_linear", "cosine", "edm", "rectified_flow", "continuous_cosine"]
    beta_start: Positive  # of linear and scaled_linear
    beta_end: Positive
    prediction: Literal[
        "eps", "v", "x0", "flow", "edm", "residual"
    ]  # what the network returns: raphael/diffusion/prediction.py
    zero_terminal_snr: bool  # the last timestep is pure noise, alpha_bar = 0; not with prediction eps
    sigma_data: Positive = field(default=0.5, metadata=LATER)  # deviation of the data, of predictions edm and residual
    # of residual: deviation of an image from its half-size self, enlarged (raphael/diffusion/prediction.py: Residual)
    sigma_residual: Positive = field(default=0.09, metadata=LATER)
    edm: EdmNoiseConfig = field(default_factory=EdmNoiseConfig, metadata=LATER)
    rectified_flow: FlowNoiseConfig = field(default_factory=FlowNoiseConfig, metadata=LATER)

    def __post_init__(self) -> None:
        if self.zero_terminal_snr and self.prediction == "eps":
            raise ValueError(
                "zero_terminal_snr: got true with prediction eps, expected v: the last input is eps and nothing else"
            )
        if self.schedule == "edm" and self.zero_terminal_snr:
            raise ValueError("zero_terminal_snr: got true with schedule edm, expected false: it ends at edm.sigma_max")
        if self.schedule in ("rectified_flow", "continuous_cosine") and not self.zero_terminal_snr:
            raise ValueError(
                f"zero_terminal_snr: got false with schedule {self.schedule}, expected true: it ends in pure noise"
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

    channels: tuple[int, ...]  # one per resolution; each but the last halves the image
    layers_per_block: Count
    norm_groups: Count
    attention: bool  # in the middle, as in Stable Diffusion; those trained here have convolutions only


@dataclass(frozen=True)
class Preset:
    """raphael/presets/<name>.yaml"""

    unet: RaphaelUNetConfig
    diffusion: DiffusionConfig
    text: TextTowerConfig
    vae: VaeConfig
    sizes_px: tuple[tuple[int, ...], ...]  # [height, width] of the images that it is meant for

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


def preset_names() -> list[str]:
    """Of the presets that hold sizes, sorted."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml") if file.stem != NO_PRESET)


def load_preset(name: str, kind: type[T] = Preset, over: dict[str, Any] | None = None) -> T:
    """The preset of that name, or the file at that path. Raises ConfigError that lists the names.

    kind: the dataclass that it fills. over: settings that stand above the file's.
    """
    path = Path(name) if name.endswith(".yaml") else PRESETS / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(preset_names())
        raise ConfigError(f"model.preset: got {name!r}, expected one of {names}, or the path of a .yaml file")
    if not over and name != NO_PRESET:
        return load(kind, read_yaml(path), str(path))
    return load(kind, _over(read_yaml(path), over or {}), f"{path.name} and model.settings")


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {name: _over(below[name], above[name]) for name in below if isinstance(above.get(name), dict)}
    return {**below, **above, **both}
