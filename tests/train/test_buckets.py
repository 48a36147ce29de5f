"""Training on images of several shapes: the debug sizes, random encoders and records of two tiny buckets."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from truth import bucket_training
from truth.toy_training import fingerprint
from truth.training_workspace import ROOT, write_workspace

from raphael.base.checkpoint.home import CheckpointHome
from raphael.base.randomness import SampleRng
from raphael.base.records import EDGES, MOMENTS, Records
from raphael.systems.raphael.training import Folders, TrainingJob, build_denoising, sampling_parts
from raphael.train.loop import Hooks, train

SIZES = [[32, 32], [24, 40]]
COUNTS = {"32x32": 28, "24x40": 12}
LOOP = {
    "num_images": 80, "batch_size": 8, "log_every_images": 16, "checkpoint_every_images": 24, "sample_every_images": 0,
    "warmup_images": 16, "precision": "fp32",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("workspace")
    config = write_workspace(root, {"picture": {"sizes_px": SIZES}, "train": {"num_workers": 0, "loop": LOOP}}, COUNTS)
    return TrainingJob(config, Folders.of(root, root / "work"))


class Stop(Exception):
    pass


def run(job, folder, stop_at=None):
    """Train in `folder`; stop after so many images. (the loop's result, the shapes of the steps' latents)"""
    objective, records = build_denoising(job.config, job.folders)
    shapes = []
    objective.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0][MOMENTS].shape)))

    def progress(images):
        if images == stop_at:
            raise Stop

    hooks = Hooks(progress=progress, say=lambda _: None)
    loop = job.config.train.loop
    try:
        return train(objective, records, loop, job.config.train.seed, folder=folder, hooks=hooks), shapes
    except Stop:
        return None, shapes


def test_training_takes_the_buckets_in_turn_and_goes_on_after_a_stop_to_the_same_bits(job, tmp_path):
    whole, shapes = run(job, tmp_path / "whole")
    assert len(shapes) == 10 and shapes.count((8, 8, 8, 8)) == 7 and shapes.count((8, 8, 6, 10)) == 3  # 56 and 24 of 80
    _, before = run(job, tmp_path / "halves", stop_at=48)
    resumed, after = run(job, tmp_path / "halves")
    assert before == shapes[:6] and after == shapes[3:]  # from the checkpoint at 24 images
    assert resumed["history"] == whole["history"]
    assert fingerprint(tmp_path / "halves") == fingerprint(tmp_path / "whole")
    for name, weights in whole["ema"].items():
        assert torch.equal(resumed["ema"][name], weights), name


def test_the_losses_of_a_batch_have_the_same_names_and_shapes_in_every_bucket(job):
    objective, records = build_denoising(job.config, job.folders)
    outputs = []
    for start, (height, width) in zip((0, 28), SIZES, strict=True):
        arrays = records.batch(range(start, start + 4))
        assert arrays[MOMENTS].shape[2:] == (height // 4, width // 4) == arrays[EDGES].shape[1:]
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        outputs.append(objective(batch, SampleRng(0, 0, range(start, start + 4))))
        assert all(torch.isfinite(value).all() for value in outputs[-1].values())
    shapes = [{name: tuple(value.shape) for name, value in output.items()} for output in outputs]
    assert shapes[0] == shapes[1] and shapes[0]["loss"] == ()


@pytest.mark.slow
def test_two_workers_whose_steps_change_shape_train_what_one_trains(job, tmp_path):
    root = job.folders.records.parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, bucket_training.__file__, str(root), str(tmp_path / "two")]
    workers = [
        subprocess.Popen([*script, str(rank), "2"], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    one, _ = run(job, tmp_path / "one")
    for worker in workers:
        _, error = worker.communicate(timeout=540)
        assert worker.returncode == 0, error
    groups, meta = CheckpointHome(tmp_path / "two").newest()
    for point, expected in zip(meta["history"], one["history"], strict=True):
        # rounding turns a few argmax routes, and Muon works in bf16: loads and weights differ more than losses do
        assert point == pytest.approx(expected, rel=1e-2, abs=1e-2)
        losses = [f"train/{name}" for name in ("loss", "denoise", "edge")]
        assert [point[name] for name in losses] == pytest.approx([expected[name] for name in losses], rel=1e-4)
    for name, weights in one["ema"].items():
        torch.testing.assert_close(groups["ema"][name], weights, rtol=0, atol=3e-3)  # they moved by 2e-2


def test_it_draws_at_every_size_and_in_training_at_the_first(job):
    from raphael.diffusion.sampling import Sampling, generate_images

    objective, _ = build_denoising(job.config, job.folders)
    parts = sampling_parts(job, objective)
    assert parts.latent_shape == (4, 8, 8)
    for height, width in SIZES:
        sized = replace(parts, latent_shape=(4, height // 4, width // 4))
        pictures = generate_images(sized, ["a red circle"], [(0, 0)], Sampling(steps=2))
        assert pictures.shape == (1, height, width, 3)


def test_the_records_say_which_images_they_are_of(job):
    records = Records(job.folders.records)
    assert records.bucket_counts == (28, 12) and [bucket.name for bucket in records.buckets] == list(COUNTS)
