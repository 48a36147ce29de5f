import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from truth import toy_training
from truth.toy_training import LOOP, ToyData, ToyObjective, fingerprint

from raphael.base.checkpoint.folder import CheckpointError
from raphael.base.checkpoint.home import CheckpointHome
from raphael.train.loop import Hooks, TrainingError, World, _mean_over_ranks, train
from raphael.train.state import State

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def toy(folder, objective=None, loop=LOOP, **hooks):
    objective = objective or ToyObjective()
    points = []
    hooks = Hooks(
        on_log=lambda point, images: points.append((images, point)), say=hooks.pop("say", lambda _: None), **hooks
    )
    return objective, train(objective, ToyData(), loop, 7, folder=folder, hooks=hooks), points


class Stop(Exception):
    pass


def stop_at(images):
    def progress(seen):
        if seen == images:
            raise Stop

    return progress


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    objective, result, _ = toy(folder)
    return {"files": fingerprint(folder), "result": result, "weights": objective.state_dict()}


def child(folder, *arguments, attempt=0):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "TOY_ATTEMPT": str(attempt),
    }
    command = [sys.executable, toy_training.__file__, str(folder), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_loss_falls_and_every_point_is_there(whole):
    history = whole["result"]["history"]
    assert [point["images"] for point in history] == list(range(40, 481, 40))
    assert history[-1]["train/loss"] < history[0]["train/loss"] < 1.5
    assert {"train/error", "train/load/0", "train/load/2", "train/gradient_norm", "train/learning_rate"} <= history[
        0
    ].keys()


@pytest.mark.parametrize("stopped", [8, 96, 104, 200, 472])
def test_stopped_and_resumed_is_the_same_as_in_one_go_to_the_last_bit(tmp_path, whole, stopped):
    with pytest.raises(Stop):
        toy(tmp_path, progress=stop_at(stopped))
    objective, result, points = toy(tmp_path)
    assert fingerprint(tmp_path) == whole["files"]
    assert result["history"] == whole["result"]["history"]
    for name, tensor in objective.state_dict().items():
        assert torch.equal(tensor, whole["weights"][name]), name
    for name, tensor in result["ema"].items():
        assert torch.equal(tensor, whole["result"]["ema"][name]), name


def test_killed_at_any_moment_and_resumed_is_the_same_to_the_last_bit(tmp_path, whole):
    process = child(tmp_path, 232, int(signal.SIGKILL))
    assert process.wait(300) == -signal.SIGKILL
    toy(tmp_path / "checkpoints")
    assert fingerprint(tmp_path / "checkpoints") == whole["files"]


def test_sigterm_saves_and_leaves_with_143_and_the_resumed_run_is_the_same(tmp_path, whole):
    process = child(tmp_path, 232, int(signal.SIGTERM))
    out, error = process.communicate(timeout=300)
    assert process.returncode == 143, error
    assert "checkpoint at 232 images" in out
    assert [path.name for path in CheckpointHome(tmp_path / "checkpoints").all()][-1] == "000000000232"
    toy(tmp_path / "checkpoints")
    assert fingerprint(tmp_path / "checkpoints") == whole["files"]


def test_ctrl_c_saves_and_is_passed_on(tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path, progress=lambda seen: os.kill(os.getpid(), signal.SIGINT) if seen == 48 else None)
    assert [path.name for path in CheckpointHome(tmp_path).all()] == ["000000000048"]
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_finished_training_is_only_read_again(tmp_path, whole):
    toy(tmp_path)
    objective, result, points = toy(tmp_path, progress=stop_at(8))
    assert points == [] and result["history"] == whole["result"]["history"]
    assert torch.equal(objective.head.weight, whole["weights"]["head.weight"])


def test_points_are_logged_once_across_a_restart(tmp_path):
    seen = []
    for stop in (200, None):
        try:
            toy_hooks = stop_at(stop) if stop else (lambda _: None)
            _, _, points = toy(tmp_path, progress=toy_hooks)
            seen += points
        except Stop:
            history = CheckpointHome(tmp_path).newest()[1]["history"]
            seen += [(point["images"], point) for point in history]
    assert [images for images, _ in seen] == list(range(40, 481, 40))


def world_of_two(folder, *arguments, attempt=0):
    ranks = [child(folder, *(arguments if rank == 0 else (0, 9)), 2, rank, attempt=attempt) for rank in (0, 1)]
    if arguments[0]:
        assert ranks[0].wait(300) == -signal.SIGKILL
        ranks[1].kill()
        ranks[1].wait(300)
    else:
        for rank in ranks:
            _, error = rank.communicate(timeout=300)
            assert rank.returncode == 0, error


def newest(folder):
    return CheckpointHome(folder).newest()


@pytest.mark.slow
def test_two_workers_give_the_update_of_one_and_resume_to_the_last_bit(tmp_path, whole):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    world_of_two(tmp_path / "whole", 0, 9)
    groups, meta = newest(tmp_path / "whole" / "checkpoints")
    # the same update as one worker, to rounding, after 60 steps; some slices of four samples leave an expert without
    # any
    for name, tensor in groups["model"].items():
        torch.testing.assert_close(tensor, whole["weights"][name], rtol=0, atol=2e-5, msg=name)
    for point, truth in zip(meta["history"], whole["result"]["history"], strict=True):
        assert point.keys() == truth.keys() and point["images"] == truth["images"]
        assert point["train/loss"] == pytest.approx(truth["train/loss"], rel=1e-5)
        assert point["train/load/1"] == pytest.approx(truth["train/load/1"], rel=1e-6)
        assert point["train/of_kind/1"] == pytest.approx(truth["train/of_kind/1"], rel=1e-5)
    world_of_two(tmp_path / "killed", 232, 9, attempt=0)
    world_of_two(tmp_path / "killed", 0, 9, attempt=1)
    assert fingerprint(tmp_path / "killed" / "checkpoints") == fingerprint(tmp_path / "whole" / "checkpoints")


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path):
    objective = ToyObjective()
    objective.poison = 17
    with pytest.raises(TrainingError, match=r"after \d+ images \(keys .*key017.*\n?") as caught:
        toy(tmp_path, objective)
    assert "\n" not in str(caught.value)
    assert all(torch.isfinite(tensor).all() for tensor in objective.state_dict().values())


