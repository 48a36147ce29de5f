import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import nn
from truth import fault_toy
from truth.toy_training import LOOP, ToyData, ToyObjective, fingerprint

from raphael.base.checkpoint.folder import CheckpointError, read_checkpoint
from raphael.base.checkpoint.home import CheckpointHome
from raphael.base.config.params import load_config
from raphael.base.stage import StageError
from raphael.base.strict import ConfigError
from raphael.train.batches import Batches
from raphael.train.distributed.ray_trainer import Cluster
from raphael.train.faults import TrainingError
from raphael.train.loop import Hooks, World, train
from raphael.train.optim.optimizer import make_optimizer

ROOT = Path(__file__).parents[2]
PATIENT = replace(LOOP, max_bad_steps=3)
FIRST_BATCH = Batches(7, len(ToyData()), LOOP.batch_size).everyone(0)[1].tolist()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def toy(folder, loop=PATIENT, poison=None, objective=None, data=None, **hooks):
    objective = objective or ToyObjective()
    objective.poison = poison
    said = []
    hooks = Hooks(say=said.append, **hooks)
    result = train(objective, data or ToyData(), loop, 7, folder=folder, hooks=hooks)
    return objective, result, said


class Stop(Exception):
    pass


def stop_at(images):
    def progress(seen):
        if seen == images:
            raise Stop

    return progress


def test_a_bad_step_changes_no_weight_is_counted_and_its_batch_is_kept(tmp_path):
    loop, at = replace(PATIENT, num_images=16, log_every_images=8, ema_decay=0.0), {}
    objective = ToyObjective()

    def progress(images):
        at[images] = {name: tensor.clone() for name, tensor in objective.state_dict().items() if name != "calls"}

    _, result, said = toy(tmp_path, loop, FIRST_BATCH[0], objective, progress=progress)
    start = ToyObjective().state_dict()
    assert all(torch.equal(at[8][name], start[name]) for name in at[8])
    assert not torch.equal(at[16]["head.weight"], start["head.weight"])
    assert result["history"][0].keys() == {"images", "train/skipped", "train/learning_rate"}
    assert [point["train/skipped"] for point in result["history"]] == [1, 0] and "train/loss" in result["history"][1]
    (line,) = [line for line in said if "skipped a step" in line]
    file = tmp_path / "bad_batches" / "000000000000.safetensors"
    assert str(file) in line and f"key{FIRST_BATCH[0]:03d}" in line and "\n" not in line
    stored = load_file(file)
    assert set(stored["indices"]) == set(FIRST_BATCH)
    np.testing.assert_array_equal(stored["x"], ToyData().x[stored["indices"]])
    with safe_open(file, "np") as opened:
        assert opened.metadata()["keys"].split("\n") == [f"key{index:03d}" for index in stored["indices"]]


def test_means_are_over_the_good_steps(tmp_path):
    """An interval of five steps of which one is bad: the mean of the other four, logged one by one."""
    loop = replace(PATIENT, num_images=40)
    poison = int(Batches(7, len(ToyData()), 8).everyone(2)[1][0])
    _, together, _ = toy(tmp_path / "together", loop, poison)
    _, single, _ = toy(tmp_path / "single", replace(loop, log_every_images=8), poison)
    good = [point["train/loss"] for point in single["history"] if "train/loss" in point]
    assert len(good) == 4 and together["history"][0]["train/skipped"] == 1
    assert together["history"][0]["train/loss"] == pytest.approx(np.mean(good), rel=1e-6)


class AllBad(ToyObjective):
    def forward(self, batch, rng):
        outputs = super().forward(batch, rng)
        bad = self.calls > 10
        return {**outputs, "loss": outputs["loss"] * torch.where(bad, torch.nan, 1.0)}


def test_so_many_in_a_row_end_the_training_with_a_line_that_names_the_file(tmp_path):
    with pytest.raises(TrainingError) as caught:
        toy(tmp_path, objective=AllBad())
    line = str(caught.value)
    assert "\n" not in line and "the loss is not finite in the batch after 96 images" in line
    assert "bad step 3 in a row" in line and (tmp_path / "bad_batches" / "000000000096.safetensors").is_file()
    assert sorted(path.name for path in (tmp_path / "bad_batches").iterdir()) == [
        f"{images:012d}.safetensors" for images in (80, 88, 96)
    ]


