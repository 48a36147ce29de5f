"""What all loaders of pretrained parts share: where a part lies, and what to say when it lies nowhere."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raphael.stage import StageError, read_json, write_json

POINTER = "pointer.json"  # a folder with this file stands for what lies elsewhere
HERE = "{here}"  # in a pointer's spec: the pointer's own folder, so that both move together
CONFIG = "config.json"
MAX_COPY_BYTES = 1 << 30  # larger weights are pointed at, not copied


class PretrainedError(StageError, ValueError):
    """A pretrained part cannot be loaded. One line: what was asked for, and which folder to put where."""


def follow(spec: str | Path) -> str:
    """The spec that a pointer folder names, or `spec` itself."""
    pointer = Path(spec) / POINTER
    if not pointer.is_file():
        return str(spec)
    data = read_json(pointer)
    if not isinstance(data, dict) or not isinstance(data.get("spec"), str):
        raise PretrainedError(f'{pointer}: got {json.dumps(data)[:100]}, expected {{"spec": "<folder or hub id>"}}')
    return data["spec"].replace(HERE, str(spec))


def pointed_facts(folder: str | Path) -> dict[str, Any]:
    """What a pointer says beside its spec; empty where the folder is none."""
    pointer = Path(folder) / POINTER
    return {name: value for name, value in read_json(pointer).items() if name != "spec"} if pointer.is_file() else {}


def write_pointer(folder: Path, spec: str, facts: dict[str, Any]) -> None:
    write_json(folder / POINTER, {"spec": spec, **facts})


def looks_like_path(spec: str) -> bool:
    """Whether a spec can only be a folder: a hub id is NAME or OWNER/NAME."""
    return spec.startswith((".", "/", "~")) or spec.count("/") > 1 or "\\" in spec


@contextlib.contextmanager
def one_line(what: str, spec: str, expected: str) -> Iterator[None]:
    """Turn a library's long message about a missing or unreachable part into one line.

    what: "the autoencoder"; expected: the files a local folder must hold.
    """
    if looks_like_path(spec) and not Path(spec).expanduser().is_dir():
        raise PretrainedError(f"{what}: got {spec!r}, which is no folder here; expected a folder with {expected}")
    try:
        yield
    except PretrainedError:
        raise
    except OSError as error:
        detail = " ".join(str(error).split())[:120]
        if Path(spec).is_dir():
            raise PretrainedError(f"{what}: {spec}: cannot be loaded ({detail}); expected {expected} in it") from None
        raise PretrainedError(
            f"{what}: {spec!r} is neither a folder here nor to be had from the hub ({detail}); where there is a "
            f"network, fetch it (hf download {spec} --local-dir DIR), then set `pretrained` to that folder, "
            f"which must hold {expected}"
        ) from None
    except (KeyError, RuntimeError, ValueError) as error:
        detail = " ".join(str(error).split())[:200]
        raise PretrainedError(f"{what}: {spec}: its files do not fit ({detail}); expected {expected}") from None


def size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
