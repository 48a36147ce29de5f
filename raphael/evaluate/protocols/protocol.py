"""What a number was measured by: versioned protocols in protocols/*.yaml, read strictly. A published one never changes;
another caption rule, size or minimum is another version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from raphael.base.stage import StageError, read_json
from raphael.base.strict import ConfigError, Range, load, read_yaml
from raphael.evaluate.catalogue import METRICS, metrics_named, nearest
from raphael.evaluate.features.image_folder import ENDINGS, Preparation
from raphael.evaluate.subject import REFERENCE, Kid, Rules

FOLDER = Path(__file__).parent
SYSTEMS = Path(__file__).parents[2] / "systems"  # each has the protocol of its evaluation in evaluate.yaml
GENERATE_ALL = "raphael prompts --protocol {} --source FILE --out P.json, raphael generate --prompts P.json --out ..."
AGAINST_REFERENCE = {metric.name for metric in METRICS if REFERENCE in metric.needs}


@dataclass(frozen=True)
class Captions:
    """Which prompts images are generated of (prompts.py). list_sha256: of the prompts and seeds; "": not fixed yet."""

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
class ImageRules:
    """crop, size_px: raphael/evaluate/features/image_folder.py. only_size_px: other sizes are refused (0: any is
    taken)."""

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
    """rule: image i is generated from base + i, from its row of the prompt table, or from anything."""

    rule: Literal["base + index", "column", "any"]
    base: int = 0


@dataclass(frozen=True)
class Protocol:
    name: str
    version: str
    about: str
    captions: Captions
    pictures: ImageRules
    seeds: Seeds
    min_images: Annotated[int, Range(1)]
    min_reference: Annotated[int, Range(0)]  # 0: there is no reference set
    reference: str  # in words: which images stand on the other side
    networks: tuple[Literal["inception", "clip", "random"], ...]  # that must be given; empty: at least one of any kind
    settings_required: bool  # guidance, sampler, steps and weights must be known
    metrics: tuple[str, ...]  # of raphael/evaluate/catalogue.py
    clip_prefix: str = ""  # before every prompt of the CLIP score
    clip_norm: Literal["float32", "float64"] = "float64"  # digits to which its embeddings are of unit norm
    kid: Kid = field(default_factory=Kid)

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ValueError("metrics: got none, expected at least one")
        try:
            metrics_named(self.metrics, "metrics")
        except ConfigError as error:
            raise ValueError(str(error)) from None
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
    def rules(self) -> Rules:
        return Rules(self.clip_prefix, self.clip_norm, self.kid)

    def with_metrics(self, names: Sequence[str], where: str) -> Protocol:
        """The protocol with metrics measured beside its own. Raises ConfigError for a name that is none; where: what
        the message calls the place."""
        more = [metric for metric in metrics_named(names, where) if metric.name not in self.metrics]
        if against := [metric.name for metric in more if REFERENCE in metric.needs and not self.needs_reference]:
            raise ConfigError(f"{where}: {against[0]} needs reference images, and {self.identity} has none")
        return replace(self, metrics=(*self.metrics, *(metric.name for metric in more)))

    @property
    def needs_reference(self) -> bool:
        return self.min_reference > 0

    def check_counts(self, generated: int, reference: int) -> None:
        """Raises StageError below a minimum: small sets inflate every distance, so there is no number for them."""
        if self.captions.count and generated > self.captions.count:
            raise StageError(f"{self.identity}: got {generated:,} images, expected exactly {self.captions.count:,}")
        for what, got, least in (("images", generated, self.min_images), ("references", reference, self.min_reference)):
            if got < least:
                advice = "distances of few images are not comparable: generate more, or take a protocol for fewer "
                advice += "(fid-5k/v1, pair-debug/v1)"
                if not self.needs_reference and self.captions.kind in ("table", "product"):
                    advice = f"generate all of its prompts: {GENERATE_ALL.format(self.identity)}"
                raise StageError(f"{self.identity}: got {got:,} {what}, expected at least {least:,}; {advice}")


def protocol_names() -> list[str]:
    return sorted(path.stem.replace("--", "/") for path in FOLDER.glob("*.yaml"))


def load_protocol(name: str, folder: Path = FOLDER, where: str = "--protocol") -> Protocol:
    """name: "coco2014-val-30k/v1", in the file coco2014-val-30k--v1.yaml. where: who asks. Raises ConfigError."""
    path = folder / f"{name.replace('/', '--')}.yaml"
    if name.count("/") != 1 or "\\" in name or ".." in name or not path.is_file():
        raise ConfigError(f"{where}: got {name!r}, {nearest(name, protocol_names())}")
    protocol = load(Protocol, read_yaml(path), path.name)
    if protocol.identity != name:
        raise ConfigError(f"{path.name}: calls itself {protocol.identity}, expected {name}")
    return protocol


def meta_of(model: Path) -> dict[str, Any]:
    """A model's meta.json; {} of a folder without one: images can be measured without their model."""
    file = model / "meta.json"
    return read_json(file) if file.is_file() else {}


def sweep_protocol(system: str, systems: Path = SYSTEMS) -> Protocol:
    """By which a sweep measures the points of a system's models: systems/<system>/sweep.yaml, else sweep/v1."""
    path = systems / system / "sweep.yaml"
    return load(Protocol, read_yaml(path), f"{system}/sweep.yaml") if path.is_file() else load_protocol("sweep/v1")


def system_protocol(system: str, systems: Path = SYSTEMS) -> Protocol:
    """By which the stage evaluate measures a system's images: systems/<system>/evaluate.yaml. Raises ConfigError."""
    path = systems / system / "evaluate.yaml"
    if not system.isidentifier() or not path.is_file():
        known = sorted(file.parent.name for file in systems.glob("*/evaluate.yaml"))
        raise ConfigError(f"system: got {system!r} without an evaluate.yaml, {nearest(system, known)}")
    return load(Protocol, read_yaml(path), f"{system}/evaluate.yaml")
