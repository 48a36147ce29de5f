"""For each field of `Sampling` a value that is not its default, found from the field's type alone."""

from __future__ import annotations

import types
import typing
from dataclasses import Field
from typing import Any, Literal

from raphael.base.config.sampling import OF_SAMPLERS, Sampling


def with_another(field: Field) -> dict[str, Any]:
    """{field: another value}, with the sampler that the option belongs to where it is one's alone."""
    samplers = OF_SAMPLERS.get(field.name)
    return {field.name: _another(field)} | ({"sampler": samplers[0]} if samplers else {})


def _another(field: Field) -> Any:
    hint = typing.get_type_hints(Sampling)[field.name]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is Literal:
        return next(choice for choice in typing.get_args(hint) if choice not in (field.default, "auto"))
    if typing.get_origin(hint) is tuple:
        return (0.25, 0.75)
    return {int: 3, float: 0.5}[hint]
