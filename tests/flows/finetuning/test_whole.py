"""A fine-tuning as its user runs it: one command from a folder of photographs to a model, killed on the way or not."""

import os
import signal
import subprocess
import sys
import time

import pytest
from truth.own_images import sidecars
from truth.tiny_raphael import write_pipeline

from flows.workspace.folder import fingerprint
from raphael.base.checkpoint.folder import checkpoint_sha256
from raphael.base.stage import file_sha256

LEFT = ("ema.safetensors", "raw.safetensors", "heldout.json", "samples/000000.png", "samples/000640.png")
WAIT_S = 1500  # on a machine that does other work, too


def command(model, photos, space, *more):
    options = ["--from", str(model), "--data", str(photos), "--out", str(space), "--num-images", "640", *more]
    options += ["--prompt", "a red square on white", "--patience", "0"]
    options += ["--set", "train.num_workers=0", "--set", "generate.steps=2"]
    return [sys.executable, "-m", "raphael.cli", "train", *options]


def environment():
    found = {**os.environ, "OMP_NUM_THREADS": "1"}
    found.pop("MLFLOW_TRACKING_URI", None)
    return found


def run(words):
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def left(space, names):
    return {name: file_sha256(space / "models/raphael" / name) for name in names}


def lineage(space):
    """Name -> digest of what the runs of the workspace say that they read."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{space / 'mlflow.db'}")
    runs = client.search_runs([item.experiment_id for item in client.search_experiments()])
    inputs = [entry.dataset for found in runs for entry in found.inputs.dataset_inputs]
    return {data.name: data.digest for data in inputs}, len(runs)


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize(("more", "names"), [((), LEFT), (("--lora", "2"), (*LEFT, "lora.safetensors"))])
def test_killed_by_9_the_same_command_ends_in_the_bytes_of_a_run_that_was_left_alone(tmp_path, more, names):
    model, photos = write_pipeline(tmp_path / "model"), sidecars(tmp_path / "photos", 12)
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    run(command(model, photos, alone, *more))
    process = subprocess.Popen(
        command(model, photos, killed, *more),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + WAIT_S
    while not (checkpoints := list((killed / "work/train").glob("*/checkpoints/*"))) and time.monotonic() < until:
        assert process.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoints and not (killed / "models/raphael").exists(), "killed in the middle of its training"
    run(command(model, photos, killed, *more))
    assert left(killed, names) == left(alone, names)
    assert (killed / "sheet.png").is_file() and (killed / "losses.png").is_file()
    for space in (alone, killed):
        found, runs = lineage(space)
        assert runs == 1, "what goes on after a kill is the same run"
        assert checkpoint_sha256(model).startswith(found["base"]) and len(found["base"]) >= 16
        assert found["images"] == fingerprint(photos)[:36]
