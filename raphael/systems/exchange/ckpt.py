"""Tensors out of a .ckpt of torch, a pickle, without running anything that it names.

Published .ckpt files of Stable Diffusion carry training's leftovers (callbacks of pytorch_lightning, say), on which
torch's weights_only reader fails. Here the pickle is read by another process as a description (inert.py), within limits
of memory and time; no module is imported, no function of another library is called. What a tensor is said to be is
compared with the file before it is read.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raphael.base.stage import StageError
from raphael.systems.exchange import inert
from raphael.systems.exchange.inert import Described, Storage

if TYPE_CHECKING:
    from torch import Tensor

MOST_PICKLE_BYTES = 64 << 20  # of the part that describes; Stable Diffusion's has less than one million
MOST_VIEWS = 4  # bytes of tensors for a byte of the file: a few share their numbers, a million that do would be a bomb
PATIENCE_S = 300
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OverflowError, ValueError)


def read_ckpt(file: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of the file's state_dict (of all of it, where it has none) whose name is wanted, on the CPU.

    Raises StageError, one line: no archive of torch, damaged, or one whose tensors are not what it says.
    """
    try:
        archive = zipfile.ZipFile(file)
    except BROKEN:
        raise StageError(
            f"{file}: got no zip archive, expected a .ckpt as torch writes it since version 1.6; an older one, or a "
            "damaged file: convert it to .safetensors"
        ) from None
    with archive:
        described, root = _described(file, archive)
        return _Reader(file, archive, root).tensors({k: v for k, v in described.items() if wanted(k)})


def _described(file: Path, archive: zipfile.ZipFile) -> tuple[dict[str, Described], str]:
    names = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(names) != 1:
        raise StageError(f"{file}: got {len(names)} places of data.pkl, expected one, as torch writes it")
    size = archive.getinfo(names[0]).file_size
    if size > MOST_PICKLE_BYTES:
        raise StageError(f"{file}: data.pkl: got {size:,} bytes, expected at most {MOST_PICKLE_BYTES:,}")
    try:
        data = archive.read(names[0])
    except BROKEN as error:
        raise StageError(f"{file}: data.pkl: cannot be read ({_words(error)}); fetch it again") from None
    tensors = _by_another_process(file, data)
    if not tensors:
        raise StageError(f"{file}: got no tensors, expected a state_dict")
    return tensors, names[0].removesuffix("data.pkl")


def _by_another_process(file: Path, data: bytes) -> dict[str, Described]:
    """What inert.py makes of a pickle. What kills it, kills it alone."""
    command = [sys.executable, "-I", inert.__file__]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=PATIENCE_S)
        said = json.loads(done.stdout) if done.returncode == 0 else {"error": f"its reader died ({done.returncode})"}
    except subprocess.TimeoutExpired:
        said = {"error": f"its reader did not end within {PATIENCE_S} s"}
    if isinstance(said, dict):
        reason = " ".join(said["error"].split())[:160]
        raise StageError(f"{file}: data.pkl: cannot be read ({reason})")
    found = {}
    for name, dtype, key, count, offset, size, stride in said:
        found[name] = Described(Storage(dtype, key, count), offset, tuple(size), tuple(stride))
    return found


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


@dataclass
class _Reader:
    file: Path
    archive: zipfile.ZipFile
    root: str

    def tensors(self, described: dict[str, Described]) -> dict[str, Tensor]:
        by_storage: dict[Storage, list[str]] = {}
        for name, item in described.items():
            by_storage.setdefault(item.storage, []).append(name)
        for name, item in described.items():
            last = item.offset + sum((n - 1) * step for n, step in zip(item.size, item.stride, strict=True))
            if (count := math.prod(item.size)) > item.storage.count or (count and last >= item.storage.count):
                raise StageError(
                    f"{self.file}: {name[:80]}: reaches beyond the {item.storage.count:,} numbers of its storage"
                )
        held = sum(storage.count for storage in by_storage)
        asked = sum(math.prod(item.size) for item in described.values())
        if asked > MOST_VIEWS * held:
            raise StageError(f"{self.file}: got {asked:,} numbers in tensors, expected at most {MOST_VIEWS} x {held:,}")
        found = {}
        for storage, names in by_storage.items():  # one storage at a time, whoever shares it
            flat = self._flat(storage)
            for name in names:
                item = described[name]
                try:
                    found[name] = flat.as_strided(item.size, item.stride, item.offset).clone()
                except (RuntimeError, OverflowError, ValueError, TypeError) as error:  # a side of 2^70 beside one of 0
                    raise StageError(f"{self.file}: {name[:80]}: is no tensor ({_words(error)})") from None
        return {name: found[name] for name in described}

    def _flat(self, storage: Storage) -> Tensor:
        import torch

        dtype, place = getattr(torch, storage.dtype), f"{self.root}data/{storage.key}"
        expected = storage.count * dtype.itemsize
        try:
            info = self.archive.getinfo(place)
        except KeyError:
            raise StageError(
                f"{self.file}: got no {place[:200]}, which a tensor's numbers are in; fetch it again"
            ) from None
        if info.file_size != expected or info.compress_type != zipfile.ZIP_STORED:
            raise StageError(f"{self.file}: {place}: got {info.file_size:,} bytes, expected {expected:,}, uncompressed")
        if expected > self.file.stat().st_size:  # said in the directory, and not there: memory would be asked for first
            raise StageError(f"{self.file}: {place}: got a shorter file, expected {expected:,} bytes of it")
        try:
            data = bytearray(self.archive.read(place))
        except BROKEN:
            raise StageError(f"{self.file}: {place}: damaged; fetch it again") from None
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
