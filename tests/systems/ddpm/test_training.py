"""DDPM's training: its loss against a second implementation, its settings, and the stages around it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from truth import plain_ddpm
from truth.class_workspace import ROOT, settings, write_class_workspace

from raphael.base.checkpoint.folder import read_checkpoint
from raphael.base.config.params import load_config
from raphael.base.randomness import SampleRng
from raphael.base.records import LABEL, PIXELS, Records
from raphael.base.stage import Stage, StageError
from raphael.base.strict import ConfigError, flatten
from raphael.net.condition import Condition
from raphael.systems import train_stage
from raphael.systems.ddpm.training import build
from raphael.systems.job import Folders
from raphael.train.loop import train

KINDS = [("linear", "eps", False), ("cosine", "v", True), ("cosine", "x0", False)]


class Told(nn.Module):
    """The U-Net with the vector as an argument."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, x, t, vector):
        return self.unet(x, t, Condition(vector=vector)).prediction


def rates(loop) -> list[float]:
    """The cosine after a warm-up, as params.yaml's comments say it."""
    found = []
    for step in range(loop.num_images // loop.batch_size):
        images = (step + 1) * loop.batch_size
        warm = min(1.0, images / loop.warmup_images)
        share = max(0.0, images - loop.warmup_images) / (loop.num_images - loop.warmup_images)
        found.append(loop.learning_rate * warm * (1 + math.cos(math.pi * share)) / 2)
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_a_hundred_steps_have_the_losses_of_a_second_implementation(kind, tmp_path: Path) -> None:
    schedule, prediction, terminal = kind
    loop = {"num_images": 800, "batch_size": 8, "optimizer": "adamw", "learning_rate": 1e-3, "log_every_images": 80}
    loop |= {"checkpoint_every_images": 800, "sample_every_images": 0, "ema_decay": 0.0, "warmup_images": 80}
    diffusion = {"schedule": schedule, "prediction": prediction, "zero_terminal_snr": terminal}
    changes = {
        "model": {"settings": {"diffusion": diffusion}},
        "train": {"loop": loop, "sample_weights": ["raw"], "settings": {"timestep_shift": 1.0}},
    }
    config = write_class_workspace(tmp_path, changes)
    folders = Folders.of(tmp_path, tmp_path / "work")
    objective, records = build(config, folders)
    other = Told(build(config, folders)[0].unet)
    result = train(objective, records, config.train.loop, config.train.seed, folder=tmp_path / "checkpoints")
    mine = [point["train/loss"] for point in result["history"]]

    from raphael.train.batches import Batches

    batches, draws = Batches(seed=config.train.seed, batch_size=8, rank=0, world_size=1, num_samples=len(records)), []
    for step in range(100):
        epochs, rows = batches.own(step)
        rng = SampleRng(config.train.seed, epochs, rows)
        draws.append((rows, rng.uniform("timestep"), rng.normal("noise", (3, 16, 16)), rng.uniform("condition_drop")))
    whole = records.batch(np.arange(len(records)))
    labels = np.where(whole[LABEL] < 0, 6, whole[LABEL])  # a seventh class that is always dropped below
    draws = [
        (rows, u, noise, torch.where(torch.from_numpy(labels[rows] == 6), 0.0, drop)) for rows, u, noise, drop in draws
    ]
    theirs = plain_ddpm.losses(other, whole[PIXELS], labels, 6, draws, kind, rates(config.train.loop))
    theirs = [float(np.mean(theirs[start : start + 10])) for start in range(0, 100, 10)]
    assert len(mine) == 10 and mine[-1] < mine[0]
    np.testing.assert_allclose(mine, theirs, rtol=0.01)


def test_the_settings_name_nothing_that_only_raphael_has() -> None:
    from test_raphael_only import NAMES

    own = yaml.safe_load((ROOT / "params.ddpm.yaml").read_text())
    named = {part for key in flatten(own) for part in key.split(".")}
    assert not named & NAMES and not {"context_dim", "vae", "caption_drop"} & named
    source = "".join(file.read_text() for file in sorted((ROOT / "raphael/systems/ddpm").glob("*.py")))
    assert not [name for name in (*NAMES, "text_encoder", "load_autoencoder", "raphael.net.moe") if name in source]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"autoencoder": {"pretrained": ""}, "encode": {"fields": ["moments"], "label_pattern": ""}},
            "expected pixels",
        ),
        ({"model": {"settings": {"unet": {"vector_dim": 6}}}}, "unet.vector_dim: got 6, expected none"),
        ({"model": {"settings": {"unet": {"latent_channels": 4}}}}, "latent_channels: got 4, expected 3"),
        ({"model": {"settings": {"unet": {"edge_tokens": "all"}}}}, r"unknown key unet.edge_tokens.*model.system ddpm"),
        ({"train": {"settings": {"labeldrop": 0.1}}}, "unknown key train.settings.labeldrop; did you mean label_drop"),
        ({"model": {"preset": "tiny", "settings": {}}}, r"unknown key .*\(model.system ddpm\)"),
        ({"picture": {"sizes_px": [[31, 32]]}}, r"sizes_px: got \[31, 32\], expected multiples of 4"),
        ({"evaluate": {"num_swaps": 3}}, "evaluate.num_swaps: got 3, expected 0"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, message, tmp_path: Path) -> None:
    said = settings(changes)
    if changes.get("model", {}).get("settings") == {}:
        said["model"]["settings"] = {}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(ConfigError, match=message) as error:
        load_config(tmp_path / "params.yaml")
    assert "\n" not in str(error.value)


