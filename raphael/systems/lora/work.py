"""`raphael lora`: an adapter into a model, out of one, and what a file holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raphael.base.checkpoint.folder import Stored, checkpoint_sha256, read_checkpoint
from raphael.base.config.systems import expect_system
from raphael.base.stage import StageError
from raphael.net.lora.low_rank import largest_rank
from raphael.net.lora.sites import Pair, owners, sites_of
from raphael.pretrained.find import find_pipeline
from raphael.systems.lora.file import Form, Header, LoraFile, read_lora, write_lora

if TYPE_CHECKING:
    from torch import Tensor

    from raphael.systems.pipeline import Pipeline


def extract(tuned: str | Path, base: str | Path, out: Path, header: Header, targets: Sequence[str], form: Form) -> str:
    """Write the adapter of header.rank that comes nearest to what a fine-tuned model has beyond its base.

    By singular values, of the targets' matrices. Returns in words how much of the difference it holds. Raises
    StageError for models of different shapes, or without a difference; ConfigError for targets that there are not.
    """
    if out.exists():
        raise StageError(f"{out}: is there already; name another file")
    (ours, meta), (theirs, _) = (_weights(which) for which in (tuned, base))
    for name in sorted(ours.keys() | theirs.keys()):
        got, expected = (list(tensors[name].shape) if name in tensors else None for tensors in (ours, theirs))
        if got != expected:
            raise StageError(f"{tuned}: is no fine-tuned {base}: {name} is of shape {got}, there {expected}")
    pairs, kept, whole = {}, 0.0, 0.0
    for path, module, name in owners(_network(meta), targets):
        most = largest_rank(tuple(getattr(module, name).shape))
        if header.rank > most:
            raise StageError(f"--rank: got {header.rank}, expected at most {most}, the smaller side of {path}.{name}")
        for _, site in sites_of(path, module, name):
            difference = site.of(ours[site.parameter]).float() - site.of(theirs[site.parameter]).float()
            if difference.any():
                pairs[site] = nearest(difference, header.rank, header.alpha)
                whole += float(difference.square().sum())
                kept += float(difference.square().sum() - (difference - pairs[site].delta()).square().sum())
    total = sum(float((ours[name].float() - theirs[name].float()).square().sum()) for name in ours)
    if not pairs:
        raise StageError(f"{tuned}: got no difference from {base} in {', '.join(targets)}, expected one to extract")
    write_lora(out, pairs, Header(checkpoint_sha256(find_pipeline(base))[:16], header.rank, header.alpha), form)
    return (
        f"{out}: {len(pairs)} matrices of rank {header.rank}; of the squared difference in {', '.join(targets)} "
        f"{kept / whole:.1%}, of that in the whole network {kept / total:.1%}"
    )


def nearest(difference: Tensor, rank: int, alpha: float) -> Pair:
    """The pair of that rank with the least square error (Eckart and Young 1936)."""
    u, s, v = torch.linalg.svd(difference.flatten(1), full_matrices=False)
    root = (s[:rank] * rank / alpha).sqrt()
    up, down = u[:, :rank] * root, root[:, None] * v[:rank]
    if difference.dim() == 4:
        up, down = up[:, :, None, None], down.view(rank, *difference.shape[1:])
    return Pair(down.contiguous(), up.contiguous(), alpha)


def _weights(which: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    folder = find_pipeline(which)
    expect_system(Stored(folder).meta, folder)
    groups, meta = read_checkpoint(folder, ["ema"])
    return groups["ema"], meta


def _network(meta: dict[str, Any]) -> torch.nn.Module:
    """Of that shape, without weights."""
    from raphael.base.config.preset import RaphaelUNetConfig
    from raphael.base.strict import load
    from raphael.net.moe.unet import RaphaelUNet

    with torch.device("meta"):
        return RaphaelUNet(load(RaphaelUNetConfig, meta["unet"], "meta.json", "unet"))


def merge(pipeline: Pipeline, out: Path) -> None:
    """Write the model with its adapters in its weights. Raises StageError where `out` holds something else."""
    if out.exists() and any(out.iterdir()):
        raise StageError(f"{out}: is there already; name a new folder")
    pipeline.fuse_lora()
    pipeline.save_pretrained(out)


def describe(file: LoraFile) -> dict[str, Any]:
    """What `raphael lora info` tells."""
    found = list(file.matrices.values())
    numbers = [item["down"].numel() + item["up"].numel() for item in found]
    return {
        "file": file.where,
        "sha256": file.sha256,
        "form": file.form,
        "matrices": len(found),
        "ranks": sorted({len(item["down"]) for item in found}),
        "factors": sorted({round(item["alpha"] / len(item["down"]), 6) for item in found}),
        "parameters": sum(numbers),
        "bytes": Path(file.where).stat().st_size,
        "types": sorted({str(item["down"].dtype).removeprefix("torch.") for item in found}),
        "base": file.header.get("raphael_base", ""),
        "parts": sorted({part for part, _ in file.matrices}),
        "names": sorted(name for _, name in file.matrices),
    }


def info_text(told: dict[str, Any]) -> str:
    shown = {**told, "names": f"{told['names'][0]} ... {told['names'][-1]}"}
    shown = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in shown.items()}
    return "\n".join(f"{name:12}{value}" for name, value in shown.items())


def read_info(path: Path) -> dict[str, Any]:
    return describe(read_lora(path))
