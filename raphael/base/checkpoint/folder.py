"""What a trained thing looks like on disk: `train` writes it; `generate`, `evaluate` and a resumed `train` read it.

    <folder>/
      <group>.safetensors   tensors of one group ("ema", "raw", "optimizer" ...), in several files where they are large
                            or several processes wrote them (raphael/base/checkpoint/parts.py)
      meta.json             what JSON can hold
      manifest.json         size and sha256 of each of these, xxh3 of every tensor; checked when read

A checkpoint appears atomically: it is written into a hidden sibling, brought to disk, and renamed. Nothing on
the way back unpickles: a checkpoint from a stranger cannot run code.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.checkpoint.parts import CheckpointError, Groups, Parts, merged, write_parts
from raphael.base.files import put
from raphael.base.manifest import ManifestError, check_files, read_manifest, write_manifest

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["CheckpointError", "Stored", "checkpoint_sha256", "load_weights", "read_checkpoint", "write_checkpoint"]

FORM = "raphael-checkpoint/2"
META = "meta.json"
PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")


def write_checkpoint(folder: str | Path, groups: Groups, meta: dict[str, Any]) -> None:
    """Write a checkpoint; an older one of the same name is replaced.

    groups: name -> tensors by name, of any device. meta: what JSON can hold (floats come back exactly; NaN is refused).
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        finish(temporary, folder, [write_parts(temporary, groups)], meta)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk leaves nothing half-written
        raise


def finish(temporary: Path, folder: Path, indices: list[dict[str, Any]], meta: dict[str, Any]) -> None:
    """Make of a folder that holds every process' parts a checkpoint, and give it its name. indices: of write_parts."""
    index = merged(indices)
    (temporary / META).write_text(json.dumps(meta, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    write_manifest(temporary, FORM, [META], {"groups": index["groups"]}, index["files"])
    if folder.exists():
        shutil.rmtree(folder)
    put(temporary, folder)


class Stored:
    """A checkpoint that is being read. Its manifest is verified at once, `meta` and every tensor when it is read.

    `check` verifies files as a whole. Raises CheckpointError, as all of its methods do.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = _manifest(self.folder)
        self.parts = Parts(self.folder, self.manifest)
        self.groups: dict[str, dict[str, Any]] = self.parts.groups  # what is there: name -> {"dtype", "shape", ...}

    @property
    def meta(self) -> dict[str, Any]:
        self._check(META)
        try:
            meta = json.loads((self.folder / META).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            meta = None  # its maker signed what is no JSON
        if not isinstance(meta, dict):
            raise CheckpointError(f"{self.folder / META}: got no mapping of JSON, expected what a training writes")
        return meta

    def check(self, groups: list[str] | None = None, rank: int = 0, size: int = 1, tensors: bool = True) -> None:
        """Compare files with the manifest, and every tensor in them (tensors False: reading them will do that, in this
        very process). groups: only theirs (None: all).

        Of `size` processes each compares its share of the files, number `rank` those from there on: one of them finds
        what there is to be found.
        """
        for group in groups or ():
            if group not in self.groups:
                raise CheckpointError(
                    f"{self.folder}: got no group {group!r}, expected one of {', '.join(self.groups)}"
                )
        files = self.parts.files(list(self.groups) if groups is None else groups)
        for file in [META, *files][rank::size]:
            self._check(file, tensors)

    def read(
        self, group: str, name: str, at: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """A tensor, or the block of it of `shape` that begins at `at`; on the CPU."""
        return self.parts.read(group, name, at, shape)

    def load(self, groups: list[str] | None = None) -> dict[str, dict[str, Tensor]]:
        """Whole tensors by group and name."""
        names = list(self.groups) if groups is None else groups
        return {group: {name: self.read(group, name) for name in self.groups[group]} for group in names}

    def _check(self, file: str, tensors: bool = False) -> None:
        try:
            check_files(self.folder, self.manifest, [file])
        except ManifestError as error:
            where = self.parts.damage(file) if "damaged" in str(error) else ""
            raise CheckpointError(f"{error}{where and f'; the damage is in {where}'}") from None
        if tensors and (where := self.parts.damage(file)):
            raise CheckpointError(f"{self.folder / file}: damaged before it was on disk, in {where}; restore it")


def read_checkpoint(
    folder: str | Path, groups: list[str] | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read (groups, meta), tensors on the CPU. groups: only these (None: all). What is read is verified first.

    Raises CheckpointError.
    """
    stored = Stored(folder)
    stored.check(groups, tensors=False)
    return stored.load(groups), stored.meta


def checkpoint_sha256(folder: str | Path) -> str:
    """The name of a checkpoint's content: its manifest's hash, which covers every file. Raises CheckpointError."""
    return _manifest(Path(folder))["sha256"]


def load_weights(module: nn.Module, tensors: dict[str, Tensor], where: str | Path) -> None:
    """Copy tensors into a module's parameters and buffers; names and shapes must fit. Raises CheckpointError.

    where: what the tensors come from, for the message.
    """
    import torch

    own = module.state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        detail = f"no {missing[0]}" if missing else f"an unknown {unknown[0]}"
        raise CheckpointError(
            f"{where}: got {detail} ({len(missing)} tensors missing, {len(unknown)} unknown), expected the weights "
            f"of a {type(module).__name__} of this shape; was it trained with another preset?"
        )
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {name}: got shape {list(tensors[name].shape)}, expected {list(tensor.shape)}; "
                "was it trained with another preset?"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _manifest(folder: Path) -> dict[str, Any]:
    if folder.is_file():
        kind = "a pickle, which can run code when it is read: refused" if folder.suffix in PICKLES else "a file"
        raise CheckpointError(
            f"{folder}: got {kind}; expected a checkpoint folder (safetensors, meta.json, manifest.json)"
        )
    if folder.is_dir() and not (folder / "manifest.json").exists():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise CheckpointError(
                f"{folder / pickles[0]}: got a pickle, which can run code when it is read: refused; "
                "expected a checkpoint folder (safetensors, meta.json, manifest.json)"
            )
    try:
        return read_manifest(folder, FORM)
    except ManifestError as error:
        raise CheckpointError(str(error)) from None
