"""Whoever does the tasks, in whatever order, and whoever dies: the same files, and one line where it cannot be."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import psutil
import pytest
from truth.engine_toy import Squarer, Squares
from truth.ray_nodes import ROOT, TwoNodes

from data_pipeline.engine.run import finish
from data_pipeline.engine.work import Work
from raphael.base.config.data import PipelineConfig, WorkerResources
from raphael.base.integrity.pieces import Pieces
from raphael.base.ray_cluster import token
from raphael.base.stage import Stage, StageError

TASKS = 12


@pytest.fixture
def root(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "settings.json").write_text('{"power": 2}')
    return tmp_path


def squares(root, pauses=(), faults=None):
    """12 tasks of one to four numbers. faults: task -> what befalls its worker."""
    for number in range(TASKS):
        numbers = tuple(range(number, number + 1 + number % 4))
        pause_s = pauses[number] if pauses else 0.0
        yield Squares(root / f"work/{number:03d}.txt", numbers, pause_s, **(faults or {}).get(number, {}))


def done(root, tasks=None, fault="", device="cpu", **pipeline):
    """Run all tasks; (what the report is told, the timings, the bar's end)."""
    stage = Stage("squares", root)
    pieces = Pieces(root / "work", "squares")
    toy = Work("squares", root, Squarer, (fault,), device)
    with stage.progress(None, "numbers") as bar:
        told = finish(PipelineConfig(**pipeline), toy, squares(root) if tasks is None else tasks, pieces, stage, bar)
        return told, stage.timings["engine"], bar.bar.n


def files(root):
    return {path.name: path.read_text() for path in sorted((root / "work").glob("[0-9]*.txt"))}


def processes():
    """Workers of ours that are still there."""
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


TRUTH = {
    f"{number:03d}.txt": "\n".join(str(n**2) for n in range(number, number + 1 + number % 4)) for number in range(TASKS)
}


def listed(root):
    """Name -> (bytes, xxh3) as the next run reads them."""
    return Pieces(root / "work", "squares").known


def test_a_stage_that_works_alone_needs_no_process_and_does_no_task_twice(root, monkeypatch):
    monkeypatch.chdir(root)
    told, timings, total = done(root)
    assert told == {"engine": "local"} and files(root) == TRUTH and total == sum(n % 4 + 1 for n in range(TASKS))
    assert (timings["workers"], timings["nodes"], timings["partitions"]) == (1, 1, TASKS)
    (root / "work/003.txt").write_text("damaged")
    (root / "work/005.txt").unlink()
    _, timings, again = done(root)
    assert files(root) == TRUTH and timings["partitions"] == 2 and again == total


@pytest.mark.parametrize(("workers", "seed"), [(2, 0), (3, 1)])
def test_processes_leave_the_same_files_whatever_the_order_and_whoever_is_killed(root, capfd, workers, seed):
    draw = random.Random(seed)
    pauses = [draw.choice((0.0, 0.05, 0.1)) for _ in range(TASKS)]
    faults = {0: {"dies": 1}, 7: {"dies": 2}}
    told, timings, total = done(root, squares(root, pauses, faults), workers=workers)
    assert told == {"engine": "local"} and files(root) == TRUTH and 1 <= timings["workers"] <= workers
    assert total == sum(n % 4 + 1 for n in range(TASKS)) and timings["partitions"] == TASKS
    assert capfd.readouterr().err.count("squares: a worker died (exit code -9); its task is done again") == 2
    hashes = listed(root)
    assert set(hashes) == set(TRUTH)
    fresh = Pieces(root / "work", "squares")
    assert all(fresh.has(root / "work" / name) for name in TRUTH), "hashed by the workers, compared here"
    assert not processes()


@pytest.mark.parametrize(
    ("faults", "fault", "words"),
    [
        ({5: {"dies": 99}}, "", r"workers died 3 times at 005.txt \(exit code -9; .* fewer pipeline.workers"),
        ({5: {"fails": "no room for squares; make room"}}, "", "^no room for squares; make room$"),
        ({5: {"fails": "bug"}}, "", "a worker failed; its message is above"),
        ({}, "dies", "workers died 3 times as they started"),
        ({}, "no such model; train it", "^no such model; train it$"),
    ],
)
def test_what_a_worker_cannot_do_is_one_line_and_what_is_finished_stays(root, capfd, faults, fault, words):
    with pytest.raises(StageError, match=words):
        done(root, squares(root, faults=faults), fault, workers=2)
    left = files(root)
    assert left.items() <= TRUTH.items() and (fault or len(left) >= 3)
    assert not processes()
    assert ("ZeroDivisionError: a bug of the toy" in capfd.readouterr().err) == (
        faults.get(5, {}).get("fails") == "bug"
    )


def test_tasks_are_taken_as_workers_become_free_and_for_none_no_process_is_started(root, monkeypatch):
    taken, most_ahead = [], 0

    def watched():
        nonlocal most_ahead
        for task in squares(root):
            taken.append(task)
            most_ahead = max(most_ahead, len(taken) - len(files(root)))
            yield task

    done(root, watched(), workers=2)
    assert len(taken) == TASKS and most_ahead <= 2 * 2
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process"))
    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", lambda self: pytest.fail("a process"))
    _, timings, _ = done(root, workers=2)
    assert (timings["workers"], timings["partitions"]) == (0, 0)


def test_workers_end_with_the_stage_that_is_killed(root):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", "import sys; from truth.engine_toy import forever; forever(sys.argv[1], 2)", root]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as running:
        until_s = time.monotonic() + 60
        while time.monotonic() < until_s and len(list((root / "work").glob("begun-*"))) < 2:
            time.sleep(0.1)
        workers = psutil.Process(running.pid).children(recursive=True)
        running.kill()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert len(workers) >= 2 and not alive, "each had a minute's task before it"
    assert not files(root)


def test_resources_of_a_stage_without_tasks_are_refused():
    with pytest.raises(ValueError, match="resources: got train, expected some of score, filter, captions, encode"):
        PipelineConfig(resources={"train": WorkerResources()})


@pytest.fixture
def ray_environment(monkeypatch):
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.slow
def test_ray_leaves_the_files_of_one_process_whoever_is_killed(root, ray_environment):
    faults = {0: {"dies": 1}, 7: {"dies": 2}}
    told, timings, _ = done(root, squares(root, [0.1] * TASKS, faults), engine="ray", workers=2)
    assert told == {"engine": "ray"} and files(root) == TRUTH
    assert timings["partitions"] == TASKS and timings["nodes"] == 1 and 1 <= timings["workers"] <= 2
    assert timings["starting_s"] > 0
    assert all(Pieces(root / "work", "squares").has(root / "work" / name) for name in TRUTH)
    (root / "work/003.txt").unlink()
    with pytest.raises(StageError, match="^no squares today$"):
        done(root, squares(root, faults={3: {"fails": "no squares today"}}), engine="ray", workers=1)
    with pytest.raises(StageError, match="asks 1 CPU and 1 GPU a worker, .* no machine .*: 2 CPU, 0 GPU"):
        done(root, device="cuda", engine="ray")


@pytest.mark.slow
def test_two_nodes_leave_the_same_files_when_one_of_them_is_lost(root, ray_environment):
    """The second node is killed while both work; its actor has nowhere to go, the other does its task."""
    with TwoNodes() as nodes:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token())

        def watched():
            for number, task in enumerate(squares(root, [0.3] * TASKS)):
                until_s = time.monotonic() + 120
                while number == 4 and len(list(root.glob("work/worker-*"))) < 2 and time.monotonic() < until_s:
                    time.sleep(0.1)
                if number == 8:
                    nodes.kill_second()
                yield task

        told, timings, _ = done(root, watched(), engine="ray", address=nodes.address, workers=2)
    assert told == {"engine": "ray"} and files(root) == TRUTH and timings["nodes"] == 2
