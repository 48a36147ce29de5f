"""Strict loading of YAML into frozen dataclasses: a key that is unknown, missing, of another type or out of range is an
error that names the key, its file and what is accepted. Nothing is guessed, nothing is ignored."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

T = TypeVar("T")
LATER = {"later": True}  # metadata of a field that came after work was named by the others: see `to_dict`


class ConfigError(ValueError):
    """A setting is wrong. The message is one line: the key, its file, what was got, what is accepted."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both inclusive; put into `Annotated[float, Range(0, 1)]`."""

    low: float = float("-inf")
    high: float = float("inf")

    def __str__(self) -> str:
        if self.high == float("inf"):
            return f"at least {self.low:g}"
        if self.low == float("-inf"):
            return f"at most {self.high:g}"
        return f"from {self.low:g} to {self.high:g}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError where the file is missing, broken or no mapping."""
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; run from the project's root, or name the file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got {type(data).__name__}, expected a mapping of settings")
    return data


def load(cls: type[T], data: Any, file: str, key: str = "") -> T:
    """Build the frozen dataclass `cls` from a mapping.

    file, key: where the mapping comes from, for the messages ("params.yaml", "train.optimizer").
    Fields without a default must be present. Raises ConfigError.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: {key or 'the file'}: got {data!r}, expected a mapping of settings")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in data:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{file}: unknown key {_join(key, name)}{hint} (accepted: {', '.join(fields)})")
    hints = _type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], file, _join(key, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{file}: missing key {_join(key, name)} ({describe(hints[name])})")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:  # a __post_init__ that relates several fields
        raise ConfigError(f"{file}: {key or cls.__name__}: {error}") from None


def later(default: Any) -> Any:
    """A field that came after work was named by the others: `to_dict` names it where it differs from its default, so
    that checkpoints and unfinished work from before it keep their names."""
    return dataclasses.field(default=default, metadata=LATER)


def to_dict(instance: Any) -> dict[str, Any]:
    """The dataclass as plain mappings and lists, so that `load(cls, to_dict(x), ...) == x`.

    A field that is LATER is left out at its default: what was made and named before the field was there (work
    folders, checkpoints, reports) keeps its name. The default of such a field must never change.
    """
    values = ((field, getattr(instance, field.name)) for field in dataclasses.fields(instance))
    return {field.name: _plain(value) for field, value in values if not _left_out(field, value)}


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}, "c": [2], "d": {}} -> {"a.b": 1, "c": [2], "d": {}}: the names by which messages, overlays and
    runs know a setting."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        key = _join(prefix, name)
        flat |= flatten(value, key) if isinstance(value, dict) and value else {key: value}
    return flat


def describe(hint: Any) -> str:
    """What a setting accepts, in words."""
    base, bounds = _split(hint)
    origin = typing.get_origin(base)
    if origin is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(base)))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else describe(arg) for arg in typing.get_args(base))
    if origin is tuple:
        return f"a list of {describe(typing.get_args(base)[0])}"
    if origin is dict:
        return "a mapping"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    name = names.get(base, "a mapping of settings")
    return f"{name} {bounds}" if bounds else name


def _convert(hint: Any, value: Any, file: str, key: str) -> Any:
    base, bounds = _split(hint)
    origin = typing.get_origin(base)
    wrong = ConfigError(f"{file}: {key}: got {value!r}, expected {describe(hint)}")
    if base is Any:
        return value
    if dataclasses.is_dataclass(base):
        return load(base, value, file, key)
    if origin is Literal:
        if value not in typing.get_args(base) or isinstance(value, bool):
            raise wrong
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in typing.get_args(base):
            return None
        *others, last = [arg for arg in typing.get_args(base) if arg is not type(None)]
        for inner in others:
            with contextlib.suppress(ConfigError):
                return _convert(inner, value, file, key)
        try:
            return _convert(last, value, file, key)
        except ConfigError:
            if others:
                raise wrong from None
            raise
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong
        return tuple(_convert(typing.get_args(base)[0], item, file, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong
        item = typing.get_args(base)[1]
        return {str(name): _convert(item, entry, file, _join(key, name)) for name, entry in value.items()}
    if base is float and isinstance(value, str):
        value = _yaml_float(value, wrong)
    accepted = {float: (int, float), int: (int,), bool: (bool,), str: (str,)}[base]
    if not isinstance(value, accepted) or (isinstance(value, bool) and base is not bool):
        raise wrong
    value = base(value)
    if bounds and not bounds.low <= value <= bounds.high:  # NaN is out of every range
        raise wrong
    return value


def _yaml_float(value: str, wrong: ConfigError) -> float:
    try:
        return float(value)  # YAML 1.1 reads 1e-4 (no dot) as a text
    except ValueError:
        raise wrong from None


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _split(hint: Any) -> tuple[Any, Range | None]:
    if typing.get_origin(hint) is typing.Annotated:
        base, *extras = typing.get_args(hint)
        return base, next((extra for extra in extras if isinstance(extra, Range)), None)
    return hint, None


def _left_out(field: dataclasses.Field, value: Any) -> bool:
    if not field.metadata.get("later"):
        return False
    return value == (field.default if field.default_factory is dataclasses.MISSING else field.default_factory())


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)
