"""A pickle is read as data: nothing that it names is imported or called."""

import builtins
import contextlib
import io
import os
import pickle
import sys
import zipfile

import pytest
import torch

from raphael.base.stage import StageError
from raphael.systems.exchange.ckpt import read_ckpt
from raphael.systems.exchange.inert import inert_load


def archive(path, data, storages=(), root="archive"):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{root}/data.pkl", data)
        for name, content in storages:
            file.writestr(f"{root}/data/{name}", content)
    return path


def test_tensors_come_back_as_torch_reads_them(tmp_path):
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    state = {
        "plain": whole,
        "view": whole[1:3, ::2],
        "turned": whole.T,
        "half": torch.randn(3).half(),
        "bf16": torch.randn(3).bfloat16(),
        "long": torch.arange(3),
        "empty": torch.zeros(0, 3),
        "one": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.ckpt")
    got = read_ckpt(tmp_path / "a.ckpt")
    assert got.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype, name
    torch.save(state, tmp_path / "b.ckpt")
    assert read_ckpt(tmp_path / "b.ckpt", wanted=lambda name: name == "half").keys() == {"half"}


class Bomb:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def test_nothing_that_a_malicious_file_names_is_run_or_imported(tmp_path):
    exploded = tmp_path / "exploded"
    bombs = [
        Bomb(os.system, f"touch {exploded}"),
        Bomb(open, str(exploded), "w"),
        Bomb(builtins.exec, f"open({str(exploded)!r}, 'w')"),
        Bomb(builtins.eval, f"open({str(exploded)!r}, 'w')"),
        Bomb(builtins.__import__, "this"),
    ]
    beside = {f"k{number}": bomb for number, bomb in enumerate(bombs)}
    torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": bombs, **beside}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as file:  # it is one: torch's own reader would run it
        assert b"system" in file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
    before = set(sys.modules)
    assert torch.equal(read_ckpt(tmp_path / "a.ckpt")["a"], torch.ones(2))
    assert not exploded.exists() and "this" not in set(sys.modules) - before


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'touch exploded'\ntR.",
        b"(S'touch exploded'\nios\nsystem\n.",
        b"\x80\x02cbuiltins\nexec\n\x94(X\x05\x00\x00\x00x = 1tR}b.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01xR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n}S'__defaults__'\nI1\nsb.",
        b"ccollections\nOrderedDict\n(tR}S'__class__'\ncos\nsystem\nsb.",
    ],
)
def test_opcodes_that_call_build_or_set_attributes_reach_stand_ins_alone(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    monkeypatch.setattr(builtins, "exec", ran.append)
    before = torch._utils._rebuild_tensor_v2.__defaults__
    with contextlib.suppress(pickle.UnpicklingError, AttributeError, TypeError):
        found = inert_load(data)
        assert isinstance(found, dict) or "inert_load.<locals>" in getattr(
            found, "__qualname__", type(found).__qualname__
        )
    assert not ran and torch._utils._rebuild_tensor_v2.__defaults__ == before


def described(tmp_path, storage=b"\0" * 16, **changes):
    """A file that says one float32 tensor of `size`, `stride`, `offset` in a storage of `count` numbers."""
    said = {"count": 4, "size": (2, 2), "stride": (2, 1), "offset": 0, "kind": torch.FloatStorage, **changes}

    mark = object()

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            return ("storage", said["kind"], "0", "cpu", said["count"]) if item is mark else None

    class Tensor:
        def __reduce__(self):
            rest = (said["offset"], said["size"], said["stride"], False, {})
            return torch._utils._rebuild_tensor_v2, (mark, *rest)

    stream = io.BytesIO()
    Pickler(stream, 2).dump({"state_dict": {"a": Tensor()}})
    return archive(tmp_path / "a.ckpt", stream.getvalue(), [("0", storage)])


def test_the_file_made_by_hand_is_read(tmp_path):
    numbers = torch.arange(4, dtype=torch.float32)
    file = described(tmp_path, numbers.numpy().tobytes())
    assert torch.equal(read_ckpt(file)["a"], numbers.view(2, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (3, 2)}, "a: reaches beyond the 4 numbers of its storage"),
        ({"offset": 1}, "a: reaches beyond the 4 numbers of its storage"),
        ({"size": (1 << 40,), "stride": (0,)}, "a: reaches beyond the 4 numbers of its storage"),
        ({"stride": (-2, 1)}, "described by something else than numbers"),
        ({"size": (2.0, 2)}, "described by something else than numbers"),
        ({"count": 400}, "got 16 bytes, expected 1,600"),
        ({"count": -1}, "described by something else than a key and a number"),
        ({"kind": dict}, "a storage of a kind that is not known"),
    ],
)
def test_a_tensor_that_is_not_what_it_says_is_refused(tmp_path, changes, message):
    with pytest.raises(StageError, match=message) as caught:
        read_ckpt(described(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_what_is_no_archive_of_torch_is_one_line(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(StageError, match="got no zip archive"):
        read_ckpt(tmp_path / "a.ckpt")
    with pytest.raises(StageError, match="got 0 places of data.pkl"):
        zipfile.ZipFile(tmp_path / "b.ckpt", "w").close()
        read_ckpt(tmp_path / "b.ckpt")
    with pytest.raises(StageError, match="data.pkl: cannot be read"):
        read_ckpt(archive(tmp_path / "c.ckpt", b"nonsense"))
    with pytest.raises(StageError, match="got no tensors, expected a state_dict"):
        read_ckpt(archive(tmp_path / "d.ckpt", pickle.dumps({"state_dict": {"a": 1}})))
