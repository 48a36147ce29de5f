"""The encoded data set on disk: fixed-size records in plain binary files, one file per field, read through memory maps.

    data/records/
      keys.txt        one key per line, in the order of the records
      moments.bin     (n, 2C, h, w) float16, C order
      token_ids.bin   (n, N) int32
      edges.bin       (n, E, E) uint8
      manifest.json   sizes and sha256 of the files, fields, facts; written last

One folder is one bucket: all its pictures have one size. Raw VAE moments are stored, not latents: scaling and sampling
are choices of the training. A memory map reads shuffled records some hundred times faster than a tar does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from raphael.manifest import NAME, ManifestError, check_files, read_manifest, write_manifest

FORM = "raphael-records/1"
KEYS = "keys.txt"

# Names of the fields that the training of the denoiser reads. It owns them; data_pipeline.encode writes them.
MOMENTS = "moments"  # float16 (2C, h, w): raw mean and log-variance of the autoencoder's posterior
TOKEN_IDS = "token_ids"  # int32 (N,)
EDGES = "edges"  # uint8 (E, E): probability of an edge times 255

RecordsError = ManifestError


class RecordWriter:
    """Write a folder of records from nothing: `with RecordWriter(...) as writer: writer.append(keys, arrays)`.

    fields: name -> (numpy dtype name, shape of one record). facts: what JSON can hold, stored in the manifest.
    What was in the folder under the same names is replaced. Left by an exception, the folder gets no manifest and does
    not open.
    """

    def __init__(self, folder: str | Path, fields: dict[str, tuple[str, tuple[int, ...]]], facts: dict[str, Any]):
        self.folder = Path(folder)
        self.fields = {name: (np.dtype(dtype), tuple(shape)) for name, (dtype, shape) in fields.items()}
        self.facts = facts
        self.keys: list[str] = []
        self.seen: set[str] = set()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / NAME).unlink(missing_ok=True)
        self.files: dict[str, BinaryIO] = {name: open(self.folder / f"{name}.bin", "wb") for name in self.fields}

    def append(self, keys: Sequence[str], arrays: dict[str, np.ndarray]) -> None:
        """Add n records. arrays: field -> (n, *shape) of exactly the field's dtype. Raises ValueError."""
        if set(arrays) != set(self.fields):
            raise ValueError(f"{self.folder}: got fields {sorted(arrays)}, expected {sorted(self.fields)}")
        for name, (dtype, shape) in self.fields.items():
            array = arrays[name]
            if array.dtype != dtype or array.shape != (len(keys), *shape):
                raise ValueError(
                    f"{self.folder}: field {name}: got {array.dtype} {array.shape}, "
                    f"expected {dtype} {(len(keys), *shape)}"
                )
        for key in keys:
            if key in self.seen or not key or "\n" in key:
                raise ValueError(
                    f"{self.folder}: got key {key!r} twice, empty or with a line break; expected unique names"
                )
            self.seen.add(key)
        self.keys.extend(keys)
        for name, file in self.files.items():
            file.write(np.ascontiguousarray(arrays[name]).tobytes())

    def close(self) -> None:
        """Finish: write the keys and the manifest."""
        for file in self.files.values():
            file.close()
        (self.folder / KEYS).write_text("".join(f"{key}\n" for key in self.keys), encoding="utf-8")
        facts = {
            "count": len(self.keys),
            "fields": {name: [dtype.name, list(shape)] for name, (dtype, shape) in self.fields.items()},
            "facts": self.facts,
        }
        write_manifest(self.folder, FORM, [KEYS, *(f"{name}.bin" for name in self.fields)], facts)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            for file in self.files.values():
                file.close()


class Records:
    """An opened folder of records. verify: check the sha256 of every file; else only their sizes.

    Raises RecordsError (a StageError and a ValueError, one line) where a file is absent, short or damaged.
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self.folder = Path(folder)
        manifest = read_manifest(self.folder, FORM)
        check_files(self.folder, manifest, hashes=verify)
        self.sha256: str = manifest["sha256"]  # of the manifest, and so of everything
        self.facts: dict[str, Any] = manifest["facts"]["facts"]
        self.keys: list[str] = (self.folder / KEYS).read_text(encoding="utf-8").split("\n")[:-1]
        self.fields: dict[str, tuple[str, tuple[int, ...]]] = {
            name: (dtype, tuple(shape)) for name, (dtype, shape) in manifest["facts"]["fields"].items()
        }
        self.maps: dict[str, np.ndarray] = {name: self._map(name, *field) for name, field in self.fields.items()}

    def _map(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        path = self.folder / f"{name}.bin"
        shape = (len(self.keys), *shape)
        if path.stat().st_size != np.dtype(dtype).itemsize * int(np.prod(shape)):
            raise RecordsError(
                f"{path}: got {path.stat().st_size} bytes, expected {dtype} {shape}; run the stage encode again"
            )
        if not np.prod(shape):
            return np.empty(shape, dtype)  # an empty file cannot be mapped
        return np.memmap(path, dtype, "r", shape=shape)

    def __len__(self) -> int:
        return len(self.keys)

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Copies of the records at `indices`: field -> (len(indices), *shape)."""
        rows = np.asarray(indices, dtype=np.int64)
        return {name: np.take(array, rows, axis=0) for name, array in self.maps.items()}
