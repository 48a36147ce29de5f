import errno
import json
import os
import pickle
import random
import shutil
import signal
import threading

import numpy as np
import pytest
import torch
import xxhash

from raphael.base.checkpoint import folder, parts
from raphael.base.checkpoint.folder import (
    FORM,
    CheckpointError,
    Stored,
    checkpoint_sha256,
    load_weights,
    read_checkpoint,
    write_checkpoint,
)
from raphael.base.checkpoint.home import CheckpointHome, Crew
from raphael.base.checkpoint.parts import Share
from raphael.base.manifest import write_manifest
from raphael.base.stage import StageError


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
    assert found_of_200(home, path) == 200
    assert home.newest()[1] == META


def found_of_200(home, path):
    """How many of 200 flipped bits a resumed training would find."""
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
    assert home.newest()[1] == META
    return found


def test_a_pickle_among_a_training_s_checkpoints_is_refused_and_never_runs(tmp_path):
    victim, planted = tmp_path / "victim", tmp_path / "home/000000000640"
    planted.mkdir(parents=True)
    (planted / "model.pt").write_bytes(pickle.dumps({"weight": Malicious(victim)}))
    with pytest.raises(CheckpointError, match=r"model.pt: got a pickle.*refused"):
        CheckpointHome(tmp_path / "home").newest(lambda _: None)
    assert not victim.exists()


