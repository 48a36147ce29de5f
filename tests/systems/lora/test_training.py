"""A training with low rank by the one loop, and what it leaves."""

from dataclasses import replace

import pytest
import torch
from truth.training_workspace import write_workspace

from raphael.base.checkpoint.folder import checkpoint_sha256, read_checkpoint, write_checkpoint
from raphael.base.checkpoint.home import CheckpointHome
from raphael.base.config.lora import LoraConfig
from raphael.base.strict import ConfigError, load, to_dict
from raphael.net.lora.sites import add
from raphael.net.moe.unet import RaphaelUNet
from raphael.systems.export import finished, write_export
from raphael.systems.job import Folders, TrainingJob, decisive
from raphael.systems.lora.file import LORA_FILE, read_lora
from raphael.systems.lora.names import fit
from raphael.systems.raphael import training
from raphael.systems.worker import train_part
from raphael.train.loop import World

LOOP = {
    "num_images": 32, "batch_size": 8, "optimizer": "muon", "learning_rate": 1.0e-2, "warmup_images": 0,
    "log_every_images": 8, "checkpoint_every_images": 16, "sample_every_images": 0, "precision": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(config, root) of a training that begins with a checkpoint of random weights."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("begun")
    settings = {"num_workers": 0, "settings": {"balance": "none"}, "loop": LOOP}
    config = write_workspace(root / "workspace", {"train": settings})
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
    lora = LoraConfig(rank=2, alpha=4.0, targets=("attention", "experts"), dropout=0.25)
    return replace(config, train=replace(config.train, **init, lora=lora)), root


def trained(config, root, name):
    folders = Folders.of(root / "workspace", root / name)
    folders.work.mkdir(exist_ok=True)
    job = TrainingJob(config, folders)
    train_part(job, World())
    return folders


@pytest.fixture(scope="module")
def left(begun):
    config, root = begun
    folders = trained(config, root, "work")
    write_export(config, folders, finished(config, folders))
    return folders.work


def test_it_leaves_an_adapter_and_the_model_with_it(begun, left):
    config, root = begun
    base = read_checkpoint(root / "model", ["ema"])[0]["ema"]
    groups, meta = read_checkpoint(left / "export", ["ema", "raw"])
    assert groups["ema"].keys() == base.keys() == groups["raw"].keys()
    assert meta["lora"] == to_dict(config.train.lora) and meta["init_sha256"] == config.train.init_sha256
    unet = RaphaelUNet(config.model.load().unet)
    file = read_lora(left / "export" / LORA_FILE)
    assert file.header["raphael_base"] == config.train.init_sha256 and file.header["ss_network_dim"] == "2"
    pairs = fit(file, {"unet": unet})
    assert {pair.alpha for pair in pairs.values()} == {4.0} and {pair.rank for pair in pairs.values()} == {2}
    touched = {site.parameter for site in pairs}
    for name, tensor in base.items():
        own = [(site, pair, 1.0) for site, pair in pairs.items() if site.parameter == name]
        assert torch.equal(groups["ema"][name], add(tensor, own) if own else tensor), name
        assert torch.equal(groups["ema"][name], tensor) == (name not in touched), name
    assert not torch.equal(groups["ema"][next(iter(touched))], groups["raw"][next(iter(touched))])


def test_resumed_it_ends_in_the_same_bits(begun, left):
    config, root = begun
    half = replace(config, train=replace(config.train, loop=replace(config.train.loop, schedule="constant")))
    short = replace(half, train=replace(half.train, loop=replace(half.train.loop, num_images=16)))
    trained(short, root, "resumed")
    parts = [trained(half, root, name) for name in ("resumed", "whole")]
    groups = [CheckpointHome(folders.checkpoints).newest()[0] for folders in parts]
    assert groups[0].keys() == groups[1].keys()
    for kind in ("model", "ema", "optimizer"):
        assert groups[0][kind].keys() == groups[1][kind].keys()
        assert all(torch.equal(tensor, groups[1][kind][name]) for name, tensor in groups[0][kind].items())


def test_another_adapter_is_another_training_and_none_keeps_the_old_names(begun):
    config, root = begun
    folders = Folders.of(root / "workspace", root)

    def named(lora):
        changed = replace(config, train=replace(config.train, lora=lora))
        return [str(training.identity(changed, folders)), str(decisive(changed))]

    lora = config.train.lora
    names = [named(lora), named(replace(lora, rank=1)), named(replace(lora, dropout=0.0)), named(LoraConfig())]
    assert len({name for name, _ in names}) == len({name for _, name in names}) == 4
    assert "lora" not in names[-1][0] + names[-1][1] and "lora" not in to_dict(replace(config.train, lora=LoraConfig()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "lora.rank: got -1, expected an integer at least 0"),
        ({"rank": 2, "dropout": 1.0}, "lora.dropout: got 1.0"),
        ({"rank": 2, "alpha": float("nan")}, "lora.alpha: got nan"),
        ({"rank": 2, "targets": ["gates"]}, r"lora.targets\[0\]: got 'gates', expected one of attention, experts"),
        ({"rank": 2, "targets": []}, "targets: got \\[\\], expected at least one"),
    ],
)
def test_settings_out_of_range_name_the_key(settings, message):
    with pytest.raises(ConfigError, match=message):
        load(LoraConfig, settings, "params.yaml", "lora")
