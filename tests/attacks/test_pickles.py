"""A .ckpt that hurts without running anything: its reader dies alone, within its limits, and one line says so."""

from __future__ import annotations

import io
import pickle
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from attacks.hostile_files import damaged, ended_in_a_line, kind

from raphael.base.stage import StageError
from raphael.cli.main import main
from raphael.systems.exchange import inert
from raphael.systems.exchange.ckpt import read_ckpt

HASHED = b"}" + b"%s" + b"Ns."  # a dictionary whose key it is
HOSTILE = {  # each with what it asks of a reader
    "a table of 2^32 places (LONG_BINPUT)": b"Nr\xff\xff\xff\xff.",
    "tuples 4,000,000 deep, hashed": HASHED % (b")" + b"\x85" * 4_000_000),
    "tuples that hold themselves twice, 40 times over, hashed": HASHED % (b")" + b"2\x86" * 40),
    "10 MB of marks": b"(" * 10_000_000 + b".",
    "a text said to be 2^62 bytes long": b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little") + b"x.",
    "a frame said to be 2^62 bytes long": b"\x80\x04\x95" + (1 << 62).to_bytes(8, "little") + b"N.",
    "a number of 20 million digits": b"I" + b"9" * 20_000_000 + b"\n.",
    "a number of 16 MB": b"\x80\x02\x8b" + (1 << 24).to_bytes(4, "little") + b"\x7f" * (1 << 24) + b".",
    "a persistent name of one part": b"X\x01\0\0\0aQ.",
    "an extension code": b"\x80\x02\x84\xff\xff\xff\x7f.",
    "nothing": b"",
}
COSTLY = [name for name in HOSTILE if "places" in name or "deep" in name or "twice" in name]


def archive(path: Path, data: bytes, storages: dict[str, bytes] | None = None, **how) -> Path:
    with zipfile.ZipFile(path, "w", **how) as file:
        file.writestr("archive/data.pkl", data)
        for name, content in (storages or {}).items():
            file.writestr(f"archive/data/{name}", content)
    return path


@pytest.fixture
def quick() -> str:
    """The reader with less patience than it has, so that the test does not take a minute."""
    text = Path(inert.__file__).read_text().replace("= 4 << 30, 60", "= 4 << 30, 3")
    assert "= 4 << 30, 3\n" in text
    return text


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_hurts_its_reader_is_one_line(name, tmp_path, quick, monkeypatch, capsys, tried):
    (tmp_path / "inert.py").write_text(quick)
    monkeypatch.setattr(inert, "__file__", str(tmp_path / "inert.py"))
    file = archive(tmp_path / "a.ckpt", HOSTILE[name], compression=zipfile.ZIP_DEFLATED)
    outcome = ended_in_a_line(lambda: main(["import", str(file), "--out", str(tmp_path / "out")]), capsys)
    assert outcome == "refused in a line" and not (tmp_path / "out").exists()
    tried("a .ckpt", "import", name, outcome)


@pytest.mark.parametrize("name", COSTLY)
def test_the_same_pickle_kills_a_reader_that_has_no_process_of_its_own(name):
    """The control. Of limits lower than a machine's, so that the machine survives it."""

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (2, 2))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    code = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], input=HOSTILE[name], capture_output=True, preexec_fn=limits
    )
    assert done.returncode < 0 or b"MemoryError" in done.stderr


def pickled(tensors: list[tuple], kind: type = torch.FloatStorage) -> bytes:
    """(name, key, count, size, stride) of each tensor."""
    marks: dict[int, tuple] = {}

    class Mark:
        def __init__(self, key: str, count: int):
            marks[id(self)] = ("storage", kind, key, "cpu", count)

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            return marks.get(id(item)) if isinstance(item, Mark) else None

    class Tensor:
        def __init__(self, mark: Mark, size: tuple, stride: tuple):
            self.said = (mark, 0, size, stride, False, {})

        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, self.said

    held = {key: Mark(key, count) for _, key, count, _, _ in tensors}
    stream = io.BytesIO()
    Pickler(stream, 2).dump({name: Tensor(held[key], size, stride) for name, key, _, size, stride in tensors})
    return stream.getvalue()


