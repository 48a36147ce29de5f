import os
import pickle
import random

import numpy as np
import pytest
import torch

from raphael.checkpoint import (
    CheckpointError,
    checkpoint_sha256,
    load_weights,
    read_checkpoint,
    write_checkpoint,
)
from raphael.checkpoint_home import CheckpointHome
from raphael.stage import StageError


def groups(seed=0):
    torch.manual_seed(seed)
    return {
        "raw": {"a.weight": torch.randn(5, 3), "a.bias": torch.randn(5).bfloat16()},
        "ema": {"a.weight": torch.randn(5, 3), "count": torch.tensor(7)},
    }


META = {"images_seen": 640, "history": [{"images": 64, "loss": 0.1 + 0.2}], "name": "größe"}


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    write_checkpoint(tmp_path / "c", groups(), META)
    got, meta = read_checkpoint(tmp_path / "c")
    assert meta == META
    for group, tensors in groups().items():
        assert got[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert got[group][name].dtype == tensor.dtype and torch.equal(got[group][name], tensor)


def test_one_group_can_be_read_alone(tmp_path):
    write_checkpoint(tmp_path / "c", groups(), META)
    assert list(read_checkpoint(tmp_path / "c", ["ema"])[0]) == ["ema"]
    with pytest.raises(CheckpointError, match="no group 'optimizer', expected one of ema, raw"):
        read_checkpoint(tmp_path / "c", ["optimizer"])


def test_one_flipped_bit_anywhere_is_found(tmp_path):
    write_checkpoint(tmp_path / "c", groups(), META)
    files = sorted((tmp_path / "c").iterdir())
    assert [file.name for file in files] == ["ema.safetensors", "manifest.json", "meta.json", "raw.safetensors"]
    rng = random.Random(0)
    for file in files:
        whole = file.read_bytes()
        for _ in range(20):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=file.name) as caught:
                read_checkpoint(tmp_path / "c")
            assert "\n" not in str(caught.value)
        file.write_bytes(whole)
    read_checkpoint(tmp_path / "c")


