"""Every setting of the project, as frozen dataclasses that mirror params.yaml section by section.

`load_config` is strict (raphael/strict.py). Sizes of networks live in raphael/presets/*.yaml and are named by
`model.preset`; everything else has its number in params.yaml. Units are in the names.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from raphael.strict import ConfigError, Range, load, read_yaml

PRESETS = Path(__file__).parent / "presets"

Share = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(1)]
NonNegative = Annotated[int, Range(0)]
Positive = Annotated[float, Range(1e-12)]
Score = Annotated[float, Range(-100, 100)]
SamplerName = Literal["ddpm", "ddim", "euler", "heun", "dpmpp_2m", "unipc"]
ThresholdKind = Literal["none", "static", "dynamic"]


@dataclass(frozen=True)
class ScenesConfig:
    """The embedded corpus: drawn pictures whose truth is known, published with a stated share of what goes wrong."""

    num_rows: Count
    num_heldout_prompts: Count  # of each suite: single, relation, count, text
    min_side_px: Annotated[int, Range(48, 512)]
    max_side_px: Annotated[int, Range(48, 512)]
    bad_share: Annotated[float, Range(0, 0.9)]  # rows with something wrong: dead link, bad body, low score ...
    heldout_share: Annotated[float, Range(0.1, 0.5)]  # of (shape, colour, background) combinations, never in training

    def __post_init__(self) -> None:
        if self.min_side_px > self.max_side_px:
            raise ValueError(f"min_side_px {self.min_side_px} is above max_side_px {self.max_side_px}")


@dataclass(frozen=True)
class SourceConfig:
    """Where link lists come from. coco, folder: local pictures, served to the downloader like any others."""

    kind: Literal["scenes", "coco", "folder", "csv", "jsonl", "parquet"]
    path: str  # coco: folder of captions_*.json and pictures; folder; csv, jsonl, parquet: a file or a glob
    fingerprint: str  # of what lies at `path`, so that a changed folder is a changed input; "" where not used
    max_rows: NonNegative  # 0: all
    max_heldout_prompts: Count  # for sources other than scenes
    scenes: ScenesConfig


@dataclass(frozen=True)
class SelectConfig:
    """Which rows are worth a request. Scores are judged here too when `score_rules` is on (right for real LAION)."""

    score_rules: bool
    min_caption_chars: NonNegative
    max_caption_chars: Count
    languages: tuple[str, ...]  # empty: any
    chunk_rows: Count  # memory bound of the stream


@dataclass(frozen=True)
class DownloadConfig:
    """img2dataset's arguments and the gateway's limits."""

    shard_rows: Count
    processes: Count
    threads: Count
    image_size_px: Count  # the short side is brought down to this; never up
    encode_format: Literal["jpg", "png", "webp"]
    encode_quality: Annotated[int, Range(0, 100)]
    retries: NonNegative
    timeout_s: Positive  # silence on a connection
    deadline_s: Positive  # the whole answer
    max_bytes: Count
    max_pixels: Count
    max_decoded_bytes: Count  # width x height x channels x depth, from the picture's header
    per_host: Count  # connections to one host at a time
    stall_s: Positive  # no shard finished and no row moved for so long: the downloader is restarted
    user_agent: str
    local_host: str  # the one host that may resolve to this machine (the embedded corpus); "" for none
    min_success_share: Share  # below this the stage stops: the list or the network is broken


@dataclass(frozen=True)
class FilterConfig:
    """Which downloaded pictures are kept. Thresholds as in the paper: aesthetic >= 4.7 on the V2 scale."""

    min_aesthetic: Score
    max_watermark: Share  # kept: strictly below
    max_unsafe: Share  # kept: strictly below
    min_similarity: Score
    min_side_px: NonNegative
    max_aspect_ratio: Annotated[float, Range(1)]
    missing_score: Literal["drop", "keep"]  # a null score is no evidence
    opt_out: str  # a text file of urls, domains and hashes that are left out (data_pipeline/opt_out.py); "": none


@dataclass(frozen=True)
class CaptionsConfig:
    min_chars: NonNegative
    max_chars: Count


@dataclass(frozen=True)
class PictureConfig:
    """What the networks see. One size for now: pictures are scaled to cover it and cropped to its middle."""

    height_px: Annotated[int, Range(8)]
    width_px: Annotated[int, Range(8)]


@dataclass(frozen=True)
class LoopConfig:
    """One training. Progress is counted in images, batch sizes are global (over all workers)."""

    num_images: Count
    batch_size: Count
    optimizer: Literal["adamw", "muon"]  # muon: its update for the matrices, AdamW's for the rest
    learning_rate: Positive
    warmup_images: NonNegative
    schedule: Literal["constant", "cosine"]
    weight_decay: Annotated[float, Range(0)]
    betas: tuple[float, ...]
    clip_norm: Annotated[float, Range(0)]  # 0: off
    ema_decay: Annotated[float, Range(0, 0.999999)]  # 0: no average
    precision: Literal["auto", "fp32", "bf16"]  # auto: bf16 where the processor multiplies it natively
    log_every_images: Count
    checkpoint_every_images: Count
    sample_every_images: NonNegative  # 0: never

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {self.betas}, expected two numbers from 0 to below 1")


@dataclass(frozen=True)
class AutoencoderConfig:
    """The KL autoencoder: loaded from `pretrained` (a folder, a hub id, or a TAEF2 weights folder) or trained here."""

    pretrained: str
    latent_channels: Count
    channels: tuple[int, ...]  # one per resolution; each but the last halves the picture
    layers_per_block: Count
    norm_groups: Count
    kl_weight: Annotated[float, Range(0)]
    gradient_weight: Annotated[float, Range(0)]  # L1 of picture gradients: keeps outlines sharp
    crop_px: NonNegative  # side of the squares that the training cuts from pictures; 0: whole pictures
    loop: LoopConfig

    def __post_init__(self) -> None:
        if self.crop_px % 2 ** (len(self.channels) - 1):
            raise ValueError(f"crop_px: got {self.crop_px}, expected a multiple of {2 ** (len(self.channels) - 1)}")


@dataclass(frozen=True)
class ClipConfig:
    """The text encoder (and scoring CLIP): loaded from `pretrained` or trained here with open_clip's class."""

    pretrained: str  # "", or "open_clip:<arch>:<weights>", "clip:<folder or hub id>", "t5:<folder or hub id>"
    context_length: Annotated[int, Range(4)]
    embed_dim: Count
    text_width: Count
    text_heads: Count
    text_layers: Count
    token_std: Positive  # of the token vectors at the start; open_clip's own is 0.02
    image_tower: Literal["vit", "resnet"]
    image_size_px: Count
    image_width: Count  # of a vit's tokens; of a resnet's stem
    image_layers: Count  # of a vit; bottlenecks in each of a resnet's four stages
    patch_size_px: NonNegative  # of a vit; 0 for a resnet
    loop: LoopConfig


