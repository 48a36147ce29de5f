"""Kills, full disks, damaged shards and dead servers: the same command again gives what an undisturbed run gives.

Tables, reports and records are compared byte for byte, tars by their members. Nothing temporary stays behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml
from truth.picture_workspace import SMALL, merge, small_preset

ROWS = 240
STAGES = ("select", "download", "filter", "captions", "encode")
OUTPUTS = {
    "select": "data/selected", "download": "data/shards", "filter": "data/filtered", "captions": "data/captions",
    "encode": "data/records",
}  # fmt: skip


def command(project: Path, stage: str, root: Path) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", f"data_pipeline.{stage}", "--params", str(root / "params.yaml")]
    return {"args": arguments, "env": environment, "start_new_session": True}


def finish(project: Path, stage: str, root: Path) -> float:
    """Run a stage to its end. Returns the seconds that it took."""
    started_s = time.monotonic()
    done = subprocess.run(**command(project, stage, root), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return time.monotonic() - started_s


@pytest.fixture(scope="session")
def undisturbed(project, tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """A workspace in which all data stages ran to their end, and the seconds of each."""
    root = tmp_path_factory.mktemp("undisturbed")
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["source"]["scenes"].update(num_rows=ROWS, bad_share=0.3, num_heldout_prompts=2)
    params["download"].update(shard_rows=40, timeout_s=1.0, deadline_s=20.0, retries=1, stall_s=120.0)
    for section, values in SMALL.items():
        merge(params[section], values)
    params["encode"]["batch_size"] = 2
    params["model"] = {"preset": small_preset(root, project)}
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    seconds = {}
    for stage in ("source", "select", "download", "filter", "captions", "fit_autoencoder", "fit_clip", "encode"):
        seconds[stage] = finish(project, stage, root)
    return root, seconds


def copy_without(root: Path, stage: str, target: Path) -> Path:
    """The workspace as it is before a stage runs."""
    shutil.copytree(root, target, symlinks=True)
    shutil.rmtree(target / OUTPUTS[stage])
    (target / f"reports/{stage}.json").unlink()
    return target


def content(root: Path, stage: str) -> dict[str, str]:
    """File -> digest of what a stage leaves: its outputs and its report; of a tar, its members' names and bodies."""
    found = {}
    for path in sorted([*(root / OUTPUTS[stage]).rglob("*"), root / f"reports/{stage}.json"]):
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                body = b"".join(member.name.encode() + tar.extractfile(member).read() for member in tar)
        elif path.is_file():
            body = path.read_bytes()
        else:
            continue
        found[path.relative_to(root).as_posix()] = hashlib.sha256(body).hexdigest()
    return found


def leftovers(root: Path, undisturbed: Path) -> set[str]:
    """Unfinished work, temporary names and progress of nobody, beyond what undisturbed runs keep on purpose (the chunks
    of `encode`, the trainings' checkpoints)."""

    def found(folder: Path) -> set[str]:
        places = [
            *(folder / "work").glob("*/*/**/*"),
            *(folder / "work/progress").glob("*"),
            *folder.rglob(".*.json.*"),
        ]
        return {path.relative_to(folder).as_posix() for path in places}

    return found(root) - found(undisturbed)


def kill_at_random(project: Path, stage: str, root: Path, rng: random.Random, seconds: float) -> bool:
    """Start a stage and kill its process group somewhere in its run. Returns whether it was still running."""
    with subprocess.Popen(**command(project, stage, root), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        try:
            run.wait(timeout=rng.uniform(0.15, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            return True
    return False


def killed_and_finished(project, undisturbed, stage: str, target: Path, kills: int, seed: int) -> None:
    root, seconds = undisturbed
    copy_without(root, stage, target)
    rng = random.Random(f"{stage} {seed}")
    hits = 0
    for _ in range(3 * kills):  # a run that ended before its kill does not count
        if hits == kills:
            break
        if kill_at_random(project, stage, target, rng, seconds[stage]):
            hits += 1
        elif (target / OUTPUTS[stage]).exists():
            shutil.rmtree(target / OUTPUTS[stage])
    finish(project, stage, target)
    assert hits, "no run was killed"
    assert content(target, stage) == content(root, stage)
    assert not leftovers(target, root)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_three_times_ends_in_the_same_bytes(project, undisturbed, tmp_path, stage):
    killed_and_finished(project, undisturbed, stage, tmp_path / "ws", kills=3, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_ten_times_ends_in_the_same_bytes(project, undisturbed, tmp_path, stage):
    killed_and_finished(project, undisturbed, stage, tmp_path / "ws", kills=10, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ("select", "filter", "captions", "encode"))
def test_a_full_disk_is_one_clear_line_and_the_same_command_goes_on(project, undisturbed, tmp_path, stage):
    """The disk is a limit on the size of a file: writing past it fails as it does on a full one."""
    root, _ = undisturbed
    copy_without(root, stage, tmp_path / "ws")

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with EFBIG instead of killing
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))

    run = subprocess.run(
        **command(project, stage, tmp_path / "ws"), preexec_fn=small_disk, capture_output=True, text=True, timeout=500
    )
    errors = [line for line in run.stderr.splitlines() if line.startswith(f"{stage}: error:")]
    assert run.returncode == 1 and len(errors) == 1 and "Traceback" not in run.stderr, run.stderr
    assert not (tmp_path / "ws" / OUTPUTS[stage]).exists() or not any((tmp_path / "ws" / OUTPUTS[stage]).iterdir())
    finish(project, stage, tmp_path / "ws")
    assert content(tmp_path / "ws", stage) == content(root, stage)
    assert not leftovers(tmp_path / "ws", root)


@pytest.mark.slow
def test_shards_that_are_cut_or_stand_twice_are_noticed_and_a_new_download_mends_them(project, undisturbed, tmp_path):
    root, _ = undisturbed
    target = tmp_path / "ws"
    shutil.copytree(root, target)
    shards = target / "data/shards"
    tar = shards / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:-20_000])
    refused = subprocess.run(**command(project, "encode", target), capture_output=True, text=True, timeout=300)
    assert refused.returncode == 1 and "00001" in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
    shutil.copy(shards / "00000.tar", shards / "00099.tar")
    shutil.copy(shards / "00000.parquet", shards / "00099.parquet")
    refused = subprocess.run(**command(project, "filter", target), capture_output=True, text=True, timeout=300)
    assert refused.returncode == 1 and "not whole; run the stage download again" in refused.stderr, refused.stderr
    shutil.rmtree(shards)
    for stage in ("download", "filter", "captions", "encode"):
        finish(project, stage, target)
        assert content(target, stage) == content(root, stage)


@pytest.mark.slow
def test_a_picture_server_that_is_dead_stops_the_download_and_the_next_run_fetches_all(project, undisturbed, tmp_path):
    root, _ = undisturbed
    target = copy_without(root, "download", tmp_path / "ws")
    params = yaml.safe_load((target / "params.yaml").read_text())
    alive = json.dumps(params)
    params["download"]["local_host"] = ""  # then nobody answers for scenes.invalid
    (target / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    dead = subprocess.run(**command(project, "download", target), capture_output=True, text=True, timeout=300)
    assert dead.returncode == 1 and "0.0% of the first" in dead.stderr and "Traceback" not in dead.stderr, dead.stderr
    assert not (target / "data/shards").exists()
    (target / "params.yaml").write_text(alive)
    finish(project, "download", target)
    assert content(target, "download") == content(root, "download")
    assert not leftovers(target, root)
