"""Files of unfinished work that a power cut left empty or half as long: every stage ends in the bytes of a run that was
left alone, and never in a traceback.

Of each stage a run is stopped where everything is finished and nothing published, so that all pieces lie there.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from truth.faulty_runs import STAGES, run_here, write_settings

from raphael.base.config.params import load_config
from raphael.base.stage import Stage, StageError

TRAINED = ("autoencoder", "clip")  # keep checkpoints, of which the newest whole one counts
QUICK = tuple(stage for stage in STAGES if stage not in ("download", *TRAINED))


class Stopped(Exception):
    """Where the work would have been published. The message: a digest of it."""


def digest(place: Path) -> str:
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    lines = [f"{path.relative_to(place)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]
    return "\n".join(line for line in lines if "manifest" not in line)  # it has the digest of the others


def stop(self: Stage, finished: Path, out: object, known: object = None) -> Path:
    raise Stopped(digest(finished))


def stopped(stage: str, root: Path) -> str:
    """The digest of what a run would publish."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "publish", stop)
        with pytest.raises(Stopped) as caught:
            run_here(stage, root)
    return str(caught.value)


def work_files(stage: str, root: Path) -> list[Path]:
    return sorted(path for path in (root / "work" / stage).rglob("*") if path.is_file())


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def check_cut(stage: str, root: Path, victims: list[Path], share: float, expected: str) -> None:
    for path in victims:
        cut(path, share)
    assert stopped(stage, root) == expected, (stage, victims, share)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("stage", QUICK)
def test_with_every_file_cut_at_once_the_stage_ends_in_the_same_bytes(data_workspace, stage, share) -> None:
    root = data_workspace
    expected = stopped(stage, root)
    victims = work_files(stage, root)
    assert victims
    check_cut(stage, root, victims, share, expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["source", "download", "score", "encode"])
def test_with_any_one_file_cut_the_stage_ends_in_the_same_bytes(data_workspace, stage) -> None:
    root = data_workspace
    expected = stopped(stage, root)
    for victim in work_files(stage, root):
        for share in (0.0, 0.5):
            if victim.is_file():
                check_cut(stage, root, [victim], share, expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAINED)
def test_a_training_passes_over_what_was_cut_or_says_that_nothing_is_whole(data_workspace, stage) -> None:
    root = data_workspace
    expected = stopped(stage, root)
    kept = root / "work.kept"
    shutil.copytree(root / "work", kept)
    for victim in work_files(stage, root):
        for share in (0.0, 0.5):
            shutil.rmtree(root / "work")
            shutil.copytree(kept, root / "work")
            cut(victim, share)
            try:
                assert stopped(stage, root) == expected, (victim, share)
            except StageError as error:
                assert "no checkpoint" in str(error) and "\n" not in str(error), (victim, share)
    shutil.rmtree(kept)


def raw_shard(raw: Path, shard: int, ids: list[int]) -> None:
    """What img2dataset leaves of a shard: a tar, a table, a note that it is done."""
    rows = []
    with tarfile.open(raw / f"{shard:05d}.tar", "w") as tar:
        for row in ids:
            body = f"image {row}".encode() * 40
            info = tarfile.TarInfo(f"{row:09d}.png")
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
            rows.append(
                {"id": row, "key": f"{row:09d}", "status": "success", "error_message": None, "sha256": "0" * 64}
                | dict.fromkeys(("width", "height", "original_width", "original_height"), 8)
            )
    pq.write_table(pa.Table.from_pylist(rows), raw / f"{shard:05d}.parquet")
    (raw / f"{shard:05d}_stats.json").write_text("{}")


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("victim", ["shards/00001.tar", "shards/00001.parquet", "pieces.jsonl"])
def test_a_packed_shard_that_was_cut_is_downloaded_again_and_no_other(project, tmp_path, victim, share, capsys) -> None:
    from data_pipeline.download.stage import _Downloads

    write_settings(project, tmp_path)
    config = load_config(tmp_path / "params.yaml").download
    work, total = tmp_path / "w", 2 * config.shard_rows

    def opened() -> _Downloads:
        work.mkdir(exist_ok=True)
        downloads = _Downloads(config, work, total)
        downloads.clean_up()
        return downloads

    opened()
    for shard in (0, 1):
        ids = list(range(shard * config.shard_rows, (shard + 1) * config.shard_rows))
        raw_shard(work / "raw", shard, ids)
        links = [{"id": row, "url": f"http://a/{row}", "caption": "c"} for row in ids]
        pq.write_table(pa.Table.from_pylist(links), work / f"slices/{shard:05d}.parquet")
    assert opened().missing() == [] and not list((work / "raw").glob("*.tar"))
    packed = digest(work / "shards")
    cut(work / victim, share)
    downloads = opened()
    lost = [0, 1] if victim == "pieces.jsonl" and not share else [1]
    assert downloads.missing() == lost
    assert downloads.outcomes.total() == total - len(lost) * config.shard_rows
    assert not any((work / f"raw/{shard:05d}_stats.json").exists() for shard in lost), "img2dataset would pass it over"
    assert "download: " in (said := capsys.readouterr().err) and "made again" in said
    for shard in lost:
        raw_shard(work / "raw", shard, list(range(shard * config.shard_rows, (shard + 1) * config.shard_rows)))
    assert opened().missing() == [] and digest(work / "shards") == packed


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_note_on_who_made_the_work_that_was_cut_is_written_again(tmp_path, share) -> None:
    from raphael.base import stage_work
    from raphael.base.code.stage_code import StageCode

    code = StageCode("encode", 1, "a", {"x": "a"}, frozenset("a"), {"x": "a"})
    work = stage_work.find(tmp_path, "inputs", code).path
    (work / "chunk_0.npz").write_bytes(b"1")
    cut(work / stage_work.MADE_BY, share)
    assert stage_work.find(tmp_path, "inputs", code).path == work
    assert json.loads((work / stage_work.MADE_BY).read_text())["code"] == "a"
