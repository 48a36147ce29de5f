"""Imagen: its settings, its sizes, its trainings part by part, and what its cascade draws."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from truth.cascade_workspace import ROOT, settings, write_cascade_workspace

from raphael.base.checkpoint.folder import read_checkpoint
from raphael.base.checkpoint.home import CheckpointHome
from raphael.base.config.params import load_config
from raphael.base.config.preset import load_preset
from raphael.base.config.sampling import Sampling
from raphael.base.stage import Stage, StageError
from raphael.base.strict import ConfigError, flatten
from raphael.net.efficient.unet import EfficientUNet
from raphael.net.plain import PlainBlock
from raphael.net.unet import UNet
from raphael.objectives.plain import PlainDenoising
from raphael.systems import train_stage
from raphael.systems.cascade import expect_fit
from raphael.systems.imagen.system import BaseSettings, UpsamplerSettings
from raphael.systems.imagen.training import open_records, step_flops
from raphael.systems.job import Folders

SIZES = {"imagen/64": 2.0e9, "imagen/256": 600e6, "imagen/1024": 400e6}  # arXiv 2205.11487, 2.1


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_has_the_published_number_of_parameters_within_15_percent(name: str) -> None:
    kind, network = (BaseSettings, UNet) if name == "imagen/64" else (UpsamplerSettings, EfficientUNet)
    with torch.device("meta"):
        built = network(load_preset(name, kind).unet, PlainBlock)
    count = sum(parameter.numel() for parameter in built.parameters())
    assert count == pytest.approx(SIZES[name], rel=0.15), f"{count:,}"


def test_the_settings_name_nothing_that_only_raphael_has() -> None:
    from test_raphael_only import NAMES

    own = yaml.safe_load((ROOT / "params.imagen.yaml").read_text())
    assert not {part for key in flatten(own) for part in key.split(".")} & NAMES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"autoencoder": {"pretrained": ""}, "encode": {"fields": ["moments", "text", "text_mask"]}},
            "expected pixels",
        ),
        ({"clip": {"tower": "clip"}}, "clip.pretrained: got 'tower clip' with model.system imagen, expected t5:"),
        ({"clip": {"pretrained": "open_clip:ViT-B-32:x"}}, "clip.pretrained: got 'open_clip:ViT-B-32:x'.*expected t5:"),
        ({"clip": {"context_length": 20}}, "base.unet.context_length: got 12, expected 20, clip.context_length"),
        ({"clip": {"t5": {"width": 32}}}, "base.unet.context_dim: got 16, expected 32, clip.t5.width"),
        (
            {"model": {"settings": {"upsampler": {"unet": {"context_length": 9}}}}},
            "got 12 and 9, expected one, the T5's",
        ),
        (
            {"model": {"settings": {"upsampler": {"unet": {"picture_channels": 4}}}}},
            "picture_channels: got 4, expected 3",
        ),
        (
            {"model": {"settings": {"base": {"unet": {"level_embedding": True}}}}},
            "level_embedding: got True, expected Fals",
        ),
        (
            {"model": {"settings": {"base": {"diffusion": {"prediction": "residual"}}}}},
            "base.diffusion.prediction: got residual, expected v, x0 or flow",
        ),
        ({"model": {"settings": {"upsampler": {"factor": 1}}}}, "factor: got 1, expected an integer at least 2"),
        ({"picture": {"sizes_px": [[20, 20]]}}, r"sizes_px: got \[20, 20\], expected multiples of 8"),
        ({"evaluate": {"num_swaps": 3}}, "evaluate.num_swaps: got 3, expected 0"),
        ({"encode": {"fields": ["pixels"]}}, "encode.fields: got .* expected text, text_mask too"),
        ({"train": {"settings": {"textdrop": 0.1}}}, "unknown key train.settings.textdrop; did you mean text_drop"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings(changes)))
    with pytest.raises(ConfigError, match=message) as error:
        load_config(tmp_path / "params.yaml")
    assert "\n" not in str(error.value)


def test_records_without_text_embeddings_say_which_stage_makes_them(tmp_path: Path) -> None:
    config = write_cascade_workspace(tmp_path, text=False)
    folders = Folders.of(tmp_path, tmp_path)
    with pytest.raises(
        StageError, match=r"records without the field text,.*encode.fields: \[.*\].* run the stage encode"
    ):
        open_records(config, folders)


def test_records_of_another_size_or_text_encoder_are_refused(tmp_path: Path) -> None:
    config = write_cascade_workspace(tmp_path)
    folders = Folders.of(tmp_path, tmp_path)
    assert len(open_records(config, folders)) == 32
    other = replace(config, picture=replace(config.picture, sizes_px=((32, 32),)))
    with pytest.raises(StageError, match="got images of .*run encode again"):
        open_records(other, folders)
    wider = {**config.model.settings}
    for part in ("base", "upsampler"):
        wider[part] = {**wider[part], "unet": {**wider[part]["unet"], "context_dim": 24}}
    with pytest.raises(StageError, match=r"captions of \(tokens, width\) \(12, 16\), expected \(12, 24\)"):
        open_records(replace(config, model=replace(config.model, settings=wider)), folders)


def test_a_step_costs_the_mean_of_its_parts(tmp_path: Path) -> None:
    config = write_cascade_workspace(tmp_path)
    assert 1e6 < step_flops(config) < 1e9


def run_train(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    train_stage.run(load_config("params.yaml"), Stage("train", folder, system="imagen"))


def published(folder: Path) -> dict[str, str]:
    files = [file for place in ("models/raphael", "reports") for file in (folder / place).rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("imagen") / "whole"
    write_cascade_workspace(folder)
    with pytest.MonkeyPatch.context() as patch:
        run_train(folder, patch)
    return folder


@pytest.mark.slow
def test_each_part_killed_and_resumed_ends_in_the_bytes_of_an_undisturbed_run(trained, tmp_path, monkeypatch) -> None:
    """The machine fails at the fifth step of the base, then at the second of the upsampler."""
    broken, real, calls = tmp_path / "broken", PlainDenoising.forward, {"PlainDenoising": 0, "Enlarging": 0}
    write_cascade_workspace(broken)
    fail_at = {"PlainDenoising": 5, "Enlarging": 2}

    def forward(self, batch, rng):
        name = type(self).__name__
        calls[name] += 1
        if calls[name] == fail_at[name]:
            raise RuntimeError(f"the machine of {name} is gone")
        return real(self, batch, rng)

    monkeypatch.setattr(PlainDenoising, "forward", forward)
    with pytest.raises(RuntimeError, match="the machine of PlainDenoising is gone"):
        run_train(broken, monkeypatch)
    with pytest.raises(RuntimeError, match="the machine of Enlarging is gone"):
        run_train(broken, monkeypatch)
    (home,) = broken.glob("work/train/*/checkpoints")
    assert CheckpointHome(home / "base").newest()[1]["images_seen"] == 64
    assert CheckpointHome(home / "upsampler").newest()[1]["images_seen"] == 8, "it resumes in the middle"
    run_train(broken, monkeypatch)
    assert calls == {"PlainDenoising": 9, "Enlarging": 3}, "the step that failed is all that was done again"
    assert published(broken) == published(trained)


@pytest.mark.slow
def test_the_stages_train_a_cascade_and_generate_from_it(trained: Path, monkeypatch, capsys) -> None:
    from raphael.cli.main import main
    from raphael.generate import stage as generate
    from raphael.generate.pipeline import RaphaelPipeline

    monkeypatch.chdir(trained)
    model = trained / "models/raphael"
    _, meta = read_checkpoint(model)
    assert meta["system"] == "imagen" and list(meta["parts"]) == ["base", "upsampler"]
    images = {name: read_checkpoint(model / name)[1]["images_seen"] for name in meta["parts"]}
    assert images == {"base": 64, "upsampler": 16}
    assert {"text_encoder", "base", "upsampler"} == {path.name for path in model.iterdir() if path.is_dir()}
    assert (model / "base/samples/000064.png").is_file() and (model / "upsampler/samples/000000.png").is_file()
    generate.run(load_config("params.yaml"), Stage("generate", trained, system="imagen"))
    listing = json.loads((trained / "data/generated/images.json").read_text())
    assert listing["settings"]["threshold"] == "dynamic" and len(listing["images"]) == 3
    pipeline = RaphaelPipeline.from_pretrained(model)
    assert type(pipeline).__name__ == "ImagenPipeline"
    assert pipeline("a red circle", num_inference_steps=2).images[0].size == (16, 16)
    base = pipeline("a red circle", sampling=Sampling(steps=2, until="base")).images[0]
    assert base.size == (8, 8)
    with pytest.raises(ValueError, match="expected multiples of 8"):
        pipeline("a red circle", height=20, width=20)
    pipeline.save_pretrained("elsewhere")
    again = RaphaelPipeline.from_pretrained("elsewhere")
    assert list(again.meta["parts"]) == ["base", "upsampler"]
    one, other = (each("a star", num_inference_steps=2, output_type="np").images for each in (pipeline, again))
    assert np.array_equal(one, other)
    for words, side in ((["--until", "base"], 8), (["--augmentation", "0.5", "--upsampler-steps", "1"], 16)):
        out = f"out-{side}"
        asked = ["generate", "a red circle", "--checkpoint", "models/raphael", "--steps", "2", *words, "--out", out]
        assert main(asked) == 0
        from PIL import Image

        assert Image.open(f"{out}/00000.png").size == (side, side)
    capsys.readouterr()
    assert main(["info", "--checkpoint", "models/raphael"]) == 0 and "imagen" in capsys.readouterr().out


@pytest.mark.slow
def test_a_picture_of_a_cascade_is_the_same_whatever_stands_beside_it(trained: Path) -> None:
    from raphael.generate.pipeline import RaphaelPipeline

    pipeline = RaphaelPipeline.from_pretrained(trained / "models/raphael")
    how = Sampling("ddim", steps=2, upsampler_steps=2, upsampler_guidance=2.0)
    several = pipeline(["a red circle", "a star"], sampling=how, output_type="np").images
    alone = pipeline("a red circle", sampling=how, output_type="np").images
    assert np.abs(several[0] - alone[0]).max() <= 1.01 / 255
    low = torch.zeros(2, 3, 8, 8)
    enlarged = [pipeline.enlarge(low[:n], ["a star"] * n, [(0, i) for i in range(n)], how) for n in (1, 2)]
    torch.testing.assert_close(enlarged[0], enlarged[1][:1], rtol=1e-4, atol=1e-4)


def test_an_upsampler_of_another_base_is_refused() -> None:
    from types import SimpleNamespace

    base = SimpleNamespace(latent_channels=3, context_dim=16, context_length=12)
    config = SimpleNamespace(picture_channels=3, context_dim=16, context_length=12)
    expect_fit(base, SimpleNamespace(unet=SimpleNamespace(config=config)))
    config.context_dim = 32
    with pytest.raises(ValueError, match="got one for text vectors of width 32, expected 16.*another base"):
        expect_fit(base, SimpleNamespace(unet=SimpleNamespace(config=config)))
