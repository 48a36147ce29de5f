"""What `from_pretrained` may be given: a pipeline folder, the name of one, an export, or a repository of the hub."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raphael.base.checkpoint.folder import checkpoint_sha256, read_checkpoint, write_checkpoint
from raphael.base.config.sampling import own_sampling
from raphael.base.config.systems import find_system
from raphael.base.integrity.contents import seal
from raphael.base.stage import StageError, read_json
from raphael.base.strict import to_dict
from raphael.pretrained.find import MANIFEST, TRAINED, find_pipeline, names
from raphael.systems.exchange.export import UNET_CLASS
from raphael.systems.exchange.import_model import import_model

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WHOLE = ""  # the name of a network that has no folder of its own
FETCHED = ["*.json", "*.safetensors", "*.txt", "*.model"]  # nothing that can run code when it is read


@dataclass(frozen=True)
class Opened:
    """A pipeline folder to read. temporary: where an export was unpacked to; it is there as long as this is."""

    folder: Path
    temporary: tempfile.TemporaryDirectory | None = None


def open_pretrained(what: str | Path) -> Opened:
    """Raises StageError, which says what lies there instead."""
    path = Path(what)
    if _is_hub_id(str(what)):
        path = _fetched(str(what))
    if not _is_export(path):
        return Opened(find_pipeline(path if path != Path(what) else what))
    temporary = tempfile.TemporaryDirectory(prefix="raphael-")
    folder = Path(temporary.name) / "raphael"
    import_model(path, folder)
    return Opened(folder, temporary)


def save_pretrained(pipeline: Any, folder: str | Path) -> None:
    """A pipeline folder of what a Pipeline holds in memory, and of its encoders as they were read. Of several networks
    each lies in a folder of its name, as a training leaves them.

    Raises StageError for a folder that holds something else, ValueError for a pipeline that was not read from one.
    """
    folder = Path(folder)
    if pipeline.source is None:
        raise ValueError("save_pretrained: got a pipeline that was not read from a folder, which its encoders lie in")
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / MANIFEST).is_file())):
        raise StageError(f"{folder}: holds something else, expected a new or empty folder, or one of a pipeline")
    meta = {**pipeline.meta, "sampling": own_sampling(to_dict(pipeline.defaults))}
    with tempfile.TemporaryDirectory(
        prefix="raphael-"
    ) as temporary:  # write_checkpoint replaces the folder it is given
        kept = {name: Path(temporary) / name for name in find_system(pipeline.system).carries}
        for name, place in kept.items():
            shutil.copytree(pipeline.source.folder / name, place)
        for name in pipeline.networks.keys() - {WHOLE}:
            kept[name] = Path(temporary) / name
            _, own = read_checkpoint(pipeline.source.folder / name, [])
            write_checkpoint(kept[name], _groups(pipeline.networks[name]), own)
        if parts := {name: checkpoint_sha256(kept[name]) for name in pipeline.networks if name != WHOLE}:
            meta["parts"] = parts
        write_checkpoint(folder, _groups(pipeline.networks[WHOLE]) if WHOLE in pipeline.networks else {}, meta)
        for name, place in kept.items():
            shutil.copytree(place, folder / name)
        seal(folder)


def _groups(network: Any) -> dict[str, dict[str, Any]]:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    return {"ema": weights, "raw": weights}


def _is_export(path: Path) -> bool:
    """What `raphael export` wrote; a Stable Diffusion is not: it becomes a pipeline by `raphael import` alone."""
    if path.is_file():
        return path.suffix == ".safetensors"
    if not (path / "model_index.json").is_file() or not (path / "unet" / "config.json").is_file():
        return False
    config = read_json(path / "unet" / "config.json")
    return isinstance(config, dict) and config.get("_class_name") == UNET_CLASS


def _is_hub_id(text: str) -> bool:
    """owner/name, where nothing of ours lies at the path and the owner is no folder here."""
    first = Path(text).parts[0] if Path(text).parts else ""
    taken = Path(first).exists() or first == TRAINED.parts[0] or text in names()
    return bool(HUB_ID.fullmatch(text)) and first not in (".", "..") and not taken


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FETCHED))
    except Exception as error:  # of requests, of the hub, of the disk: each says it in a word of its own
        reason = " ".join(str(error).split())[:200]
        raise StageError(
            f"{name}: no such folder here, and not to be had from the hub ({type(error).__name__}: {reason})"
        ) from None
