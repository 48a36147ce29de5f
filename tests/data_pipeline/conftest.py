"""A workspace in which every data stage ran, for tests of what becomes of its files."""

from __future__ import annotations

import contextlib
import io
import tarfile
import urllib.parse
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from truth.faulty_runs import STAGES, run_here, write_settings

from raphael.base.stage import Stage

ROWS = 40


@pytest.fixture(scope="session")
def data_workspace(project, tmp_path_factory) -> Path:
    """Whoever changes it works on a copy, or puts back what was there. Nothing was downloaded: the shards are packed
    from the site's images as they are."""
    root = tmp_path_factory.mktemp("data_workspace")
    write_settings(project, root, ROWS)
    for stage in STAGES:
        if stage == "download":
            pack_site(root)
        else:
            run_here(stage, root)
    return root


def pack_site(root: Path) -> None:
    """data/shards of one shard, as the stage download would publish it."""
    from data_pipeline.download.shards import pack

    work = Stage("download", root).workdir()
    (work / "shards").mkdir()
    links = pq.read_table(root / "data/selected/links.parquet", columns=["id", "url", "caption"])
    pq.write_table(links, work / "links.parquet")
    rows = []
    with zipfile.ZipFile(root / "data/source/site.zip") as site, tarfile.open(work / "00000.tar", "w") as tar:
        for link in links.to_pylist():
            path, key = urllib.parse.urlsplit(link["url"]).path.lstrip("/"), f"{link['id']:09d}"
            row = {"id": link["id"], "key": key, "status": "failed_to_download", "error_message": "HTTP Error 502: x"}
            with contextlib.suppress(KeyError, OSError):
                body = site.read(path)
                width, height = (image := Image.open(io.BytesIO(body))).size
                image.load()
                info = tarfile.TarInfo(f"{key}.{path.rpartition('.')[2]}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
                row |= {"status": "success", "error_message": None, "sha256": "0" * 64}
                row |= {"width": width, "height": height, "original_width": width, "original_height": height}
            rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(SHAPE)), work / "00000.parquet")
    pack(work, work / "links.parquet", work / "shards", 0)
    Stage("download", root).publish(work / "shards", "data/shards")


SHAPE = {
    "id": pa.int64(), "key": pa.string(), "status": pa.string(), "error_message": pa.string(), "sha256": pa.string(),
    "width": pa.int32(), "height": pa.int32(), "original_width": pa.int32(), "original_height": pa.int32(),
}  # fmt: skip
