from dataclasses import replace

import numpy as np
import pytest
import torch
from truth.training_workspace import write_workspace

from raphael.checkpoint import CheckpointError, checkpoint_sha256, write_checkpoint
from raphael.config import LoopConfig
from raphael.net.unet import UNet
from raphael.randomness import SampleRng
from raphael.stage import StageError
from raphael.strict import ConfigError, to_dict
from raphael.train.denoiser import Folders, build_denoising, patience
from raphael.train.loop import Hooks, train
from raphael.train.start import Patience

LOOP = {
    "num_images": 48,
    "batch_size": 8,
    "optimizer": "adamw",
    "warmup_images": 0,
    "schedule": "constant",
    "ema_decay": 0.0,
    "precision": "fp32",
    "log_every_images": 8,
    "checkpoint_every_images": 1000,
    "sample_every_images": 0,
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(config, folders, weights) of a training that begins with a checkpoint of random weights, none of them zero."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("begun")
    config = write_workspace(root / "workspace", {"train": {"num_workers": 0, "caption_drop": 0.0, "loop": LOOP}})
    preset = config.model.load()
    torch.manual_seed(5)
    unet = UNet(preset.unet)
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    meta = {"unet": to_dict(preset.unet), "diffusion": to_dict(preset.diffusion)}
    write_checkpoint(root / "model", {"ema": unet.state_dict()}, meta)
    init = {"init_from": str(root / "model"), "init_sha256": checkpoint_sha256(root / "model")[:16]}
    config = replace(config, train=replace(config.train, **init))
    return config, Folders.of(root / "workspace", root / "work"), unet.state_dict()


class OneKind:
    """The workspace's first record, again and again: data of one kind."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return 8

    def batch(self, indices):
        return {name: np.repeat(array, len(indices), 0) for name, array in self.records.batch(np.array([0])).items()}


def go_on(begun, folder, rate):
    config, folders, _ = begun
    objective, records = build_denoising(config, folders)
    data = OneKind(records)

    def loss():
        objective.eval()
        batch = {name: torch.from_numpy(array) for name, array in data.batch(np.arange(8)).items()}
        with torch.no_grad():
            return float(objective(batch, SampleRng(99, np.zeros(8, int), np.arange(8)))["denoise"])

    before = loss()
    loop: LoopConfig = replace(config.train.loop, learning_rate=rate)
    train(objective, data, loop, 0, folder=folder, hooks=Hooks(say=lambda _: None))
    return objective.unet.state_dict(), before, loss()


def test_a_training_begins_with_the_weights_of_its_checkpoint_and_keeps_them_at_a_rate_of_nothing(begun, tmp_path):
    weights, before, after = go_on(begun, tmp_path, 1e-12)
    for name, tensor in begun[2].items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-9)
    assert after == pytest.approx(before, rel=1e-5)


def test_data_of_one_kind_lowers_the_loss_on_it(begun, tmp_path):
    weights, before, after = go_on(begun, tmp_path, 1e-3)
    assert after < 0.9 * before
    assert any(not torch.equal(weights[name], tensor) for name, tensor in begun[2].items())


def test_another_checkpoint_another_noise_and_another_shape_are_one_line(begun, tmp_path):
    config, folders, weights = begun
    preset = config.model.load()

    def begin(**changes):
        build_denoising(replace(config, train=replace(config.train, **changes)), folders)

    with pytest.raises(StageError, match="got checkpoint .*, expected 0000000000000000; another model lies there"):
        begin(init_sha256="0" * 16)
    with pytest.raises(StageError, match="no such folder"):
        begin(init_from=str(tmp_path / "nowhere"))
    meta = {"diffusion": {**to_dict(preset.diffusion), "prediction": "eps"}}
    write_checkpoint(tmp_path / "eps", {"ema": weights}, meta)
    with pytest.raises(StageError, match="diffusion.prediction eps, this preset has v"):
        begin(init_from=str(tmp_path / "eps"), init_sha256=checkpoint_sha256(tmp_path / "eps"))
    write_checkpoint(tmp_path / "less", {"ema": {"a": torch.zeros(1)}}, {"diffusion": to_dict(preset.diffusion)})
    with pytest.raises(CheckpointError, match="expected the weights of a UNet of this shape"):
        begin(init_from=str(tmp_path / "less"), init_sha256=checkpoint_sha256(tmp_path / "less"))


def test_a_folder_without_its_hash_is_no_setting(begun, tmp_path):
    with pytest.raises(ValueError, match="init_sha256: got '' with init_from 'x', expected both or neither"):
        replace(begun[0].train, init_from="x", init_sha256="")
    with pytest.raises((ConfigError, ValueError)):
        replace(begun[0].train, init_from="", init_sha256="0" * 16)


def test_patience_counts_points_since_the_best_and_leaves_out_those_without_the_metric():
    enough = Patience("heldout/loss", 2)
    history = []
    for value, expected in ((3.0, False), (2.0, False), (2.5, False), (None, False), (2.1, True), (1.0, False)):
        history.append({"images": 0} if value is None else {"heldout/loss": value})
        assert enough(history) is expected
    assert not enough([])
    with pytest.raises(ValueError, match="patience: got 0 points"):
        Patience("heldout/loss", 0)


def test_a_training_ends_at_the_point_where_it_is_enough_and_a_resumed_one_stays_ended(begun, tmp_path):
    config, folders, _ = begun
    steps = []

    def run():
        objective, records = build_denoising(config, folders)
        hooks = Hooks(
            say=lambda _: None,
            progress=steps.append,
            enough=lambda history: len(history) == 2 and "images" in history[1],
        )
        return train(objective, OneKind(records), config.train.loop, 0, folder=tmp_path, hooks=hooks)

    assert run()["images"] == 16 and steps == [8, 16]
    assert run()["images"] == 16 and steps == [8, 16]


def test_patience_with_the_held_out_loss_ends_a_training_and_keeps_it_ended(begun, tmp_path):
    config, folders, _ = begun
    values, steps = iter([3.0, 2.0, 2.5, 2.1, 1.0, 1.0]), []
    loop = replace(config.train.loop, heldout_every_images=8, num_images=800)

    def run():
        objective, records = build_denoising(config, folders)
        hooks = Hooks(
            say=lambda _: None,
            progress=steps.append,
            heldout=lambda: {"denoise": next(values)},
            enough=Patience("heldout/raw/denoise", 2),
        )
        return train(objective, OneKind(records), replace(loop, ema_decay=0.0), 0, folder=tmp_path, hooks=hooks)

    assert [point["heldout/raw/denoise"] for point in run()["heldout"]] == [3.0, 2.0, 2.5, 2.1]
    assert steps == [8, 16, 24]
    assert run()["images"] == 24 and steps == [8, 16, 24]


def test_patience_asks_for_records_that_are_kept_out(begun):
    with pytest.raises(ValueError, match="patience: got 3 with num_heldout 0, expected 0"):
        replace(begun[0].train, patience=3)
    loop = replace(begun[0].train.loop, heldout_every_images=8)
    enough = patience(replace(begun[0].train, patience=3, num_heldout=4, loop=loop))
    assert (enough.metric, enough.points) == ("heldout/ema/denoise" if loop.ema_decay else "heldout/raw/denoise", 3)
    assert not patience(begun[0].train)([])
