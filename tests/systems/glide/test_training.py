"""GLIDE: its settings, its sizes, its trainings part by part, what its cascade draws, edits and is guided by."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from truth.glide_workspace import ROOT, settings, write_glide_workspace

from flows import demo
from raphael.base.checkpoint.folder import read_checkpoint
from raphael.base.checkpoint.home import CheckpointHome
from raphael.base.config.params import load_config
from raphael.base.config.preset import load_preset
from raphael.base.config.sampling import Sampling
from raphael.base.config.systems import find_system
from raphael.base.stage import Stage, StageError
from raphael.base.strict import ConfigError, flatten
from raphael.net.captions.captioned import Captioned
from raphael.net.plain import PlainBlock
from raphael.objectives.plain import PlainDenoising
from raphael.systems import train_stage
from raphael.systems.glide.system import BaseSettings, UpsamplerSettings
from raphael.systems.glide.training import build, identity, known_ids, network, open_records, step_flops
from raphael.systems.job import Folders

# arXiv 2112.10741, 4: 3.5 B, of which the text transformer has 1.2 B; an upsampler of 1.5 B; 300 M as it was released
SIZES = {"glide/64": (3.5e9, 1.2e9), "glide/256": (1.5e9, None)}
RELEASED = "glide/released-64"


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def counted(name: str) -> Captioned:
    own = load_preset(name, BaseSettings if "64" in name else UpsamplerSettings)
    with torch.device("meta"):
        return Captioned(own.unet, own.text, PlainBlock)


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_has_the_published_number_of_parameters_within_15_percent(name: str) -> None:
    whole, text = SIZES[name]
    made = counted(name)
    assert parameters(made) == pytest.approx(whole, rel=0.15), f"{parameters(made):,}"
    if text:
        assert parameters(made.text) == pytest.approx(text, rel=0.15), f"{parameters(made.text):,}"


def test_the_released_base_is_a_u_net_of_300_m_and_has_a_text_transformer_besides() -> None:
    made = counted(RELEASED)
    assert parameters(made.unet) == pytest.approx(300e6, rel=0.15), f"{parameters(made.unet):,}"
    assert parameters(made.text) < 80e6
    assert parameters(counted("glide/released-256").unet) == pytest.approx(300e6, rel=0.15)


def test_the_settings_name_nothing_that_only_raphael_has() -> None:
    from test_raphael_only import NAMES

    own = yaml.safe_load((ROOT / "params.glide.yaml").read_text())
    assert not {part for key in flatten(own) for part in key.split(".")} & NAMES


BASE_UNET = {"model": {"settings": {"base": {"unet": {"vector_dim": 0}}}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"autoencoder": {"pretrained": ""}, "encode": {"fields": ["moments", "token_ids"]}},
            "autoencoder.pretrained: got '' with model.system glide, expected pixels",
        ),
        ({"clip": {"pretrained": "none"}}, "clip.pretrained: got 'none' with model.system glide, expected an encoder"),
        ({"clip": {"context_length": 20}}, "base.unet.context_length: got 12, expected 20, clip.context_length"),
        (BASE_UNET, "unet.vector_dim: got 0 with context_dim 16, expected one number above 0"),
        (
            {"model": {"settings": {"upsampler": {"unet": {"context_length": 9}}}}},
            "got 12 and 9, expected one",
        ),
        (
            {"model": {"settings": {"upsampler": {"unet": {"picture_channels": 4}}}}},
            "unet.picture_channels: got 4, expected 3",
        ),
        ({"model": {"settings": {"base": {"unet": {"text_pool": True}}}}}, "unet.text_pool: got True, expected False"),
        (
            {"model": {"settings": {"base": {"text": {"head_dim": 5}}}}},
            "text.head_dim: got 5, expected a divisor of 16",
        ),
        (
            {"model": {"settings": {"base": {"diffusion": {"prediction": "residual"}}}}},
            "diffusion.prediction: got residual",
        ),
        ({"picture": {"sizes_px": [[20, 20]]}}, r"sizes_px: got \[20, 20\], expected multiples of 8"),
        ({"evaluate": {"num_swaps": 3}}, "evaluate.num_swaps: got 3, expected 0"),
        ({"encode": {"fields": ["pixels"]}}, "encode.fields: got .* expected token_ids too"),
        ({"train": {"settings": {"extra": ["clip"]}}}, "train.settings.extra: got 'clip', expected some of inpaint"),
        ({"train": {"settings": {"empty_caption": 0.1}}}, "unknown key train.settings.empty_caption; did you mean"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings(changes)))
    with pytest.raises(ConfigError, match=message) as error:
        load_config(tmp_path / "params.yaml")
    assert "\n" not in str(error.value)


def test_parts_begin_from_the_one_before_and_the_vocabulary_is_that_of_the_captions(tmp_path: Path) -> None:
    config = write_glide_workspace(tmp_path)
    folders = Folders.of(tmp_path, tmp_path)
    records = open_records(config, folders)
    known = known_ids(records)
    assert known == tuple(sorted(set(records.batch(range(32))["token_ids"].flatten().tolist())))
    base = network(config, "base", known)
    assert base.text.known.tolist() == list(known) and len(base.text.tokens.weight) == len(known) + 1
    trained = {f"unet.{name}": torch.rand_like(value, dtype=torch.float32) for name, value in base.state_dict().items()}
    trained["unet.text.known"] = base.text.known
    averaged = {name: value / 2 for name, value in trained.items() if not name.endswith("known")}
    seeing = build(config, folders, records, "inpaint", {"finetune": {"model": trained, "ema": averaged}})
    found = seeing.unet.state_dict()
    for name, value in averaged.items():
        assert torch.equal(found[name.removeprefix("unet.")], value), name
    assert not found["unet.picture_in.weight"].any() and seeing.unet.config.inpainting
    assert [build(config, folders, records, part, {}).drop for part in ("base", "finetune", "upsampler")] == [
        0,
        0.2,
        0.1,
    ]


def test_a_dropped_caption_is_told_as_the_empty_prompt_is(tmp_path: Path) -> None:
    from raphael.encoders.text import load_text_encoder
    from raphael.systems.glide.pipeline import asked

    config = write_glide_workspace(tmp_path)
    folders = Folders.of(tmp_path, tmp_path)
    records = open_records(config, folders)
    goal = build(config, folders, records, "finetune", {})
    batch = {name: torch.from_numpy(array) for name, array in records.batch(range(2)).items()}
    told = goal.told(batch, torch.tensor([True, False]))
    prompts = asked(load_text_encoder(folders.clip), ["", "a green square on white"])
    assert torch.equal(told.mask, prompts.mask) and not told.mask[0].any()
    assert torch.equal(told.tokens[1], prompts.tokens[1])
    with torch.no_grad():
        torch.testing.assert_close(goal.unet.read(told).tokens, goal.unet.read(prompts).tokens)


def test_what_fits_not_is_said_before_training(tmp_path: Path) -> None:
    config = write_glide_workspace(tmp_path)
    folders = Folders.of(tmp_path, tmp_path)
    other = replace(config, picture=replace(config.picture, sizes_px=((32, 32),)))
    with pytest.raises(StageError, match="got images of .*run encode again"):
        open_records(other, folders)
    begun = replace(config, train=replace(config.train, init_from="scenes", init_sha256="0"))
    with pytest.raises(StageError, match="train.init_from: got 'scenes' with model.system glide, expected none"):
        build(begun, folders, open_records(config, folders), "base", {})


def test_parts_beside_the_others_change_nothing_of_them(tmp_path: Path) -> None:
    plain = write_glide_workspace(tmp_path / "a")
    more = write_glide_workspace(tmp_path / "b", {"train": {"settings": {"extra": ["inpaint"]}}})
    system = find_system("glide")
    assert [part.name for part in system.trained(plain)] == ["base", "finetune", "upsampler"]
    assert [part.name for part in system.trained(more)] == ["base", "finetune", "upsampler", "inpaint"]
    assert identity(plain, Folders.of(tmp_path, tmp_path)) == identity(more, Folders.of(tmp_path, tmp_path))
    assert 1e6 < step_flops(plain) < 1e9


def test_make_demo_with_all_parts_trains_what_the_system_has_besides(tmp_path: Path, monkeypatch) -> None:
    made, ran = [], []
    monkeypatch.setattr(demo, "make_workspace", lambda *given: made.append(given) or tmp_path)
    monkeypatch.setattr(
        demo.subprocess, "run", lambda command, **how: ran.append(command) or SimpleNamespace(returncode=0)
    )
    demo.choose_workspace("scenes", "", "glide")
    demo.choose_workspace("scenes", "", "glide", "all")
    assert [changes for _, _, changes in made] == [{}, {"train.settings.extra": ["inpaint"]}]
    demo.train_guides(tmp_path, "glide")
    assert [command[-4:] for command in ran] == [["--guide", "clip", "--workspace", str(tmp_path)]]
    monkeypatch.setattr(demo.subprocess, "run", lambda *given, **how: SimpleNamespace(returncode=1))
    with pytest.raises(StageError, match="the guide clip was not trained; the same command resumes it"):
        demo.train_guides(tmp_path, "glide")
    with pytest.raises(
        ConfigError, match="PARTS: got all with SYSTEM=ddpm, which has no parts besides; expected glide"
    ):
        demo.choose_workspace("scenes", "", "ddpm", "all")


def run_train(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    train_stage.run(load_config("params.yaml"), Stage("train", folder, system="glide"))


def published(folder: Path) -> dict[str, str]:
    files = [file for place in ("models/raphael", "reports") for file in (folder / place).rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


ALL = {"train": {"settings": {"extra": ["inpaint"]}}}
STEPS = {"base": 7, "finetune": 1, "upsampler": 2, "inpaint": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("glide") / "whole"
    write_glide_workspace(folder, ALL)
    with pytest.MonkeyPatch.context() as patch:
        run_train(folder, patch)
    return folder


@pytest.mark.slow
def test_each_part_killed_and_resumed_ends_in_the_bytes_of_an_undisturbed_run(trained, tmp_path, monkeypatch) -> None:
    """The machine fails in each part's last step."""
    broken, real, calls, failed = tmp_path / "broken", PlainDenoising.forward, [0], []
    write_glide_workspace(broken, ALL)
    ends = np.cumsum(list(STEPS.values())).tolist()

    def forward(self, batch, rng):
        calls[0] += 1
        if calls[0] - len(failed) in ends and calls[0] - len(failed) not in failed:
            failed.append(calls[0] - len(failed))
            raise RuntimeError("the machine is gone")
        return real(self, batch, rng)

    monkeypatch.setattr(PlainDenoising, "forward", forward)
    seen = []
    for _ in STEPS:
        with pytest.raises(RuntimeError, match="the machine is gone"):
            run_train(broken, monkeypatch)
        (home,) = broken.glob("work/train/*/checkpoints")
        seen.append({path.name: CheckpointHome(path).newest()[1]["images_seen"] for path in home.iterdir()
                     if CheckpointHome(path).all()})  # fmt: skip
    assert seen[0] == {"base": 48} and seen[2]["upsampler"] == 8 and seen[3]["inpaint"] == 8, "it resumes in the middle"
    run_train(broken, monkeypatch)
    assert calls[0] == sum(STEPS.values()) + len(STEPS), "the steps that failed are all that was done again"
    assert published(broken) == published(trained)


