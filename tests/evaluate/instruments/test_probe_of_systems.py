"""The probe asks every model that is told captions: what a system diffuses and how it reads are the pipeline's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from truth.cascade_workspace import SIDE, captions
from truth.glide_workspace import write_glide_workspace
from truth.tiny_cascade import cascade_in
from truth.tiny_ddpm import write_ddpm
from truth.tiny_raphael import ROOT, write_pipeline

from data_pipeline.source.scene_probe import probe_set
from raphael.base.config.params import load_config
from raphael.base.probe_set import Exchange, ProbeSet
from raphael.base.randomness import SampleRng
from raphael.base.records import Records
from raphael.base.stage import Stage, write_json
from raphael.base.strict import ConfigError
from raphael.cli.main import main
from raphael.encoders.autoencoder import encode_images
from raphael.encoders.text import load_text_encoder
from raphael.evaluate.instruments.probe import mean_latents, probe_pipeline
from raphael.evaluate.protocols.protocol import load_protocol
from raphael.evaluate.protocols.workspace import Workspace
from raphael.evaluate.stage import protocol_of
from raphael.evaluate.subject import CAPTION_MODEL, TEXT_MODEL
from raphael.generate.pipeline import Pipeline, RaphaelPipeline, default_size
from raphael.net.condition import Condition
from raphael.objectives.probe import TIMES
from raphael.systems.glide.pipeline import asked


@pytest.fixture(scope="module")
def scenes() -> ProbeSet:
    """Drawn scenes under captions of the words that the small T5 knows: what is asked is which of two is told."""
    images, texts = probe_set(0, 3, 2 * SIDE, 0.12, ()).images, captions()
    wrong = [text.replace("red", "green") if "red" in text else text.replace("blue", "red") for text in texts]
    rows = np.array([row for row, text in enumerate(texts[: len(images)]) if "green" not in text])
    facts = {"colour": Exchange(rows, [wrong[row] for row in rows]), "word": Exchange(rows[:1], [texts[rows[0]]])}
    count = len(images)
    return ProbeSet(images, texts[:count], ["single"] * count, [{}] * count, facts)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return cascade_in(tmp_path_factory.mktemp("cascade"))


@pytest.fixture(scope="module")
def of_ids(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """An untrained cascade that reads token ids by transformers of its own, every weight drawn anew."""
    from raphael.diffusion.cascade import Upsampler
    from raphael.diffusion.noise import noise_of
    from raphael.diffusion.prediction import prediction_of
    from raphael.systems.glide.pipeline import GlidePipeline
    from raphael.systems.glide.training import described, known_ids, network
    from raphael.systems.job import Folders

    folder = tmp_path_factory.mktemp("of_ids")
    config = write_glide_workspace(folder)
    folders = Folders.of(folder, folder)
    settings, meta, known = config.model.load(), described(config, folders), known_ids(Records(folders.records))
    base, large = (network(config, part, known) for part in ("base", "upsampler"))
    torch.manual_seed(5)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    noise = noise_of(settings.upsampler.diffusion), prediction_of(settings.upsampler.diffusion)
    upsampler = Upsampler(large, *noise, settings.upsampler.factor)
    text = load_text_encoder(folder / "models/clip")
    return GlidePipeline(base, settings.base.diffusion, upsampler, text, meta)


@torch.inference_mode()
@pytest.mark.parametrize("side", [32, 48], ids=["as large", "larger"])
def test_of_a_model_of_latents_it_is_of_the_same_bits_as_the_autoencoder_gives(tmp_path: Path, side: int) -> None:
    pipeline = RaphaelPipeline.from_pretrained(write_pipeline(tmp_path / "model"))
    images = probe_set(0, 5, side, 0.12, ()).images
    size = default_size(pipeline.meta["picture"])
    assert torch.equal(mean_latents(pipeline, images), encode_images(pipeline.autoencoder, images, size))


def error_of_v(pipeline: Pipeline, image: np.ndarray, place: int, caption: str) -> float:
    """By hand: the base's pixels are means over squares, v = sqrt(a) eps - sqrt(1 - a) x_0, a = cos^2."""
    factor = image.shape[0] // (SIDE // 2)
    pixels = image.reshape(SIDE, 2, SIDE, 2, 3).mean((1, 3)).round()  # as a record of pixels of the model's size
    assert factor == 4
    x0 = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None].unflatten(2, (-1, 2)).unflatten(4, (-1, 2))
    x0 = x0.mean((3, 5))  # and of that the base's
    noise = SampleRng(0, 0, [place]).normal("probe", tuple(x0.shape[1:])).double()
    encoder, total = pipeline.text_encoder, 0.0
    if pipeline.system == "glide":
        told = asked(encoder, [caption])
    else:
        read = encoder.encode(encoder.tokenize([caption]))
        told = Condition(read.context, read.mask)
    for time in TIMES:
        t = torch.tensor([round(1000 * time)])
        angle = torch.acos(pipeline.schedule.alpha_bar_at(t).double().sqrt()).view(-1, 1, 1, 1)
        x_t, v = angle.cos() * x0 + angle.sin() * noise, angle.cos() * noise - angle.sin() * x0
        out = pipeline.unet(x_t.float(), t, told).prediction
        total += float((out.double() - v).square().mean()) / len(TIMES)
    return total


