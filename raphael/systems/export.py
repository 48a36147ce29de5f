"""What a finished training leaves: models/raphael, a pipeline folder that generates by itself.

Of a system with one part it is that part's checkpoint; of one with several each part's lies in a folder of its own
name, and the folder's meta.json names their hashes. Beside them what the system carries along (its encoders), the
curves, the held-out losses and the grids.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.config.params import Config
from raphael.base.config.systems import find_system
from raphael.base.images.fit import is_whole
from raphael.base.stage import StageError, write_json
from raphael.base.strict import to_dict
from raphael.systems import module_of

if TYPE_CHECKING:
    from raphael.systems.job import Folders

Trained = dict[str, tuple[dict[str, Any], dict[str, Any]]]  # (groups, meta) of the checkpoint of each part that is left


def finished(config: Config, folders: Folders) -> Trained:
    """Every part's last checkpoint, or, with train.export best, that of the lowest held-out loss, whose curves and
    grids still go to the end. Raises CheckpointError where one has none."""
    from raphael.base.checkpoint.folder import Stored
    from raphael.base.checkpoint.home import CheckpointHome

    found = {}
    for part in find_system(config.model.system).trained(config):
        home = CheckpointHome(folders_of(folders, config, part.name).checkpoints)
        groups, meta = home.newest()
        if config.train.export == "best" and (best := home.best()) is not None:
            stored = Stored(home.folder / best["checkpoint"])
            groups, meta = stored.load(), {**meta, "images_seen": stored.meta["images_seen"]}
        found[part.name] = groups, meta
    return found


def folders_of(folders: Folders, config: Config, part: str) -> Folders:
    """The folders of a part; of a system with one part alone they are the training's own."""
    return replace(folders, part=part) if len(find_system(config.model.system).parts) > 1 else folders


def write_export(config: Config, folders: Folders, trained: Trained) -> tuple[str, int]:
    """Put the pipeline folder together in work/.../export. Returns (its identity, number of parameters)."""
    from raphael.base.checkpoint.folder import checkpoint_sha256, write_checkpoint
    from raphael.base.integrity.contents import seal
    from raphael.base.manifest import read_manifest
    from raphael.base.records import FORM

    system = find_system(config.model.system)
    about = {
        **module_of(system.name, "training").described(config, folders),
        # of the code that made the weights, which a run that only exports them need not be
        "git_revision": trained[system.parts[-1].name][1]["about"]["git_revision"],
        "revisions": trained[system.parts[-1].name][1]["about"]["revisions"],
        "records_sha256": read_manifest(folders.records, FORM)["sha256"],
        "images_seen": sum(meta["images_seen"] for _, meta in trained.values()),
    }
    if config.train.init_from:
        about["init_sha256"] = config.train.init_sha256
    export, parameters = folders.work / "export", 0
    if len(trained) == 1:
        ((groups, meta),) = trained.values()
        parameters = _write_part(config, export, groups, about, system.parts[0].network)
        _beside(export, meta, folders)
        _adapter(config, export, groups, system.parts[0].network)
    else:
        shutil.rmtree(export, ignore_errors=True)
        finished = {}
        for name, (groups, meta) in trained.items():
            part, own = folders.work / f"export_{name}", {"part": name, "images_seen": meta["images_seen"]}
            parameters += _write_part(config, part, groups, {**about, **own}, system.part(name).network)
            _beside(part, meta, folders_of(folders, config, name))
            _adapter(config, part, groups, system.part(name).network)
            finished[name] = part
        about["parts"] = {name: checkpoint_sha256(part) for name, part in finished.items()}
        write_checkpoint(export, {}, about)
        for name, part in finished.items():
            part.rename(export / name)
    for name, place in system.carries.items():
        shutil.copytree(folders.root / place, export / name)
    return seal(export), parameters


def _write_part(config: Config, folder: Path, groups: dict[str, Any], about: dict[str, Any], network: str) -> int:
    """A part's weights: the EMAs over the raw ones, since buffers have no EMA. Returns the number of parameters."""
    from raphael.base.checkpoint.folder import write_checkpoint

    raw = weights_of(groups["model"], network)
    emas = {name: {**raw, **weights_of(groups[name], network)} for name in config.train.loop.ema_decays}
    kinds = {**emas, "raw": raw}
    if config.train.lora.rank:
        from raphael.net.lora.low_rank import merged

        kinds = {name: merged(tensors, config.train.lora.strength) for name, tensors in kinds.items()}
        about = {**about, "lora": to_dict(config.train.lora)}
    write_checkpoint(folder, kinds, about)
    return sum(tensor.numel() for tensor in kinds["raw"].values())


def _adapter(config: Config, folder: Path, groups: dict[str, Any], network: str) -> None:
    """Of a training with low rank what it trained, as a file of its own beside the weights that hold it, too."""
    if not config.train.lora.rank:
        return
    from raphael.net.lora.low_rank import pairs_in
    from raphael.systems.lora.file import LORA_FILE, Header, write_lora

    tensors = {**weights_of(groups["model"], network), **weights_of(groups["ema"], network)}
    pairs, lora = pairs_in(tensors, config.train.lora.strength), config.train.lora
    write_lora(folder / LORA_FILE, pairs, Header(config.train.init_sha256, lora.rank, lora.strength))


def _beside(folder: Path, meta: dict[str, Any], folders: Folders) -> None:
    write_json(folder / "curves.json", meta["history"])
    if "heldout" in meta:
        write_json(folder / "heldout.json", meta["heldout"])
    (folder / "samples").mkdir()
    for path in sorted(folders.samples.rglob("[0-9]*.png")):
        if not is_whole(path):
            print(f"train: {path}: damaged: this grid is left out", flush=True)
            continue
        target = folder / "samples" / path.relative_to(folders.samples)
        target.parent.mkdir(exist_ok=True)
        shutil.copy2(path, target)


def weights_of(tensors: dict[str, Any], network: str) -> dict[str, Any]:
    """Of an objective's tensors those of its network, by the names they have in it. Raises StageError for none."""
    prefix = f"{network}."
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not found:
        held = ", ".join(sorted({name.split(".")[0] for name in tensors}))
        raise StageError(f"Part.network: got {network!r}, expected a module of the objective, which has {held}")
    return found