@pytest.mark.slow
def test_the_stages_train_a_cascade_and_generate_from_it(trained: Path, monkeypatch, capsys) -> None:
    from PIL import Image

    from raphael.cli.main import main
    from raphael.generate import stage as generate
    from raphael.generate.pipeline import RaphaelPipeline

    monkeypatch.chdir(trained)
    model = trained / "models/raphael"
    _, meta = read_checkpoint(model)
    assert meta["system"] == "glide" and list(meta["parts"]) == list(STEPS)
    images = {name: read_checkpoint(model / name)[1]["images_seen"] for name in meta["parts"]}
    assert images == {name: 8 * steps for name, steps in STEPS.items()}
    assert {"text_encoder", *STEPS} == {path.name for path in model.iterdir() if path.is_dir()}
    generate.run(load_config("params.yaml"), Stage("generate", trained, system="glide"))
    listing = json.loads((trained / "data/generated/images.json").read_text())
    assert listing["settings"]["upsampler_spacing"] == "fast27" and len(listing["images"]) == 3
    pipeline = RaphaelPipeline.from_pretrained(model)
    assert type(pipeline).__name__ == "GlidePipeline"
    defaults = pipeline.defaults
    assert (defaults.upsampler_steps, defaults.threshold, defaults.guidance_scale) == (27, "static", 3.0)
    assert pipeline("a red circle", num_inference_steps=2).images[0].size == (16, 16)
    ids = pipeline.encode(["a red circle"])
    by_ids = pipeline(prompt_embeds=ids, num_inference_steps=2, output_type="np").images
    torch.testing.assert_close(by_ids, pipeline("a red circle", num_inference_steps=2, output_type="np").images)
    fewer = ["--upsampler-spacing", "trailing", "--upsampler-steps", "1"]
    for words, side in ((["--until", "base"], 8), (fewer, 16)):
        out = f"out-{side}"
        asked = ["generate", "a red circle", "--checkpoint", "models/raphael", "--steps", "2", *words, "--out", out]
        assert main(asked) == 0
        assert Image.open(f"{out}/00000.png").size == (side, side)
    capsys.readouterr()
    assert main(["info", "--checkpoint", "models/raphael"]) == 0 and "glide" in capsys.readouterr().out


