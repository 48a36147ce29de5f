"""Every setting of the project, as frozen dataclasses that mirror params.yaml section by section.

`load_config` is strict (raphael/strict.py). Sizes of networks live in raphael/presets/*.yaml and are named by
`model.preset`; everything else has its number in params.yaml. Units are in the names.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from raphael.config_data import (
    CaptionsConfig,
    DownloadConfig,
    FilterConfig,
    NonNegative,
    PictureConfig,
    ScoreConfig,
    SelectConfig,
    SourceConfig,
)
from raphael.preset import Count, Positive, Preset, Share, load_preset
from raphael.strict import ConfigError, Range, load, read_yaml

SamplerName = Literal["ddpm", "ddim", "euler", "heun", "dpmpp_2m", "unipc"]
ThresholdKind = Literal["none", "static", "dynamic"]


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
    max_bad_steps: Count  # so many bad steps in a row end the training; 1: the first. A bad step changes no weight
    spike_factor: Annotated[float, Range(0)]  # bad is also a loss above this many running medians; 0: off
    ema_decay: Annotated[float, Range(0, 0.999999)]  # 0: no average
    ema_more_decays: tuple[Annotated[float, Range(0, 0.999999)], ...]  # further averages, exported as ema_<decay>
    ema_start_images: NonNegative  # averages begin here, at the weights of then; until then they are the weights
    ema_every_steps: Count  # averages take in the weights at every so many-th step, for all steps since
    ema_on_cpu: bool  # averages lie in main memory where the model is on a GPU
    precision: Literal["auto", "fp32", "bf16"]  # auto: bf16 where the processor multiplies it natively
    log_every_images: Count
    checkpoint_every_images: Count
    keep_checkpoints: Count  # the newest so many; the one with the lowest held-out loss stays, too
    sample_every_images: NonNegative  # 0: never; else also at 0 and at the end
    heldout_every_images: NonNegative  # measure the held-out loss; 0: never; else also at 0 and at the end

    @property
    def averages(self) -> dict[str, float]:
        """Decay of every average by its name in checkpoints and exports. "ema" is the one that is drawn with."""
        return {"ema": self.ema_decay, **{f"ema_{decay:g}": decay for decay in self.ema_more_decays}}

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {self.betas}, expected two numbers from 0 to below 1")
        if self.ema_start_images >= self.num_images:
            raise ValueError(
                f"ema_start_images: got {self.ema_start_images} of {self.num_images} images, expected fewer: averages "
                "would never begin"
            )
        decays = (self.ema_decay, *self.ema_more_decays)
        if self.ema_more_decays and (0 in decays or len(set(decays)) < len(decays)):
            raise ValueError(
                f"ema_more_decays: got {list(self.ema_more_decays)} beside ema_decay {self.ema_decay:g}, expected "
                "decays above 0, each once"
            )
        if 0 < self.spike_factor <= 1:
            raise ValueError(
                f"spike_factor: got {self.spike_factor:g}, expected 0 (off) or above 1: half of all losses lie above "
                "their median"
            )


@dataclass(frozen=True)
class ParallelConfig:
    """How the work of a step is spread over workers and passes. Nothing here changes an update beyond rounding."""

    strategy: Literal["ddp", "fsdp2"]  # ddp: every worker has everything; fsdp2: each keeps a share of every tensor
    micro_batch: NonNegative  # images per worker and pass, gradients added up; 0: the worker's whole slice at once
    checkpoint_activations: Literal["none", "blocks"]  # blocks: a transformer block is computed again in the backward
    compile: Literal["none", "blocks"]  # blocks: torch.compile, one transformer block at a time
    max_failures: NonNegative  # restarts of the worker group in one run of the stage
    collective_timeout_s: Positive  # a worker that is silent for so long has failed
    min_workers: NonNegative  # so many may go on where the cluster has no room for num_workers; 0: only num_workers
    placement_timeout_s: Positive  # how long the cluster may take to find room, for a lost node to return, say


@dataclass(frozen=True)
class PerceptualConfig:
    """LPIPS in the autoencoder's loss; off where no backbone is given."""

    weight: Annotated[float, Range(0)]
    backbone: str  # path of torchvision's vgg16 weights
    heads: str  # path of LPIPS' v0.1/vgg.pth

    def __post_init__(self) -> None:
        if bool(self.backbone) != bool(self.heads):
            missing, given = ("heads", "backbone") if self.backbone else ("backbone", "heads")
            raise ValueError(f"{missing}: got nothing with a {given} file, expected both files, or neither: LPIPS off")


@dataclass(frozen=True)
class AdversarialConfig:
    """A patch discriminator in the autoencoder's loss; 0.5 from 50,000 steps on in latent diffusion."""

    weight: Annotated[float, Range(0)]  # 0: off
    start_images: NonNegative
    channels: Count
    layers: Count


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
    perceptual: PerceptualConfig
    adversarial: AdversarialConfig
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
    edge_detector: Literal["sobel", "canny", "pidinet"]
    edge_weights: str  # path of pidinet's .pth; "" with the others
    edge_threshold: Share  # of the strongest response in the picture; pidinet: the probability, 0: kept as it is

    def __post_init__(self) -> None:
        if (self.edge_detector == "pidinet") != bool(self.edge_weights):
            expected = "the path of its .pth" if self.edge_detector == "pidinet" else '"": it has none'
            raise ValueError(
                f"edge_weights: got {self.edge_weights!r} with edge_detector {self.edge_detector}, expected {expected}"
            )


@dataclass(frozen=True)
class ModelConfig:
    preset: str  # a name in raphael/presets, or a path to a file like those

    def load(self) -> Preset:
        return load_preset(self.preset)