def test_many_tensors_of_the_same_numbers_are_refused_before_they_are_copied(tmp_path, tried):
    count = 1 << 16
    said = pickled([(f"t{n}", "0", count, (count,), (1,)) for n in range(100_000 // 100)])
    file = archive(tmp_path / "a.ckpt", said, {"0": bytes(4 * count)})
    with pytest.raises(StageError, match=r"got 65,536,000 numbers in tensors, expected at most 4 x 65,536"):
        read_ckpt(file)
    tried("a .ckpt", "read", "1,000 tensors of the same numbers", "refused in a line")
    twice = pickled([(name, "0", count, (count,), (1,)) for name in ("token", "position")])
    assert read_ckpt(archive(tmp_path / "b.ckpt", twice, {"0": bytes(4 * count)})).keys() == {"token", "position"}


@pytest.mark.parametrize(
    ("size", "stride"), [((1 << 70, 0), (1, 1)), ((0,), (1 << 70,)), ((1,) * 100, (1,) * 100), ((), ())]
)
def test_sides_that_no_tensor_has_are_one_line_or_a_tensor(size, stride, tmp_path, tried):
    file = archive(tmp_path / "a.ckpt", pickled([("a", "0", 4, size, stride)]), {"0": bytes(16)})
    try:
        assert read_ckpt(file)["a"].numel() in (0, 1)
        outcome = "taken"
    except StageError as error:
        assert "\n" not in str(error)
        outcome = "refused in a line"
    tried("a .ckpt", "read", "sides of 2^70, a hundred sides", outcome)


def test_an_archive_that_is_damaged_or_lies_is_one_line(tmp_path, capsys, tried):
    import random

    said = pickled([("a", "0", 1 << 10, (1 << 10,), (1,))])
    file, out = tmp_path / "a.ckpt", tmp_path / "out"
    whole = archive(file, said, {"0": bytes(range(256)) * 16}).read_bytes()
    packed = archive(file, said, {"0": bytes(4 << 10)}, compression=zipfile.ZIP_DEFLATED).read_bytes()
    assert read_ckpt(archive(file, said, {"0": bytes(4 << 10)}))["a"].numel() == 1 << 10
    cases = [*damaged(whole, random.Random(1), 25), *damaged(packed, random.Random(2), 25)]
    local, central = b"PK\3\4\x14\0\0\0", b"PK\1\2\x14\3\x14\0\0\0"  # what stands before a member's method
    for method in (1, 12, 14, 99):  # imploded, bzip2, lzma, encrypted
        packed = whole.replace(local + b"\0", local + bytes([method])).replace(
            central + b"\0", central + bytes([method])
        )
        cases.append(("another method of packing", packed))
    cases.append(("encrypted", whole.replace(central, central[:-2] + b"\1\0")))
    for what, data in cases:
        assert data != whole
        file.write_bytes(data)
        outcome = ended_in_a_line(lambda: main(["import", str(file), "--out", str(out)]), capsys)
        assert outcome == "refused in a line"  # whole, it holds no Stable Diffusion
        tried("a .ckpt", "import", kind(what), outcome)
    assert not out.exists()


def test_numbers_that_are_not_there_are_asked_no_memory_for(tmp_path, tried):
    """The directory says 32 GB, the archive is a kilobyte."""
    count = 1 << 33
    file = archive(tmp_path / "a.ckpt", pickled([("a", "0", count, (count,), (1,))]), {"0": bytes(16)})
    lie = (0xFFFFFFFE).to_bytes(4, "little")
    data = file.read_bytes()
    place = data.rindex(b"PK\1\2")
    file.write_bytes(data[: place + 20] + lie + lie + data[place + 28 :])
    with pytest.raises(StageError, match="expected 34,359,738,368"):
        read_ckpt(file)
    said = pickled([("a", "0", 0xFFFFFFFC // 4, (4,), (1,))])
    file = archive(tmp_path / "b.ckpt", said, {"0": bytes(16)})
    data = file.read_bytes()
    place, lie = data.rindex(b"PK\1\2"), (0xFFFFFFFC).to_bytes(4, "little")
    file.write_bytes(data[: place + 20] + lie + lie + data[place + 28 :])
    with pytest.raises(StageError, match="got a shorter file, expected 4,294,967,292 bytes"):
        read_ckpt(file)
    tried("a .ckpt", "read", "4 and 32 GB that are not there", "refused in a line")
