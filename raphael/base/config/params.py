"""Every setting of the project, as frozen dataclasses that mirror params.yaml section by section.

`load_config` is strict (raphael/base/strict.py). Sizes of networks live in raphael/presets/*.yaml and are named by
`model.preset`; everything else has its number in params.yaml. Units are in the names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from raphael.base.config.data import (
    CaptionsConfig,
    DownloadConfig,
    EncodeConfig,
    EvaluateConfig,
    FilterConfig,
    NonNegative,
    PictureConfig,
    PipelineConfig,
    ScoreConfig,
    SelectConfig,
    SourceConfig,
)
from raphael.base.config.lora import LoraConfig
from raphael.base.config.preset import Count, Positive, Share, load_preset
from raphael.base.config.sampling import Sampling
from raphael.base.config.systems import DEFAULT, check_fields, find_system, refuse_misplaced
from raphael.base.config.t5 import T5Config
from raphael.base.devices import DeviceName
from raphael.base.strict import LATER, ConfigError, Range, later, load, read_yaml, to_dict

# Settings of a loop that may change between a checkpoint and its resumption (num_images: upwards)
FREE = (
    "num_images", "log_every_images", "checkpoint_every_images", "sample_every_images", "heldout_every_images",
    "max_bad_steps", "ema_on_cpu", "keep_checkpoints", "decay_images",
)  # fmt: skip


@dataclass(frozen=True)
class LoopConfig:
    """One training. Progress is counted in images, batch sizes are global (over all workers)."""

    num_images: Count
    batch_size: Count
    # muon: its update for the matrices, AdamW's for the rest; adafactor: moments of rows and columns, the least memory
    optimizer: Literal["adamw", "muon", "adafactor"]
    learning_rate: Positive
    warmup_images: NonNegative
    schedule: Literal["constant", "cosine", "trapezoid"]  # trapezoid: constant, then a cosine over decay_images
    weight_decay: Annotated[float, Range(0)]
    betas: tuple[float, ...]
    clip_norm: Annotated[float, Range(0)]  # 0: off
    max_bad_steps: Count  # so many bad steps in a row end the training; 1: the first. A bad step changes no weight
    spike_factor: Annotated[float, Range(0)]  # bad is also a loss above this many running medians; 0: off
    ema_decay: Annotated[float, Range(0, 0.999999)]  # 0: no EMA
    ema_more_decays: tuple[Annotated[float, Range(0, 0.999999)], ...]  # further EMAs, exported as ema_<decay>
    ema_start_images: NonNegative  # EMAs begin here, at the weights of then; until then they are the weights
    ema_every_steps: Count  # EMAs take in the weights at every so many-th step, for all steps since
    ema_on_cpu: bool  # EMAs lie in main memory where the model is on a GPU
    precision: Literal["auto", "fp32", "bf16"]  # auto: bf16 where the processor multiplies it natively
    log_every_images: Count
    checkpoint_every_images: Count
    keep_checkpoints: Count  # the newest so many; the one with the lowest held-out loss stays, too
    sample_every_images: NonNegative  # 0: never; else also at 0 and at the end
    heldout_every_images: NonNegative  # measure the held-out loss; 0: never; else also at 0 and at the end
    decay_images: NonNegative = 0  # of trapezoid: the last so many images, in which the rate falls to 0

    def decisive(self) -> dict[str, Any]:
        """What of it can change the weights. Where the rate is constant, or is until the fall of a trapezoid,
        num_images cannot: resuming is then what one longer run does."""
        keep = ("num_images",) if self.schedule == "cosine" else ()
        return {name: value for name, value in to_dict(self).items() if name not in FREE or name in keep}

    @property
    def ema_decays(self) -> dict[str, float]:
        """Decay of every EMA by its name in checkpoints and exports. "ema" is the one that generates."""
        return {"ema": self.ema_decay, **{f"ema_{decay:g}": decay for decay in self.ema_more_decays}}

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {self.betas}, expected two numbers from 0 to below 1")
        if self.ema_start_images >= self.num_images:
            raise ValueError(
                f"ema_start_images: got {self.ema_start_images} of {self.num_images} images, expected fewer: EMAs "
                "would never begin"
            )
        if (self.schedule == "trapezoid") != bool(self.decay_images) or self.decay_images > self.num_images:
            raise ValueError(
                f"decay_images: got {self.decay_images} of {self.num_images} images with schedule {self.schedule}, "
                "expected 1 to num_images with trapezoid, 0 with the others"
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


def refuse_unread(loop: LoopConfig) -> None:
    """Raises ValueError for what only `train` reads: a training of autoencoder or CLIP samples nothing, measures
    its held-out images once at its end, and publishes one EMA."""
    for name in ("sample_every_images", "heldout_every_images", "ema_more_decays"):
        if value := getattr(loop, name):
            got, expected = (list(value), "[]") if isinstance(value, tuple) else (value, 0)
            raise ValueError(f"loop.{name}: got {got}, expected {expected}: only train reads it")


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


PIXEL_AUTOENCODER = "pixels"  # of autoencoder.pretrained: none, images are diffused as they are


@dataclass(frozen=True)
class AutoencoderConfig:
    """The KL autoencoder: loaded from `pretrained` (a folder, a hub id, or a TAEF2 weights folder), trained here, or
    none (`pixels`: factor 1, 3 channels)."""

    pretrained: str
    latent_channels: Count
    channels: tuple[int, ...]  # one per resolution; each but the last halves the image
    layers_per_block: Count
    norm_groups: Count
    kl_weight: Annotated[float, Range(0)]
    gradient_weight: Annotated[float, Range(0)]  # L1 of image gradients: keeps outlines sharp
    crop_px: NonNegative  # side of the squares that the training cuts from images; 0: whole images
    perceptual: PerceptualConfig
    adversarial: AdversarialConfig
    loop: LoopConfig

    def __post_init__(self) -> None:
        refuse_unread(self.loop)
        if self.crop_px % 2 ** (len(self.channels) - 1):
            raise ValueError(f"crop_px: got {self.crop_px}, expected a multiple of {2 ** (len(self.channels) - 1)}")

    @property
    def is_pixels(self) -> bool:
        return self.pretrained == PIXEL_AUTOENCODER


NO_TEXT = "none"  # of clip.pretrained: no text encoder, for a system that reads no text


@dataclass(frozen=True)
class ClipConfig:
    """The text encoder (and scoring CLIP): loaded from `pretrained`, or trained here with open_clip's class, or, as
    tower t5, with transformers' T5: a tower of text alone, which scores no images."""

    pretrained: str  # "", "open_clip:<arch>:<weights>", "clip:<folder or hub id>", "t5:<folder or hub id>", or NO_TEXT
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
    tower: Literal["clip", "t5"] = later("clip")  # what is trained here
    t5: T5Config = field(default_factory=T5Config, metadata=LATER)

    def __post_init__(self) -> None:
        refuse_unread(self.loop)


