"""Which folder a stage works in, told apart by inputs and code, and what becomes of the others."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from raphael.base import stage_work
from raphael.base.code.stage_code import StageCode

DAY_S = 86400


def code(digest: str, version: int = 1, known: tuple[str, ...] = ("a",), **files: str) -> StageCode:
    return StageCode("train", version, digest, files or {"raphael.x": digest}, frozenset(known), {"raphael.x": "a"})


def begun(home: Path, inputs: str, by: StageCode, anew: bool = False) -> Path:
    """A folder with a checkpoint in it."""
    path = stage_work.find(home, inputs, by, anew).path
    (path / "checkpoints" / "000000000064").mkdir(parents=True, exist_ok=True)
    return path


def test_work_goes_on_where_the_code_is_the_same_or_was_said_to_be(tmp_path: Path) -> None:
    first = begun(tmp_path, "i", code("a"))
    assert stage_work.find(tmp_path, "i", code("a")).path == first
    assert stage_work.find(tmp_path, "i", code("b", known=("b", "a"))).path == first
    assert stage_work.find(tmp_path, "j", code("a")).path != first


def test_work_of_other_code_is_neither_reused_nor_deleted_but_refused(tmp_path: Path) -> None:
    first = begun(tmp_path, "i", code("a"))
    with pytest.raises(stage_work.OtherCode) as caught:
        stage_work.find(tmp_path, "i", code("b"))
    line = str(caught.value)
    assert "the code of this stage changed since this work was made" in line and "raphael/x.py" in line
    assert "changed train --same" in line and "--results" in line and "\n" not in line
    assert first.is_dir() and list(tmp_path.iterdir()) == [first]


def test_declared_results_begin_in_another_folder_and_the_old_one_stays(tmp_path: Path) -> None:
    first = begun(tmp_path, "i", code("a"))
    found = stage_work.find(tmp_path, "i", code("b", version=2, known=("b",)))
    assert found.path != first and found.others == [first]
    assert stage_work.sweep(tmp_path, found, "i") == [] and first.is_dir()
    assert stage_work.find(tmp_path, "i", code("a")).path == first, "the former code finds its work again"


@pytest.mark.parametrize("later", [code("b", known=("b", "a")), code("b", version=2, known=("b",))])
def test_work_begun_anew_before_its_code_was_declared_counts_once_it_is(tmp_path: Path, later: StageCode) -> None:
    tried = begun(tmp_path, "i", code("b"), anew=True)
    assert stage_work.find(tmp_path, "i", code("b")).path == tried
    taken = stage_work.find(tmp_path, "i", later).path
    assert (taken / "checkpoints" / "000000000064").is_dir() and not tried.exists()


def test_after_an_edit_was_taken_back_its_work_is_passed_over(tmp_path: Path) -> None:
    tried = begun(tmp_path, "i", code("b"))
    found = stage_work.find(tmp_path, "i", code("a"))
    assert found.path != tried and found.others == [tried]
    stage_work.sweep(tmp_path, found, "i")
    assert tried.is_dir()


def test_work_that_does_not_say_who_made_it_is_refused(tmp_path: Path) -> None:
    first = begun(tmp_path, "i", code("a"))
    (first / stage_work.MADE_BY).unlink()
    with pytest.raises(stage_work.OtherCode, match=first.name):
        stage_work.find(tmp_path, "i", code("a"))
    assert stage_work.find(tmp_path, "i", code("a"), anew=True).path != first and first.is_dir()


def test_an_emptied_folder_is_no_work_and_is_taken_by_other_code(tmp_path: Path) -> None:
    first = stage_work.find(tmp_path, "i", code("a")).path
    assert stage_work.find(tmp_path, "i", code("b")).path != first
    assert stage_work.find(tmp_path, "i", code("a")).path == first


def test_leftovers_without_checkpoints_go_and_those_with_stay(tmp_path: Path) -> None:
    trained = begun(tmp_path, "i", code("a"))
    cheap = stage_work.find(tmp_path, "j", code("a")).path
    (cheap / "half").touch()
    found = stage_work.find(tmp_path, "k", code("a"))
    assert stage_work.sweep(tmp_path, found, "k") == []
    assert trained.is_dir() and found.path.is_dir() and not cheap.exists()


def test_checkpoints_go_by_age_and_size_and_each_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    folders = {}
    for inputs, days in (("old", 31), ("middle", 20), ("late", 10), ("fresh", 1)):
        path = folders[inputs] = begun(tmp_path, inputs, code("a"))
        (path / "checkpoints" / "000000000064" / "weights").write_bytes(bytes(10**6))
        for part in [*path.rglob("*"), path]:
            os.utime(part, (now - days * DAY_S,) * 2)
    found = stage_work.find(tmp_path, "now", code("a"))
    (line,) = stage_work.sweep(tmp_path, found, "now")
    assert folders["old"].name in line and "0.001 GB" in line and "31 days" in line
    monkeypatch.setattr(stage_work, "KEPT_BYTES", 2_500_000)
    (line,) = stage_work.sweep(tmp_path, found, "now")
    assert folders["middle"].name in line and "20 days" in line
    monkeypatch.setattr(stage_work, "KEPT_BYTES", 0)
    (line,) = stage_work.sweep(tmp_path, found, "now")
    assert folders["late"].name in line and folders["fresh"].is_dir(), "what was touched this week may still be running"


def test_a_clock_that_jumps_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead by ten years all work is old at once, unless a stage ran meanwhile; back to 1970 none ever is."""
    home = tmp_path / "work" / "train"
    path = begun(home, "old", code("a"))
    (tmp_path / "work" / "timings").mkdir()
    (tmp_path / "work" / "timings" / "train.json").write_text("{}")
    found, real = stage_work.find(home, "now", code("a")), time.time
    monkeypatch.setattr(stage_work.time, "time", lambda: real() + 3650 * DAY_S)
    (line,) = stage_work.sweep(home, found, "now")
    assert "no stage ran here for 3650 days: nothing of before is removed" in line and path.is_dir()
    monkeypatch.setattr(stage_work.time, "time", lambda: 0.0)
    assert stage_work.sweep(home, found, "now") == [] and path.is_dir()
    monkeypatch.setattr(stage_work.time, "time", real)
    for part in [*path.rglob("*"), path]:
        os.utime(part, (real() - 31 * DAY_S,) * 2)
    (line,) = stage_work.sweep(home, found, "now")
    assert "31 days" in line and not path.exists(), "it goes where stages ran meanwhile"
