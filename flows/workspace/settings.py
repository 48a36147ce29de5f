"""Changing params.yaml from outside, comments kept, and only ever to something that loads."""

from __future__ import annotations

import dataclasses
import difflib
import io
import os
import typing
from pathlib import Path
from typing import Any

from raphael.base.config.params import Config, load_config
from raphael.base.config.systems import DEFAULT
from raphael.base.files import put
from raphael.base.strict import ConfigError, flatten, read_yaml

SYSTEM, OF_SYSTEM = "model.system", ("model", "train")  # the setting; the sections that have `settings` of its own


def apply(params: Path, changes: dict[str, Any]) -> Config:
    """Write `changes`, such as {"generate.seed": 1}, into params.yaml, as `dvc exp run -S` would; returns the settings.

    The result is checked first. Raises ConfigError, one line, and leaves the file alone where a key is unknown or a
    value is not accepted. Nothing is written where nothing changes.
    """
    before = load_config(params)
    if not changes:
        return before
    return write(params, merged(params, changes))


def merged(params: Path, *overlays: dict[str, Any]) -> str:
    """The text of params.yaml with the dotted keys of each overlay set. Raises ConfigError for unknown keys.

    With another system the settings that were the former one's own are gone (model.settings, train.settings).
    """
    from ruamel.yaml import YAML

    read_yaml(params)  # for its messages
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(float, _float)
    document = yaml.load(params.read_text(encoding="utf-8"))
    for overlay in overlays:
        if overlay.get(SYSTEM, now := system_in(document)) != now:
            for section in OF_SYSTEM:
                document.get(section, {}).pop("settings", None)
        for key, value in overlay.items():
            _set(document, key, value, params.name)
    text = io.StringIO()
    yaml.dump(document, text)
    return text.getvalue()


def system_in(document: dict[str, Any]) -> str:
    model = document.get("model")
    return model.get("system", DEFAULT) if isinstance(model, dict) else DEFAULT


def _float(representer: Any, value: float) -> Any:
    """5e-06 as 5.0e-06: without a dot YAML 1.1, which is how settings are read, takes it for a text."""
    text = repr(value)
    if "e" not in text or "." in text:
        return type(representer).represent_float(representer, value)
    return representer.represent_scalar("tag:yaml.org,2002:float", text.replace("e", ".0e"))


def flat(overlay: Path) -> dict[str, Any]:
    """An overlay file (params.debug.yaml) as dotted keys; a section with nothing in it changes nothing."""
    return {key: value for key, value in flatten(read_yaml(overlay)).items() if value != {}}


def parse(assignments: list[str]) -> dict[str, Any]:
    """["generate.seed=1"] as {"generate.seed": 1}; values are YAML. Raises ConfigError."""
    import yaml

    changes = {}
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        if not sign or not key:
            raise ConfigError(f"got {assignment!r}, expected KEY=VALUE such as generate.seed=1")
        changes[key] = yaml.safe_load(value) if value else ""
    return changes


def write(params: Path, text: str) -> Config:
    """Put `text` in the place of params.yaml, whole and only if it loads. Raises ConfigError."""
    draft = params.with_name(f".{params.stem}.{os.getpid()}.yaml")
    draft.write_text(text, encoding="utf-8")
    try:
        config = load_config(draft)
        if not params.exists() or params.read_text(encoding="utf-8") != text:
            put(draft, params)
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(draft), params.name)) from None
    finally:
        draft.unlink(missing_ok=True)
    return config


def _set(document: Any, key: str, value: Any, file: str) -> None:
    parent, place, last = document, document, ""
    *above, final = key.split(".")
    if (free := free_mapping(key)) and free != key:  # whoever reads the mapping checks what is in it
        for last in key.split(".")[:-1]:
            place = place.setdefault(last, {})
        if final not in place or _differ(place[final], value):
            place[final] = value
        return
    for end, last in enumerate(key.split("."), 1):
        if (
            end <= len(above)
            and isinstance(place, dict)
            and last not in place
            and may_be_left_out(".".join(above[:end]))
        ):
            place[last] = {}
        if last == final and isinstance(place, dict) and last not in place and may_be_left_out(key):
            place[last] = value
            return
        if not isinstance(place, dict) or last not in place:
            raise ConfigError(f"{file}: unknown key {key}{_nearest(key, last, place, document)}")
        parent, place = place, place[last]
    if isinstance(place, dict) and not isinstance(value, dict):
        raise ConfigError(f"{file}: {key}: got {value!r}, expected a setting in it, such as {key}.{next(iter(place))}")
    if _differ(place, value):
        parent[last] = value


def _differ(one: Any, other: Any) -> bool:
    return one != other or isinstance(one, bool) != isinstance(other, bool)  # True == 1


def _nearest(key: str, last: str, place: Any, document: Any) -> str:
    """What may be meant where `last` of a dotted key is not in `place`: its like there, or the same name elsewhere."""
    section, final = key.split(".")[0], key.split(".")[-1]
    known = flatten(document.get(section, {}), section)
    if same := [name for name in known if name.split(".")[-1] == final]:
        return f"; did you mean {same[0]}?"
    near = difflib.get_close_matches(last, list(place) if isinstance(place, dict) else [], n=1)
    return f"; did you mean {near[0]} for {last}?" if near else ""


def may_be_left_out(key: str, settings: type = Config) -> bool:
    """Whether a dotted key names a setting with a default, which params.yaml need not hold."""
    *sections, last = key.split(".")
    for name in sections:
        settings = typing.get_type_hints(settings).get(name, object)
        if not dataclasses.is_dataclass(settings):
            return False
    fields = {field.name: field for field in dataclasses.fields(settings)}
    missing = dataclasses.MISSING
    return last in fields and (fields[last].default, fields[last].default_factory) != (missing, missing)


def free_mapping(key: str, settings: Any = Config) -> str:
    """The beginning of a dotted key that names a mapping without fields of its own (model.settings); "" without one."""
    names = key.split(".")
    for end, name in enumerate(names, 1):
        settings = typing.get_type_hints(settings).get(name, object)
        if typing.get_origin(settings) is dict:
            return ".".join(names[:end])
        if not dataclasses.is_dataclass(settings):
            return ""
    return ""
