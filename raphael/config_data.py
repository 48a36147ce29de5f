"""The settings of data_pipeline's stages: sections of params.yaml from `source` to `picture` (raphael/config.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from raphael.preset import Count, Positive, Share
from raphael.strict import Range

NonNegative = Annotated[int, Range(0)]
Score = Annotated[float, Range(-100, 100)]


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
    unique_urls: bool  # the first row of each url alone
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
    rehearsal: str  # a folder of photographs that answers for every link, as the web does; "": the web itself
    min_success_share: Share  # below this the stage stops: the list or the network is broken


@dataclass(frozen=True)
class ScoreConfig:
    """Which scores are computed from the downloaded pictures, where the list lacks them."""

    aesthetic: str  # a V1 linear or V2 MLP head on `clip`'s embeddings; "": not computed
    watermark: str  # a detector made by data_pipeline.watermark_model; "": not computed
    unsafe: str  # a head of the same forms whose output is a logit; "": not computed
    similarity: bool  # of picture and caption, by `clip`
    clip: str  # open_clip:<arch>:<weights>, clip:<folder or hub id>, or a folder; "" where nothing needs it
    replace: bool  # true: instead of the list's scores, not only where it has none
    batch_size: Count
    distributor: Literal["local", "ray"]  # ray: Ray Data, one set of models in each worker, on GPUs if there are any
    workers: Count  # of ray

    @property
    def computed(self) -> tuple[str, ...]:
        """The scores that are computed, by their names in data_pipeline/schema.py."""
        wanted = {name: getattr(self, name) for name in ("similarity", "unsafe", "watermark", "aesthetic")}
        return tuple(name for name, value in wanted.items() if value)

    def __post_init__(self) -> None:
        needing = [name for name in self.computed if name != "watermark"]
        if needing and not self.clip:
            raise ValueError(f"clip: got '', expected a CLIP: {', '.join(needing)} are computed from its embeddings")


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
    near_duplicate_bits: Annotated[int, Range(0, 15)]  # of 64 of a perceptual hash that may differ; 0: not looked for
    evaluation_pictures: str  # a folder: pictures that look like one in it are left out; "": none
    opt_out: str  # a text file of urls, domains and hashes that are left out (data_pipeline/opt_out.py); "": none


@dataclass(frozen=True)
class CaptionsConfig:
    min_chars: NonNegative
    max_chars: Count


@dataclass(frozen=True)
class PictureConfig:
    """What the networks see. A picture goes to the size nearest in aspect ratio, is scaled to cover it and cropped to
    its middle (data_pipeline/buckets.py). The first size is that of pictures drawn without asking for another."""

    sizes_px: tuple[tuple[int, ...], ...]  # buckets, [height, width] each

    @property
    def height_px(self) -> int:
        """Of the first size."""
        return self.sizes_px[0][0]

    @property
    def width_px(self) -> int:
        return self.sizes_px[0][1]

    def __post_init__(self) -> None:
        if not self.sizes_px:
            raise ValueError("sizes_px: got an empty list, expected at least one [height, width]")
        for size in self.sizes_px:
            if len(size) != 2 or min(size) < 8:
                raise ValueError(f"sizes_px: got {list(size)}, expected [height, width], at least 8 px each")
        for index, (height, width) in enumerate(self.sizes_px):
            for other_height, other_width in self.sizes_px[:index]:
                if height * other_width == width * other_height:  # the later one would never get a picture
                    raise ValueError(
                        f"sizes_px: got {[other_height, other_width]} and {[height, width]}, of one aspect ratio, "
                        "expected one size for each"
                    )