@dataclass(frozen=True)
class EncodeConfig:
    batch_size: Count
    edge_detector: Literal["sobel", "canny"]
    edge_threshold: Share  # of the strongest response in the picture


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
    num_space_experts: Count
    num_time_experts: Count
    expansion: Positive  # hidden width of an expert / width of the block
    mask_threshold: Share  # alpha: M_hat = [M >= alpha * max M]
    gate_hidden: Annotated[float, Range(0.01)]  # hidden width of a gate / width of its input
    gate_noise: Annotated[float, Range(0)]  # standard deviation of eps, added after the softmax, in training only
    gate_gradient: Literal["straight_through", "none"]  # "none" is the printed formula: argmax, so gates never learn
    mean_over: Literal["all_tokens", "real_tokens"]  # the paper's 1/n_y is all 77; tiny leaves padding out
    edge_channels: Count
    edge_layers: Annotated[int, Range(2)]
    edge_tokens: Literal["all", "last"]  # whose maps the edge head reads; last: the closing token's, figure 7 shows it
    moe_residual: bool  # h + MoE(h) around both mixtures; the paper writes none
    moe_norm: bool  # LayerNorm per pixel before both mixtures; the paper writes none
    pooled_text: bool  # res-blocks also read the caption as a whole (not in the paper; gates never do)

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
            if self.channels[level] % self.head_dim:
                got = self.channels[level]
                raise ValueError(f"channels: got {got}, expected a multiple of head_dim {self.head_dim}")


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


@dataclass(frozen=True)
class ModelConfig:
    preset: str  # a name in raphael/presets, or a path to a file like those

    def load(self) -> Preset:
        return load_preset(self.preset)