def test_bad_steps_apart_from_each_other_do_not_end_it_and_a_resumed_run_is_the_same(tmp_path):
    _, result, said = toy(tmp_path / "whole", poison=17)
    epochs = LOOP.num_images / 50
    assert sum(point["train/skipped"] for point in result["history"]) == pytest.approx(epochs, abs=1)
    assert len([line for line in said if "skipped a step" in line]) >= 9
    with pytest.raises(Stop):
        toy(tmp_path / "parts", poison=17, progress=stop_at(208))
    toy(tmp_path / "parts", poison=17)
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


def test_bad_steps_in_a_row_are_counted_across_a_restart(tmp_path):
    loop = replace(PATIENT, checkpoint_every_images=8)
    with pytest.raises(Stop):
        toy(tmp_path, loop, objective=AllBad(), progress=stop_at(96))  # two bad steps, the second in no checkpoint
    assert CheckpointHome(tmp_path).newest()[1]["bad_in_row"] == 1
    with pytest.raises(TrainingError, match="after 96 images .*bad step 3 in a row"):
        toy(tmp_path, loop, objective=AllBad())


class Spiky(ToyObjective):
    """Every 20th loss is 100 times as large."""

    def forward(self, batch, rng):
        outputs = super().forward(batch, rng)
        return {**outputs, "loss": outputs["loss"] * (100 if self.calls % 20 == 0 else 1)}


def test_a_spike_is_skipped_where_asked_for_and_a_resumed_run_is_the_same(tmp_path):
    loop = replace(PATIENT, spike_factor=10.0)
    _, result, said = toy(tmp_path / "whole", loop, objective=Spiky())
    assert sum(point["train/skipped"] for point in result["history"]) == 3  # steps 20, 40, 60
    assert len([line for line in said if "above 10 running medians" in line]) == 3
    with pytest.raises(Stop):
        toy(tmp_path / "parts", loop, objective=Spiky(), progress=stop_at(208))
    toy(tmp_path / "parts", loop, objective=Spiky())
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")
    _, result, _ = toy(tmp_path / "off", objective=Spiky())
    assert sum(point["train/skipped"] for point in result["history"]) == 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_masked_update_of_a_device_is_the_one_left_out_on_a_cpu(name):
    """What a GPU does without looking: a bad step leaves weights and moments alone, the steps around it are as ever."""
    loop = replace(LOOP, optimizer=name, weight_decay=0.1)

    def run(masked):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(40, 36), nn.Linear(36, 5))
        optimizer = make_optimizer(module, loop)
        for step in range(4):
            optimizer.zero_grad()
            module(torch.full((3, 40), 0.1 * step)).square().sum().backward()
            bad = step in (1, 3)
            if bad:
                module[0].weight.grad[0, 0] = torch.nan
            if masked:
                optimizer.masked_step(torch.tensor(bad))
            elif not bad:
                optimizer.step(torch.tensor(False))
        return module, [optimizer.moments(parameter) for parameter in module.parameters()]

    (masked, masked_moments), (left_out, moments) = run(True), run(False)
    for one, other in zip(masked.parameters(), left_out.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(masked_moments, moments, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device"),  # of blocks, and of inodes
        (errno.EDQUOT, "Disk quota exceeded"),
        (errno.EIO, "Input/output error"),
        (errno.EROFS, "Read-only file system"),  # what a kernel makes of a disk that failed
    ],
)
def test_a_disk_that_is_full_or_fails_stops_with_a_line_and_the_checkpoint_before_is_whole(
    tmp_path, monkeypatch, number, words
):
    real, calls = os.fsync, []

    def full(descriptor):
        if (tmp_path / "000000000096").exists():
            calls.append(descriptor)
        if len(calls) > 3:  # a checkpoint brings more files and folders than that to disk, the last of the first is one
            raise OSError(number, os.strerror(number))
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError) as caught:
            toy(tmp_path)
    line = str(caught.value)
    assert "\n" not in line and f"000000000192: the checkpoint cannot be written ({words})" in line
    assert "GB are free" in line and f"resumes from {tmp_path / '000000000096'}, which is whole" in line
    assert [path.name for path in tmp_path.iterdir()] == ["000000000096"]
    read_checkpoint(tmp_path / "000000000096")
    toy(tmp_path)
    toy(tmp_path.with_name("whole"))
    assert fingerprint(tmp_path) == fingerprint(tmp_path.with_name("whole"))


