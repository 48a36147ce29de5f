"""`from_pretrained`, `save_pretrained`, `to`, `components`: what diffusers' users do with a pipeline as a whole."""

import json
import shutil

import numpy as np
import pytest
import torch
from truth.tiny_raphael import write_pipeline

from raphael import RaphaelPipeline
from raphael.base.stage import StageError
from raphael.systems.exchange.export import export


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return write_pipeline(tmp_path_factory.mktemp("model") / "raphael")


def drawn(pipeline):
    return pipeline("a red circle", num_inference_steps=2, output_type="np").images


@pytest.fixture(scope="module")
def plain(folder):
    return drawn(RaphaelPipeline.from_pretrained(folder))


@pytest.mark.parametrize("form", ["diffusers", "safetensors"])
def test_an_export_is_read_as_the_folder_that_it_was_made_of(folder, plain, form, tmp_path):
    written = export(folder, tmp_path / "export", form)
    assert np.array_equal(drawn(RaphaelPipeline.from_pretrained(written)), plain)


def test_what_was_saved_is_read_again_with_its_weights_and_its_defaults(folder, plain, tmp_path):
    pipeline = RaphaelPipeline.from_pretrained(folder)
    with torch.no_grad():
        next(pipeline.unet.parameters()).mul_(1.5)
    pipeline.sampler = "heun"
    changed = drawn(pipeline)
    pipeline.save_pretrained(tmp_path / "saved")
    again = RaphaelPipeline.from_pretrained(tmp_path / "saved")
    assert again.sampler == "heun" and np.array_equal(drawn(again), changed) and not np.array_equal(changed, plain)
    again.save_pretrained(tmp_path / "saved")  # onto itself, its encoders with it
    assert np.array_equal(drawn(RaphaelPipeline.from_pretrained(tmp_path / "saved")), changed)


def test_an_export_that_was_read_can_be_saved_after_its_own_folder_is_gone(folder, plain, tmp_path):
    pipeline = RaphaelPipeline.from_pretrained(export(folder, tmp_path / "export", "safetensors"))
    shutil.rmtree(tmp_path / "export")
    pipeline.save_pretrained(tmp_path / "saved")
    assert np.array_equal(drawn(RaphaelPipeline.from_pretrained(tmp_path / "saved")), plain)


def test_nothing_that_is_no_pipeline_is_written_over_and_no_pickle_is_written(folder, tmp_path):
    pipeline = RaphaelPipeline.from_pretrained(folder)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StageError, match="holds something else, expected a new or empty folder"):
        pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="safe_serialization: got false"):
        pipeline.save_pretrained(tmp_path / "new", safe_serialization=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_hub_id_is_fetched_without_pickles_and_read(folder, plain, monkeypatch, tmp_path):
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert np.array_equal(drawn(RaphaelPipeline.from_pretrained("somebody/raphael-tiny")), plain)
    ((name, patterns),) = asked
    assert name == "somebody/raphael-tiny" and not {"*.bin", "*.pt", "*.ckpt", "*"} & set(patterns)
    with pytest.raises(StageError, match="models/raphael: no such folder"):
        RaphaelPipeline.from_pretrained("models/raphael")  # of a workspace, never of the hub
    (tmp_path / "mine").mkdir()
    with pytest.raises(StageError, match="mine/model: no such folder; expected a pipeline folder"):
        RaphaelPipeline.from_pretrained("mine/model")
    assert len(asked) == 1

    def missing(name, allow_patterns):
        raise OSError("404:  not\n found")

    monkeypatch.setattr("huggingface_hub.snapshot_download", missing)
    with pytest.raises(StageError, match=r"not to be had from the hub \(OSError: 404: not found\)"):
        RaphaelPipeline.from_pretrained("somebody/nothing")


def test_a_wrong_folder_says_what_it_is(folder, tmp_path):
    sd = tmp_path / "sd"
    (sd / "unet").mkdir(parents=True)
    (sd / "model_index.json").write_text("{}")
    (sd / "unet/config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    for wrong, what in (
        (sd, "is diffusers' form; make a pipeline folder of it: raphael import"),
        (folder / "text_encoder", "is a text encoder; expected a pipeline folder"),
        (folder / "autoencoder", "is an autoencoder; expected a pipeline folder"),
        (folder.parent, "is a folder of models; name the pipeline in it"),
    ):
        with pytest.raises(StageError, match=what) as error:
            RaphaelPipeline.from_pretrained(wrong)
        assert "\n" not in str(error.value)


def test_device_type_and_parts_are_those_of_diffusers_pipelines(folder, plain):
    pipeline = RaphaelPipeline.from_pretrained(folder)
    assert pipeline.device == torch.device("cpu") and pipeline.dtype == torch.float32
    assert set(pipeline.components) == {"unet", "scheduler", "autoencoder", "text_encoder"}
    assert all(getattr(pipeline, name) is part for name, part in pipeline.components.items() if name != "scheduler")
    asked = RaphaelPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    for halved in (pipeline.to("cpu", torch.bfloat16), pipeline.to(torch.bfloat16)):
        assert halved is pipeline and halved.dtype == torch.bfloat16 and np.array_equal(drawn(halved), drawn(asked))
    back = pipeline.to(dtype=torch.float32)
    assert back.dtype == torch.float32 and back.precision is None
    assert all(item.dtype == torch.float32 for item in back.unet.parameters())
    assert np.abs(drawn(back) - plain).max() > 0  # the roundings of bfloat16 stay
    with pytest.raises(ValueError, match="torch_dtype: got torch.float16, expected torch.float32 or torch.bfloat16"):
        pipeline.to(torch.float16)
