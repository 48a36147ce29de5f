"""A pipeline's adapters, by diffusers' method names. What generates is always the plain network with merged weights:
an adapter costs nothing while it samples, and what the network remembers of its weights stays true."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raphael.net.lora.sites import Pair, Site, add
from raphael.systems.lora.file import find_file, read_lora
from raphael.systems.lora.names import fit

Place = tuple[str, str]  # part of the pipeline, parameter


@dataclass
class Adapter:
    pairs: dict[Site, Pair] = field(repr=False)
    sha256: str
    weight: float
    file: str


@dataclass
class Held:
    """What a pipeline holds of its adapters. base: the weights without them, on the CPU, of what they add to.

    identity: the pipeline's without them. scale: of all together; fused: they stay when they are unloaded.
    """

    identity: str
    adapters: dict[str, Adapter] = field(default_factory=dict)
    base: dict[Place, Tensor] = field(default_factory=dict)
    scale: float = 1.0
    fused: bool = False


class Adaptable:
    """load_lora_weights, set_adapters, fuse_lora, unload_lora_weights: the part of a pipeline that knows adapters."""

    unet: nn.Module  # the pipeline's own, as `identity`
    identity: str
    _held: Held | None = None
    _fused_tower = False  # whether the text encoder is another than the one in the pipeline's folder

    @property
    def adapters(self) -> dict[str, float]:
        """Name -> weight of those that are loaded."""
        return {} if self._held is None else {name: item.weight for name, item in self._held.adapters.items()}

    def load_lora_weights(
        self,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str | None = None,
        weight_name: str | None = None,
    ) -> None:
        """Add an adapter to the model, at weight 1: a file of kohya's, peft's or diffusers' form, or a folder with one
        (weight_name: which file of the folder).

        Several may be loaded: they add up. Raises StageError for one that is damaged, none, or for another model
        (which names the first key), ValueError for a name that is taken, or with adapters that are fused.
        """
        held = self._held or Held(self.identity)
        if held.fused:
            raise ValueError("load_lora_weights: got fused adapters, expected none; call unload_lora_weights first")
        name = adapter_name or f"default_{len(held.adapters)}"
        if name in held.adapters:
            raise ValueError(f"adapter_name: got {name!r}, which is loaded already; expected another name")
        path = Path(pretrained_model_name_or_path)
        file = read_lora(find_file(path / weight_name if weight_name else path))
        pairs, parts = fit(file, _parts(self)), _parts(self)
        for site in pairs:
            if (place := (site.part, site.parameter)) not in held.base:
                parameter = parts[site.part].get_parameter(site.parameter)
                held.base[place] = parameter.detach().to("cpu", copy=True)
        held.adapters[name] = Adapter(pairs, file.sha256, 1.0, Path(file.where).name)
        self._held = held
        _merge(self, {(site.part, site.parameter) for site in pairs})

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Use these adapters with these weights (1 where none are given), and no others. Raises ValueError."""
        held = _expect(self, "set_adapters")
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = [1.0] * len(names) if adapter_weights is None else adapter_weights
        weights = [weights] * len(names) if isinstance(weights, (int, float)) else list(weights)
        if unknown := [name for name in names if name not in held.adapters]:
            raise ValueError(f"adapter_names: got {unknown[0]!r}, expected some of {', '.join(held.adapters)}")
        if len(weights) != len(names):
            raise ValueError(f"adapter_weights: got {len(weights)} for {len(names)} names, expected one for each")
        for weight in weights:
            _expect_finite("adapter_weights", weight)
        chosen = dict(zip(names, map(float, weights), strict=True))
        for name, adapter in held.adapters.items():
            adapter.weight = chosen.get(name, 0.0)
        _merge(self)

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Let the adapters, times lora_scale, stay when they are unloaded: the model is then what they made of it.

        `save_pretrained` writes it so. `unfuse_lora` takes that back until they are unloaded. Raises ValueError.
        """
        held = _expect(self, "fuse_lora")
        _expect_finite("lora_scale", lora_scale)
        held.scale, held.fused = float(lora_scale), True
        self._fused_tower |= any(place[0] == "text_encoder" for place in held.base)
        _merge(self)

    def unfuse_lora(self) -> None:
        held = _expect(self, "unfuse_lora")
        held.scale, held.fused = 1.0, False
        _merge(self)

    def unload_lora_weights(self) -> None:
        """Forget the adapters. Unless they were fused the weights are then, to the bit, what they were before."""
        held = self._held
        if held is None:
            return
        if not held.fused:
            held.adapters = {}
            _merge(self)
        self._held = None

    def told_adapters(self) -> dict[str, Any]:
        """What images.json says of them; nothing where there are none."""
        loaded = [] if self._held is None else self._held.adapters.values()
        told = [{"file": item.file, "sha256": item.sha256, "weight": item.weight} for item in loaded]
        return {"lora": told} if told else {}

    def expect_saveable(self) -> None:
        """Raises ValueError where the weights are not the model's own, or no folder would hold what they are."""
        if self._held is not None and not self._held.fused:
            raise ValueError("save_pretrained: got adapters, expected fused ones or none; call fuse_lora")
        if self._fused_tower:
            raise ValueError("save_pretrained: got an adapter fused into the text encoder, which is kept as read")


def _parts(pipeline: Adaptable) -> dict[str, nn.Module]:
    named = {"unet": pipeline.unet, "text_encoder": getattr(pipeline, "text_encoder", None)}
    return {name: module for name, module in named.items() if module is not None}


def _expect(pipeline: Adaptable, method: str) -> Held:
    if pipeline._held is None:
        raise ValueError(f"{method}: got no adapters, expected some; call load_lora_weights first")
    return pipeline._held


def _expect_finite(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}: got {value!r}, expected a finite number")


@torch.no_grad()
def _merge(pipeline: Adaptable, only: set[Place] | None = None) -> None:
    """Set every touched weight to base + sum of weight (alpha / rank) up down; to the base itself where no adapter
    counts. only: these places."""
    held, parts = pipeline._held, _parts(pipeline)
    counting = [item for item in held.adapters.values() if item.weight * held.scale]
    adds: dict[Place, list[tuple[Site, Pair, float]]] = {}
    for item in counting:
        for site, pair in item.pairs.items():
            adds.setdefault((site.part, site.parameter), []).append((site, pair, item.weight * held.scale))
    for place in held.base if only is None else only:
        parameter = parts[place[0]].get_parameter(place[1])
        base = held.base[place].to(parameter.device)
        parameter.copy_(add(base, adds[place]) if place in adds else base)
    pipeline.identity = _identity(held, counting)


def _identity(held: Held, counting: list[Adapter]) -> str:
    """Of what generates: the base's own where no adapter counts."""
    if not counting:
        return held.identity
    told = [f"{item.sha256}:{item.weight * held.scale!r}" for item in counting]
    return hashlib.sha256("\n".join([held.identity, *told]).encode()).hexdigest()[:16]