@dataclass(frozen=True)
class ModelConfig:
    preset: str  # a name in raphael/presets, or a path to a file like those; none: all of it stands in `settings`
    system: str = DEFAULT  # a name in raphael/systems
    settings: dict[str, Any] = field(default_factory=dict)  # of the system, over the preset's

    def load(self) -> Any:
        """The system's own settings, of its own dataclass (for RAPHAEL a Preset). Raises ConfigError."""
        kind = find_system(self.system).settings
        try:
            return load_preset(self.preset, kind, self.settings)
        except ConfigError as error:
            if self.system == DEFAULT:
                raise
            # where the system alone was named over settings of another: its own are a file
            hint = "" if self.settings else f"; make demo SYSTEM={self.system} takes params.{self.system}.yaml"
            raise ConfigError(f"{error} (model.system {self.system}){hint}") from None


@dataclass(frozen=True)
class PhaseConfig:
    """What the first images of a training by texts see (raphael/train/phases.py)."""

    until_images: Count  # the phase ends here, counted from the training's beginning; a multiple of loop.batch_size
    timesteps: tuple[Share, ...] = (0.0, 1.0)  # from, to: shares of T, 0 the cleanest, 1 the noisiest
    timestep_shift: Positive = 1.0  # within these
    captions: str = ""  # a regular expression that is found in the captions of the phase's records; "": all records

    def __post_init__(self) -> None:
        if len(self.timesteps) != 2 or self.timesteps[0] >= self.timesteps[1]:
            raise ValueError(f"timesteps: got {list(self.timesteps)}, expected two shares of T, the lower first")
        try:
            re.compile(self.captions)
        except re.error as error:
            raise ValueError(
                f"captions: got {self.captions!r}, expected a regular expression of Python: {error}"
            ) from None


