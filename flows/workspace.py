"""A workspace: a folder with the pipeline's code, dvc.yaml and its own settings, data, cache and MLflow store.

    python -m flows.workspace DIR [--params params.coco.yaml] [--set source.kind=coco]

Other settings, other data, without touching the project's own params.yaml, dvc.lock or outputs. Making it again brings
code and settings up to date; files that did not change are left alone, so that DVC finds nothing to do.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from flows import settings
from raphael.stage import StageError, one_clear_line
from raphael.strict import ConfigError

PROJECT = Path(__file__).resolve().parent.parent
CODE = ("raphael", "data_pipeline", "flows")
OVERLAYS = ("params.coco.yaml", "params.debug.yaml")  # which its own code asks for, too
FILES = ("dvc.yaml", "prefect.toml", ".dvcignore", *OVERLAYS)
DVC_CONFIG = """[core]
    no_scm = true
    analytics = false
    autostage = false
    check_update = false
[cache]
    type = "reflink,hardlink,symlink,copy"
"""


def make_workspace(folder: Path, overlays: list[Path], changes: dict | None = None, cache: Path | None = None) -> Path:
    """Make or refresh `folder`. Its params.yaml is the project's with `overlays` (changed keys only), then `changes`.

    cache: a DVC cache shared with other workspaces; None: its own.

    Raises ConfigError where the settings do not load, StageError where the folder is something else.
    """
    folder = folder.resolve()
    if folder == PROJECT or folder in PROJECT.parents:
        raise StageError(f"{folder}: is or holds the project itself; name another folder for the workspace")
    if folder.exists() and any(folder.iterdir()) and not (folder / ".dvc" / "config").is_file():
        raise StageError(f"{folder}: has other files in it; name an empty or new folder for the workspace")
    text = settings.merged(PROJECT / "params.yaml", *map(settings.flat, overlays), changes or {})
    (folder / ".dvc").mkdir(parents=True, exist_ok=True)
    shared = f"    dir = {cache.resolve()}\n" if cache else ""
    _put(folder / ".dvc" / "config", f"{DVC_CONFIG}{shared}".encode())
    for package in CODE:
        _mirror(PROJECT / package, folder / package)
    for name in FILES:
        _put(folder / name, (PROJECT / name).read_bytes())
    settings.write(folder / "params.yaml", text)
    return folder


def fingerprint(folder: Path) -> str:
    """A hash over path, size and time of change of each file: cheap, and new when a picture is added or edited."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; expected one with captions_*.json and pictures")
    lines = []
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            stat = file.stat()
            lines.append(f"{file.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _mirror(source: Path, target: Path) -> None:
    wanted = {
        file.relative_to(source) for file in source.rglob("*") if file.is_file() and "__pycache__" not in file.parts
    }
    for name in wanted:
        _put(target / name, (source / name).read_bytes())
    for file in [file for file in target.rglob("*") if file.is_file() and "__pycache__" not in file.parts]:
        if file.relative_to(target) not in wanted:
            file.unlink()


def _put(file: Path, data: bytes) -> None:
    if not file.exists() or file.read_bytes() != data:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="workspace", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where; made if absent")
    parser.add_argument(
        "--params", type=Path, action="append", default=[], help="a file of changed settings; may be repeated"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one changed setting; may be repeated"
    )
    arguments = parser.parse_args(argv)
    with one_clear_line("workspace") as outcome:
        folder = make_workspace(arguments.folder, arguments.params, settings.parse(arguments.set))
        print(f"workspace: {folder}; go on with: cd {folder} && dvc repro")
    return outcome.status


if __name__ == "__main__":
    raise SystemExit(main())
