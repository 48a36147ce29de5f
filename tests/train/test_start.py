from dataclasses import replace

import numpy as np
import pytest
import torch
from truth.training_workspace import write_workspace

from raphael.base.checkpoint.folder import CheckpointError, checkpoint_sha256, write_checkpoint
from raphael.base.config.params import LoopConfig, load_config
from raphael.base.randomness import SampleRng
from raphael.base.stage import StageError
from raphael.base.strict import ConfigError, to_dict
from raphael.net.condition import Condition
from raphael.net.moe.unet import RaphaelUNet
from raphael.systems.job import Folders
from raphael.systems.raphael.training import build_denoising
from raphael.systems.worker import patience
from raphael.train.loop import Hooks, train
from raphael.train.start import Patience, begin_from, workers_for

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
    config = write_workspace(
        root / "workspace", {"train": {"num_workers": 0, "settings": {"caption_drop": 0.0}, "loop": LOOP}}
    )
    preset = config.model.load()
    torch.manual_seed(5)
    unet = RaphaelUNet(preset.unet)
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


def test_a_network_with_the_input_of_mask_and_picture_begins_with_a_checkpoint_without_it(begun):
    config, _, weights = begun
    preset = config.model.load()
    unet = replace(preset.unet, inpainting=True, picture_channels=preset.unet.latent_channels + 1)
    network = RaphaelUNet(unet)
    begin_from(network, config.train, replace(preset, unet=unet))
    found = network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    assert not network.picture_in.weight.any()


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


def test_a_training_whose_network_reads_more_begins_with_what_its_checkpoint_computes(begun):
    config, folders, weights = begun
    old, preset = RaphaelUNet(config.model.load().unet).eval(), config.model.load()
    old.load_state_dict(weights)
    wide = replace(preset, unet=replace(preset.unet, picture_channels=2, vector_dim=3, level_embedding=True))
    unet = RaphaelUNet(wide.unet).eval()
    begin_from(unet, config.train, wide)
    generator, shape = torch.Generator().manual_seed(0), preset.unet
    x = torch.randn(2, shape.latent_channels, 8, 8, generator=generator)
    t, tokens = torch.tensor([3.0, 800.0]), torch.randn(2, shape.context_length, shape.context_dim, generator=generator)
    more = {"vector": torch.randn(2, 3), "picture": torch.randn(2, 2, 8, 8), "level": torch.tensor([1.0, 99.0])}
    with torch.no_grad():
        assert torch.equal(unet(x, t, Condition(tokens, **more)).prediction, old(x, t, Condition(tokens)).prediction)


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
    with pytest.raises(CheckpointError, match="expected the weights of a RaphaelUNet of this shape"):
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


@pytest.mark.parametrize(
    ("batch", "images", "cores", "gpus", "use_gpu", "expected"),
    [
        (16, 25_600, 2, 0, False, 2),
        (16, 25_600, 8, 0, False, 2),  # eight images a worker at least
        (32, 25_600, 3, 0, False, 2),  # three do not divide the batch
        (32, 25_600, 4, 0, False, 4),
        (16, 25_600, 1, 0, False, 0),
        (16, 640, 2, 0, False, 0),  # over before Ray is there
        (8, 25_600, 2, 0, False, 0),
        (16, 25_600, 16, 1, False, 0),  # this process, on the GPU
        (16, 640, 16, 4, True, 4),
        (16, 640, 16, 1, True, 0),
    ],
)
def test_auto_takes_as_many_workers_as_pay_on_this_machine(batch, images, cores, gpus, use_gpu, expected, project):
    train = load_config(project / "params.yaml").train
    loop = replace(train.loop, batch_size=batch, num_images=images)
    assert workers_for(replace(train, num_workers="auto", loop=loop, use_gpu=use_gpu), cores, gpus) == expected
    assert workers_for(replace(train, num_workers=1, loop=loop, use_gpu=use_gpu), cores, gpus) == 1
