import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from truth.training_workspace import ROOT, write_workspace

from raphael.base.checkpoint.folder import checkpoint_sha256, read_checkpoint
from raphael.base.checkpoint.home import CheckpointHome
from raphael.base.config.params import load_config
from raphael.base.stage import StageError
from raphael.systems.raphael.snapshot import snapshot
from raphael.systems.raphael.training import Folders, check_fit, sample_prompts

LOOP = {
    "num_images": 64, "batch_size": 8, "log_every_images": 16, "checkpoint_every_images": 16, "sample_every_images": 32,
    "warmup_images": 16, "heldout_every_images": 32, "ema_more_decays": [0.5],
}  # fmt: skip


def outputs(workspace):
    """sha256 of every byte that the stage publishes."""
    files = [
        path
        for folder in ("models/raphael", "reports")
        for path in sorted((workspace / folder).rglob("*"))
        if path.is_file()
    ]
    return {str(path.relative_to(workspace)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start(workspace, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.Popen(
        [sys.executable, "-m", "raphael.train"], cwd=workspace, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    write_workspace(folder, {"train": {"num_workers": 0, "num_heldout": 8, "loop": LOOP}})
    return folder


@pytest.fixture(scope="module")
def trained(template, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "workspace"
    shutil.copytree(template, folder)
    process = start(folder)
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    return folder, out


@pytest.mark.slow
def test_a_snapshot_of_the_newest_checkpoint_is_what_the_stage_would_publish(trained, tmp_path):
    folder, _ = trained
    before = outputs(folder)
    assert snapshot(folder, tmp_path / "out") == LOOP["num_images"]
    assert checkpoint_sha256(tmp_path / "out") == checkpoint_sha256(folder / "models/raphael")
    for part in ("autoencoder", "text_encoder"):
        assert sorted(path.name for path in (tmp_path / "out" / part).iterdir()) == sorted(
            path.name for path in (folder / "models/raphael" / part).iterdir()
        )
    assert outputs(folder) == before and [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(StageError, match="out: is there already"):
        snapshot(folder, tmp_path / "out")
    with pytest.raises(StageError, match="got 0 trainings with a checkpoint, expected one"):
        snapshot(tmp_path, tmp_path / "other")


@pytest.mark.slow
def test_the_stage_leaves_a_whole_pipeline_folder_and_a_report(trained):
    folder, out = trained
    model = folder / "models/raphael"
    groups, meta = read_checkpoint(model)
    assert set(groups) == {"ema", "ema_0.5", "raw"}
    assert groups["ema"].keys() == groups["ema_0.5"].keys() == groups["raw"].keys()
    heldout = json.loads((model / "heldout.json").read_text())
    assert [point["images"] for point in heldout] == [0, 32, 64] and "heldout/ema_0.5/denoise_t/3" in heldout[0]
    assert {"unet", "diffusion", "picture", "mean_over", "git_revision", "records_sha256", "images_seen"} <= set(meta)
    assert meta["images_seen"] == 64
    for folder_of_grids in (model / "samples", model / "samples/raw"):
        drawn = sorted(path.name for path in folder_of_grids.glob("*.png"))
        assert drawn == ["000000.png", "000032.png", "000064.png"]
    curves = json.loads((model / "curves.json").read_text())
    assert [point["images"] for point in curves] == [16, 32, 48, 64] and "train/edge" in curves[0]
    assert {"train/gate_entropy/space", "train/gate_entropy/time"} <= curves[0].keys()
    assert not any("images_per_s" in name or "memory" in name for name in curves[0])  # of this machine, not of this run
    assert (model / "autoencoder").is_dir() and (model / "text_encoder").is_dir()
    report = json.loads((folder / "reports/train.json").read_text())
    assert report["total"] == report["kept"] == 64 and report["parameters"] > 0
    assert any("space_load" in name for name in report["experts"])
    assert "64/64 images  loss" in out and "images/s" in out
    (home,) = folder.glob("work/train/*/checkpoints")
    _, state = CheckpointHome(home).newest()
    assert state["about"]["git_revision"] == meta["git_revision"]
    assert state["about"]["records_sha256"] == meta["records_sha256"] and len(state["facts"]["data_sha256"]) == 64
    assert state["about"]["config"]["train"]["loop"]["num_images"] == 64
    measured = {point["images"]: point["heldout/ema/denoise"] for point in heldout if point["images"]}
    best = min(measured, key=measured.get)
    assert CheckpointHome(home).best() == {
        "checkpoint": f"{best:012d}", "metric": "heldout/ema/denoise", "value": measured[best],
    }  # fmt: skip


@pytest.mark.slow
def test_two_ray_workers_that_share_the_weights_out_measure_and_draw_what_one_process_does(trained, tmp_path):
    parallel = {"strategy": "fsdp2", "checkpoint_activations": "blocks"}
    write_workspace(tmp_path, {"train": {"num_workers": 2, "num_heldout": 8, "parallel": parallel, "loop": LOOP}})
    process = start(tmp_path)
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0 and "2 workers (fsdp2) on cpu" in out, error
    model, alone = tmp_path / "models/raphael", trained[0] / "models/raphael"
    for point, expected in zip(
        *(json.loads((path / "heldout.json").read_text()) for path in (model, alone)), strict=True
    ):
        assert point == pytest.approx(expected, rel=0.02)
    for name in ("000000.png", "000032.png", "000064.png", "raw/000064.png"):
        drawn, expected = (np.asarray(Image.open(path / "samples" / name), float) for path in (model, alone))
        assert drawn.shape == expected.shape and np.abs(drawn - expected).mean() < 8, name


@pytest.mark.slow
def test_the_folder_generates_by_itself(trained, tmp_path):
    from raphael.generate.pipeline import RaphaelPipeline

    shutil.copytree(trained[0] / "models/raphael", tmp_path / "elsewhere")
    images = RaphaelPipeline.from_pretrained(tmp_path / "elsewhere")("a red circle", num_inference_steps=2).images
    assert images[0].size == (32, 32)


@pytest.mark.slow
def test_the_run_is_in_mlflow_with_its_model(trained):
    from raphael.base.tracking.tracker import connect

    folder, _ = trained
    (record,) = json.loads((folder / "work/mlflow_run.json").read_text()).values()
    client = connect(f"sqlite:///{folder}/mlflow.db")
    run = client.get_run(record["run_id"])
    assert run.info.status == "FINISHED" and run.data.params["train.loop.num_images"] == "64"
    steps = [point.step for point in client.get_metric_history(record["run_id"], "train/loss")]
    assert steps == [16, 32, 48, 64] and run.data.metrics["train/images_per_s"] > 0
    assert run.data.metrics["train/tflop_per_s"] > 0 and 0 <= run.data.metrics["train/loader_wait"] < 1
    assert {entry.dataset.name for entry in run.inputs.dataset_inputs} == {"records"}
    (model,) = client.search_registered_models()
    assert model.name == "raphael" and model.latest_versions[0].run_id == record["run_id"]


@pytest.mark.slow
def test_killed_and_started_again_it_ends_in_the_same_bytes_and_the_same_run(template, trained, tmp_path):
    folder = tmp_path / "workspace"
    shutil.copytree(template, folder)
    process = start(folder)
    deadline = time.monotonic() + 600
    while not list(folder.glob("work/train/*/checkpoints/[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "models/raphael").exists()
    process = start(folder)
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0 and "resuming from the checkpoint" in out, error
    assert outputs(folder) == outputs(trained[0])
    from raphael.base.tracking.tracker import connect

    client = connect(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("raphael").experiment_id])
    assert len(runs) == 1
    steps = [point.step for point in client.get_metric_history(runs[0].info.run_id, "train/loss")]
    assert steps == [16, 32, 48, 64]


def test_the_help_is_there_at_once():
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "raphael.train", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0 and "--params" in result.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert not loaded & {"torch", "ray", "mlflow", "numpy"}


def test_missing_inputs_are_named(tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    process = start(tmp_path)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1 and error.strip().startswith(
        "train: error: data/records: absent; run the stages before"
    )
    assert error.count("\n") == 1


def test_parts_that_do_not_fit_are_named(template):
    from raphael.base.records import Records

    config = load_config(template / "params.yaml")
    records = Records(template / "data/records")
    check_fit(config, records, config.model.load().unet.context_dim)
    with pytest.raises(StageError, match="unet.context_dim: got .* set it in the preset to 999"):
        check_fit(config, records, 999)
    records.facts = {"picture": {"sizes_px": [[8, 8]]}}
    with pytest.raises(StageError, match="got images of .* run encode again"):
        check_fit(config, records, config.model.load().unet.context_dim)


def test_a_preset_is_refused_when_no_record_is_nearly_as_large_as_what_it_is_meant_for(template, monkeypatch):
    from raphael.base.records import Records

    config, records = load_config(template / "params.yaml"), Records(template / "data/records")
    preset = config.model.load()
    (side, _), *_ = config.picture.sizes_px

    def check(sizes):
        monkeypatch.setattr(type(config.model), "load", lambda self: replace(preset, sizes_px=sizes))
        check_fit(config, records, preset.unet.context_dim)

    check(((4 * side, 4 * side),))
    check(((32 * side, 32 * side), (side, side)))
    with pytest.raises(
        StageError, match=rf"got images of {side}x\d+.*, expected some .* meant for, {8 * side}x{8 * side}"
    ):
        check(((8 * side, 8 * side), (32 * side, 8 * side)))


def test_grids_take_prompts_of_every_suite_in_turn(template):
    config = load_config(template / "params.yaml")
    prompts = sample_prompts(config, Folders.of(template, Path("work")).prompts)
    assert prompts == ["a cross", "a pair", "a star", "a row"][: config.train.num_sample_prompts]
