"""contents.json: every file of a pipeline folder with its size and sha256, also those that the checkpoint's manifest
does not know: copies of the encoders, curves, grids. Not the card: its words may be mended.

It is written last and carries its own hash, which is the model's identity: with another text encoder it is another
model. Who loads the folder has the encoders compared with it; weights and meta.json are compared by the checkpoint
itself. A folder from before there was such a file loads as it did, known by its checkpoint alone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from raphael.base.checkpoint.folder import CheckpointError, checkpoint_sha256
from raphael.base.files import file_sha256, fsync, written_whole

NAME, CARD = "contents.json", "README.md"
FORM = "raphael-contents/1"


def seal(folder: Path) -> str:
    """Write contents.json of what lies in the folder now. Returns the model's identity."""
    files = {}
    for path in _files(folder):
        fsync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    content = {"format": FORM, "files": files}
    with written_whole(folder / NAME) as temporary:
        temporary.write_text(_text({**content, "sha256": _digest(content)}), encoding="utf-8")
    return _digest(content)


def model_sha256(folder: str | Path) -> str:
    """The identity of a pipeline folder; of one without contents.json, its checkpoint's. Raises CheckpointError."""
    contents = _read(Path(folder))
    return checkpoint_sha256(folder) if contents is None else contents["sha256"]


def check_contents(folder: str | Path, parts: list[str] | None = None) -> None:
    """Compare the files of these sub-folders with contents.json, and all manifests; parts None: every file.

    A file that is not listed is refused, too: encoders read what they find. Raises CheckpointError, which names it.
    """
    folder = Path(folder)
    contents = _read(folder)
    if contents is None:
        return
    listed = contents["files"]
    found = {path.relative_to(folder).as_posix() for path in _files(folder)}
    wanted = {
        name
        for name in {*listed, *found}
        if parts is None or name.split("/")[0] in parts or name.endswith("manifest.json")
    }
    for name in sorted(wanted):
        _compare(folder / name, listed.get(name))


def _compare(path: Path, entry: dict[str, Any] | None) -> None:
    again = "restore the folder, or run what makes it again"
    if entry is None:
        raise CheckpointError(f"{path}: not in {NAME}, expected nothing that was not there at its making; {again}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, though {NAME} lists it; {again}")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise CheckpointError(f"{path}: damaged: got {size} bytes, expected {entry['bytes']}; {again}")
    if (got := file_sha256(path)) != entry["sha256"]:
        raise CheckpointError(f"{path}: damaged: got sha256 {got[:12]}..., expected {entry['sha256'][:12]}...; {again}")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path not in (folder / NAME, folder / CARD))


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / NAME
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        contents = json.loads(raw)
        said = contents.pop("sha256")
        own = _text({**contents, "sha256": said}).encode()  # so that a flipped bit in white space is seen, too
        whole = contents["format"] == FORM and said == _digest(contents) and raw == own
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path}: damaged (its own hash does not fit); restore it or run what makes it again")
    return {**contents, "sha256": said}


def _text(contents: dict[str, Any]) -> str:
    return json.dumps(contents, indent=1, ensure_ascii=False) + "\n"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()
