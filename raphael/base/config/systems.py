"""What the ground floor knows of a system: its name, its settings, its parts. The systems themselves stand above, in
raphael/systems, and are asked by name when settings are read."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from raphael.base.config.studied import Studied
from raphael.base.strict import ConfigError

Config = Any  # of params.py, which asks here

Field = str | tuple[str, ...]  # of records; of a tuple any one is enough
DEFAULT = "raphael"  # of settings and checkpoints that name none: they are from before there were several


@dataclass(frozen=True)
class Part:
    """One training of a system, by the one loop.

    share: of train.loop.num_images. needs: parts that must be trained before it. losses: of its objective, in the
    order in which a person reads them. network: the objective's module that is exported.
    """

    name: str
    share: float = 1.0
    needs: tuple[str, ...] = ()
    losses: tuple[str, ...] = ("loss",)
    network: str = "unet"


@dataclass(frozen=True)
class NoSettings:
    """Of a system whose training has nothing to set but the loop."""


@dataclass(frozen=True)
class System:
    """A named composition of the layers. Data alone, so that it is there at once; what it does stands beside it:

    raphael/systems/NAME/training.py   `training(job) -> Training` of a part (raphael/systems/job.py), `identity`,
                                       `described`
    raphael/systems/NAME/pipeline.py   PIPELINE, the class that generates (raphael/systems/pipeline.py)
    raphael/systems/NAME/evaluate.yaml, sweep.yaml, report.yaml   by what its images and the points of its sweeps are
                                       measured, and what the report shows of it

    settings: the dataclass of what model.preset and model.settings say: the network. training: that of train.settings:
    how it is trained, beside the loop. check: what it asks of the settings together; raises ConfigError.
    inputs: what its training reads in a workspace, beside the records. fields: what these must hold, of a tuple any
    one; more_fields: what besides, by these settings. carries: what the trained model takes along, name -> its place in
    the workspace. parts: in their order. extra: parts that are trained only where train.settings.extra names them;
    their shares are beside those of the others. guides: kinds of raphael/systems/guides that `make demo PARTS=all`
    trains beside the model.
    asked: what `raphael generate` is given, as an example.
    prompts(meta, listed): what the stage generate asks a model with this meta.json for, of data/source/prompts.json.
    reported(last): the last point of the losses, as reports/train.json shows it.
    tuned(settings, side_px): of train.settings what is another than in params.yaml for a training that begins from a
    model with these settings, on images whose longer side is side_px.
    studied: what sweeps may vary of its models. imported: settings of the network, with what they may be, that
    `raphael import` of another program's weights may set otherwise than the preset.
    told: what a prompt is: a caption, or the name of a class.
    """

    name: str
    about: str
    settings: type
    check: Callable[[Config], None]
    fields: tuple[Field, ...]
    inputs: tuple[str, ...]
    parts: tuple[Part, ...]
    training: type = NoSettings
    carries: dict[str, str] = field(default_factory=dict)
    asked: str = "a red circle"
    more_fields: Callable[[Config], tuple[Field, ...]] = lambda config: ()
    prompts: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = lambda meta, listed: listed
    reported: Callable[[dict[str, float]], dict[str, Any]] = lambda last: {"final": last}
    tuned: Callable[[Any, int], dict[str, Any]] = lambda settings, side_px: {}
    studied: Studied = field(default_factory=Studied)
    imported: dict[str, tuple[str, ...]] = field(default_factory=dict)
    extra: tuple[Part, ...] = ()
    guides: tuple[str, ...] = ()
    told: Literal["captions", "labels"] = "captions"

    def __post_init__(self) -> None:
        names = [part.name for part in (*self.parts, *self.extra)]
        assert self.parts and len(set(names)) == len(names), f"{self.name}: parts {names}"
        for at, part in enumerate((*self.parts, *self.extra)):
            assert set(part.needs) <= set(names[:at]), f"{self.name}: {part.name} needs {part.needs}, which come later"
        assert abs(sum(part.share for part in self.parts) - 1) < 1e-9, f"{self.name}: shares of the parts"

    def needs(self, config: Config) -> tuple[Field, ...]:
        """The fields of the records that a training by these settings reads."""
        return (*self.fields, *self.more_fields(config))

    def part(self, name: str) -> Part:
        return next(part for part in (*self.parts, *self.extra) if part.name == name)

    def trained(self, config: Config) -> tuple[Part, ...]:
        """The parts that a training by these settings has, in their order."""
        asked = getattr(config.training(), "extra", ()) if self.extra else ()
        return (*self.parts, *(part for part in self.extra if part.name in asked))


def find_system(name: str, key: str = "model.system") -> System:
    """The system of that name. Raises ConfigError that lists them, the nearest first said. key: who asks."""
    # upwards, as a plugin is looked up: the list of systems is theirs, this is the one place that asks from below
    return importlib.import_module("raphael.systems").find(name, key)


def refuse_misplaced(data: dict[str, Any], file: str, shared: set[str]) -> None:
    """Raises ConfigError for a setting of a system's training that stands in the wrong place, or with a system that
    does not read it: which system's it is, and what to do. data: of params.yaml. shared: the keys of `train` itself."""
    places = {"train": data.get("train"), "train.settings": None, "model.settings": None}
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(places["train"], dict):
        return  # the loading says what is wrong
    places |= {"train.settings": places["train"].get("settings"), "model.settings": model.get("settings")}
    systems, name = importlib.import_module("raphael.systems"), model.get("system", DEFAULT)
    if name not in systems.SYSTEMS:
        return
    mine = find_system(name)
    known = {"train": shared, "train.settings": _names(mine.training), "model.settings": _names(mine.settings)}
    owners = {other: _names(find_system(other).training) for other in systems.SYSTEMS}
    for place, found in places.items():
        for key in found if isinstance(found, dict) else ():
            of = [other for other, keys in owners.items() if key in keys]
            if key in known[place] or not of:
                continue
            what = f"{file}: {place}.{key}: a setting of the training of {' and '.join(of)}"
            if name in of:
                raise ConfigError(f"{what}, expected in train.settings: write train.settings.{key}")
            hint = "" if places["model.settings"] else f"; make demo SYSTEM={name} takes params.{name}.yaml"
            raise ConfigError(f"{what}, which the system {name} does not read: take it out (model.system {name}){hint}")