def test_records_without_labels_or_of_another_size_say_which_stage_makes_them(tmp_path: Path) -> None:
    config = write_class_workspace(tmp_path, labels=False)
    folders = Folders.of(tmp_path, tmp_path)
    with pytest.raises(StageError, match=r"label.*encode.fields.*run"):
        build(config, folders)
    other = replace(config, picture=replace(config.picture, sizes_px=((32, 32),)))
    free = replace(other, encode=replace(config.encode, fields=("pixels",), label_pattern=""))
    with pytest.raises(StageError, match=r"got images of .*run encode again"):
        build(free, folders)


def run_train(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    train_stage.run(load_config("params.yaml"), Stage("train", folder, system="ddpm"))


@pytest.mark.slow
def test_the_stages_train_a_model_of_classes_and_generate_every_class(tmp_path: Path, monkeypatch, capsys) -> None:
    from raphael.cli.main import main
    from raphael.generate import stage as generate
    from raphael.generate.pipeline import RaphaelPipeline

    write_class_workspace(tmp_path)
    run_train(tmp_path, monkeypatch)
    groups, meta = read_checkpoint(tmp_path / "models/raphael")
    assert meta["system"] == "ddpm" and len(meta["classes"]) == 6 and meta["unet"]["vector_dim"] == 6
    assert groups["raw"]["vector_in.weight"].abs().sum() > 0, "the labels have been read"
    assert sorted(path.name for path in (tmp_path / "models/raphael").iterdir() if path.is_dir()) == ["samples"]
    generate.run(load_config("params.yaml"), Stage("generate", tmp_path, system="ddpm"))
    listing = json.loads((tmp_path / "data/generated/images.json").read_text())
    assert [entry["label"] for entry in listing["images"]] == [name for name in meta["classes"] for _ in range(2)]
    assert all((tmp_path / "data/generated" / entry["file"]).is_file() for entry in listing["images"])
    pipeline = RaphaelPipeline.from_pretrained(tmp_path / "models/raphael")
    assert type(pipeline).__name__ == "DdpmPipeline" and pipeline.system == "ddpm"
    assert main(["generate", "heart", "--checkpoint", "models/raphael", "--steps", "2", "--out", "out"]) == 0
    capsys.readouterr()
    assert main(["generate", "hart", "--checkpoint", "models/raphael", "--steps", "2", "--out", "more"]) == 1
    assert "label: got 'hart', expected circle, cross, heart" in (line := capsys.readouterr().err)
    assert "did you mean heart?" in line and main(["info", "--checkpoint", "models/raphael"]) == 0
    assert "ddpm" in capsys.readouterr().out
    assert main(["figures", "--checkpoint", "models/raphael", "--prompt", "star", "--out", "figures"]) == 0
    drawn = capsys.readouterr().out
    assert "forward.png" in drawn and "reverse.png" in drawn and "figure5" not in drawn


@pytest.mark.slow
def test_without_labels_it_is_an_unconditional_model(tmp_path: Path, monkeypatch) -> None:
    from raphael.generate.pipeline import RaphaelPipeline

    free = {"encode": {"fields": ["pixels"], "label_pattern": ""}}
    write_class_workspace(tmp_path, free, labels=False)
    run_train(tmp_path, monkeypatch)
    pipeline = RaphaelPipeline.from_pretrained(tmp_path / "models/raphael")
    assert pipeline.classes == () and pipeline.unet.vector_in is None
    assert pipeline("", num_inference_steps=2).images[0].size == (16, 16)
    with pytest.raises(ValueError, match="this model is unconditional"):
        pipeline("circle", num_inference_steps=2)
    assert len(Records(tmp_path / "data/records")) == 40