def by_two(rank):
    """groups() as number `rank` of two would hold them: rows sharded, what has no rows at the first alone."""
    found = {}
    for group, tensors in groups().items():
        found[group] = {}
        for name, tensor in tensors.items():
            if tensor.ndim:
                half = -(-len(tensor) // 2)
                found[group][name] = Share(
                    tensor.chunk(2)[rank], (half * rank,) + (0,) * (tensor.ndim - 1), tensor.shape
                )
            elif rank == 0:
                found[group][name] = tensor
    return found


def saved_by_two(home, images=640, meta=META):
    home.save(images, by_two(1), {}, Crew(1, 2, "token"))
    return home.save(images, by_two(0), meta, Crew(0, 2, "token"))


def test_what_two_wrote_together_is_as_what_one_wrote_and_a_flipped_bit_is_found_in_200_of_200_trials(tmp_path):
    home = CheckpointHome(tmp_path)
    path = saved_by_two(home)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert sorted(file.name for file in path.iterdir()) == [
        "ema.00000-of-00002.safetensors", "ema.00001-of-00002.safetensors", "manifest.json", "meta.json",
        "raw.00000-of-00002.safetensors", "raw.00001-of-00002.safetensors",
    ]  # fmt: skip
    got, meta = home.newest()
    assert meta == META
    for group, tensors in groups().items():
        assert got[group].keys() == tensors.keys()
        assert all(torch.equal(got[group][name], tensor) for name, tensor in tensors.items())
    assert found_of_200(home, path) == 200


def test_a_bit_is_found_by_one_of_those_who_share_the_verification_and_all_pass_the_checkpoint_over(tmp_path):
    home = CheckpointHome(tmp_path)
    saved_by_two(home, 320)
    damaged = saved_by_two(home) / "raw.00001-of-00002.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    alone = []
    for rank in range(3):
        try:
            Stored(damaged.parent).check(None, rank, 3)
        except CheckpointError as error:
            alone.append((rank, str(error)))
    assert len(alone) == 1 and "tensor a.bias" in alone[0][1]  # one of three looks at this file
    verdicts = []
    for rank in range(3):
        said = []
        any_of_all = iter((True, False))  # of the newest somebody says so, of the one before nobody does
        stored = home.find(said.append, rank, 3, lambda mine, answers=any_of_all: next(answers))
        verdicts.append((stored.folder.name, len(said)))
    assert sorted(verdicts) == [("000000000320", 0), ("000000000320", 0), ("000000000320", 1)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_any_number_of_readers_gets_its_share(tmp_path, size):
    """Against torch.chunk of the whole, by rows and by columns, from what one wrote and from what two wrote."""
    write_checkpoint(tmp_path / "one", groups(), META)
    for stored in (Stored(tmp_path / "one"), Stored(saved_by_two(CheckpointHome(tmp_path / "two")))):
        for name, tensor in groups()["raw"].items():
            for dim in range(tensor.ndim):
                at = [0] * tensor.ndim
                for chunk in tensor.chunk(size, dim):
                    assert torch.equal(stored.read("raw", name, tuple(at), tuple(chunk.shape)), chunk)
                    at[dim] += chunk.shape[dim]
        assert stored.read("raw", "a.weight", (5, 0), (0, 3)).shape == (0, 3)  # more readers than rows
        assert torch.equal(stored.read("ema", "count"), torch.tensor(7))
        assert torch.equal(stored.read("raw", "a.weight", (1, 1), (3, 2)), groups()["raw"]["a.weight"][1:4, 1:3])


def test_the_manifest_has_a_hash_per_tensor_and_a_damaged_one_is_named(tmp_path):
    write_checkpoint(tmp_path / "c", groups(), META)
    entries = json.loads((tmp_path / "c/manifest.json").read_text())["facts"]["groups"]
    for group, tensors in groups().items():
        for name, tensor in tensors.items():
            (part,) = entries[group][name]["parts"]
            raw = bytes(tensor.flatten().view(torch.uint8).tolist())
            assert part["xxh3_128"] == xxhash.xxh3_128(raw).hexdigest()
    file = tmp_path / "c/raw.safetensors"
    whole = file.read_bytes()
    for flipped, words in (
        (b"a.bias", "its header"),
        (groups()["raw"]["a.weight"].numpy().tobytes(), "tensor a.weight"),
    ):
        damaged = bytearray(whole)
        damaged[whole.index(flipped)] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"raw.safetensors: damaged: .*the damage is in {words}") as caught:
            read_checkpoint(tmp_path / "c", ["raw"])
        assert "\n" not in str(caught.value)
        with pytest.raises(CheckpointError, match="raw.safetensors: tensor a.*damaged"):
            stored = Stored(tmp_path / "c")  # not compared as files: each tensor is, all the same
            [stored.read("raw", name) for name in stored.groups["raw"]]


def test_large_files_are_split(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "LARGEST_FILE", 100)
    tensors = {f"layer{i}": torch.randn(10) for i in range(5)} | {"large": torch.randn(40)}
    write_checkpoint(tmp_path / "c", {"raw": tensors}, META)
    files = sorted(path.name for path in (tmp_path / "c").glob("raw*"))
    assert files == [
        "raw.part1.safetensors", "raw.part2.safetensors", "raw.part3.safetensors", "raw.safetensors"
    ]  # fmt: skip
    got = read_checkpoint(tmp_path / "c")[0]["raw"]
    assert got.keys() == tensors.keys() and all(torch.equal(got[name], tensors[name]) for name in tensors)


def test_the_form_before_is_refused_with_both_names(tmp_path):
    write_checkpoint(tmp_path / "c", groups(), META)
    write_manifest(tmp_path / "c", "raphael-checkpoint/1", ["raw.safetensors", "meta.json"], {"groups": ["raw"]})
    with pytest.raises(CheckpointError, match="got format 'raphael-checkpoint/1', expected 'raphael-checkpoint/2'"):
        read_checkpoint(tmp_path / "c")


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "save"}, {"shape": [5, 4]}, {"shape": [5]}, {"shape": "5x3"}, {"parts": []}, {"parts": None},
        {"file": "../raw.safetensors"}, {"file": "other.safetensors"}, {"at": [1, 0]}, {"at": [-1, 0]},
    ],
)  # fmt: skip
def test_a_manifest_whose_parts_make_no_tensor_is_refused(tmp_path, change):
    """A stranger can give it a hash that fits."""
    write_checkpoint(tmp_path / "c", groups(), META)
    facts = json.loads((tmp_path / "c/manifest.json").read_text())["facts"]
    entry = facts["groups"]["raw"]["a.weight"]
    for key, value in change.items():
        (entry if key in entry else entry["parts"][0])[key] = value
    write_manifest(tmp_path / "c", FORM, ["meta.json", "raw.safetensors", "ema.safetensors"], facts)
    with pytest.raises(CheckpointError, match="manifest.json: got .*this program did not write it"):
        read_checkpoint(tmp_path / "c")


