"""The workspace that a fine-tuning is; the training itself: tests/train/test_start.py."""

import json
import subprocess
import sys

import pytest
from truth.tiny_raphael import small_unet, write_pipeline

from flows.finetune import Request, make
from flows.workspace import make_workspace
from raphael.checkpoint import checkpoint_sha256
from raphael.config import load_config
from raphael.preset import load_preset
from raphael.stage import StageError


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


def test_made_again_nothing_changes_and_another_picture_is_another_input(model, tmp_path):
    root = make(request(model, tmp_path))
    before = (root / "params.yaml").read_text()
    assert (make(request(model, tmp_path)) / "params.yaml").read_text() == before
    (tmp_path / "pictures" / "a star.png").write_bytes(b"x")
    after = (make(request(model, tmp_path)) / "params.yaml").read_text()
    changed = [line for line in after.splitlines() if line not in before.splitlines()]
    assert len(changed) == 1 and "fingerprint" in changed[0]


def test_what_is_absent_is_one_line(model, tmp_path):
    with pytest.raises(StageError, match="nowhere: no such folder; expected pictures with captions"):
        make(request(model, tmp_path, data=tmp_path / "nowhere"))
    with pytest.raises(StageError, match="none: no such folder; expected a pipeline folder"):
        make(request(tmp_path / "none", tmp_path))


def test_the_raphael_command_hands_its_options_on(model, tmp_path):
    pictures = request(model, tmp_path).data
    command = [sys.executable, "-m", "raphael.cli", "train", "--from", str(model), "--data", str(pictures)]
    command += ["--out", str(tmp_path / "space"), "--learning-rate", "3e-5", "--only-make", "--set", "train.seed=7"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    train = load_config(tmp_path / "space" / "params.yaml").train
    assert train.loop.learning_rate == 3e-5 and train.seed == 7
    assert json.dumps(str(tmp_path / "space")).strip('"') in done.stdout


def test_a_workspace_can_be_fine_tuned_from_like_the_project(model, tmp_path):
    """Its code is a copy, and asks for the project's files beside itself."""
    inside = make_workspace(tmp_path / "inside", [])
    pictures = request(model, tmp_path).data
    command = [sys.executable, "-m", "flows.finetune", "--from", str(model), "--data", str(pictures)]
    command += ["--out", str(tmp_path / "space"), "--only-make"]
    done = subprocess.run(command, cwd=inside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load_config(tmp_path / "space" / "params.yaml").source.kind == "folder"