@pytest.mark.slow
def test_a_hole_is_drawn_by_the_network_that_sees_it_and_the_rest_stays(trained: Path) -> None:
    from raphael.edit.known import inpaint
    from raphael.edit.run import How
    from raphael.edit.vary import interpolate
    from raphael.generate.pipeline import RaphaelPipeline

    pipeline = RaphaelPipeline.from_pretrained(trained / "models/raphael")
    assert pipeline.painting().unet.config.inpainting and not pipeline.unet.config.inpainting
    image, mask = np.full((16, 16, 3), 200, np.uint8), np.zeros((16, 16), bool)
    mask[4:8, 4:8] = True
    how = How(sampling=replace(pipeline.defaults, steps=2, upsampler_spacing="trailing", upsampler_steps=2))
    edited = inpaint(pipeline, image, mask, "a red circle", how, feather_px=0)
    assert edited.facts["picture_in_input"] and edited.result.shape == edited.without.shape == (1, 16, 16, 3)
    assert (edited.result[0][~mask] == 200).all() and (edited.result[0][mask] != 200).any()
    with pytest.raises(ValueError, match="target: got another prompt, expected none: the model reads token ids"):
        interpolate(pipeline, "a red circle", "a star", how=replace(how, num_images=3))


@pytest.mark.slow
def test_a_noised_clip_of_what_the_base_draws_turns_its_sampling(trained: Path, monkeypatch) -> None:
    from raphael.generate.pipeline import RaphaelPipeline
    from raphael.systems.guides.work import main

    monkeypatch.chdir(trained)
    small = ["network.channels=[8, 16]", "network.attention_levels=[1]", "network.head_dim=8", "num_heldout=8"]
    small += ["loop.num_images=32", "loop.batch_size=8", "loop.warmup_images=8", "loop.log_every_images=8"]
    small += ["loop.checkpoint_every_images=16", "network.patch_px=1"]
    assert main(["--guide", "clip", *(word for one in small for word in ("--set", one))]) == 0
    meta = json.loads((trained / "models/guides/clip/meta.json").read_text())
    assert meta["space"] == "pixels at 1 / 2 of the side"
    pipeline = RaphaelPipeline.from_pretrained(trained / "models/raphael")
    how = Sampling("ddim", steps=2, guidance_scale=1.0, upsampler_steps=1)
    guide = "clip:models/guides/clip"
    plain, turned = (
        pipeline("a red circle", sampling=how, output_type="np", **more).images
        for more in ({}, {"guidance": guide, "guidance_weight": 50.0})
    )
    assert np.abs(plain - turned).max() > 0
