"""Records of other fields than RAPHAEL's: pixels and labels, made by the stages and read by a training."""

import json
import os
import subprocess
import sys
import typing
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from truth.image_workspace import SMALL, drawn, write_params, write_workspace

from data_pipeline.autoencoder import stage as fit_autoencoder
from data_pipeline.clip import stage as fit_clip
from data_pipeline.encode import fields
from data_pipeline.encode import stage as encode
from raphael.base import records as names
from raphael.base.config.data import EncodeConfig, FieldName
from raphael.base.config.params import load_config
from raphael.base.records import EDGES, LABEL, MOMENTS, PIXELS, TOKEN_IDS, Records
from raphael.base.stage import Stage, StageError, write_json
from raphael.base.strict import ConfigError
from raphael.encoders.autoencoder import load_autoencoder
from raphael.systems.ddpm.system import OF_TEXTS

COUNT = 12
PATTERN = "^a (red|green|blue|white)"
DRAWN = (64, 32)  # width, height
CLASSES = {  # a model that reads no text
    "system": "ddpm",
    "preset": "none",
    "settings": {
        "unet": {
            "latent_channels": 3, "channels": [8], "res_blocks": 1, "attention_levels": [], "head_dim": 8,
            "norm_groups": 4,
        },
        "diffusion": {
            "num_steps": 10, "schedule": "linear", "beta_start": 1.0e-4, "beta_end": 0.02, "prediction": "eps",
            "zero_terminal_snr": False,
        },
    },
}  # fmt: skip
SIZES = {"picture": {"sizes_px": [[16, 32]]}}
WITHOUT_TEXTS = {"model": CLASSES, "evaluate": dict.fromkeys(OF_TEXTS, 0)}


def pixel_preset(root, project):
    """A preset for 3 channels at factor 1."""
    preset = yaml.safe_load((project / "raphael/presets/tiny-debug.yaml").read_text())
    preset["unet"] |= {"latent_channels": 3, "channels": [16, 16]}
    preset["vae"]["channels"] = [8]
    (root / "pixels.yaml").write_text(yaml.safe_dump(preset))
    return str(root / "pixels.yaml")


def sections(root, project, **encode_settings):
    settings = {"batch_size": 4, **encode_settings}
    clip = {**SMALL["clip"], "context_length": 16}
    return {
        **SIZES, "clip": clip, "autoencoder": {"pretrained": "pixels"}, "encode": settings,
        **({"model": {"preset": pixel_preset(root, project)}} if "token_ids" in settings["fields"] else WITHOUT_TEXTS),
    }  # fmt: skip


def run(root, *stages):
    config = load_config(root / "params.yaml")
    for module, name in stages:
        module.run(config, Stage(name, root))
    return config


@pytest.fixture
def workspace(tmp_path, project, monkeypatch):
    root = write_workspace(tmp_path, project, COUNT, shapes=(DRAWN[::-1],))
    write_params(root, project, **sections(root, project, fields=["pixels", "label"], label_pattern=PATTERN))
    monkeypatch.chdir(root)
    return root


def test_the_table_has_every_field_that_a_setting_can_name():
    assert set(fields.ENCODERS) == set(typing.get_args(FieldName))
    assert {names.MOMENTS, names.PIXELS, names.TOKEN_IDS, names.EDGES, names.LABEL, names.SIZES} | {
        names.TEXT,
        names.TEXT_MASK,
    } == set(fields.ENCODERS)
    assert set(EncodeConfig.fields) == {MOMENTS, TOKEN_IDS, EDGES}


def test_pixels_and_labels_need_neither_an_autoencoder_nor_a_text_encoder(workspace):
    run(workspace, (encode, "encode"))
    records = Records(workspace / "data/records")
    records.check()
    assert records.fields == {PIXELS: ("uint8", (3, 16, 32)), LABEL: ("int32", ())}
    batch = records.batch(range(COUNT))
    first_words = [drawn(number)[0].split()[1] for number in range(COUNT)]
    classes = sorted(set(first_words))
    assert records.facts["label"]["classes"] == classes and records.facts["label"]["without"] == 0
    assert [classes[label] for label in batch[LABEL]] == first_words
    assert records.facts["autoencoder"]["kind"] == "pixels" and "text_encoder" not in records.facts
    size = sum(path.stat().st_size for path in (workspace / "data/records").glob("*.bin"))
    assert size == COUNT * (3 * 16 * 32 + 4)


