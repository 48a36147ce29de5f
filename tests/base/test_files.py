"""A file that counts is on disk before it has its name, and its name before anyone is told of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raphael.base import files
from raphael.base.files import put, written_whole
from raphael.base.manifest import write_manifest


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the disk, in order: "sync NAME" and "rename NAME"."""
    made: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        made.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        made.append(f"rename {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", renamed)
    return made


def test_the_bytes_come_before_the_name_and_the_name_before_the_end(tmp_path: Path, calls: list[str]) -> None:
    with written_whole(tmp_path / "one.json") as temporary:
        temporary.write_text("{}")
        assert not (tmp_path / "one.json").exists()
    assert calls == [f"sync {temporary.name}", "rename one.json", f"sync {tmp_path.name}"]


def test_a_folder_is_renamed_after_everything_in_it_is_on_disk(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "work/deep").mkdir(parents=True)
    for name in ("a", "deep/b"):
        (tmp_path / "work" / name).write_text(name)
    put(tmp_path / "work", tmp_path / "out")
    at = calls.index("rename out")
    assert sorted(calls[:at]) == ["sync a", "sync b", "sync deep", "sync work"]
    assert calls[at + 1 :] == [f"sync {tmp_path.name}"]


def test_a_manifest_and_the_files_that_it_lists_are_on_disk_before_it_has_its_name(
    tmp_path: Path, calls: list[str]
) -> None:
    (tmp_path / "a.bin").write_bytes(b"a")
    write_manifest(tmp_path, "form/1", ["a.bin"], {})
    assert calls[0] == "sync a.bin"
    assert [call.split()[0] for call in calls[1:]] == ["sync", "rename", "sync"]


def test_an_exception_and_a_full_disk_leave_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("before")
    with pytest.raises(OSError, match="full"), written_whole(tmp_path / "one") as temporary:
        temporary.write_text("half")
        raise OSError("full")
    assert [path.name for path in tmp_path.iterdir()] == ["one"] and (tmp_path / "one").read_text() == "before"


def test_what_is_worth_nothing_after_a_power_cut_waits_for_no_disk(tmp_path: Path, calls: list[str]) -> None:
    with written_whole(tmp_path / "one", lasting=False) as temporary:
        temporary.write_text("x")
    assert calls == ["rename one"]
