"""What an adapter's matrices are called in files, and where in our model they belong.

A network's own names are its modules' paths. One in Stable Diffusion's shape (raphael/net/moe/from_diffusers.py) knows
diffusers' names, too, so that adapters of that model fit: q, k and v are rows of one matrix of ours, the feed-forward
is in every expert of the mixture that took its place. Text towers of transformers have their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raphael.base.stage import StageError
from raphael.net.lora.sites import Pair, Site, own_names
from raphael.net.moe.from_diffusers import block_names, places, straight_names
from raphael.net.moe.unet import RaphaelUNet

if TYPE_CHECKING:
    from torch import nn

    from raphael.systems.lora.file import LoraFile

Names = dict[str, tuple[Site, ...]]


def names_of(network: nn.Module) -> Names:
    """Every name by which a matrix of the network may be called, with dots."""
    found: Names = {name: (site,) for name, site in own_names(network).items()}
    if isinstance(network, RaphaelUNet) and network.config.proj_in:
        found |= stable_diffusion_names(network)
    return found


def stable_diffusion_names(unet: RaphaelUNet) -> Names:
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.named_parameters()}
    found: Names = {}
    for mine, other in straight_names(unet.config):
        if len(shapes.get(f"{mine}.weight", ())) in (2, 4):
            found[other] = (Site(f"{mine}.weight"),)
    for mine, other in block_names(unet.config):
        inner = f"{other}.transformer_blocks.0"
        for attention, name, parts in (
            ("attn1", f"{mine}.self_attention.qkv.weight", ("to_q", "to_k", "to_v")),
            ("attn2", f"{mine}.cross_attention.q.weight", ("to_q",)),
            ("attn2", f"{mine}.cross_attention.kv.weight", ("to_k", "to_v")),
        ):
            each = shapes[name][0] // len(parts)
            for number, part in enumerate(parts):
                found[f"{inner}.{attention}.{part}"] = (Site(name, rows=(number * each, (number + 1) * each)),)
        for _, place, kind in places(unet.config)[:1]:
            for theirs, bank, layer in (("0.proj", "w1", "wide"), ("2", "w2", "narrow")):
                if kind == "dense":
                    found[f"{inner}.ff.net.{theirs}"] = (Site(f"{mine}.{place}_dense.{layer}.weight"),)
                    continue
                name = f"{mine}.{place}_moe.experts.{bank}"
                found[f"{inner}.ff.net.{theirs}"] = tuple(Site(name, k) for k in range(shapes[name][0]))
    return found


def tower_names(encoder: Any) -> Names:
    """Of a text encoder that is one of transformers; none of another build."""
    model = getattr(encoder, "model", None)
    if model is None:
        return {}
    found: Names = {}
    for name, parameter in model.named_parameters():
        if name.endswith(".weight") and parameter.dim() == 2 and "embedding" not in name:
            path = name.removesuffix(".weight").removeprefix("text_model.")
            found[f"text_model.{path}"] = (Site(f"model.{name}", part="text_encoder"),)
    return found


def fit(file: LoraFile, parts: dict[str, nn.Module]) -> dict[Site, Pair]:
    """The file's matrices at their sites. parts: "unet", and "text_encoder" where there is one.

    Raises StageError that names the first key which does not fit.
    """
    tables = {"unet": names_of(parts["unet"]), "text_encoder": tower_names(parts.get("text_encoder"))}
    if not file.dotted:
        tables = {part: {name.replace(".", "_"): at for name, at in names.items()} for part, names in tables.items()}
    parameters = {part: dict(module.named_parameters()) for part, module in parts.items()}
    pairs: dict[Site, Pair] = {}
    for (part, name), found in file.matrices.items():
        key = file.keys[part, name]
        if name not in tables[part]:
            known = next(iter(tables[part]), "none: its text encoder is no tower of transformers")
            raise StageError(f"{file.where}: was made for another model: got {key}, expected names such as {known}")
        pair = Pair(found["down"], found["up"], found["alpha"])
        for site in tables[part][name]:
            expected = tuple(site.of(parameters[part][site.parameter]).shape)
            if pair.shape != expected and pair.shape == (*expected, 1, 1):  # a 1 x 1 convolution, kept as a matrix
                pair = Pair(pair.down.flatten(1), pair.up.flatten(1), pair.alpha)
            elif pair.shape != expected and (*pair.shape, 1, 1) == expected:
                pair = Pair(pair.down[:, :, None, None], pair.up[:, :, None, None], pair.alpha)
            if pair.shape != expected:
                raise StageError(
                    f"{file.where}: was made for another model: {key} adds to a matrix of {list(pair.shape)}, "
                    f"expected {list(expected)}"
                )
            pairs[site] = pair
    return pairs
