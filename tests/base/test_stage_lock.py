"""Two runs of one stage do not work in one workspace, whatever becomes of the first."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from raphael.base import stage_work
from raphael.base.stage import StageError, only_run

RUN = """
import sys, time
from pathlib import Path
from raphael.base.stage import main

def run(config, stage):
    print("began", flush=True)
    sys.stdin.read()
    Path(stage.root, "ended").touch()

raise SystemExit(main(sys.argv[1], run, "a toy", ["--params", sys.argv[2]]))
"""


def start(workspace: Path, name: str = "toy") -> subprocess.Popen:
    """A stage that says that it began and runs until its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", RUN, name, str(workspace / "params.yaml")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def workspace(tmp_path, project):
    (tmp_path / "params.yaml").write_text((project / "params.yaml").read_text())
    return tmp_path


def test_a_second_run_is_one_line_that_names_the_first_and_begins_once_that_is_killed(workspace):
    first = start(workspace)
    assert first.stdout.readline() == "began\n"
    out, error = start(workspace).communicate()
    said = re.fullmatch(
        r"toy: error: another run of toy is going on in this workspace \(process (\d+), since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\); wait for it, or end it first: .*\n", error
    )  # fmt: skip
    assert said and int(said[1]) == first.pid and "began" not in out and not (workspace / "ended").exists()
    first.send_signal(signal.SIGKILL)
    first.wait()
    third = start(workspace)
    assert "began" in third.communicate("")[0] and third.returncode == 0
    assert (workspace / "ended").exists()


def test_other_stages_and_other_workspaces_are_not_kept_out(workspace, tmp_path, project):
    other = tmp_path / "other"
    other.mkdir()
    (other / "params.yaml").write_text((project / "params.yaml").read_text())
    first = start(workspace)
    assert first.stdout.readline() == "began\n"
    others = [start(workspace, "other"), start(other)]
    assert [run.communicate("")[0] for run in others] == ["began\n"] * 2 and not any(run.returncode for run in others)
    first.communicate("")
    assert first.returncode == 0


def test_of_many_at_once_one_holds_the_lock_and_the_next_gets_it_after_an_error(tmp_path):
    inside, kept_out, barrier = [], [], threading.Barrier(8)

    def try_it():
        try:
            with only_run("toy", tmp_path):
                inside.append(1)
                barrier.wait()
        except StageError as error:
            kept_out.append(str(error))
            barrier.wait()

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert (len(inside), len(kept_out)) == (1, 7)
    assert all(f"process {os.getpid()}" in line or "just begun" in line for line in kept_out)
    with pytest.raises(ZeroDivisionError), only_run("toy", tmp_path):
        1 / 0  # noqa: B018
    with only_run("toy", tmp_path):
        pass


def test_a_process_of_another_machine_is_named_with_it_and_a_broken_file_names_nobody(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    with stage_work.only_run(lock, "toy"):
        for text, said in (
            ('{"pid": 7, "host": "node-2", "since": "2026-01-02 03:04:05"}', "process 7 on node-2, since 2026-01-02"),
            ("", "it has just begun"),
            ("[1]", "it has just begun"),
            ('{"pid"', "it has just begun"),
        ):
            lock.write_text(text)
            with pytest.raises(stage_work.OtherRun, match=said), stage_work.only_run(lock, "toy"):
                pass


def test_a_file_system_without_locks_is_said_and_stops_nobody(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with only_run("toy", tmp_path):
        pass
    assert "no locks on this file system" in capsys.readouterr().err