def test_rank_0_waits_for_every_part_and_says_who_failed(tmp_path):
    home = CheckpointHome(tmp_path)
    home.save(64, groups(), META)
    with pytest.raises(CheckpointError, match=r"worker 1 did not write its part within 0 s"):
        home.save(128, by_two(0), META, Crew(0, 2, "a", patience_s=0.1))

    thread = threading.Timer(0.3, lambda: home.save(192, by_two(1), {}, Crew(1, 2, "b")))
    thread.start()
    assert home.save(192, by_two(0), META, Crew(0, 2, "b")).name == "000000000192"  # the later one is waited for
    thread.join()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("raphael.base.checkpoint.home.write_parts", full)
        with pytest.raises(CheckpointError, match="cannot be written .No space"):
            home.save(256, by_two(1), {}, Crew(1, 2, "c"))
    with pytest.raises(CheckpointError, match=r"worker 1: .*256: the checkpoint cannot be written \(No space left"):
        home.save(256, by_two(0), META, Crew(0, 2, "c"))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["000000000064", "000000000192"]


@pytest.mark.parametrize("moment", ["the first file", "the manifest", "the name"])
def test_killed_in_the_middle_of_writing_the_one_before_is_whole_and_the_rest_is_swept(tmp_path, moment):
    home = CheckpointHome(tmp_path)
    home.save(64, groups(), {**META, "images": 64})
    if not (child := os.fork()):
        place, name = {
            "the first file": (parts, "file_entry"), "the manifest": (folder, "write_manifest"),
            "the name": (folder, "put"),
        }[moment]  # fmt: skip
        setattr(place, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        home.save(128, groups(1), META)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (stray,) = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert any(stray.iterdir()) and (stray / "manifest.json").exists() == (moment == "the name")
    assert [path.name for path in home.all()] == ["000000000064"] and home.newest()[1]["images"] == 64
    home.sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["000000000064"]


def test_the_newest_stay_and_the_best_beside_them(tmp_path):
    """Losses 5, 3, 4, none, 3.5, 2: at each time the newest two, and the lowest so far."""
    home = CheckpointHome(tmp_path, keep=2)
    stay = []
    for images, value in ((1, 5.0), (2, 3.0), (3, 4.0), (4, None), (5, 3.5), (6, 2.0), (7, None), (8, 9.0)):
        score = {} if value is None else {"score": {"metric": "heldout/ema/denoise", "value": value}}
        home.save(images, groups(), {"images": images, **score})
        stay.append([int(path.name) for path in home.all()])
    assert stay == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7], [6, 7, 8]]
    assert home.best() == {"checkpoint": "000000000006", "metric": "heldout/ema/denoise", "value": 2.0}
    assert home.newest()[1]["images"] == 8
    shutil.rmtree(tmp_path / "000000000006")
    assert home.best() is None  # what is not there is not the best
    assert CheckpointHome(tmp_path, keep=1).save(9, groups(), {}).parent == tmp_path
    assert [int(path.name) for path in home.all()] == [9]


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
    victim, evil = tmp_path / "victim", pickle.dumps({"weight": Malicious(tmp_path / "victim")})
    folder = tmp_path / "model"
    folder.mkdir()
    if where == "listed":  # a stranger can write a manifest, too
        (folder / "raw.safetensors").write_bytes(evil)
        (folder / "meta.json").write_text("{}")
        part = {"file": "raw.safetensors", "at": [0], "shape": [1], "xxh3_128": "0" * 32}
        entry = {"dtype": "float32", "shape": [1], "parts": [part]}
        write_manifest(folder, FORM, ["raw.safetensors", "meta.json"], {"groups": {"raw": {"weight": entry}}})
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
