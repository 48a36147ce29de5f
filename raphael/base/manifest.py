"""A manifest says what a folder must hold: every file with its size and sha256, and the facts that belong to them.

safetensors, .npy and plain binary files give back a flipped bit without a word; a hash per file, checked when the
folder is opened, finds it. The manifest is written last, so that a folder without one is unfinished, and it carries
its own hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from raphael.base.files import file_sha256, fsync, written_whole
from raphael.base.stage import StageError

NAME = "manifest.json"


class ManifestError(StageError, ValueError):
    """A folder does not hold what its manifest says. One line: the file, got, expected, what to do."""


def write_manifest(
    folder: Path, form: str, files: list[str], facts: dict[str, Any], known: dict[str, dict[str, Any]] | None = None
) -> str:
    """Hash `files` of `folder` and write manifest.json to disk, the last step of finishing a folder. Returns its
    sha256.

    form: name and version of the format, such as "raphael-records/1". known: entries of further files, as
    `file_entry` made them.
    """
    entries = {**{name: file_entry(folder / name) for name in files}, **(known or {})}
    content = {"format": form, "files": entries, "facts": facts}
    sha256 = _sha256(content)
    with written_whole(folder / NAME) as temporary:
        temporary.write_bytes(_canonical({"sha256": sha256, **content}))
    return sha256


def file_entry(path: Path) -> dict[str, Any]:
    """Bring a file to disk; what a manifest says of it: {"bytes", "sha256"}."""
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def read_manifest(folder: str | Path, form: str) -> dict[str, Any]:
    """The manifest of a finished folder, itself verified: keys sha256, format, files, facts. Raises ManifestError."""
    path = Path(folder) / NAME
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw)
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestError(
            f"{path}: no such file: {folder} is absent or unfinished; run what makes it again"
        ) from None
    except (ValueError, RecursionError):  # JSON and UTF-8 errors; brackets in brackets
        raise ManifestError(f"{path}: damaged (not valid JSON); restore it or run what makes it again") from None
    content = (
        {name: value for name, value in manifest.items() if name != "sha256"} if isinstance(manifest, dict) else {}
    )
    # The hash is of the bytes without the last entry, itself, so that a flipped bit in white space is seen, and nothing
    # is written anew to be compared: at ten million records that took longer than all other parts of opening them.
    said = manifest.get("sha256") if isinstance(manifest, dict) else None
    ending = f',\n "sha256": "{said}"\n}}\n'.encode()
    if (
        set(content) != {"format", "files", "facts"}
        or not isinstance(content["files"], dict)
        or not isinstance(content["facts"], dict)
        or not raw.endswith(ending)
        or hashlib.sha256(raw.removesuffix(ending) + b"\n}\n").hexdigest() != said
    ):
        raise ManifestError(f"{path}: damaged (its own hash does not fit); restore it or run what makes it again")
    if manifest["format"] != form:
        raise ManifestError(
            f"{path}: got format {manifest['format']!r}, expected {form!r}; make it again with this version"
        )
    return manifest


def check_files(
    folder: str | Path, manifest: dict[str, Any], names: list[str] | None = None, hashes: bool = True
) -> None:
    """Compare files with the manifest: their sizes always, their sha256 where `hashes`. Raises ManifestError."""
    for name in manifest["files"] if names is None else names:
        path = Path(folder) / name
        entry = manifest["files"].get(name)
        if entry is None or Path(name).name != name:
            raise ManifestError(f"{path}: not in the manifest of {folder}; restore it or run what makes it again")
        if not path.is_file():
            raise ManifestError(
                f"{path}: no such file, though the manifest lists it; restore it or run what makes it again"
            )
        if path.stat().st_size != entry["bytes"]:
            raise ManifestError(
                f"{path}: got {path.stat().st_size} bytes, expected {entry['bytes']}; "
                "restore it or run what makes it again"
            )
        if hashes and (got := file_sha256(path)) != entry["sha256"]:
            raise ManifestError(
                f"{path}: damaged: got sha256 {got[:12]}..., expected {entry['sha256'][:12]}...; "
                "restore it or run what makes it again"
            )


def check_sizes(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Compare the sizes of all files with the manifest, in one pass over the folder. Raises ManifestError."""
    with os.scandir(folder) as entries:
        found = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    for name, entry in manifest["files"].items():
        if found.get(name) != entry["bytes"]:
            check_files(folder, manifest, [name], hashes=False)


def _canonical(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()
