"""What a number was measured by: versioned protocols in protocols/*.yaml, read strictly. A published one never changes;
another caption rule, size or minimum is another version."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from raphael.evaluate.picture_folder import ENDINGS, Preparation
from raphael.stage import StageError
from raphael.strict import ConfigError, Range, load, read_yaml

FOLDER = Path(__file__).parent / "protocols"
Metric = Literal["frechet", "kid", "precision_recall", "density_coverage", "cmmd", "clip_score", "scenes"]
DRAW_LIST = "raphael prompts --protocol {} --source FILE --out P.json, raphael generate --prompts P.json --out ..."
AGAINST_REFERENCE = {"frechet", "kid", "precision_recall", "density_coverage", "cmmd"}


@dataclass(frozen=True)
class Captions:
    """Which prompts are drawn (prompts.py). list_sha256: of the prompts and seeds; "": not fixed yet."""

    kind: Literal["any", "coco_annotations", "table", "product", "scenes"]
    rule: str  # in words
    count: Annotated[int, Range(0)] = 0  # 0: as many as there are
    draw_seed: int = 0  # of coco_annotations: which images
    separator: Literal["comma", "tab"] = "comma"
    prompt_column: str = "prompt"
    id_column: str = ""
    seed_column: str = ""
    category_column: str = ""
    styles: tuple[str, ...] = ()  # of product: "{subject}" stands for the subject
    subjects: tuple[str, ...] = ()
    list_sha256: str = ""


@dataclass(frozen=True)
class Pictures:
    """crop, size_px: raphael/evaluate/picture_folder.py. only_size_px: other sizes are refused (0: any is taken)."""

    crop: Literal["centre", "none"]
    size_px: Annotated[int, Range(0)]
    drawn: tuple[str, ...] = (".png",)  # endings; JPEG moves FID more than many a model
    reference: tuple[str, ...] = ENDINGS
    only_size_px: Annotated[int, Range(0)] = 0

    @property
    def preparation(self) -> Preparation:
        return Preparation(self.crop, self.size_px)


@dataclass(frozen=True)
class Seeds:
    """rule: picture i is drawn from base + i, from its row of the prompt table, or from anything."""

    rule: Literal["base + index", "column", "any"]
    base: int = 0


@dataclass(frozen=True)
class Kid:
    subsets: Annotated[int, Range(1)] = 100
    subset_size: Annotated[int, Range(2)] = 1000  # or the smaller set, where that is less
    seed: int = 2020


@dataclass(frozen=True)
class Protocol:
    name: str
    version: str
    about: str
    captions: Captions
    pictures: Pictures
    seeds: Seeds
    min_images: Annotated[int, Range(1)]
    min_reference: Annotated[int, Range(0)]  # 0: there is no reference set
    reference: str  # in words: which pictures stand on the other side
    networks: tuple[Literal["inception", "clip"], ...]  # that must be given; empty: at least one of any kind
    settings_required: bool  # guidance, sampler, steps and weights must be known
    metrics: tuple[Metric, ...]
    clip_prefix: str = ""  # before every prompt of the CLIP score
    kid: Kid = field(default_factory=Kid)

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ValueError("metrics: got none, expected at least one")
        if bool(AGAINST_REFERENCE & set(self.metrics)) != bool(self.min_reference):
            raise ValueError("min_reference and the metrics disagree on whether there is a reference set")
        if self.captions.count and self.captions.count < self.min_images:
            raise ValueError(f"got {self.captions.count} prompts and min_images {self.min_images}, expected enough")
        if self.captions.kind == "product" and not (self.captions.styles and self.captions.subjects):
            raise ValueError("captions: kind product needs styles and subjects")

    @property
    def identity(self) -> str:
        return f"{self.name}/{self.version}"

    @property
    def needs_reference(self) -> bool:
        return self.min_reference > 0

    def check_counts(self, drawn: int, reference: int) -> None:
        """Raises StageError below a minimum: small sets inflate every distance, so there is no number for them."""
        if self.captions.count and drawn > self.captions.count:
            raise StageError(f"{self.identity}: got {drawn:,} pictures, expected exactly {self.captions.count:,}")
        for what, got, least in (("pictures", drawn, self.min_images), ("references", reference, self.min_reference)):
            if got < least:
                advice = "distances of few pictures are not comparable: draw more, or take a protocol for fewer "
                advice += "(fid-5k/v1, pair-debug/v1)"
                if not self.needs_reference and self.captions.kind in ("table", "product"):
                    advice = f"draw all of its prompts: {DRAW_LIST.format(self.identity)}"
                raise StageError(f"{self.identity}: got {got:,} {what}, expected at least {least:,}; {advice}")


def protocol_names() -> list[str]:
    return sorted(path.stem.replace("--", "/") for path in FOLDER.glob("*.yaml"))


def load_protocol(name: str, folder: Path = FOLDER) -> Protocol:
    """name: "coco2014-val-30k/v1", in the file coco2014-val-30k--v1.yaml. Raises ConfigError, one line."""
    path = folder / f"{name.replace('/', '--')}.yaml"
    if name.count("/") != 1 or "\\" in name or ".." in name or not path.is_file():
        raise ConfigError(f"--protocol: got {name!r}, expected one of {', '.join(protocol_names())}")
    protocol = load(Protocol, read_yaml(path), path.name)
    if protocol.identity != name:
        raise ConfigError(f"{path.name}: calls itself {protocol.identity}, expected {name}")
    return protocol