def test_pixels_are_means_over_the_area_that_each_covers(workspace):
    run(workspace, (encode, "encode"))
    pixels = Records(workspace / "data/records").batch(range(COUNT))[PIXELS]
    for number in range(COUNT):
        drawing = np.asarray(drawn(number, *DRAWN)[1]).astype(np.float64)  # twice as high and wide
        means = (drawing[0::2, 0::2] + drawing[0::2, 1::2] + drawing[1::2, 0::2] + drawing[1::2, 1::2]) / 4
        assert np.abs(pixels[number].transpose(1, 2, 0) - means).max() <= 1, number  # rounded along each axis


def test_the_images_that_a_model_of_pixels_is_compared_with_are_its_records_byte_for_byte(workspace):
    from raphael.evaluate.protocols.protocol import system_protocol
    from raphael.evaluate.protocols.workspace import Workspace

    class Kept:
        """A network whose rows are the images' bytes."""

        name = "kept"

        def rows(self, images, advance):
            return np.stack([image.ravel() for image in images])

    config = run(workspace, (encode, "encode"))
    pixels = Records(workspace / "data/records").batch(range(COUNT))[PIXELS].transpose(0, 2, 3, 1)
    generated = [np.zeros((16, 32, 3), np.uint8)]
    stage = Stage("evaluate", workspace)
    subject = Workspace(config, stage, system_protocol("ddpm"), [], generated, workspace / "models/raphael")
    subject.networks = [Kept()]
    np.testing.assert_array_equal(subject.pairs[0].theirs.rows, pixels.reshape(COUNT, -1))


def test_the_autoencoder_of_pixels_is_a_folder_that_says_so(workspace):
    run(workspace, (fit_autoencoder, "autoencoder"))
    folder = workspace / "models/autoencoder"
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    told = json.loads((workspace / "reports/autoencoder.json").read_text())
    assert (told["total"], told["kept"], told["trained_on"], told["parameters"]) == (COUNT, COUNT, 0, 0)
    assert load_autoencoder(folder).facts() == {
        "kind": "pixels", "latent_channels": 3, "downsampling": 1, "scaling_factor": 1.0, "shift": 0.0,
    }  # fmt: skip


def test_moments_of_pixels_are_the_same_numbers_within_the_rounding_of_float16(workspace, project):
    from raphael.net.latents import moments_of

    run(workspace, (fit_autoencoder, "autoencoder"), (encode, "encode"))
    pixels = Records(workspace / "data/records").batch(range(COUNT))[PIXELS]
    write_params(workspace, project, **sections(workspace, project, fields=["moments", "token_ids", "edges"]))
    run(workspace, (fit_clip, "clip"), (encode, "encode"))
    stored = Records(workspace / "data/records").batch(range(COUNT))[MOMENTS]
    assert stored.shape == (COUNT, 6, 16, 32)
    made = moments_of({PIXELS: torch.from_numpy(pixels)}).numpy()
    np.testing.assert_array_equal(made.astype(np.float16), stored)


def test_a_system_of_pixels_trains_and_generates_without_an_autoencoder(workspace, project):
    from raphael.base.randomness import SampleRng
    from raphael.diffusion.sampling import generate_images, sampling_of
    from raphael.systems.raphael.training import Folders, TrainingJob, build_denoising, sampling_parts, training_flops

    settings = sections(workspace, project, fields=["edges", "pixels", "token_ids"])
    write_params(workspace, project, **settings)
    config = run(workspace, (fit_autoencoder, "autoencoder"), (fit_clip, "clip"), (encode, "encode"))
    folders = Folders.of(workspace, workspace / "work")
    objective, records = build_denoising(config, folders)
    batch = {name: torch.from_numpy(array) for name, array in records.batch([3, 1]).items()}
    objective.train()
    losses = objective(batch, SampleRng(0, 0, [3, 1]))
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"]) and objective.unet.conv_out.weight.grad.abs().sum() > 0
    assert training_flops(config.model.load(), records) > 0
    parts = sampling_parts(TrainingJob(config, folders), objective)
    assert parts.latent_shape == (3, 16, 32)
    images = generate_images(parts, ["a red square on white"], [(0, 0)], replace(sampling_of(config.generate), steps=2))
    assert images.shape == (1, 16, 32, 3) and images.dtype == np.uint8


