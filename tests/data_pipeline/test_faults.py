"""Kills, full disks, vanished workers, damaged shards, dead servers: the same command again gives what an undisturbed
run gives.

Tables, models, reports and records are compared byte for byte, tars by their members. Nothing temporary stays behind.
FAULTS_RESULT=file.json keeps what was survived, how often (benchmarks/results/data-faults-*.json).
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from truth.faulty_runs import (
    SOURCE_ROWS,
    STAGES,
    Tally,
    can_mount,
    change,
    command,
    content,
    copy_without,
    finish,
    killed_and_finished,
    leftovers,
    on_a_small_disk,
    run,
    write_settings,
)


@pytest.fixture(scope="session")
def undisturbed(project, tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """A workspace in which all data stages ran to their end, and the seconds of each."""
    root = tmp_path_factory.mktemp("undisturbed")
    write_settings(project, root)
    return root, {stage: finish(project, stage, root) for stage in STAGES}


@pytest.fixture(scope="session")
def drawn(project, tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """A workspace in which `source` alone ran, over rows enough for several processes."""
    root = tmp_path_factory.mktemp("drawn")
    write_settings(project, root, SOURCE_ROWS)
    return root, {"source": finish(project, "source", root)}


@pytest.fixture(scope="session")
def tally():
    return Tally(os.environ.get("FAULTS_RESULT"))


def check_kills(project, made, stage: str, target: Path, kills: int, tally: Tally) -> None:
    root, seconds = made
    hits = killed_and_finished(project, root, seconds[stage], stage, target, kills)
    assert hits == kills, "most runs ended before they could be killed"
    assert content(target, stage) == content(root, stage)
    assert not leftovers(target, root)
    tally.add(stage, f"kill -9 of the process group at random moments, {kills} in turn", kills)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_three_times_ends_in_the_same_bytes(project, request, tmp_path, stage, tally):
    made = request.getfixturevalue("drawn" if stage == "source" else "undisturbed")
    check_kills(project, made, stage, tmp_path / "ws", 3, tally)


@pytest.mark.soak
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_ten_times_ends_in_the_same_bytes(project, request, tmp_path, stage, tally):
    made = request.getfixturevalue("drawn" if stage == "source" else "undisturbed")
    check_kills(project, made, stage, tmp_path / "ws", 10, tally)


def one_clear_line(stage: str, stderr: str) -> None:
    errors = [line for line in stderr.splitlines() if line.startswith(f"{STAGES[stage].name}: error:")]
    assert len(errors) == 1 and "Traceback" not in stderr, stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_one_clear_line_and_the_same_command_resumes(project, undisturbed, tmp_path, stage, tally):
    """The disk is a tmpfs with room for half of what the stage writes."""
    if not can_mount():
        pytest.skip("no file system can be mounted here (unshare -rm): the limit on the size of a file is tested alone")
    root, _ = undisturbed
    target = copy_without(root, stage, tmp_path / "ws")
    written = sum(path.stat().st_size for path in (root / STAGES[stage].output).rglob("*") if path.is_file())
    done = on_a_small_disk(project, stage, target, max(4096, written // 2 // 4096 * 4096))
    assert done.stdout.split() == ["1", "0"], (done.stdout, done.stderr[-3000:])
    one_clear_line(stage, done.stderr)
    back = tmp_path / "ws.out"
    for name in ("first", "second"):
        (back / name).unlink()
    assert content(back, stage) == content(root, stage)
    assert not leftovers(back, root)
    tally.add(stage, "full disk (a tmpfs with room for half)")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ("select", "filter", "captions", "encode"))
def test_a_file_that_may_not_grow_is_one_clear_line_and_the_same_command_resumes(
    project, undisturbed, tmp_path, stage, tally
):
    """A limit on the size of a file: writing past it fails as it does on a full disk, and needs no rights."""
    root, _ = undisturbed
    copy_without(root, stage, tmp_path / "ws")

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with EFBIG instead of killing
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))

    done = run(project, stage, tmp_path / "ws", preexec_fn=small_files)
    assert done.returncode == 1
    one_clear_line(stage, done.stderr)
    output = tmp_path / "ws" / STAGES[stage].output
    assert not output.exists() or not any(output.iterdir())
    finish(project, stage, tmp_path / "ws")
    assert content(tmp_path / "ws", stage) == content(root, stage)
    assert not leftovers(tmp_path / "ws", root)
    tally.add(stage, "a limit on the size of a file")


@pytest.mark.slow
def test_a_cut_shard_and_one_that_stands_twice_are_noticed_and_a_new_download_mends_them(
    project, undisturbed, tmp_path, tally
):
    root, _ = undisturbed
    target = tmp_path / "ws"
    shutil.copytree(root, target)
    shutil.rmtree(target / "work")  # finished chunks know nothing of what lies in a tar now
    shards = target / "data/shards"
    tar = shards / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:-20_000])
    for stage in ("score", "encode"):
        refused = run(project, stage, target)
        assert refused.returncode == 1 and "00001" in refused.stderr, refused.stderr
        one_clear_line(stage, refused.stderr)
        tally.add(stage, "a truncated tar is refused by its name")
    shutil.copy(shards / "00000.tar", shards / "00099.tar")
    shutil.copy(shards / "00000.parquet", shards / "00099.parquet")
    for stage in ("score", "filter"):
        refused = run(project, stage, target)
        assert refused.returncode == 1 and "not whole; run the stage download again" in refused.stderr, refused.stderr
        tally.add(stage, "a shard that stands twice is refused")
    shutil.copy(shards / "00000.tar", shards / "00006.tar")  # in the place of the next, so that names run on
    shutil.copy(shards / "00000.parquet", shards / "00006.parquet")
    for name in ("00099.tar", "00099.parquet"):
        (shards / name).unlink()
    refused = run(project, "filter", target)
    assert refused.returncode == 1 and "00006" in refused.stderr, refused.stderr
    one_clear_line("filter", refused.stderr)
    shutil.rmtree(shards)
    for stage in ("download", "score", "filter", "captions", "encode"):
        finish(project, stage, target)
        assert content(target, stage) == content(root, stage)
    tally.add("download", "shards made anew after damage")


@pytest.mark.slow
def test_an_image_server_that_is_dead_stops_the_download_and_the_next_run_fetches_all(
    project, undisturbed, tmp_path, tally
):
    root, _ = undisturbed
    target = copy_without(root, "download", tmp_path / "ws")
    alive = (target / "params.yaml").read_text()
    change(target, "download", local_host="")  # then nobody answers for scenes.invalid
    dead = run(project, "download", target)
    assert dead.returncode == 1 and "0.0% of the first" in dead.stderr, dead.stderr
    one_clear_line("download", dead.stderr)
    assert not (target / "data/shards").exists()
    (target / "params.yaml").write_text(alive)
    finish(project, "download", target)
    assert content(target, "download") == content(root, "download")
    assert not leftovers(target, root)
    tally.add("download", "a dead image server")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize("stage", ["score", "encode"])
def test_a_worker_that_vanishes_changes_nothing(project, undisturbed, tmp_path, tally, stage, engine):
    """One of two workers is killed at its work; another does what it had in hand."""
    root, _ = undisturbed
    target = copy_without(root, stage, tmp_path / "ws")
    change(target, "pipeline", engine=engine, workers=2)
    with subprocess.Popen(**command(project, stage, target), stderr=subprocess.PIPE, text=True) as running:
        victim = worker_of(running, engine, patience_s=150)
        victim.kill()
        _, errors = running.communicate(timeout=300)
    assert running.returncode == 0, errors
    assert content(target, stage) == content(root, stage)
    assert not leftovers(target, root)
    tally.add(stage, f"a worker of the engine {engine} that vanishes")


def worker_of(running: subprocess.Popen, engine: str, patience_s: float) -> psutil.Process:
    """A process that holds a worker of ours, as soon as there is one."""
    until_s = time.monotonic() + patience_s
    while time.monotonic() < until_s and running.poll() is None:
        for process in psutil.Process(running.pid).children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if ("ray::TaskWorker" if engine == "ray" else "spawn_main") in title:
                return process
        time.sleep(0.02)
    raise AssertionError(f"no actor was seen (status {running.poll()})")