@dataclass(frozen=True)
class TrainConfig:
    """What the one loop is told, whatever it trains."""

    seed: NonNegative  # of weights, order, noise; another seed is another training on the same data
    num_workers: NonNegative | Literal["auto"]  # Ray Train workers; 0: this process, without Ray; auto: by this machine
    use_gpu: bool  # each Ray worker has a GPU of its own; without workers `device` says where this process computes
    sample_prompts: tuple[str, ...]  # of the grids generated while training; empty: the first held-out prompts
    num_sample_prompts: Count
    sample_weights: tuple[str, ...]  # which weights generate them: raw, ema, ema_<decay> of loop.ema_more_decays
    num_heldout: NonNegative  # records kept out of training, for the held-out loss (raphael/train/heldout.py)
    patience: NonNegative  # held-out points in a row without a lower loss, after which the training ends; 0: never
    init_from: str  # a pipeline folder whose EMA weights the training begins with; "": from nothing
    init_sha256: str  # of that checkpoint, its first 16 digits or more: another one there is another training
    parallel: ParallelConfig
    loop: LoopConfig
    settings: dict[str, Any] = field(default_factory=dict)  # of the system's training: Config.training reads them
    lora: LoraConfig = field(default_factory=LoraConfig, metadata=LATER)  # off unless it has a rank
    export: Literal["last", "best"] = later("last")  # best: the checkpoint of the lowest held-out loss

    def __post_init__(self) -> None:
        if bool(self.init_from) != bool(self.init_sha256):
            raise ValueError(
                f"init_sha256: got {self.init_sha256!r} with init_from {self.init_from!r}, expected both or neither; "
                "raphael train --from sets them"
            )
        self.lora.check(self.init_from, self.parallel.micro_batch, self.parallel.strategy)
        if bool(self.num_heldout) != bool(self.loop.heldout_every_images):
            raise ValueError(
                f"num_heldout: got {self.num_heldout} with loop.heldout_every_images {self.loop.heldout_every_images}, "
                "expected both 0 or neither: records would be kept out for nothing, or none would be there to measure"
            )
        if self.patience and not self.num_heldout:
            raise ValueError(
                f"patience: got {self.patience} with num_heldout 0, expected 0: no loss to be patient with"
            )
        if self.export == "best" and not self.num_heldout:
            raise ValueError("export: got best with num_heldout 0, expected last: no loss to be the best by")
        if unknown := set(self.sample_weights) - {"raw", *self.loop.ema_decays}:
            raise ValueError(
                f"sample_weights: got {sorted(unknown)[0]}, expected some of raw, {', '.join(self.loop.ema_decays)}"
            )
        if self.loop.ema_on_cpu and self.parallel.strategy == "fsdp2":
            raise ValueError(
                "loop.ema_on_cpu: got true with parallel.strategy fsdp2, expected false: EMA weights are sharded"
            )
        if self.loop.optimizer == "adafactor" and self.parallel.strategy == "fsdp2":
            raise ValueError(
                "loop.optimizer: got adafactor with parallel.strategy fsdp2, expected adamw or muon: its moments are "
                "of whole matrices"
            )
        workers = 0 if self.num_workers == "auto" else self.num_workers
        if self.parallel.min_workers > workers:
            raise ValueError(
                f"parallel.min_workers: got {self.parallel.min_workers} with num_workers {self.num_workers}, expected "
                "at most num_workers, or 0: only num_workers"
            )
        if self.loop.batch_size % max(1, workers):
            raise ValueError(
                f"loop.batch_size: got {self.loop.batch_size} for {self.num_workers} workers, expected a multiple of "
                "num_workers: each takes an equal slice"
            )


@dataclass(frozen=True)
class GenerateConfig(Sampling):
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: NonNegative = field(kw_only=True)
    batch_size: Count = field(kw_only=True)
    images_per_prompt: Count = field(kw_only=True)


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
    device: DeviceName = "auto"  # of every stage that computes with torch (raphael/base/devices.py)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig, metadata=LATER)
    file: str = field(default="params.yaml", compare=False)

    def training(self) -> Any:
        """train.settings, as the system's own dataclass. Raises ConfigError."""
        return load(find_system(self.model.system).training, self.train.settings, self.file, "train.settings")


MOVED = {("score", "distributor"): "pipeline.engine", ("score", "workers"): "pipeline.workers"}


def _refuse_moved(data: dict[str, Any], file: str | Path) -> None:
    """Raises ConfigError for settings that stand elsewhere since an earlier version: where."""
    for (section, key), now in MOVED.items():
        if isinstance(data.get(section), dict) and key in data[section]:
            raise ConfigError(
                f"{file}: {section}.{key}: got {data[section][key]!r}, expected {now} instead, of every stage "
                "whose work is dealt out"
            )


def load_config(path: str | Path = "params.yaml") -> Config:
    """Read and check params.yaml and the preset that it names. Raises ConfigError."""
    data = read_yaml(path)
    if "file" in data:
        raise ConfigError(f"{path}: unknown key file")
    _refuse_moved(data, path)
    refuse_misplaced(data, str(path), {item.name for item in fields(TrainConfig)})
    config = replace(load(Config, data, str(path)), file=str(path))
    try:
        system = find_system(config.model.system)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    config.training()
    system.check(config)
    config.model.load()
    if "pixels" in config.encode.fields and not config.autoencoder.is_pixels:
        raise ConfigError(
            f"{path}: encode.fields: got pixels with autoencoder.pretrained {config.autoencoder.pretrained!r}, "
            f"expected {PIXEL_AUTOENCODER!r} there, or moments in the place of pixels"
        )
    check_fields(config, system)
    return config