@torch.inference_mode()
@pytest.mark.parametrize("reads", ["cascade", "of_ids"])
def test_of_a_cascade_it_is_the_base_told_the_exchanged_caption_as_it_reads(reads, scenes: ProbeSet, request) -> None:
    cascade = request.getfixturevalue(reads)
    found = probe_pipeline(cascade, scenes, precision="fp32")["facts"]
    fact, margins = scenes.facts["colour"], []
    assert len(fact.rows) >= 4
    for row, wrong in zip(fact.rows, fact.captions, strict=True):
        errors = [error_of_v(cascade, scenes.images[row], int(row), text) for text in (scenes.captions[row], wrong)]
        margins.append(errors[1] - errors[0])
    assert all(abs(margin) > 1e-5 for margin in margins), "the captions' vectors reach the network"
    assert found["colour"]["margin"] == pytest.approx(np.mean(margins), abs=2e-5)
    assert found["colour"]["win_share"] == pytest.approx(np.mean([margin > 0 for margin in margins]), abs=1e-6)
    assert abs(found["word"]["margin"]) < 1e-6, "a caption exchanged for itself"
    if reads == "cascade":  # a network that reads the words itself rounds by the row where they stand
        assert (found["word"]["win_share"], found["word"]["ties"]) == (0.5, 1)


def test_a_model_of_classes_is_refused_in_words(tmp_path: Path, capsys) -> None:
    probe_set(0, 5, 32, 0.12, ()).write(tmp_path / "probe.npz")
    model = write_ddpm(tmp_path / "model")
    words = ["probe", "--checkpoint", str(model), "--scenes", str(tmp_path / "probe.npz"), "--n", "1"]
    assert main([*words, "--out", str(tmp_path / "probe.json")]) == 1
    said = capsys.readouterr().err
    assert "got a checkpoint of the system ddpm, which is told labels, expected one that is told captions" in said


def test_whether_a_workspaces_model_is_told_captions_is_known_from_its_system(tmp_path: Path) -> None:
    config = load_config(ROOT / "params.yaml")

    def subject(system: str) -> Workspace:
        write_json(tmp_path / system / "meta.json", {"system": system})
        protocol = load_protocol("systems/v1")
        return Workspace(config, Stage("evaluate", tmp_path), protocol, [], [], tmp_path / system)

    assert subject("raphael").missing(CAPTION_MODEL) == "" == subject("imagen").missing(CAPTION_MODEL)
    assert "which is told no captions" in subject("ddpm").missing(CAPTION_MODEL)
    assert subject("imagen").missing(TEXT_MODEL), "it has no autoencoder, and the probe needs none"
    named = replace(config, evaluate=replace(config.evaluate, protocol="systems/v1"))
    assert protocol_of(named, tmp_path / "imagen").identity == "systems/v1"
    assert protocol_of(config, tmp_path / "imagen").identity == "imagen/v1"
    wrong = replace(config, evaluate=replace(config.evaluate, protocol="system/v1"))
    with pytest.raises(ConfigError, match="evaluate.protocol: got 'system/v1', did you mean systems/v1"):
        protocol_of(wrong, tmp_path / "imagen")