def test_records_without_what_a_training_reads_name_the_setting_and_the_stage(workspace, project):
    from raphael.systems.raphael.training import check_fit

    run(workspace, (encode, "encode"))
    write_params(workspace, project, **sections(workspace, project, fields=["edges", "pixels", "token_ids"]))
    config, records = load_config(workspace / "params.yaml"), Records(workspace / "data/records")
    message = (
        r"records without the field token_ids.*encode.fields: \[label, pixels, token_ids\] in .*run the stage encode"
    )
    with pytest.raises(StageError, match=message):
        check_fit(config, records, 32)
    records.require([(MOMENTS, PIXELS), LABEL])
    with pytest.raises(StageError, match="without the field edges"):
        records.require([EDGES])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fields": ["pixels", "lable"]}, r"encode.fields\[1\]: got 'lable', expected one of moments, pixels"),
        ({"fields": ["pixels", "pixels"]}, "expected each once"),
        ({"fields": ["token_ids"]}, "one of moments and pixels"),
        ({"fields": ["moments", "pixels"]}, "one of moments and pixels"),
        ({"fields": ["pixels", "label"]}, "got neither with fields"),
        ({"fields": ["pixels"], "label_column": "class"}, "got label_column with fields"),
        ({"fields": ["pixels", "label"], "label_pattern": "("}, "expected a regular expression"),
        ({"fields": ["pixels", "label"], "label_pattern": "(a)(b)"}, "got 2 groups"),
    ],
)
def test_fields_that_make_no_sense_are_refused_when_the_settings_are_read(workspace, project, changes, message):
    write_params(workspace, project, **sections(workspace, project, **changes))
    with pytest.raises(ConfigError, match=message):
        load_config(workspace / "params.yaml")


def test_pixels_beside_an_autoencoder_of_latents_are_refused(workspace, project):
    settings = sections(workspace, project, fields=["pixels", "token_ids", "edges"])
    write_params(workspace, project, **{**settings, "autoencoder": {"pretrained": ""}})
    with pytest.raises(ConfigError, match="got pixels with autoencoder.pretrained '', expected 'pixels'"):
        load_config(workspace / "params.yaml")


def test_settings_that_were_not_there_once_do_not_move_the_folder_of_unfinished_work():
    old = {"batch_size": 4, "edge_detector": "sobel", "edge_weights": "", "edge_threshold": 0.3}
    assert EncodeConfig(**old).decisive() == old
    assert EncodeConfig(**old, fields=("moments",)).decisive() == {**old, "fields": ["moments"]}


@pytest.mark.slow
def test_the_stage_train_leaves_a_model_of_pixels_that_generates_by_itself(workspace, project):
    from raphael.generate.pipeline import RaphaelPipeline

    loop = {
        "num_images": 32, "batch_size": 8, "log_every_images": 16, "checkpoint_every_images": 16, "warmup_images": 16,
        "sample_every_images": 32, "heldout_every_images": 16,
    }  # fmt: skip
    settings = sections(workspace, project, fields=["edges", "pixels", "token_ids"])
    train = {"num_workers": 0, "num_heldout": 3, "loop": loop}
    write_params(workspace, project, **settings, train=train, generate={"steps": 2})
    run(workspace, (fit_autoencoder, "autoencoder"), (fit_clip, "clip"), (encode, "encode"))
    prompts = [{"prompt": "a red square on white", "suite": "captions", "truth": None, "reference": None}]
    write_json(workspace / "data/source/prompts.json", {"source": "scenes", "prompts": prompts})
    environment = {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "raphael.train"]
    done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    model = workspace / "models/raphael"
    assert json.loads((model / "autoencoder/config.json").read_text()) == {"kind": "pixels"}
    pipeline = RaphaelPipeline.from_pretrained(model)
    pipeline.threshold = "static"  # pixels have bounds
    assert pipeline("a red square", num_inference_steps=2).images[0].size == (32, 16)


@pytest.mark.parametrize("largest", [7e4, -7e4, float("nan")])
def test_moments_beyond_float16_are_one_line_and_no_infinities_in_the_records(largest):
    class Loud:
        device = torch.device("cpu")

        def encode_moments(self, images):
            return torch.full((len(images), 8, 2, 2), largest)

    tools = fields.Tools(None, None, torch.device("cpu"), Loud(), None, None)
    pictures = fields.Pictures(np.zeros((2, 16, 16, 3), np.uint8), ["a", "b"])
    with pytest.raises(StageError, match="the autoencoder's moments do not fit float16 .*; train it again"):
        fields._moments(tools, pictures)
