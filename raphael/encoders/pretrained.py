"""What all loaders of pretrained parts share: where a part lies, and what to say when it lies nowhere."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

from raphael.base.config.consent import COMMIT, REVISION, is_of_settings, remote_is_allowed
from raphael.base.config.params import NO_TEXT, PIXEL_AUTOENCODER
from raphael.base.stage import StageError, read_json, write_json

POINTER = "pointer.json"  # a folder with this file stands for what lies elsewhere
HERE = "{here}"  # in a pointer's spec: the pointer's own folder, so that both move together
CONFIG = "config.json"
_NO_FIT = (KeyError, RuntimeError, ValueError, TypeError, AttributeError)
_NO_WEIGHTS = (EOFError, UnpicklingError, SafetensorError)
MAX_COPY_BYTES = 1 << 30  # larger weights are pointed at, not copied


class PretrainedError(StageError, ValueError):
    """A pretrained part cannot be loaded. One line: what was asked for, and which folder to put where."""


def follow(spec: str | Path) -> str:
    """The spec that a pointer folder names, or `spec` itself.

    Raises PretrainedError for a pointer that leads out of its folder, unless the settings name the same or the user
    said --allow-remote; of the hub then only a pinned commit. A folder from a stranger decides nothing else.
    """
    pointer = Path(spec) / POINTER
    if not pointer.is_file():
        return str(spec)
    data = read_json(pointer)
    if not isinstance(data, dict) or not isinstance(data.get("spec"), str):
        raise PretrainedError(f'{pointer}: got {json.dumps(data)[:100]}, expected {{"spec": "<folder or hub id>"}}')
    target = data["spec"].replace(HERE, str(spec))
    if target not in (NO_TEXT, PIXEL_AUTOENCODER) and not is_of_settings(target):
        _refuse_stranger(pointer, target)
    return target


def _refuse_stranger(pointer: Path, target: str) -> None:
    kind, _, place = target.partition(":")
    if kind == "open_clip":
        place = place.partition(":")[2]
    elif kind not in ("clip", "t5"):
        kind, place = "", target
    path = Path(place).expanduser()
    is_here = path.exists() or looks_like_path(place)
    if is_here and path.resolve().is_relative_to(pointer.parent.resolve()):
        if path.is_file() and path.suffix != ".safetensors":
            raise PretrainedError(f"{pointer}: got {path.name}, expected weights in .safetensors: nothing else is read")
        return
    where = "a place outside this folder" if is_here else "the hub"
    if not remote_is_allowed():
        raise PretrainedError(
            f"{pointer}: leads to {where}, {target!r}: refused, since who made the folder chose it; if you trust that, "
            "say --allow-remote (in Python: RAPHAEL_ALLOW_REMOTE=1)"
        )
    # A tag is of open_clip's own table, which names no repository of a stranger's
    if not is_here and kind != "open_clip" and not (split_revision(place)[1]):
        raise PretrainedError(
            f"{pointer}: got {target!r}, expected {target.partition(REVISION)[0]}{REVISION}<commit>, 40 hexadecimal "
            "digits: without them it is whatever its owner puts there; write the commit that you have looked at there"
        )


def split_revision(where: str) -> tuple[str, str | None]:
    """owner/name@<commit> -> (owner/name, commit); a folder, or a hub id without a commit -> (itself, None)."""
    name, _, commit = where.rpartition(REVISION)
    return (name, commit) if COMMIT.fullmatch(commit) and not Path(where).exists() else (where, None)


def pinned(spec: str, commit: str | None) -> str:
    """The spec at the commit that was loaded; as it is where it has none, or has one already."""
    return f"{spec}{REVISION}{commit}" if commit and REVISION not in spec else spec


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
    except (*_NO_FIT, *_NO_WEIGHTS) as error:
        detail = " ".join(str(error).split())[:200]
        raise PretrainedError(f"{what}: {spec}: its files do not fit ({detail}); expected {expected}") from None


def size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
