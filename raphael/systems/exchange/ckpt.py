"""Tensors out of a .ckpt of torch, a pickle, without running anything that it names.

Published .ckpt files of Stable Diffusion carry training's leftovers (callbacks of pytorch_lightning, say), on which
torch's weights_only reader fails. Here a name in the pickle is looked up in a short table of what describes tensors;
every other is an inert stand-in, which takes whatever it is given and does nothing. No module is imported, no function
of another library is called; what a tensor is said to be is compared with the file before it is read.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.stage import StageError

if TYPE_CHECKING:
    from torch import Tensor

MOST_PICKLE_BYTES = 64 << 20  # of the part that describes; Stable Diffusion's has less than one million
STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


@dataclass(frozen=True)
class Storage:
    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class Described:
    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_ckpt(file: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of the file's state_dict (of all of it, where it has none) whose name is wanted, on the CPU.

    Raises StageError, one line: no archive of torch, damaged, or one whose tensors are not what it says.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            described, root = _described(file, archive)
            return _Reader(file, archive, root).tensors({k: v for k, v in described.items() if wanted(k)})
    except zipfile.BadZipFile:
        raise StageError(
            f"{file}: got no zip archive, expected a .ckpt as torch writes it since version 1.6; an older one, or a "
            "damaged file: convert it to .safetensors"
        ) from None


def _described(file: Path, archive: zipfile.ZipFile) -> tuple[dict[str, Described], str]:
    names = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(names) != 1:
        raise StageError(f"{file}: got {len(names)} places of data.pkl, expected one, as torch writes it")
    size = archive.getinfo(names[0]).file_size
    if size > MOST_PICKLE_BYTES:
        raise StageError(f"{file}: data.pkl: got {size:,} bytes, expected at most {MOST_PICKLE_BYTES:,}")
    try:
        found = inert_load(archive.read(names[0]))
    except Exception as error:  # a pickle that is none fails in many ways
        reason = " ".join(str(error).split())[:160]
        raise StageError(f"{file}: data.pkl: cannot be read ({type(error).__name__}: {reason})") from None
    state = found.get("state_dict", found) if isinstance(found, dict) else {}
    state = state if isinstance(state, dict) else {}
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Described)}
    if not tensors:
        raise StageError(f"{file}: got no tensors, expected a state_dict")
    return tensors, names[0].removesuffix("data.pkl")


def inert_load(data: bytes) -> Any:
    """What a pickle says, tensors as Described and everything unknown as a thing that does nothing.

    The table is made anew for each file: a pickle may change what it was given.
    """

    class Inert:
        def __new__(cls, *_: Any, **__: Any) -> Any:
            return object.__new__(cls)

        def __init__(self, *_: Any, **__: Any):
            pass

        def ignore(self, *_: Any, **__: Any) -> None:
            return None

        def __call__(self, *_: Any, **__: Any) -> Any:
            return Inert()

        __setstate__ = __setitem__ = append = extend = add = update = ignore

    class Kind:
        def __init__(self, dtype: str):
            self.dtype = dtype

    class Mapping(dict):
        def __setstate__(self, state: Any) -> None:
            pass

    def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
        whole = all(type(n) is int and n >= 0 for n in (offset, *size, *stride))
        if not isinstance(storage, Storage) or not whole or len(size) != len(stride):
            raise pickle.UnpicklingError("a tensor that is described by something else than numbers")
        return Described(storage, offset, tuple(size), tuple(stride))

    def rebuild_parameter(tensor: Any, *_: Any) -> Any:
        return tensor

    table: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): Mapping,
        ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
        **{("torch", name): Kind(dtype) for name, dtype in STORAGES.items()},
    }

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return table.get((module, name), Inert)

        def persistent_load(self, pid: Any) -> Any:
            if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], Kind)):
                raise pickle.UnpicklingError("a storage of a kind that is not known")
            _, kind, key, _, count = pid
            if type(kind.dtype) is not str or type(key) is not str or type(count) is not int or count < 0:
                raise pickle.UnpicklingError("a storage that is described by something else than a key and a number")
            return Storage(kind.dtype, key, count)

    return Unpickler(io.BytesIO(data)).load()


@dataclass
class _Reader:
    file: Path
    archive: zipfile.ZipFile
    root: str

    def tensors(self, described: dict[str, Described]) -> dict[str, Tensor]:
        by_storage: dict[Storage, list[str]] = {}
        for name, item in described.items():
            by_storage.setdefault(item.storage, []).append(name)
        found = {}
        for storage, names in by_storage.items():  # one storage at a time, whoever shares it
            flat = self._flat(storage)
            for name in names:
                item = described[name]
                last = item.offset + sum((n - 1) * step for n, step in zip(item.size, item.stride, strict=True))
                if math.prod(item.size) > storage.count or (math.prod(item.size) and last >= storage.count):
                    raise StageError(
                        f"{self.file}: {name}: reaches beyond the {storage.count:,} numbers of its storage"
                    )
                found[name] = flat.as_strided(item.size, item.stride, item.offset).clone()
        return {name: found[name] for name in described}

    def _flat(self, storage: Storage) -> Tensor:
        import torch

        dtype, place = getattr(torch, storage.dtype), f"{self.root}data/{storage.key}"
        expected = storage.count * dtype.itemsize
        try:
            info = self.archive.getinfo(place)
        except KeyError:
            raise StageError(f"{self.file}: got no {place}, which a tensor's numbers are in; fetch it again") from None
        if info.file_size != expected or info.compress_type != zipfile.ZIP_STORED:
            raise StageError(f"{self.file}: {place}: got {info.file_size:,} bytes, expected {expected:,}, uncompressed")
        try:
            data = bytearray(self.archive.read(place))
        except zipfile.BadZipFile:
            raise StageError(f"{self.file}: {place}: damaged; fetch it again") from None
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
