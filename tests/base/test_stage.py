import json
import subprocess
import sys

import pytest

from raphael.base.stage import Stage, StageError, main, read_json, write_json


def test_the_counts_of_a_report_must_add_up(tmp_path):
    stage = Stage("toy", tmp_path)
    stage.report(10, 7, {"too small": 2, "broken": 1, "unused": 0}, extra=3)
    report = read_json(tmp_path / "reports/toy.json")
    assert report == {"stage": "toy", "total": 10, "kept": 7, "dropped": {"too small": 2, "broken": 1}, "extra": 3}
    with pytest.raises(AssertionError, match="1 unaccounted for"):
        stage.report(10, 7, {"too small": 2})


def test_equal_runs_give_equal_reports_and_times_lie_elsewhere(tmp_path):
    texts = []
    for _ in range(2):
        Stage("toy", tmp_path).report(1, 1)
        texts.append((tmp_path / "reports/toy.json").read_text())
    assert texts[0] == texts[1]
    assert "seconds" in read_json(tmp_path / "work/timings/toy.json")


def test_unfinished_work_is_found_again_for_the_same_input_and_swept_for_another(tmp_path):
    (tmp_path / "input").write_text("a")
    stage = Stage("toy", tmp_path)
    first = stage.workdir(tmp_path / "input", {"size": 1})
    (first / "half").write_text("done")
    assert stage.workdir(tmp_path / "input", {"size": 1}) == first and (first / "half").exists()
    assert stage.workdir(tmp_path / "input", {"size": 2}) != first and not first.exists()
    (tmp_path / "input").write_text("b")
    assert stage.workdir(tmp_path / "input", {"size": 1}) != first


def test_publishing_replaces_a_whole_folder(tmp_path):
    stage = Stage("toy", tmp_path)
    for name in ("old", "new"):
        folder = stage.workdir() / "out"
        folder.mkdir()
        (folder / name).touch()
        stage.publish(folder, "data/out")
    assert [path.name for path in (tmp_path / "data/out").iterdir()] == ["new"]


def run_main(tmp_path, body, capsys):
    status = main("toy", body, "a toy", ["--params", str(tmp_path / "params.yaml")])
    return status, capsys.readouterr().err


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    from pathlib import Path

    (tmp_path / "params.yaml").write_text((Path(__file__).parents[2] / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)  # main() changes folder; this one is undone
    return tmp_path


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (StageError("got 1, expected 2"), "toy: error: got 1, expected 2\n"),
        (OSError(28, "No space left on device", "/x"), "toy: error: No space left on device: /x (RAPHAEL_TRACEBACK=1"),
    ],
)
def test_what_a_user_can_cause_is_one_line_and_a_status(workspace, capsys, error, line):
    def body(config, stage):
        raise error

    status, printed = run_main(workspace, body, capsys)
    assert status == 1 and printed.startswith(line) and printed.count("\n") == 1


def test_a_programming_error_keeps_its_traceback(workspace, capsys):
    def body(config, stage):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_main(workspace, body, capsys)


def test_missing_settings_are_one_line(tmp_path, capsys):
    status, printed = run_main(tmp_path, lambda config, stage: None, capsys)
    assert status == 1 and "no such file" in printed and printed.count("\n") == 1


def test_json_is_written_whole_and_errors_of_reading_name_the_file(tmp_path):
    write_json(tmp_path / "a/b.json", {"x": "ä"})
    assert json.loads((tmp_path / "a/b.json").read_text(encoding="utf-8")) == {"x": "ä"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(StageError, match=r"bad.json: not valid JSON"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(StageError, match="no such file; run the stage"):
        read_json(tmp_path / "none.json")


def test_the_ground_floor_loads_no_heavy_library():
    code = "import sys, raphael.base.stage; print([m for m in ('torch', 'ray', 'mlflow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_strangers_name_in_an_error_moves_no_cursor_breaks_no_line_and_fills_no_screen(capsys):
    from raphael.base.stage import LONGEST_LINE, one_clear_line

    for text in (
        "a\x1b]0;owned\x07\x1b[2Jb",
        "a\nraphael: all is well\nb",
        "a\u202eb",
        "a" + "x" * 10**6 + "b",
        "a\udcffb",
    ):
        with one_clear_line("stage") as outcome:
            raise StageError(text)
        (line,) = capsys.readouterr().err.splitlines()
        assert outcome.status == 1 and line.startswith("stage: error: a") and line.endswith("b")
        assert line.isprintable() and len(line) < LONGEST_LINE + 100
    with one_clear_line("stage"):
        raise StageError("got ü, 日本, expected ‘x’")
    assert capsys.readouterr().err == "stage: error: got ü, 日本, expected ‘x’\n"