@dataclass(frozen=True)
class TrainConfig:
    seed: NonNegative  # of weights, order, noise; another seed is another training on the same data
    num_workers: NonNegative  # Ray Train workers; 0: this process, without Ray
    use_gpu: bool
    latents: Literal["sample", "mean"]  # of the autoencoder's posterior; sample: as in latent diffusion
    caption_drop: Share  # share of samples whose caption is replaced by the empty one
    edge_weight: Annotated[float, Range(0)]
    edge_block_weights: tuple[Annotated[float, Range(0)], ...]  # one a transformer block, in their order; empty: all 1
    edge_max_timestep: NonNegative  # T_c: no edge loss at t > T_c
    focal_alpha: Share
    focal_gamma: Annotated[float, Range(0)]
    noise_offset: Annotated[float, Range(0, 1)]  # share of noise that is the same on a whole channel; 0: off
    timestep_shift: Positive  # s: timesteps are drawn as T s u / (1 + (s - 1) u), u uniform; 1: uniform
    min_snr_gamma: Annotated[float, Range(0)]  # 0: off, every timestep counts alike; 5 in arXiv 2303.09556
    edge_resolution: Literal["map", "target"]  # targets brought to each block's map, or logits to the targets' size
    balance: Literal["none", "switch", "loss_free"]  # none: as in the paper; loss_free: a bias moved outside gradients
    balance_weight: Annotated[float, Range(0)]  # of Switch's loss
    balance_rate: Annotated[float, Range(0)]  # u of loss_free: what a step adds to or takes from a gate's bias
    sample_prompts: tuple[str, ...]  # of the grids drawn while training; empty: the first held-out prompts
    num_sample_prompts: Count
    sample_weights: tuple[str, ...]  # which weights draw them: raw, ema, ema_<decay> of loop.ema_more_decays
    num_heldout: NonNegative  # records kept out of training, for the held-out loss (raphael/train/heldout.py)
    patience: NonNegative  # held-out points in a row without a lower loss, after which the training ends; 0: never
    init_from: str  # a pipeline folder whose averaged weights the training begins with; "": from nothing
    init_sha256: str  # of that checkpoint, its first 16 digits or more: another one there is another training
    parallel: ParallelConfig
    loop: LoopConfig

    def __post_init__(self) -> None:
        if bool(self.init_from) != bool(self.init_sha256):
            raise ValueError(
                f"init_sha256: got {self.init_sha256!r} with init_from {self.init_from!r}, expected both or neither; "
                "raphael train --from sets them"
            )
        if self.balance == "loss_free" and self.parallel.micro_batch:
            raise ValueError(
                f"parallel.micro_batch: got {self.parallel.micro_batch} with balance loss_free, expected 0: its biases "
                "move once a pass"
            )
        if bool(self.num_heldout) != bool(self.loop.heldout_every_images):
            raise ValueError(
                f"num_heldout: got {self.num_heldout} with loop.heldout_every_images {self.loop.heldout_every_images}, "
                "expected both 0 or neither: records would be kept out for nothing, or none would be there to measure"
            )
        if self.patience and not self.num_heldout:
            raise ValueError(
                f"patience: got {self.patience} with num_heldout 0, expected 0: no loss to be patient with"
            )
        if unknown := set(self.sample_weights) - {"raw", *self.loop.averages}:
            raise ValueError(
                f"sample_weights: got {sorted(unknown)[0]}, expected some of raw, {', '.join(self.loop.averages)}"
            )
        if self.loop.ema_on_cpu and self.parallel.strategy == "fsdp2":
            raise ValueError(
                "loop.ema_on_cpu: got true with parallel.strategy fsdp2, expected false: averages are shared out"
            )
        if self.parallel.min_workers > self.num_workers:
            raise ValueError(
                f"parallel.min_workers: got {self.parallel.min_workers} with num_workers {self.num_workers}, expected "
                "at most num_workers, or 0: only num_workers"
            )
        if self.loop.batch_size % max(1, self.num_workers):
            raise ValueError(
                f"loop.batch_size: got {self.loop.batch_size} for {self.num_workers} workers, expected a multiple of "
                "num_workers: each takes an equal slice"
            )


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
    score: ScoreConfig
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


def load_config(path: str | Path = "params.yaml") -> Config:
    """Read and check params.yaml and the preset that it names. Raises ConfigError."""
    data = read_yaml(path)
    if "file" in data:
        raise ConfigError(f"{path}: unknown key file")
    config = replace(load(Config, data, str(path)), file=str(path))
    blocks, weights = config.model.load().unet.num_blocks, config.train.edge_block_weights
    if weights and len(weights) != blocks:
        raise ConfigError(
            f"{path}: train.edge_block_weights: got {len(weights)} numbers, expected {blocks}, one for each "
            f"transformer block of the preset {config.model.preset}, or none"
        )
    _check_sizes(config, len(config.model.load().unet.channels))
    return config


def _check_sizes(config: Config, levels: int) -> None:
    """Every side must survive the halvings of the autoencoder and of the U-Net. Raises ConfigError.

    A pretrained autoencoder's factor is known where it is loaded: stages check it there.
    """
    factor = 1 if config.autoencoder.pretrained else 2 ** (len(config.autoencoder.channels) - 1)
    multiple = factor * 2 ** (levels - 1)
    for size in config.picture.sizes_px:
        if any(side % multiple for side in size):
            raise ConfigError(
                f"{config.file}: picture.sizes_px: got {list(size)}, expected multiples of {multiple} "
                f"(autoencoder {factor} x U-Net {2 ** (levels - 1)})"
            )
