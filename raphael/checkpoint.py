"""What a trained thing looks like on disk: `train` writes it; `generate`, `evaluate` and a resumed `train` read it.

    <folder>/
      <group>.safetensors   one per group of tensors ("ema", "raw", "optimizer" ...)
      meta.json             what JSON can hold
      manifest.json         size and sha256 of each of these; checked when read

A checkpoint appears whole or not at all: it is written into a hidden sibling, brought to disk, and renamed. Nothing on
the way back unpickles: a checkpoint from a stranger cannot run code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.manifest import ManifestError, check_files, fsync_folder, read_manifest, write_manifest

if TYPE_CHECKING:
    from torch import Tensor, nn

FORM = "raphael-checkpoint/1"
META = "meta.json"
PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")


class CheckpointError(ManifestError):
    """A checkpoint is absent, unfinished, damaged, of another shape, or not ours. The message is one line."""


def write_checkpoint(folder: str | Path, groups: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
    """Write a checkpoint; an older one of the same name is replaced.

    groups: name -> tensors by name, of any device. meta: what JSON can hold (floats come back exactly; NaN is refused).
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        (temporary / META).write_text(json.dumps(meta, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        for name, tensors in groups.items():
            save_file(_separate(tensors), temporary / f"{name}.safetensors")
        write_manifest(temporary, FORM, [META, *(f"{name}.safetensors" for name in groups)], {"groups": sorted(groups)})
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk leaves nothing half-written
        raise
    fsync_folder(folder.parent)


def read_checkpoint(
    folder: str | Path, groups: list[str] | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read (groups, meta), tensors on the CPU. groups: only these (None: all). What is read is verified first.

    Raises CheckpointError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    manifest = _manifest(folder)
    stored = manifest["facts"]["groups"]
    for name in groups or ():
        if name not in stored:
            raise CheckpointError(f"{folder}: got no group {name!r}, expected one of {', '.join(stored)}")
    names = stored if groups is None else groups
    files = [META, *(f"{name}.safetensors" for name in names)]
    try:
        check_files(folder, manifest, files)
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        return {name: load_file(folder / f"{name}.safetensors") for name in names}, meta
    except CheckpointError:
        raise
    except (ManifestError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {error}" if isinstance(error, SafetensorError) else str(error)) from None


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


class CheckpointHome:
    """A folder of checkpoints named by images seen. Only the newest `keep` stay."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder)
        self.keep = keep

    def all(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("[0-9]*") if path.is_dir())

    def save(self, images: int, groups: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> Path:
        """Raises CheckpointError where it cannot be written, a full disk say; those before it are whole."""
        from safetensors import SafetensorError

        path = self.folder / f"{images:012d}"
        try:
            write_checkpoint(path, groups, meta)
        except (OSError, SafetensorError) as error:
            size = sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())
            before = self.all()
            raise CheckpointError(
                f"{path}: the checkpoint cannot be written ({getattr(error, 'strerror', None) or error}); it takes "
                f"{size / 1e9:,.3f} GB, {shutil.disk_usage(self.folder).free / 1e9:,.3f} GB are free: make room, then "
                f"the same command goes on from {f'{before[-1]}, which is whole' if before else 'the start'}"
            ) from error
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old)
        return path

    def sweep(self) -> None:
        """Remove what a killed process left unfinished. Only one process may: the one that writes."""
        for stray in self.folder.glob(".[0-9]*"):
            shutil.rmtree(stray, ignore_errors=True)

    def newest(self, warn: Callable[[str], None] = print) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """The newest checkpoint that is whole; None where there is none at all.

        A damaged one is named to `warn` and passed over. Raises CheckpointError when all are damaged.
        """
        damage: list[CheckpointError] = []
        for path in reversed(self.all()):
            try:
                return read_checkpoint(path)
            except CheckpointError as error:
                warn(f"passing over a checkpoint: {error}")
                damage.append(error)
        if damage:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole ({damage[0]}); delete that folder to start over"
            )
        return None


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
