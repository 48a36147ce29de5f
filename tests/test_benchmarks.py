"""The benchmarks run, and what they found is read into one table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
BENCHMARKS = sorted(file.name for file in (PROJECT / "benchmarks").glob("[a-z]*.py"))
HERE = {"processor": "a processor", "cores": 2, "torch": "2.15"}


def run(*command, **options):
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=PROJECT, env=environment, **options
    )


def result(folder, name, measured, summary, **facts):
    content = {"benchmark": name, "measured": measured, **HERE, **facts, "summary": summary}
    (folder / f"{name}-{measured}{len(facts)}.json").write_text(json.dumps(content))


def row(case, met, ratio=0.5):
    return {"case": case, "ours": 1, "peer": 2.0, "unit": "s", "ratio": ratio, "target": "<= 1.0", "met": met}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_takes_the_newest_result_of_every_benchmark_and_machine_and_says_what_was_met(tmp_path):
    result(tmp_path, "speed", "2026-01-02", [row("new", True), row("open", None), row("slow", False, 1.5)])
    result(tmp_path, "speed", "2026-01-01", [row("old", True)])
    result(tmp_path, "speed", "2025-01-01", [row("on the card", True)], gpu="a card")
    result(tmp_path, "memory", "2024-01-01", [row("bytes", True)])
    (tmp_path / "older.json").write_text(json.dumps({"results": []}))
    done = run("benchmarks/_table.py", str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    table = [cells(line) for line in lines if line.startswith("|")]
    assert table[0] == ["benchmark", "case", "ours", "peer", "unit", "ours / peer", "target", "met"]
    assert {line[1]: (line[0], line[-1]) for line in table[2:]} == {
        "bytes": ("memory", "yes"),
        "new": ("speed", "yes"),
        "open": ("speed", ""),
        "slow": ("speed", "NO"),
        "on the card": ("speed", "yes"),
    }
    assert table[2][2:7] == ["1", "2", "s", "0.5", "<= 1.0"]
    assert lines[-1] == "3 of 4 targets met"


def test_a_folder_without_results_is_an_error_of_one_line(tmp_path):
    done = run("benchmarks/_table.py", str(tmp_path))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "make bench" in done.stderr


def test_a_target_is_judged_on_the_ratio_of_ours_to_the_peer():
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); from _machine import judged\n"
        "rows = [judged('', 1.0, 2.0, 's', target) for target in ('<= 0.5', '<= 0.49', '>= 0.5', '>= 0.51', '')]\n"
        "print([row['met'] for row in rows], {row['ratio'] for row in rows})"
    )
    done = run("-c", code)
    assert done.stdout.strip() == "[True, False, True, False, None] {0.5}", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_runs_quickly_and_keeps_nothing(name):
    before = sorted((PROJECT / "benchmarks/results").glob("*"))
    done = run(f"benchmarks/{name}", "--quick", timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert sorted((PROJECT / "benchmarks/results").glob("*")) == before


def test_make_bench_runs_the_others_when_one_fails_and_ends_in_failure(tmp_path):
    """The recipe as it stands, over a folder of two benchmarks and a table."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "a.py").write_text("raise SystemExit(1)")
    (folder / "b.py").write_text("print('b ran')")
    (folder / "_table.py").write_text("print('the table')")
    text = (PROJECT / "Makefile").read_text().replace("bench: setup", "bench:")
    (tmp_path / "Makefile").write_text(text.replace("export PATH := $(BIN):$(PATH)", ""))
    (tmp_path / "requirements.lock").touch()
    (tmp_path / "pyproject.toml").touch()
    paths = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["make", "bench"], cwd=tmp_path, env=paths, capture_output=True, text=True)
    assert done.returncode != 0
    assert "b ran" in done.stdout and "the table" in done.stdout
    assert "failed: a\n" in done.stderr
    only = subprocess.run(["make", "bench", "ONLY=b"], cwd=tmp_path, env=paths, capture_output=True, text=True)
    assert only.returncode == 0 and "b ran" in only.stdout and "== a" not in only.stdout
