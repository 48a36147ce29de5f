"""Guides from their training to the images that followed them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from truth.tiny_ddpm import write_ddpm
from truth.tiny_guides import CLASSES, SMALL, write_class_home, write_text_home

from raphael.base.checkpoint.folder import read_checkpoint
from raphael.base.records import Records
from raphael.base.stage import StageError
from raphael.base.strict import ConfigError
from raphael.cli.main import main
from raphael.generate.metadata import read_made
from raphael.generate.pipeline import RaphaelPipeline
from raphael.systems.guides.guide import load_guide
from raphael.systems.guides.training import GuideJob, build, settings_of, train_guide
from raphael.train.loop import Hooks


def job_of(kind: str, pipeline, records: Records, **changes) -> GuideJob:
    return GuideJob(kind, pipeline, records, settings_of(kind, pipeline.space == "pixels", {**SMALL, **changes}))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A workspace of a DDPM with its classifier."""
    torch.set_num_threads(1)
    folder = write_class_home(tmp_path_factory.mktemp("ddpm"))
    pipeline = RaphaelPipeline.from_pretrained(folder / "models/raphael")
    guide = train_guide(job_of("classifier", pipeline, Records(folder / "data/records")), folder / "work")
    shutil.copytree(guide, folder / "models/guides/classifier")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """The same of a RAPHAEL, with both guides."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("raphael")
    pipeline, records = write_text_home(folder)
    for kind in ("classifier", "clip"):
        guide = train_guide(job_of(kind, pipeline, records), folder / f"work_{kind}")
        shutil.copytree(guide, folder / "models/guides" / kind)
    return folder


def drawn(pipeline, prompts, **call) -> np.ndarray:
    return pipeline(prompts, num_inference_steps=3, output_type="np", **call).images


@pytest.mark.parametrize("kind", ["classifier", "clip"])
def test_a_training_that_was_killed_ends_in_the_same_bytes(kind, texts, tmp_path) -> None:
    pipeline, records = RaphaelPipeline.from_pretrained(texts / "models/raphael"), Records(texts / "data/records")

    def kill(images: int) -> None:
        if images == 40:  # between two checkpoints
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_guide(job_of(kind, pipeline, records), tmp_path, Hooks(progress=kill))
    said: list[str] = []
    again = train_guide(job_of(kind, pipeline, records), tmp_path, Hooks(say=said.append))
    assert any("resuming from the checkpoint at 32 images" in line for line in said)
    whole = texts / "models/guides" / kind
    for name in ("ema.safetensors", "raw.safetensors", "meta.json", "curves.json"):
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name


def test_its_folder_says_what_it_reads_and_how_well_on_records_that_were_kept_out(home, texts) -> None:
    groups, meta = read_checkpoint(home / "models/guides/classifier")
    assert set(groups) == {"ema", "raw"} and meta["guide"] == "classifier" and meta["system"] == "ddpm"
    assert (
        meta["classes"] == sorted(CLASSES) and meta["space"] == "pixels" and meta["picture"]["sizes_px"] == [[32, 32]]
    )
    assert meta["network"]["patch_px"] == 2 and meta["network"]["embedding_dim"] == 6
    assert set(meta["heldout"]) == {"200", "500", "800"}
    assert all(0 < one["n"] <= 8 and one["hits"] <= one["n"] for one in meta["heldout"].values())
    _, meta = read_checkpoint(texts / "models/guides/clip")
    assert meta["space"].startswith("latents ") and meta["text"].startswith("texts ") and 1 < meta["scale"] <= 100
    assert meta["network"].get("patch_px", 1) == 1 and meta["heldout"]["500"]["n"] == 8
    points = json.loads((texts / "models/guides/clip/curves.json").read_text())
    assert points[-1]["images"] == 64 and {"train/loss", "train/accuracy", "train/scale"} <= points[-1].keys()


def test_a_guide_turns_the_images_of_every_system_and_weight_0_changes_no_bit(home, texts) -> None:
    for folder, kinds, prompts in (
        (home, ["classifier"], ["heart", "star"]),
        (texts, ["classifier", "clip"], ["a red heart", "a star"]),
    ):
        pipeline = RaphaelPipeline.from_pretrained(folder / "models/raphael")
        plain = drawn(pipeline, prompts)
        for kind in kinds:
            spec = f"{kind}:{folder / 'models/guides' / kind}"
            assert np.array_equal(drawn(pipeline, prompts, guidance=spec, guidance_weight=0.0), plain)
            guided = drawn(pipeline, prompts, guidance=spec, guidance_weight=8.0)
            assert (guided != plain).any((1, 2, 3)).all(), kind
            guide = load_guide(spec)  # one that is open already
            assert np.array_equal(drawn(pipeline, prompts, guidance=guide, guidance_weight=8.0), guided)
            alone = drawn(pipeline, prompts[1:], guidance=guide, guidance_weight=8.0, seed=0)
            assert alone.shape == guided[1:].shape


def test_a_stronger_weight_brings_what_the_classifier_is_asked_for(home) -> None:
    """Its own log p of the images rises: the gradient has the right sign, whatever it has learned."""
    pipeline = RaphaelPipeline.from_pretrained(home / "models/raphael")
    guide = load_guide(f"classifier:{home / 'models/guides/classifier'}")
    found = []
    for weight in (0.0, 100.0):
        images = pipeline(
            ["heart"] * 6, num_inference_steps=20, guidance=guide, guidance_weight=weight, output_type="latent"
        ).images
        log_p = guide.of(pipeline, ["heart"] * 6)(images.clone(), torch.full((6,), 0.05))
        found.append(float(log_p.mean()))
    assert found[1] > found[0] + 0.01


def test_the_command_guides_and_its_picture_says_so_and_is_made_again(home, tmp_path, capsys) -> None:
    guide = f"classifier:{home / 'models/guides/classifier'}"
    model = ["--checkpoint", str(home / "models/raphael"), "--steps", "3"]
    asked = ["--guidance", guide, "--guidance-weight", "6", "--out", str(tmp_path / "a")]
    assert main(["generate", "heart", "star", *model, *asked]) == 0
    made, identity = read_made(tmp_path / "a/00001.png"), load_guide(guide).identity
    assert (made.guidance, made.guidance_weight) == (f"classifier:{identity}", 6.0)
    told = json.loads((tmp_path / "a/images.json").read_text())["settings"]
    assert (told["guidance"], told["guidance_weight"]) == (f"classifier:{identity}", 6.0)
    assert f"Guided by: classifier:{identity} x 6" in Image.open(tmp_path / "a/00001.png").text["parameters"]
    again = ["generate", "--from", str(tmp_path / "a/00001.png"), *model[:2], "--out", str(tmp_path / "b")]
    assert main([*again, "--guidance", guide]) == 0
    pixels = [np.asarray(Image.open(tmp_path / name)) for name in ("a/00001.png", "b/00001.png")]
    assert np.array_equal(*pixels)
    capsys.readouterr()
    assert main(again) == 1
    assert f"expected the guide that it followed, classifier:{identity}" in capsys.readouterr().err


def test_a_file_of_prompts_follows_it_too(home, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("heart\nstar\n")
    guide = f"classifier:{home / 'models/guides/classifier'}"
    for name, more in (("plain", []), ("guided", ["--guidance", guide, "--guidance-weight", "6"])):
        call = ["generate", "--prompts", str(tmp_path / "prompts.txt"), "--checkpoint", str(home / "models/raphael")]
        assert main([*call, "--steps", "3", "--out", str(tmp_path / name), *more]) == 0
    pixels = [np.asarray(Image.open(tmp_path / name / "00000.png")) for name in ("plain", "guided")]
    assert (pixels[0] != pixels[1]).any()
    assert read_made(tmp_path / "guided/00000.png").guidance.startswith("classifier:")
    assert "guidance" not in json.loads((tmp_path / "plain/images.json").read_text())["settings"]


def test_an_unconditional_model_is_asked_by_its_guide_alone(home, tmp_path) -> None:
    pipeline = RaphaelPipeline.from_pretrained(write_ddpm(tmp_path / "free", classes=()))
    guide = f"classifier:{home / 'models/guides/classifier'}"
    with pytest.raises(ValueError, match="this model is unconditional"):
        drawn(pipeline, "heart")
    guided = drawn(pipeline, ["heart"], guidance=guide, guidance_weight=8.0)
    assert (guided != drawn(pipeline, [""])).any()


def test_a_class_is_named_by_the_prompt_or_by_one_word_of_it(home) -> None:
    guide = load_guide(f"classifier:{home / 'models/guides/classifier'}")
    names = guide.meta["classes"]
    for prompt, wanted in (("heart", "heart"), ("a Red HEART on blue", "heart"), ("hearty star", "star")):
        assert names[guide.class_of(prompt)] == wanted
    for prompt, got in (("", "none"), ("a red thing", "none"), ("a star and a heart", "heart and star")):
        with pytest.raises(
            ValueError, match=rf"guidance: got the prompt .*which names {got} of circle, .*expected one"
        ):
            guide.class_of(prompt)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("edges:x", "guidance: got 'edges:x', expected classifier:PATH or clip:PATH"),
        (7.5, "guidance: got 7.5, expected classifier:PATH or clip:PATH; a number is guidance_scale"),
        ("classifier:", "guidance: got 'classifier:', expected classifier:PATH"),
        ("classifier:nowhere", r"no classifier there; train one beside your model: raphael train --guide classifier"),
        ("clip:{home}/models/guides/classifier", "got a classifier, expected a clip"),
        ("clip:{home}/models/raphael", "got a checkpoint that is no guide, expected a clip"),
        ("clip", r"models/guides/clip: no clip there; train one beside your model: raphael train --guide clip"),
    ],
)
def test_a_guide_that_is_not_there_says_how_to_train_one(spec, message, home) -> None:
    with pytest.raises(StageError, match=message) as error:
        load_guide(spec.format(home=home) if isinstance(spec, str) else spec)
    assert "\n" not in str(error.value)


def test_a_guide_of_another_system_or_size_is_named(home, texts) -> None:
    pixels, latents = (RaphaelPipeline.from_pretrained(folder / "models/raphael") for folder in (home, texts))
    of_pixels = f"classifier:{home / 'models/guides/classifier'}"
    of_latents = f"classifier:{texts / 'models/guides/classifier'}"
    again = "train one beside this model: raphael train --guide classifier"
    with pytest.raises(ValueError, match=f"of the system ddpm, which reads pixels of 3 channels, expected .*{again}"):
        drawn(latents, "a heart", guidance=of_pixels)
    with pytest.raises(
        ValueError, match="of the system raphael, which reads latents .* of 4 channels, expected pixels"
    ):
        drawn(pixels, "heart", guidance=of_latents)
    with pytest.raises(ValueError, match=r"of the system ddpm for images of 32 x 32 px, got 16 x 16; train one"):
        drawn(pixels, "heart", guidance=of_pixels, height=16, width=16)
    clip = load_guide(f"clip:{texts / 'models/guides/clip'}")
    clip.meta["text"] = "texts 000"
    with pytest.raises(ValueError, match=r"captions were read by another text encoder \(texts 000\), expected texts "):
        drawn(latents, "a heart", guidance=clip)


def test_what_does_not_go_with_a_guide_is_said(home, texts, capsys) -> None:
    pipeline = RaphaelPipeline.from_pretrained(texts / "models/raphael")
    guide = f"clip:{texts / 'models/guides/clip'}"
    with pytest.raises(
        ValueError, match="guidance_weight: got 3 without guidance, expected classifier:PATH or clip:PATH"
    ):
        drawn(pipeline, "a heart", guidance_weight=3.0)
    with pytest.raises(ValueError, match="guidance_weight: got -1, expected 0 or more"):
        drawn(pipeline, "a heart", guidance=guide, guidance_weight=-1.0)
    with pytest.raises(ValueError, match="guidance: got it with prompt_embeds, expected prompts"):
        drawn(pipeline, None, prompt_embeds=pipeline.encode(["a heart"]), guidance=guide)
    assert main(["generate", "heart", "--checkpoint", str(home / "models/raphael"), "--guidance-weight", "2"]) == 1
    assert "--guidance-weight: got 2 without --guidance" in capsys.readouterr().err


def test_a_training_that_cannot_be_says_what_is_missing(home, texts, tmp_path) -> None:
    ddpm, raphael = (RaphaelPipeline.from_pretrained(folder / "models/raphael") for folder in (home, texts))
    classes, captions = Records(home / "data/records"), Records(texts / "data/records")
    with pytest.raises(StageError, match="--guide: got clip for a model of the system ddpm.*expected classifier"):
        build(job_of("clip", ddpm, classes))
    free = write_class_home(tmp_path / "free", labels=False)
    with pytest.raises(StageError, match=r"without the field label.*encode.fields.*run the stage encode"):
        build(job_of("classifier", ddpm, Records(free / "data/records")))
    with pytest.raises(StageError, match=r"got images of \[\[32, 32\]\] px, expected the model's"):
        build(job_of("classifier", raphael, classes))
    raphael.autoencoder.set_scaling(2.0, 0.0)
    with pytest.raises(StageError, match="got latents of 4 channels and factor .*another autoencoder's"):
        build(job_of("clip", raphael, captions))
    with pytest.raises(ConfigError, match="unknown key loop.num_image; did you mean num_images"):
        settings_of("clip", False, {"loop.num_image": 3})
    with pytest.raises(ConfigError, match="sample_every_images: got 8, expected 0"):
        settings_of("clip", False, {"loop.sample_every_images": 8})


@pytest.mark.slow
def test_raphael_train_makes_a_guide_tracks_it_and_keeps_other_folders(home, tmp_path, capsys) -> None:
    from raphael.systems.guides.work import main as train_main

    folder = shutil.copytree(home, tmp_path / "home", ignore=shutil.ignore_patterns("guides", "work"))
    said = [f"--set={key}={json.dumps(value)}" for key, value in SMALL.items()]
    call = ["--guide", "classifier", "--workspace", str(folder), *said]
    assert train_main(call) == 0, capsys.readouterr().err
    for name in ("ema.safetensors", "meta.json"):
        assert (folder / "models/guides/classifier" / name).read_bytes() == (
            home / "models/guides/classifier" / name
        ).read_bytes()
    from raphael.base.tracking.tracker import connect

    client = connect(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "raphael"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name.startswith("guide-classifier-") and run.info.status == "FINISHED"
    assert run.data.metrics["train/accuracy"] >= 0 and "heldout/accuracy_t/500" in run.data.metrics
    assert train_main(call) == 0  # done already: the same folder, no second run
    assert len(client.search_runs([experiment.experiment_id])) == 1
    capsys.readouterr()
    assert train_main([*call, "--out", "models/raphael"]) == 1
    assert "holds something else than a guide" in capsys.readouterr().err
    assert (folder / "models/raphael/ema.safetensors").is_file()
    assert train_main([*call, "--set", "loop.nothing"]) == 1
    assert "--set: got 'loop.nothing', expected KEY=VALUE" in capsys.readouterr().err