def test_the_frozen_and_the_never_chosen_stay_as_they_were(whole):
    start = ToyObjective()
    for name in ("frozen.weight", "experts.3.weight"):
        assert torch.equal(whole["weights"][name], start.state_dict()[name])
    assert "frozen.weight" not in whole["result"]["ema"]


def test_images_are_generated_with_ema_and_with_last_weights_at_zero_at_the_pace_and_at_the_end(tmp_path, whole):
    objective = ToyObjective()
    drawn = {}

    def draw(images, weights):
        assert not objective.training
        drawn[images, weights] = objective.head.weight.detach().clone()

    _, result, _ = toy(tmp_path, objective, on_sample=draw, sample_weights=("ema", "raw"))
    assert list(drawn) == [(images, weights) for images in (0, 160, 320, 480) for weights in ("ema", "raw")]
    assert torch.equal(drawn[480, "ema"], result["ema"]["head.weight"])
    assert torch.equal(drawn[480, "raw"], objective.head.weight)
    assert not torch.equal(objective.head.weight, result["ema"]["head.weight"])
    assert torch.equal(objective.head.weight, whole["weights"]["head.weight"])  # drawing changed nothing


def test_a_mean_over_a_part_of_the_samples_is_that_of_the_samples_for_any_number_of_workers():
    """Against the plain mean of all samples of that part; the last part is empty, and one step is bad."""
    generator = torch.Generator().manual_seed(0)
    errors, parts = torch.rand(3, 8, generator=generator), torch.randint(0, 3, (3, 8), generator=generator)
    states = []
    for columns in (slice(0, 8), slice(0, 4), slice(4, 8)):
        state = State(ToyObjective(), LOOP, {})
        for error, part in zip(errors[:, columns], parts[:, columns], strict=True):
            inside = torch.nn.functional.one_hot(part, 4).float()
            outputs = {"x": (error[:, None] * inside).mean(0), "x.share": inside.mean(0)}
            state.add(outputs, torch.tensor(False))
        state.add({name: value * torch.nan for name, value in outputs.items()}, torch.tensor(True))
        states.append(state)
    alone, first, second = states

    class Two:
        size = 2

        def sum(self, flat):
            return flat + torch.cat([second.sums[name].reshape(-1) for name in sorted(second.sums)])

    one, two = _mean_over_ranks(alone, World()), _mean_over_ranks(first, Two())
    assert one.keys() == two.keys() == {"train/skipped", "train/x/0", "train/x/1", "train/x/2"}
    for part in range(3):
        truth = errors.double()[parts == part].mean()
        assert one[f"train/x/{part}"] == pytest.approx(float(truth), rel=1e-6)
        assert two[f"train/x/{part}"] == pytest.approx(float(truth), rel=1e-6)


def test_bf16_trains_and_keeps_weights_in_fp32(tmp_path):
    objective, result, _ = toy(tmp_path, loop=replace(LOOP, precision="bf16", num_images=160))
    assert objective.head.weight.dtype == torch.float32
    assert result["history"][-1]["train/loss"] < 1.5


def test_a_checkpoint_of_other_settings_or_another_shape_is_refused(tmp_path):
    with pytest.raises(Stop):
        toy(tmp_path, progress=stop_at(104))
    with pytest.raises(CheckpointError, match="made with loop.learning_rate 0.003, this training has 0.001"):
        toy(tmp_path, loop=replace(LOOP, learning_rate=1e-3))
    other = ToyObjective()
    other.head = torch.nn.Linear(6, 6, bias=False)
    with pytest.raises(CheckpointError, match="head.bias is only in the checkpoint"):
        toy(tmp_path, other)


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_end_is_the_same(tmp_path, whole):
    with pytest.raises(Stop):
        toy(tmp_path, progress=stop_at(200))
    damaged = CheckpointHome(tmp_path).all()[-1] / "optimizer.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    said = []
    toy(tmp_path, say=said.append)
    assert "optimizer.safetensors" in said[0] and "96 images" in said[1]
    assert fingerprint(tmp_path) == whole["files"]


def test_no_ema_means_the_weights_themselves(tmp_path):
    objective, result, _ = toy(tmp_path, loop=replace(LOOP, ema_decay=0.0, num_images=80))
    assert torch.equal(result["ema"]["head.weight"], objective.head.weight)
