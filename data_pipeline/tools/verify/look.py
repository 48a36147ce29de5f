"""What can be said of a file that no list has a hash of: by the checksums that its own form carries."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

from raphael.base.stage import StageError


def fault_of(path: Path) -> str:
    """What is wrong with the file; "" where nothing is seen, which of some forms is little."""
    look = LOOKS.get(path.suffix)
    try:
        return look(path) if look else ""
    except StageError as error:
        return str(error).removeprefix(f"{path}: ")
    except (OSError, ValueError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        return f"damaged ({' '.join(str(error).split())[:120]})"


def _table(path: Path) -> str:
    from data_pipeline.common.tables import open_parquet

    for _ in open_parquet(path).iter_batches():
        pass
    return ""


def _shard(path: Path) -> str:
    """Every image against its sha256 in the table beside the tar."""
    from data_pipeline.common.images import Shard

    shard = Shard(path)
    try:
        for key in shard.digests:
            shard.image(key)
    finally:
        shard.close()
    return ""


def _archive(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    return f"damaged (its member {broken})" if broken else ""


def _json(path: Path) -> str:
    """Its text; of a manifest also the files that it lists."""
    from raphael.base.manifest import NAME, check_files, read_manifest

    content = json.loads(path.read_text(encoding="utf-8"))
    if path.name == NAME and isinstance(content, dict) and "format" in content:
        check_files(path.parent, read_manifest(path.parent, content["format"]))
    return ""


def _png(path: Path) -> str:
    from raphael.base.images.fit import is_whole

    return "" if is_whole(path) else "damaged (a checksum does not fit)"


LOOKS = {".parquet": _table, ".tar": _shard, ".zip": _archive, ".npz": _archive, ".json": _json, ".png": _png}
