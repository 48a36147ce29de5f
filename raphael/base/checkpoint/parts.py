"""Groups of tensors in safetensors files: whole, or in the parts that several processes wrote, each with its hash.

The manifest's facts say of every tensor its type, its shape and its parts, which do not overlap and together are it:

    {"groups": {"ema": {"a.weight": {"dtype": "float32", "shape": [5, 3], "parts": [
        {"file": "ema.00000-of-00002.safetensors", "at": [0, 0], "shape": [3, 3], "xxh3_128": "..."}, ...

So a process with another layout reads the parts that its own share touches. A file is `<group>.safetensors`,
`<group>.<rank>-of-<size>.safetensors` where several processes wrote, and `....part<n>.safetensors` from the second on
where one would be too large.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.manifest import ManifestError, file_entry

if TYPE_CHECKING:
    from torch import Tensor, nn

LARGEST_FILE = 5 * 10**9  # bytes of tensors; a larger tensor has a file of its own


class CheckpointError(ManifestError):
    """A checkpoint is absent, unfinished, damaged, of another shape, or not ours. The message is one line."""


@dataclass(frozen=True)
class Share:
    """A block of a larger tensor: what one process holds of it. at: where it begins; shape: of the whole."""

    tensor: Tensor
    at: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


Groups = dict[str, dict[str, "Tensor | Share"]]


def write_parts(folder: Path, groups: Groups, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """Write what this process (number `rank` of `size`) has, and bring it to disk. Returns what `merged` takes:

    {"files": {file: {"bytes", "sha256"}}, "groups": as in the manifest, with this process' parts alone}.
    Raises OSError, SafetensorError.
    """
    from safetensors.torch import save_file

    worker = f".{rank:05d}-of-{size:05d}" if size > 1 else ""
    index: dict[str, Any] = {"files": {}, "groups": {group: {} for group in groups}}
    for group, tensors in groups.items():
        shares = {name: tensor if isinstance(tensor, Share) else _all_of(tensor) for name, tensor in tensors.items()}
        for number, names in enumerate(_by_file(shares)):
            file = f"{group}{worker}{f'.part{number}' if number else ''}.safetensors"
            held = _separate({name: shares[name].tensor for name in names})
            save_file(held, folder / file)
            index["files"][file] = file_entry(folder / file)
            for name, tensor in held.items():
                part = {"file": file, "at": list(shares[name].at), "shape": list(tensor.shape)}
                index["groups"][group][name] = {
                    "dtype": _dtype_name(tensor),
                    "shape": list(shares[name].shape),
                    "parts": [{**part, "xxh3_128": tensor_hash(tensor)}],
                }
    return index


def merged(indices: list[dict[str, Any]]) -> dict[str, Any]:
    """One index of those of all processes, in their order. Asserts that every tensor is there as a whole."""
    whole: dict[str, Any] = {"files": {}, "groups": {}}
    for index in indices:
        whole["files"] |= index["files"]
        for group, tensors in index["groups"].items():
            mine = whole["groups"].setdefault(group, {})
            for name, entry in tensors.items():
                known = mine.setdefault(name, {**entry, "parts": []})
                known["parts"] += entry["parts"]
                assert (known["dtype"], known["shape"]) == (entry["dtype"], entry["shape"]), name
    for group, tensors in whole["groups"].items():
        for name, entry in tensors.items():
            assert _is_whole(entry), f"{group}: {name}: some of it is in no part, or twice"
    return whole


class Parts:
    """The tensors of an opened checkpoint, each verified when it is read. manifest: of `folder`, itself verified."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.groups = folder, _checked(folder, manifest)
        self.opened: dict[str, Any] = {}

    def files(self, groups: list[str]) -> list[str]:
        """Those with tensors of these groups, sorted."""
        return sorted({part["file"] for group in groups for _, part in self._parts(group)})

    def read(
        self, group: str, name: str, at: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """A tensor, or the block of it of `shape` that begins at `at`; on the CPU. Reads the parts that it touches.

        Raises CheckpointError where one is damaged.
        """
        import torch

        entry = self.groups[group][name]
        shape = tuple(entry["shape"] if shape is None else shape)
        at = (0,) * len(shape) if at is None else tuple(at)
        touched = [part for part in entry["parts"] if _overlap(at, shape, part) is not None]
        if len(touched) == 1 and tuple(touched[0]["at"]) == at and tuple(touched[0]["shape"]) == shape:
            return self.part(name, entry["dtype"], touched[0])
        out = torch.empty(shape, dtype=getattr(torch, entry["dtype"]))
        for part in touched:
            tensor = self.part(name, entry["dtype"], part)
            begin, end = _overlap(at, shape, part)
            source = tuple(slice(b - p, e - p) for b, e, p in zip(begin, end, part["at"], strict=True))
            target = tuple(slice(b - a, e - a) for b, e, a in zip(begin, end, at, strict=True))
            out[target] = tensor[source]
        return out

    def part(self, name: str, dtype: str, part: dict[str, Any]) -> Tensor:
        """One part as it lies in its file. Raises CheckpointError, which names the tensor."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / part["file"]
        try:
            if part["file"] not in self.opened:
                self.opened[part["file"]] = safe_open(path, "pt")
            tensor = self.opened[part["file"]].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: tensor {name}: damaged: {error}; restore it") from None
        got = _dtype_name(tensor), list(tensor.shape), tensor_hash(tensor)
        expected = dtype, part["shape"], part["xxh3_128"]
        if got != expected:
            raise CheckpointError(
                f"{path}: tensor {name}: damaged: got {_words(*got)}, expected {_words(*expected)}; restore it"
            )
        return tensor

    def damage(self, file: str) -> str:
        """What in a file is not as it was written: a tensor's name, its header, or nothing."""
        from safetensors import SafetensorError, safe_open

        held = {
            name: (self.groups[group][name]["dtype"], part)
            for group in self.groups
            for name, part in self._parts(group)
            if part["file"] == file
        }
        if not held:
            return ""
        try:
            with safe_open(self.folder / file, "pt") as opened:
                shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        except SafetensorError:
            return "its header"
        if shapes != {name: part["shape"] for name, (_, part) in held.items()}:
            return "its header"
        found = []
        for name, (dtype, part) in held.items():
            try:
                self.part(name, dtype, part)
            except CheckpointError:
                found.append(name)
        return f"tensor {found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''}" if found else ""

    def _parts(self, group: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, entry in self.groups[group].items():
            for part in entry["parts"]:
                yield name, part


def tensor_hash(tensor: Tensor) -> str:
    """xxh3 (128 bits) of a contiguous CPU tensor's bytes. It finds damage; it is no guard against who means harm."""
    import torch
    import xxhash

    return xxhash.xxh3_128_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy())


def weights_hash(module: nn.Module) -> str:
    """xxh3 of a module's tensors, whatever their names and places in it are: a second class of the same network, such
    as a light one, has the same."""
    import xxhash

    hashes = sorted(tensor_hash(tensor.detach().cpu().contiguous()) for tensor in module.state_dict().values())
    return xxhash.xxh3_128_hexdigest("".join(hashes).encode())


def _all_of(tensor: Tensor) -> Share:
    return Share(tensor, (0,) * tensor.ndim, tuple(tensor.shape))


def _by_file(shares: dict[str, Share]) -> Iterator[list[str]]:
    """Names, file by file, in their order."""
    names: list[str] = []
    filled = 0
    for name, share in shares.items():
        if names and filled + share.nbytes > LARGEST_FILE:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += share.nbytes
    if names:
        yield names


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """CPU copies where needed; safetensors refuses tensors that share memory."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        result[name] = tensor
    return result


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _words(dtype: str, shape: list[int], xxh3: str) -> str:
    return f"{dtype} {shape} of xxh3 {xxh3[:12]}..."


def _overlap(at: tuple[int, ...], shape: tuple[int, ...], part: dict[str, Any]) -> tuple[list[int], list[int]] | None:
    """(begin, end) of what a block and a part share, in places of the whole tensor; None: nothing."""
    begin = [max(a, b) for a, b in zip(at, part["at"], strict=True)]
    sizes = zip(at, shape, part["at"], part["shape"], strict=True)
    end = [min(a + n, b + m) for a, n, b, m in sizes]
    return None if any(e <= b for b, e in zip(begin, end, strict=True)) else (begin, end)


def _is_whole(entry: dict[str, Any]) -> bool:
    """Whether the parts lie inside the tensor, are disjoint, and add up to it."""
    parts, shape = entry["parts"], entry["shape"]
    for part in parts:
        if not len(part["at"]) == len(part["shape"]) == len(shape):
            return False
        if any(min(a, n) < 0 or a + n > whole for a, n, whole in zip(part["at"], part["shape"], shape, strict=True)):
            return False
    cut = [d for d, whole in enumerate(shape) if any(part["shape"][d] != whole for part in parts)]
    if len(cut) == 1:  # as a rule; pair by pair it would be the square of the number of processes
        ends = [0, *sorted(part["at"][cut[0]] + part["shape"][cut[0]] for part in parts)]
        apart = ends[:-1] == sorted(part["at"][cut[0]] for part in parts)
    else:
        pairs = ((one, other) for i, one in enumerate(parts) for other in parts[:i])
        apart = all(_overlap(one["at"], one["shape"], other) is None for one, other in pairs)
    return apart and sum(math.prod(part["shape"]) for part in parts) == math.prod(shape)


def _checked(folder: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The groups of a manifest, whoever wrote it: what is read later fits together. Raises CheckpointError."""
    import torch

    try:
        groups = manifest["facts"]["groups"]
        for tensors in groups.values():
            for name, entry in tensors.items():
                known = isinstance(getattr(torch, entry["dtype"], None), torch.dtype)
                files = all(
                    part["file"] in manifest["files"] and isinstance(part["xxh3_128"], str) for part in entry["parts"]
                )
                if not (known and files and _is_whole(entry)):
                    raise ValueError(f"the parts of {name} do not make a tensor")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}/manifest.json: got {error or type(error).__name__}, expected groups of tensors in parts; "
            "this program did not write it"
        ) from None
    return groups