def test_a_file_that_may_not_grow_is_one_line_too(tmp_path, monkeypatch):
    """The kernel's own refusal, inside safetensors' Rust: no OSError there."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be written .*resumes from the start"):
            toy(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"log_every_images": 80}, {"checkpoint_every_images": 48}, {"sample_every_images": 0}, {"max_bad_steps": 9},
    ],
)  # fmt: skip
def test_the_pace_may_change_between_a_checkpoint_and_its_resumption(tmp_path, changes):
    with pytest.raises(Stop):
        toy(tmp_path / "parts", progress=stop_at(200))
    changed, _, _ = toy(tmp_path / "parts", replace(PATIENT, **changes))
    whole, _, _ = toy(tmp_path / "whole")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(changed.state_dict()[name], tensor), name


def test_more_images_are_allowed_fewer_are_not_and_at_a_constant_rate_it_is_as_in_one_go(tmp_path):
    constant = replace(PATIENT, schedule="constant", num_images=240)
    toy(tmp_path / "parts", constant)
    longer, _, said = toy(tmp_path / "parts", replace(constant, num_images=480))
    assert "loop.num_images was raised from 240 to 480 after 240 images" in said
    whole, _, _ = toy(tmp_path / "whole", replace(constant, num_images=480))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(longer.state_dict()[name], tensor), name
    meta = CheckpointHome(tmp_path / "parts").newest()[1]
    assert meta["extended"] == [{"at_images": 240, "from": 240, "to": 480}]
    with pytest.raises(CheckpointError, match="made with loop.num_images 480, this training has 240, expected"):
        toy(tmp_path / "parts", constant)
    toy(tmp_path / "cosine", replace(PATIENT, num_images=240))
    _, _, said = toy(tmp_path / "cosine")
    assert any("the rate follows the longer schedule from here" in line for line in said)


def test_a_checkpoint_keeps_a_hash_of_what_decides_and_refuses_another_objective(tmp_path):
    def with_settings(**settings):
        objective = ToyObjective()
        objective.settings = settings
        return objective

    toy(tmp_path, replace(PATIENT, num_images=96), objective=with_settings(noise=1.0, deep={"depth": 2}))
    meta = CheckpointHome(tmp_path).newest()[1]
    assert len(meta["config_sha256"]) == 64 and meta["facts"]["objective"]["deep"]["depth"] == 2
    with pytest.raises(CheckpointError, match="made with objective.deep.depth 2, this training has 3"):
        toy(tmp_path, objective=with_settings(noise=1.0, deep={"depth": 3}))


@pytest.mark.parametrize(("rank", "size"), [(0, 0), (2, 2)])
def test_a_world_without_this_worker_is_refused(rank, size):
    with pytest.raises(ValueError, match=f"got worker {rank} of {size}, expected at least one worker, counted from"):
        World(rank, size)


def test_no_ray_worker_at_all_is_refused():
    with pytest.raises(StageError, match="train.num_workers: got 0 Ray workers, expected at least 1; 0 in params.yaml"):
        Cluster(0, False, "x", Path("/"))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"num_workers": 3}, "train: loop.batch_size: got 16 for 3 workers, expected a multiple of num_workers"),
        (
            {"settings": {"balance": "loss_free"}, "parallel": {"micro_batch": 4}},
            "train.parallel.micro_batch: got 4 with train.settings.balance loss_free, expected 0",
        ),
        ({"loop": {"spike_factor": 0.5}}, "train.loop: spike_factor: got 0.5, expected 0 .off. or above 1"),
        ({"parallel": {"strategy": "fsdp"}}, "train.parallel.strategy: got 'fsdp', expected one of ddp, fsdp2"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path, section, message):
    import yaml
    from truth.training_workspace import merge

    settings = merge(yaml.safe_load((ROOT / "params.yaml").read_text()), {"train": section})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)


def test_a_gpu_that_is_not_there_is_named_at_once(monkeypatch):
    from raphael.systems.train_stage import check_machine

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config(ROOT / "params.yaml")

    def with_gpu(workers):
        return replace(config, train=replace(config.train, use_gpu=True, num_workers=workers))

    check_machine(with_gpu(0))
    check_machine(with_gpu(1))
    with pytest.raises(
        StageError, match="train.use_gpu: got true with 2 workers, but torch .* sees 1 GPUs here"
    ) as caught:
        check_machine(with_gpu(2))
    assert "\n" not in str(caught.value)


def test_only_what_decides_the_weights_begins_another_training():
    from raphael.systems.raphael.training import decisive

    config = load_config(ROOT / "params.yaml")

    def changed(loop=None, **train):
        return decisive(
            replace(config, train=replace(config.train, loop=replace(config.train.loop, **(loop or {})), **train))
        )

    same = decisive(config)
    assert changed(num_workers=4) == changed(use_gpu=True) == changed({"log_every_images": 7}) == same
    assert changed(parallel=replace(config.train.parallel, strategy="fsdp2")) == same
    assert changed({"learning_rate": 1e-5}) != same
    own = config.train.settings
    assert changed(settings={**own, "edge_weight": 0.5}) != same == changed(settings={**own, "num_probe": 1})
    assert (
        changed(sample_prompts=("a star",)) == changed(num_sample_prompts=1) == changed(sample_weights=("raw",)) == same
    )
    assert changed({"spike_factor": 10.0}) != same, "which step is left out decides what the weights become"
    held = {"num_heldout": 8, "patience": 3}
    often, seldom = ({"heldout_every_images": images} for images in (64, 128))
    assert changed(often, **held) != changed(seldom, **held), "measured at other places, it may end at another"
    assert changed(often, num_heldout=8, patience=0) == changed(seldom, num_heldout=8, patience=0)
    assert changed({"num_images": 10**6}) != same  # a cosine over more images is another rate from the first step on
    assert changed({"num_images": 10**6, "schedule": "constant"}) == changed({"schedule": "constant"})


def two_workers(folder, kind):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, fault_toy.__file__, str(folder), kind]
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=550)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "blame"),
    [
        ("stopped", r"worker 1 \(stopped or dead: silent for \d+ s, last \w+"),
        ("hung", r"worker 1 \(hangs: reading its batch after 40 images\)"),
        ("killed", r"worker 1 \(stopped or dead: silent for \d+ s, last \w+"),
    ],
)
def test_a_worker_that_does_not_answer_is_named_within_the_limit(tmp_path, kind, blame):
    done = two_workers(tmp_path, kind)
    assert done.returncode == 0, done.stderr
    import re

    line, seconds = (tmp_path / "line").read_text(), float((tmp_path / "seconds").read_text())
    assert re.search(blame, line), line
    assert line.startswith("worker 0 waited") and "\n" not in line
    assert seconds < 3 * fault_toy.LIMIT_S + 5 and (kind == "killed" or seconds >= fault_toy.LIMIT_S)


@pytest.mark.slow
def test_a_bad_step_of_one_rank_is_skipped_by_both(tmp_path):
    done = two_workers(tmp_path, "poisoned")
    assert done.returncode == 0, done.stderr
    groups, meta = CheckpointHome(tmp_path / "checkpoints").newest()
    alone, result, _ = toy(tmp_path / "alone", replace(PATIENT, num_images=80, spike_factor=50.0), poison=17)
    assert sum(point["train/skipped"] for point in meta["history"]) == 2
    for name, tensor in groups["model"].items():
        torch.testing.assert_close(tensor, alone.state_dict()[name], rtol=0, atol=2e-5, msg=name)
