"""The systems: each a package that puts the layers below together, and says what it is in its system.py. What several
share stands beside their packages."""

from __future__ import annotations

import difflib
import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from raphael.base.strict import ConfigError

if TYPE_CHECKING:
    from raphael.base.config.systems import System

SYSTEMS = ("raphael", "ddpm", "imagen", "glide")  # packages here


def find(name: str, key: str = "model.system") -> System:
    """A system by its name. Raises ConfigError that lists them. key: the setting or option that names it."""
    return module_of(name, "system", key).SYSTEM


def module_of(name: str, module: str, key: str = "model.system") -> ModuleType:
    """A module of a system's package, imported now. Raises ConfigError for an unknown system."""
    if name not in SYSTEMS:
        near = difflib.get_close_matches(str(name), SYSTEMS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}: got {name!r}, expected one of {', '.join(SYSTEMS)}{hint}")
    return importlib.import_module(f"{__name__}.{name}.{module}")