def _names(settings: type) -> set[str]:
    return {item.name for item in fields(settings)}


def system_of(meta: dict[str, Any]) -> str:
    """Which system made a checkpoint with this meta.json."""
    return str(meta.get("system", DEFAULT))


def expect_system(meta: dict[str, Any], where: str | Path, name: str = DEFAULT) -> None:
    """Raises ConfigError where the checkpoint with this meta.json is another system's: which, and how to use it."""
    if (found := system_of(meta)) != name:
        asked = find_system(found, f"{where}: meta.json: system").asked
        raise ConfigError(
            f"{where}: got a checkpoint of the system {found}, expected one of {name}; it generates: raphael generate "
            f'"{asked}" --checkpoint {where}'
        )


def check_fields(config: Config, system: System) -> None:
    """Raises ConfigError where encode.fields lacks what the system trains on."""
    said = config.encode.fields
    either = [(need,) if isinstance(need, str) else need for need in system.needs(config)]
    if absent := [names for names in either if not set(names) & set(said)]:
        words = ", ".join(" or ".join(names) for names in absent)
        whole = ", ".join([*said, *(names[0] for names in absent)])
        raise ConfigError(
            f"{config.file}: encode.fields: got {list(said)} with model.system {system.name}, expected {words} too: it "
            f"trains on them; set encode.fields: [{whole}]"
        )


def check_sizes(config: Config, unet_multiple: int) -> None:
    """Every side must survive the halvings of the autoencoder and of the U-Net. Raises ConfigError.

    A pretrained autoencoder's factor is known where it is loaded: stages check it there.
    """
    factor = 1 if config.autoencoder.pretrained else 2 ** (len(config.autoencoder.channels) - 1)
    multiple = factor * unet_multiple
    for size in config.picture.sizes_px:
        if any(side % multiple for side in size):
            raise ConfigError(
                f"{config.file}: picture.sizes_px: got {list(size)}, expected multiples of {multiple} "
                f"(autoencoder {factor} x U-Net {unet_multiple})"
            )
