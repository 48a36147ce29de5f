"""A workspace: a folder with the pipeline's code, dvc.yaml and its own settings, data, cache and MLflow store.

    python -m flows.workspace DIR [--params params.coco.yaml] [--set source.kind=coco]

Other settings, other data, without touching the project's own params.yaml, dvc.lock or outputs. Making it again brings
code and settings up to date; files that did not change are left alone, so that DVC finds nothing to do.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path

from flows.serve.access import private_folder
from flows.workspace import settings
from raphael.base.config.systems import DEFAULT, find_system
from raphael.base.stage import StageError, one_clear_line
from raphael.base.strict import ConfigError
from raphael.pretrained.find import names
from raphael.systems import SYSTEMS

PROJECT = Path(__file__).resolve().parents[2]
CODE = ("raphael", "data_pipeline", "flows")
MODELS = Path("raphael/pretrained")  # each folder in it is a model
# What its own code asks for, too: of the other systems those that are there
OVERLAYS = ("params.coco.yaml", "params.debug.yaml", *(f"params.{name}.yaml" for name in SYSTEMS))
FILES = ("dvc.yaml", "prefect.toml", ".dvcignore", *OVERLAYS)
DVC_CONFIG = """[core]
    no_scm = true
    analytics = false
    autostage = false
    check_update = false
[cache]
    type = "reflink,hardlink,symlink,copy"
"""
PRIVATE = ".run/dvc"  # DVC's own state, pickles among it; by default a folder that every user may write to


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
    private_folder(folder / ".run")
    state = f"[core]\n    site_cache_dir = {folder / PRIVATE}\n"
    shared = f"    dir = {cache.resolve()}\n" if cache else ""
    _put(folder / ".dvc" / "config", f"{DVC_CONFIG}{shared}".encode())
    _put(folder / ".dvc" / "config.local", state.encode())
    for package in CODE:
        _mirror(PROJECT / package, folder / package)
    _link_models(folder)
    for name in filter(lambda name: (PROJECT / name).is_file(), FILES):
        _put(folder / name, (PROJECT / name).read_bytes())
    settings.write(folder / "params.yaml", text)
    return folder


def overlays_of(system: str) -> list[Path]:
    """What changes in the settings for a system: params.NAME.yaml; nothing for the default one.

    Raises ConfigError for a system that is not there, and for one without such a file.
    """
    find_system(system, "SYSTEM")
    if system == DEFAULT:
        return []
    file = PROJECT / f"params.{system}.yaml"
    if not file.is_file():
        raise ConfigError(f"{file.name}: no such file; expected the settings of SYSTEM={system} beside params.yaml")
    return [file]


def fingerprint(folder: Path) -> str:
    """A hash over path, size and time of change of each file, or of the one: cheap, and new when an image is added or
    edited."""
    if not folder.exists():
        raise ConfigError(f"{folder}: no such folder; expected one with captions_*.json and images")
    lines = []
    for file in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
        if file.is_file():
            stat = file.stat()
            lines.append(f"{file.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _mirror(source: Path, target: Path) -> None:
    wanted = {file.relative_to(source) for file in _files(source)}
    for name in wanted:
        _put(target / name, (source / name).read_bytes())
    for file in _files(target):
        if file.relative_to(target) not in wanted:
            file.unlink()


def _files(package: Path) -> list[Path]:
    """A package's files without bytecode, and without the models that come with it (`_link_models`)."""
    found = []
    for place, folders, files in os.walk(package):  # follows no link
        is_home = Path(place).parts[-2:] == MODELS.parts
        folders[:] = [] if is_home else [name for name in folders if name != "__pycache__"]
        found += [Path(place) / name for name in files]
    return found


def _link_models(folder: Path) -> None:
    """Each model that comes with the package as a link to the project's: megabytes that no workspace changes."""
    home = folder / MODELS
    for name in names():
        model = (PROJECT / MODELS / name).resolve()
        if (home / name).is_symlink() and (home / name).resolve() != model:
            (home / name).unlink()
        if not (home / name).exists():
            (home / name).symlink_to(model, target_is_directory=True)


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
        print(f"workspace: {folder}; continue with: cd {folder} && dvc repro")
    return outcome.status
