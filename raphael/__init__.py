"""An open RAPHAEL: the models, and everything that is true of them without a cluster.

`from raphael import RaphaelPipeline` is what diffusers' users begin with; `import raphael` alone loads nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

DOORS = {"RaphaelPipeline": "generate.pipeline"}  # name -> module; by name, since no layer below may import this one


def __getattr__(name: str) -> Any:
    if name not in DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{DOORS[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *DOORS])
