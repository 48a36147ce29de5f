"""The workspace that a fine-tuning is; the training itself: tests/train/test_start.py."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from truth.own_images import in_parquet, in_tar, sidecars
from truth.tiny_adapter import made_pairs
from truth.tiny_raphael import small_unet, write_pipeline

from flows.finetune import LORA_LEARNING_RATE, Request, base_of, make, put_adapter
from flows.workspace.folder import make_workspace
from raphael.base.checkpoint.folder import checkpoint_sha256
from raphael.base.config.params import load_config
from raphael.base.config.preset import load_preset
from raphael.base.stage import StageError
from raphael.base.strict import ConfigError
from raphael.generate.pipeline import RaphaelPipeline
from raphael.pretrained.find import HOME
from raphael.systems.lora.file import Header, read_lora, write_lora
from raphael.systems.lora.names import fit


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("model") / "raphael")


def request(model, tmp_path, **changes):
    pictures = tmp_path / "pictures"
    pictures.mkdir(exist_ok=True)
    if not (pictures / "a red circle.png").exists():  # a time of change is part of the fingerprint
        (pictures / "a red circle.png").write_bytes(b"")
    settings = {"train.num_workers": 0, "picture.sizes_px": [[32, 32]]}
    values = {"num_images": 640, "learning_rate": None, "sample_every": 160, "changes": settings, **changes}
    return Request(model, values.pop("data", pictures), tmp_path / "space", **values)


def test_the_workspace_has_the_checkpoints_encoders_shape_and_weights_to_begin_with(model, tmp_path):
    root = make(request(model, tmp_path))
    config = load_config(root / "params.yaml")
    assert config.source.kind == "folder" and config.source.fingerprint
    assert config.train.init_from == str(model.resolve())
    assert checkpoint_sha256(model).startswith(config.train.init_sha256)
    assert config.autoencoder.pretrained == str(model / "autoencoder")
    assert config.clip.pretrained == str(model / "text_encoder")
    assert config.train.loop.sample_every_images == 160 and config.train.num_workers == 0
    preset = load_preset(str(root / f"raphael/presets/{config.model.preset}.yaml"))
    assert preset.unet == small_unet() and preset.diffusion.prediction == "v"


def test_the_model_that_comes_with_the_package_can_be_fine_tuned_by_its_name(tmp_path):
    root = make(request("scenes", tmp_path, changes={"train.num_workers": 0}))
    config = load_config(root / "params.yaml")
    assert config.train.init_from == str(HOME / "scenes")
    assert checkpoint_sha256(HOME / "scenes").startswith(config.train.init_sha256)
    assert config.clip.pretrained == str(HOME / "scenes/text_encoder") and config.picture.sizes_px == ((64, 64),)


def test_a_model_can_gain_the_input_of_mask_and_picture(model, tmp_path):
    root = make(request(model, tmp_path, inpainting=True))
    config = load_config(root / "params.yaml")
    unet = load_preset(str(root / f"raphael/presets/{config.model.preset}.yaml")).unet
    assert unet.inpainting and unet.picture_channels == unet.latent_channels + 1
    assert replace(unet, inpainting=False, picture_channels=0) == small_unet()


def test_a_model_can_gain_the_input_of_sizes_and_does_so_only_where_asked(model, tmp_path):
    root = make(request(model, tmp_path, sizes=True))
    config = load_config(root / "params.yaml")
    unet = load_preset(str(root / f"raphael/presets/{config.model.preset}.yaml")).unet
    assert (unet.size_px, unet.vector_dim) == (4, 6) and config.encode.fields[-1] == "sizes"
    assert replace(unet, size_px=0, vector_dim=0) == small_unet()
    plain = load_config(make(request(model, tmp_path)) / "params.yaml")
    assert "sizes" not in plain.encode.fields


def test_made_again_nothing_changes_and_another_image_is_another_input(model, tmp_path):
    root = make(request(model, tmp_path))
    before = (root / "params.yaml").read_text()
    assert (make(request(model, tmp_path)) / "params.yaml").read_text() == before
    (tmp_path / "pictures" / "a star.png").write_bytes(b"x")
    after = (make(request(model, tmp_path)) / "params.yaml").read_text()
    changed = [line for line in after.splitlines() if line not in before.splitlines()]
    assert len(changed) == 1 and "fingerprint" in changed[0]


def test_what_is_absent_is_one_line(model, tmp_path):
    with pytest.raises(StageError, match="nowhere: no such file or folder; expected a folder of images with captions"):
        make(request(model, tmp_path, data=tmp_path / "nowhere"))
    with pytest.raises(StageError, match="none: no such folder; expected a pipeline folder"):
        make(request(tmp_path / "none", tmp_path))


def test_the_raphael_command_hands_its_options_on(model, tmp_path):
    pictures = sidecars(tmp_path / "photos", 12)
    command = [sys.executable, "-m", "raphael.cli", "train", "--from", str(model), "--data", str(pictures)]
    command += ["--out", str(tmp_path / "space"), "--learning-rate", "3e-5", "--only-make", "--set", "train.seed=7"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    train = load_config(tmp_path / "space" / "params.yaml").train
    assert train.loop.learning_rate == 3e-5 and train.seed == 7
    assert (train.num_heldout, train.patience, train.export) == (2, 5, "best")
    assert train.loop.heldout_every_images == train.loop.sample_every_images == 320  # twenty of 6,400 images
    assert "12 of 12 captioned images are used" in done.stdout and " GB and about " in done.stdout
    assert json.dumps(str(tmp_path / "space")).strip('"') in done.stdout


def test_a_workspace_can_be_fine_tuned_from_like_the_project(model, tmp_path):
    """Its code is a copy, and asks for the project's files beside itself."""
    inside = make_workspace(tmp_path / "inside", [])
    pictures = sidecars(tmp_path / "photos", 4)
    command = [sys.executable, "-m", "flows.finetune", "--from", str(model), "--data", str(pictures)]
    command += ["--out", str(tmp_path / "space"), "--only-make"]
    done = subprocess.run(command, cwd=inside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load_config(tmp_path / "space" / "params.yaml").source.kind == "folder"


@pytest.mark.parametrize("kind", ["pictures", "webdataset"])
def test_parquet_files_and_tars_are_trained_on_like_a_folder(model, tmp_path, kind):
    file = in_parquet(tmp_path / "in/a.parquet") if kind == "pictures" else in_tar(tmp_path / "in/a.tar")
    for place in (file, file.parent):
        config = load_config(make(request(model, tmp_path, data=place)) / "params.yaml")
        assert config.source.kind == kind and config.source.path == str(place) and config.source.fingerprint


def test_an_adapter_is_asked_for_by_its_rank(model, tmp_path):
    root = make(request(model, tmp_path, lora=4, prompts=("a ring", "a red circle")))
    train = load_config(root / "params.yaml").train
    assert train.lora.rank == 4 and train.lora.strength == 4.0 and train.lora.targets == ("attention",)
    assert train.settings == {**train.settings, "balance": "none"} and train.loop.optimizer == "adamw"
    assert train.loop.learning_rate == LORA_LEARNING_RATE
    assert train.sample_prompts == ("a ring", "a red circle")
    changes = {"train.num_workers": 0, "picture.sizes_px": [[32, 32]], "train.lora.targets": ["experts"]}
    root = make(request(model, tmp_path, lora=4, changes=changes))
    assert load_config(root / "params.yaml").train.lora.targets == ("experts",)


def test_a_rank_above_a_width_is_said_before_anything_is_made(model, tmp_path):
    with pytest.raises(ConfigError, match="lora.rank: got 64, expected at most 16, the smaller side of"):
        make(request(model, tmp_path, lora=64))
    assert not (tmp_path / "space").exists()


@pytest.mark.parametrize(("form", "names"), [("kohya", {"lora.safetensors"}), ("peft", {"adapter_model.safetensors"})])
def test_what_the_training_left_is_put_into_the_workspace_in_the_form_that_was_asked_for(tmp_path, form, names):
    trained = write_pipeline(tmp_path / "models" / "raphael")
    pairs = made_pairs(("attention",))
    write_lora(trained / "lora.safetensors", pairs, Header("0123", 2, 2.0))
    file = put_adapter(tmp_path, form)
    assert file.parent == tmp_path and {file.name} == names
    assert read_lora(file).form == form
    pipeline = RaphaelPipeline.from_pretrained(trained)
    assert fit(read_lora(file), {"unet": pipeline.unet}).keys() == pairs.keys()


def test_a_single_file_is_imported_beside_the_workspace_once(model, tmp_path, monkeypatch):
    asked = []

    def imported(source, out):
        asked.append(source)
        write_pipeline(out)
        return "imported"

    monkeypatch.setattr("raphael.systems.exchange.import_model.import_model", imported)
    (tmp_path / "sd.safetensors").write_bytes(b"weights")
    wanted = replace(request(model, tmp_path), checkpoint=tmp_path / "sd.safetensors")
    first, again = base_of(wanted), base_of(wanted)
    assert first == again and first.parent == tmp_path and asked == [tmp_path / "sd.safetensors"]
    (tmp_path / "sd.safetensors").write_bytes(b"others")
    assert base_of(wanted) != first