@dataclass(frozen=True)
class TrainConfig:
    num_workers: NonNegative  # Ray Train workers; 0: this process, without Ray
    use_gpu: bool
    latents: Literal["sample", "mean"]  # of the autoencoder's posterior; sample: as in latent diffusion
    caption_drop: Share  # share of samples whose caption is replaced by the empty one
    edge_weight: Annotated[float, Range(0)]
    edge_max_timestep: NonNegative  # T_c: no edge loss at t > T_c
    focal_alpha: Share
    focal_gamma: Annotated[float, Range(0)]
    timestep_shift: Positive  # s: timesteps are drawn as T s u / (1 + (s - 1) u), u uniform; 1: uniform
    min_snr_gamma: Annotated[float, Range(0)]  # 0: off, every timestep counts alike; 5 in arXiv 2303.09556
    edge_resolution: Literal["map", "target"]  # targets brought to each block's map, or logits to the targets' size
    balance: Literal["none", "switch", "loss_free"]  # none: as in the paper; loss_free: a bias moved outside gradients
    balance_weight: Annotated[float, Range(0)]  # of Switch's loss
    balance_rate: Annotated[float, Range(0)]  # u of loss_free: what a step adds to or takes from a gate's bias
    sample_prompts: tuple[str, ...]  # of the grids drawn while training; empty: the first held-out prompts
    num_sample_prompts: Count
    loop: LoopConfig


@dataclass(frozen=True)
class GenerateConfig:
    seed: NonNegative
    sampler: SamplerName
    steps: Count
    eta: Share  # of ddim: 0 deterministic, 1 the noise of ddpm; 0 with every other sampler
    guidance_scale: Annotated[float, Range(0)]
    guidance_interval: tuple[Share, ...]  # from, to: shares of the timesteps, 0 the cleanest, 1 the noisiest
    threshold: ThresholdKind  # of the estimates of x_0; for models of pixels, whose bounds are known
    threshold_percentile: Annotated[float, Range(0, 100)]  # of |x_0|, dynamic only
    threshold_bound: Positive  # of |x_0| in the data: 1 for pixels
    precision: Literal["auto", "fp32", "bf16"]
    batch_size: Count
    images_per_prompt: Count

    def __post_init__(self) -> None:
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta: got {self.eta:g} with sampler {self.sampler}, expected 0: only ddim has it")
        if len(self.guidance_interval) != 2 or self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(
                f"guidance_interval: got {list(self.guidance_interval)}, expected two shares, the lower first"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    fid_inception_weights: str  # path of torch-fidelity's weights; "": our CLIP's features, and another name
    scoring_clip: str  # like clip.pretrained; "": the conditioning CLIP, and the metric is called clip_score_self
    max_reference_images: Count


@dataclass(frozen=True)
class TrackingConfig:
    uri: str  # "": SQLite in the workspace (mlflow.db); the environment's MLFLOW_TRACKING_URI wins
    experiment: str


@dataclass(frozen=True)
class Config:
    """params.yaml"""

    seed: NonNegative
    source: SourceConfig
    select: SelectConfig
    download: DownloadConfig
    filter: FilterConfig
    captions: CaptionsConfig
    picture: PictureConfig
    autoencoder: AutoencoderConfig
    clip: ClipConfig
    encode: EncodeConfig
    model: ModelConfig
    train: TrainConfig
    generate: GenerateConfig
    evaluate: EvaluateConfig
    tracking: TrackingConfig
    file: str = field(default="params.yaml", compare=False)

    def __post_init__(self) -> None:
        factor = 2 ** (len(self.autoencoder.channels) - 1)
        for side in (self.picture.height_px, self.picture.width_px):
            if side % factor:
                raise ValueError(f"picture: got a side of {side} px, expected a multiple of {factor} (autoencoder)")


def load_config(path: str | Path = "params.yaml") -> Config:
    """Read and check params.yaml and the preset that it names. Raises ConfigError."""
    data = read_yaml(path)
    if "file" in data:
        raise ConfigError(f"{path}: unknown key file")
    config = replace(load(Config, data, str(path)), file=str(path))
    config.model.load()
    return config


def load_preset(name: str) -> Preset:
    """The preset of that name, or the file at that path. Raises ConfigError that lists the names."""
    path = Path(name) if name.endswith(".yaml") else PRESETS / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in PRESETS.glob("*.yaml")))
        raise ConfigError(f"model.preset: got {name!r}, expected one of {names}, or the path of a .yaml file")
    return load(Preset, read_yaml(path), str(path))
