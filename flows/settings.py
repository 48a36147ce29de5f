"""Changing params.yaml from outside, comments kept, and only ever to something that loads."""

from __future__ import annotations

import difflib
import io
import os
from pathlib import Path
from typing import Any

from raphael.config import Config, load_config
from raphael.strict import ConfigError, read_yaml


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
    """The text of params.yaml with the dotted keys of each overlay set. Raises ConfigError for unknown keys."""
    from ruamel.yaml import YAML

    read_yaml(params)  # for its messages
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    document = yaml.load(params.read_text(encoding="utf-8"))
    for overlay in overlays:
        for key, value in overlay.items():
            _set(document, key, value, params.name)
    text = io.StringIO()
    yaml.dump(document, text)
    return text.getvalue()


def flat(overlay: Path) -> dict[str, Any]:
    """An overlay file (params.debug.yaml) as dotted keys."""
    return _flatten(read_yaml(overlay), "")


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
            os.replace(draft, params)
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(draft), params.name)) from None
    finally:
        draft.unlink(missing_ok=True)
    return config


def _set(document: Any, key: str, value: Any, file: str) -> None:
    parent, place, last = document, document, ""
    for last in key.split("."):
        if not isinstance(place, dict) or last not in place:
            near = difflib.get_close_matches(last, list(place) if isinstance(place, dict) else [], n=1)
            raise ConfigError(f"{file}: unknown key {key}" + (f"; did you mean {near[0]} for {last}?" if near else ""))
        parent, place = place, place[last]
    if isinstance(place, dict) and not isinstance(value, dict):
        raise ConfigError(f"{file}: {key}: got {value!r}, expected a setting in it, such as {key}.{next(iter(place))}")
    if place != value or isinstance(place, bool) != isinstance(value, bool):  # True == 1
        parent[last] = value


def _flatten(data: dict[str, Any], prefix: str) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, value in data.items():
        key = f"{prefix}{name}"
        keys.update(_flatten(value, f"{key}.") if isinstance(value, dict) else {key: value})
    return keys
