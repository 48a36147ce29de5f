"""A pipeline folder's contents: what is in the encoders' copies belongs to the model's name, and is compared."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from raphael.base.checkpoint.folder import CheckpointError, checkpoint_sha256, write_checkpoint
from raphael.base.integrity.contents import NAME, check_contents, model_sha256, seal

PARTS = ["autoencoder", "text_encoder"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_checkpoint(folder, {"ema": {"w": torch.arange(6.0)}}, {"preset": "x"})
    for name in ("autoencoder/config.json", "autoencoder/weights.safetensors", "text_encoder/deep/vocab.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 9)
    (folder / "curves.json").write_text("[]")
    seal(folder)
    return folder


def test_a_sealed_folder_is_whole_wherever_it_is_copied(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    check_contents(tmp_path / "copy")
    assert model_sha256(tmp_path / "copy") == model_sha256(model) != checkpoint_sha256(model)


def test_another_encoder_is_another_model(model: Path) -> None:
    before = model_sha256(model)
    (model / "autoencoder/weights.safetensors").write_bytes(b"another")
    assert seal(model) != before


def test_a_folder_of_before_loads_and_is_known_by_its_checkpoint(model: Path) -> None:
    (model / NAME).unlink()
    check_contents(model, PARTS)
    assert model_sha256(model) == checkpoint_sha256(model)


def test_every_flipped_bit_is_found_and_the_file_named(model: Path) -> None:
    rng = random.Random(0)
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for _ in range(12):
            data, place = bytearray(whole), rng.randrange(len(whole))
            data[place] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            with pytest.raises(CheckpointError, match=path.name):
                check_contents(model)
        path.write_bytes(whole)
    check_contents(model)


def test_loading_compares_the_encoders_and_leaves_curves_alone(model: Path) -> None:
    (model / "curves.json").write_text("damaged")
    check_contents(model, PARTS)
    (model / "text_encoder/deep/vocab.txt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="vocab.txt: damaged: got 0 bytes, expected 243"):
        check_contents(model, PARTS)


def test_a_file_that_was_put_there_later_is_refused(model: Path) -> None:
    (model / "text_encoder/pointer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="pointer.json: not in contents.json"):
        check_contents(model, PARTS)


def test_a_missing_file_is_named(model: Path) -> None:
    (model / "autoencoder/config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json: no such file, though contents.json lists it"):
        check_contents(model, PARTS)
