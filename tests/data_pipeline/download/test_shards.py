"""A downloader's shard that was cut anywhere is downloaded again; none is packed with a part of an image."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.download.shards import BrokenShard, pack

IDS = range(4)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """One shard as img2dataset leaves it, and the links that it is of."""
    (tmp_path / "out").mkdir()
    facts = {"status": "success", "error_message": None, "sha256": "0" * 64}
    sizes = dict.fromkeys(("width", "height", "original_width", "original_height"), 8)
    rows = [{"id": row, "key": f"{row:09d}", **facts, **sizes} for row in IDS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    links = [{"id": row, "url": f"http://a/{row}", "caption": f"number {row}"} for row in IDS]
    pq.write_table(pa.Table.from_pylist(links), tmp_path / "links.parquet")
    with tarfile.open(tmp_path / "00000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in IDS:
            body = f"image {row} ".encode() * 200
            info = tarfile.TarInfo(f"{row:09d}.png")
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return tmp_path


def packed(raw: Path) -> int:
    return sum(pack(raw, raw / "links.parquet", raw / "out", 0).values())


def test_a_whole_shard_is_packed_with_its_captions_and_facts(raw: Path) -> None:
    assert packed(raw) == len(IDS)
    with tarfile.open(raw / "out/00000.tar") as tar:
        names = tar.getnames()
        assert tar.extractfile("000000002.txt").read() == b"number 2"
    assert names == [f"{row:09d}.{ending}" for row in IDS for ending in ("png", "txt", "json")]


@pytest.mark.parametrize("file", ["00000.tar", "00000.parquet", "links.parquet"])
# the second half of so small a tar is padding
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.2, 0.3, 0.45])
def test_cut_anywhere_it_is_broken_and_nothing_is_left_of_it(raw: Path, file: str, share: float) -> None:
    data = (raw / file).read_bytes()
    (raw / file).write_bytes(data[: int(share * len(data))])
    with pytest.raises(BrokenShard, match="shard 00000"):
        packed(raw)
    assert list((raw / "out").iterdir()) == []


def test_a_member_that_ends_early_is_no_image(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system, not tarfile, gives back less than it should."""
    real = tarfile.TarFile.extractfile
    monkeypatch.setattr(tarfile.TarFile, "extractfile", lambda tar, member: io.BytesIO(real(tar, member).read()[:-1]))
    with pytest.raises(BrokenShard, match="is cut short"):
        packed(raw)
