"""What stages published: rot is told from writing, and named before it is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raphael.base.integrity import published
from raphael.base.stage import Stage, StageError

TABLE = Path("data/selected/links.parquet")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    stage = Stage("select", tmp_path)
    (stage.workdir() / "links").write_bytes(b"link " * 100)
    stage.publish(stage.workdir() / "links", TABLE)
    return tmp_path


def rot(path: Path, place: int = 7) -> None:
    """One bit, and no time of change: what a disk does."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_the_stage_that_reads_a_rotten_file_names_it(workspace: Path) -> None:
    Stage("download", workspace).workdir(TABLE)
    rot(workspace / TABLE)
    for item in (TABLE, workspace / TABLE, TABLE.parent):
        with pytest.raises(StageError, match=f"^{TABLE}: damaged: other bytes than were written"):
            Stage("download", workspace).workdir(item)


def test_a_file_cut_by_the_disk_is_named_too(workspace: Path) -> None:
    stat = (workspace / TABLE).stat()
    os.truncate(workspace / TABLE, 40)
    os.utime(workspace / TABLE, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(StageError, match="damaged"):
        Stage("download", workspace).workdir(TABLE)


def test_a_file_that_someone_wrote_is_taken_as_it_is(workspace: Path) -> None:
    (workspace / TABLE).write_bytes(b"another list")
    Stage("download", workspace).workdir(TABLE)


def test_the_same_bytes_linked_or_copied_anew_are_watched_from_then_on(workspace: Path) -> None:
    os.utime(workspace / TABLE, ns=(1, 10**18))  # as a checkout leaves it
    Stage("download", workspace).workdir(TABLE)
    rot(workspace / TABLE)
    with pytest.raises(StageError, match="damaged"):
        Stage("download", workspace).workdir(TABLE)


def test_a_larger_file_is_known_by_its_size_alone(workspace: Path) -> None:
    rot(workspace / TABLE)
    assert published.faults(workspace, [TABLE], most_bytes=499) == []
    assert len(published.faults(workspace, [TABLE], most_bytes=500)) == 1


def test_a_file_rewritten_on_purpose_is_noted_again(workspace: Path) -> None:
    (workspace / TABLE).write_bytes(b"without one row")
    published.note_again(workspace, workspace / TABLE)
    rot(workspace / TABLE)
    with pytest.raises(StageError, match="damaged"):
        Stage("download", workspace).workdir(TABLE)


@pytest.mark.parametrize("text", ["", "{", '{"out": 1}', "[]"])
def test_a_broken_list_vouches_for_nothing_and_stops_nobody(workspace: Path, text: str) -> None:
    (list_file,) = (workspace / published.FOLDER).iterdir()
    list_file.write_text(text)
    assert published.noted(workspace) == {}
    Stage("download", workspace).workdir(TABLE)


def test_hashes_known_from_writing_are_taken_and_the_others_read(tmp_path: Path) -> None:
    folder = tmp_path / "data/x"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        (folder / name).write_text(name)
    published.note(tmp_path, folder, {"a": "known"})
    noted = published.noted(tmp_path)
    assert noted[folder / "a"][2] == "known" and noted[folder / "b"][2] == published.file_xxh3(folder / "b")
