"""What a pickle of torch describes, as plain data: `python -I inert.py < data.pkl` writes JSON and runs nothing else.

A name in the pickle is looked up in a short table of what describes tensors; every other is an inert stand-in. It still
can hurt whoever reads it: a five-byte opcode asks for a table of 2^32 places, tuples in tuples 100,000 deep overflow
the stack of C when one is hashed, those that hold themselves twice, forty times over, are hashed for a day. So
raphael/systems/exchange/ckpt.py reads in a process of its own, with limits. Only Python's own library is imported here.
"""

from __future__ import annotations

import io
import json
import pickle
import resource
import sys
from dataclasses import dataclass
from typing import Any

MOST_MEMORY, MOST_CPU_S = 4 << 30, 60
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


def tensors_in(found: Any) -> dict[str, Described]:
    """The tensors of a state_dict, or of what is one itself."""
    state = found.get("state_dict", found) if isinstance(found, dict) else {}
    state = state if isinstance(state, dict) else {}
    return {name: item for name, item in state.items() if isinstance(name, str) and isinstance(item, Described)}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_S, MOST_CPU_S))
    try:
        found = tensors_in(inert_load(sys.stdin.buffer.read()))
        said: Any = [
            [name, item.storage.dtype, item.storage.key, item.storage.count, item.offset, item.size, item.stride]
            for name, item in found.items()
        ]
        text = json.dumps(said)
    except Exception as error:  # a pickle that is none fails in many ways
        text = json.dumps({"error": f"{type(error).__name__}: {error}"})
    print(text)


if __name__ == "__main__":
    main()
