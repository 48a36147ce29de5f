"""The files that `source.path` names: one file, a folder of them, or a pattern; on this machine or at any address that
fsspec knows (`hf://datasets/...`, `s3://...`)."""

from __future__ import annotations

import glob
from pathlib import Path

from data_pipeline.common.tables import is_remote
from raphael.base.stage import StageError


def files_at(address: str, suffix: str, where: str = "params.yaml") -> list[Path | str]:
    """Every file, in the order of their names. Remote ones are addresses. A folder without any is looked through below.

    suffix: of the files of a folder, such as ".parquet". Raises StageError, one line, where there is none.
    """
    if is_remote(address):
        files = _remote_files(address, suffix)
    else:
        path = Path(address)
        if path.is_dir():
            files = sorted(path.glob(f"*{suffix}")) or sorted(path.rglob(f"*{suffix}"))
        else:
            files = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(address, recursive=True))]
        files = [file for file in files if file.is_file()]
    if not address or not files:
        raise StageError(
            f"source.path: got {address!r}, expected a {suffix} file, a folder of them or a pattern; set it in {where}"
        )
    return files


def _remote_files(address: str, suffix: str) -> list[str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(address)
        if "*" in path:
            found = sorted(system.glob(path))
        elif address.startswith(("http://", "https://")) or system.isfile(path):
            return [address]  # a web server has no folders
        else:
            found = sorted(name for name in system.find(path) if name.endswith(suffix))
    except ImportError as error:
        raise StageError(f"source.path: {address}: {one_line(error)}") from None
    except Exception as error:  # each file system has errors of its own: the hub's are httpx's, of no common class
        raise StageError(
            f"source.path: {address}: {one_line(error)}; is this machine online, and (hf://) HF_TOKEN set for a data "
            "set behind a gate? A copy on this machine works without either"
        ) from None
    return [system.unstrip_protocol(name) for name in found]


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def identity(file: Path | str) -> object:
    """What a finished piece of work on a file belongs to: a path's content, an address's size, time and tag."""
    if not is_remote(file):
        return file
    import fsspec

    system, path = fsspec.core.url_to_fs(str(file))
    facts = {name.lower(): str(value) for name, value in system.info(path).items()}
    return [
        str(file),
        *(facts.get(name, "") for name in ("size", "etag", "sha256", "mtime", "created", "lastmodified")),
    ]