def test_a_bit_flipped_anywhere_in_a_training_s_checkpoint_is_found_in_200_of_200_trials(tmp_path):
    """Bits drawn evenly over all bytes of all files, as a disk would; on the way that a resumed training takes."""
    home = CheckpointHome(tmp_path)
    path = home.save(640, {**groups(), "optimizer": {"a.exp_avg": torch.randn(40, 30)}}, META)
    files = [(file, file.read_bytes()) for file in sorted(path.iterdir())]
    ends = np.cumsum([len(data) for _, data in files])
    found = 0
    for bit in np.random.default_rng(1).integers(0, 8 * ends[-1], 200):
        number = int(np.searchsorted(ends, bit // 8, side="right"))
        file, whole = files[number]
        damaged = bytearray(whole)
        damaged[bit // 8 - (ends[number] - len(whole))] ^= 1 << (bit % 8)
        file.write_bytes(damaged)
        try:
            home.newest(lambda _: None)
        except CheckpointError:
            found += 1
        file.write_bytes(whole)
    assert found == 200
    assert home.newest()[1] == META


def test_a_pickle_among_a_training_s_checkpoints_is_refused_and_never_runs(tmp_path):
    victim, planted = tmp_path / "victim", tmp_path / "home/000000000640"
    planted.mkdir(parents=True)
    (planted / "model.pt").write_bytes(pickle.dumps({"weight": Malicious(victim)}))
    with pytest.raises(CheckpointError, match=r"model.pt: got a pickle.*refused"):
        CheckpointHome(tmp_path / "home").newest(lambda _: None)
    assert not victim.exists()


def test_a_lost_or_short_file_is_named(tmp_path):
    write_checkpoint(tmp_path / "c", groups(), META)
    file = tmp_path / "c" / "raw.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"raw.safetensors: got \d+ bytes, expected"):
        read_checkpoint(tmp_path / "c")
    file.unlink()
    with pytest.raises(StageError, match="raw.safetensors: no such file"):
        read_checkpoint(tmp_path / "c")


class Malicious:
    def __init__(self, victim):
        self.victim = str(victim)

    def __reduce__(self):
        return os.mkdir, (self.victim,)


@pytest.mark.parametrize("where", ["file", "folder", "listed"])
def test_a_pickle_is_refused_and_never_runs(tmp_path, where):
    from raphael.checkpoint import FORM
    from raphael.manifest import write_manifest

    victim, evil = tmp_path / "victim", pickle.dumps({"weight": Malicious(tmp_path / "victim")})
    folder = tmp_path / "model"
    folder.mkdir()
    if where == "listed":  # a stranger can write a manifest, too
        (folder / "raw.safetensors").write_bytes(evil)
        (folder / "meta.json").write_text("{}")
        write_manifest(folder, FORM, ["raw.safetensors", "meta.json"], {"groups": ["raw"]})
    else:
        (folder / "pytorch_model.bin").write_bytes(evil)
    with pytest.raises(CheckpointError, match="model" if where == "listed" else "refused"):
        read_checkpoint(folder / "pytorch_model.bin" if where == "file" else folder)
    assert not victim.exists()


def test_a_failed_write_leaves_the_older_checkpoint_and_no_rest(tmp_path):
    write_checkpoint(tmp_path / "c", groups(), META)
    before = checkpoint_sha256(tmp_path / "c")
    with pytest.raises(ValueError):
        write_checkpoint(tmp_path / "c", groups(1), {"loss": float("nan")})
    assert [path.name for path in tmp_path.iterdir()] == ["c"] and checkpoint_sha256(tmp_path / "c") == before
    write_checkpoint(tmp_path / "c", groups(1), META)
    assert checkpoint_sha256(tmp_path / "c") != before


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    base = torch.arange(6.0)
    write_checkpoint(tmp_path / "c", {"g": {"a": base, "b": base, "view": base[2:4], "t": base.view(2, 3).t()}}, {})
    got = read_checkpoint(tmp_path / "c")[0]["g"]
    assert (
        torch.equal(got["b"], base)
        and torch.equal(got["view"], base[2:4])
        and torch.equal(got["t"], base.view(2, 3).t())
    )


def test_weights_of_another_shape_are_refused_in_one_line():
    layer = torch.nn.Linear(3, 5)
    weights = {name: tensor + 1 for name, tensor in layer.state_dict().items()}
    load_weights(layer, weights, "here")
    assert torch.equal(layer.weight, weights["weight"])
    with pytest.raises(CheckpointError, match=r"here: weight: got shape \[5, 4\], expected \[5, 3\]"):
        load_weights(layer, {**weights, "weight": torch.zeros(5, 4)}, "here")
    with pytest.raises(CheckpointError, match="no bias"):
        load_weights(layer, {"weight": weights["weight"]}, "here")
    with pytest.raises(CheckpointError, match="unknown extra"):
        load_weights(layer, {**weights, "extra": torch.zeros(1)}, "here")


def test_a_home_keeps_the_newest_and_passes_over_a_damaged_one(tmp_path):
    home = CheckpointHome(tmp_path, keep=2)
    assert home.newest() is None
    for images in (64, 128, 1024):
        home.save(images, groups(images), {"images": images})
    assert [path.name for path in home.all()] == ["000000000128", "000000001024"]
    (tmp_path / ".000000002048.77").mkdir()
    home.sweep()
    assert len(list(tmp_path.iterdir())) == 2
    assert home.newest()[1] == {"images": 1024}
    for images, expected in ((1024, 128), (128, None)):
        (tmp_path / f"{images:012d}" / "meta.json").write_text("{")
        said = []
        if expected:
            assert home.newest(said.append)[1] == {"images": expected} and "meta.json" in said[0]
    with pytest.raises(CheckpointError, match="delete that folder"):
        home.newest(said.append)
