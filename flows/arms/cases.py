"""A case of a study: one arm with one seed of training, in a workspace of its own that shares the study's DVC cache."""

from __future__ import annotations

import typing
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flows.workspace import settings
from raphael.base.config.preset import load_preset
from raphael.base.config.systems import find_system
from raphael.base.strict import ConfigError, load, to_dict
from raphael.evaluate.catalogue import nearest


@dataclass(frozen=True)
class Case:
    arm: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}"


def network_changes(system: str, changes: Iterable[str], where: str) -> dict[str, Any]:
    """FIELD=VALUE of `unet` as settings of a system without presets. Raises ConfigError for unknown fields."""
    if not (parsed := settings.parse(list(changes))):
        return {}
    kind = typing.get_type_hints(find_system(system).settings).get("unet")
    if kind is None:
        raise ConfigError(f"{where}: got {', '.join(parsed)}, expected none: {system} has no unet")
    refuse_unknown(where, parsed, {field.name for field in fields(kind)})
    return {f"model.settings.unet.{name}": value for name, value in parsed.items()}


def preset_text(system: str, preset: str, changes: Iterable[str], where: str) -> str:
    """A preset with changes of `unet`, FIELD=VALUE, as a file. Raises ConfigError where it would not load."""
    import yaml

    loaded, parsed = load_preset(preset, find_system(system).settings), settings.parse(list(changes))
    refuse_unknown(where, parsed, {field.name for field in fields(loaded.unet)})
    data = to_dict(loaded)
    data["unet"] |= parsed
    changed = replace(loaded, unet=load(type(loaded.unet), data["unet"], where.removesuffix(".unet"), "unet"))
    return yaml.safe_dump(to_dict(changed), sort_keys=False)


def put_preset(folder: Path, preset: str, text: str) -> None:
    """DVC depends on the preset's file by its name, whose text is the arm's in the arm's workspace. "": as it is."""
    file = folder / "raphael" / "presets" / f"{preset}.yaml"
    if text and file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


def refuse_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(f"{where}: unknown field {unknown[0]}, {nearest(unknown[0], known)}")
