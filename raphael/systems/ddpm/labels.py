"""Class labels as what the network is told: a one-hot vector; the null label is the vector 0."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raphael.base.records import LABEL, NO_LABEL
from raphael.base.stage import StageError
from raphael.net.condition import Condition

COLUMNS = "vector_in.weight"  # of the U-Net: (time_dim, classes)


def classes_of(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes, of a records' manifest; () where records have no label."""
    return tuple(facts.get(LABEL, {}).get("classes", ()))


def arranged(classes: Sequence[str], tensors: dict[str, Tensor], meta: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint for these classes: each keeps the column that its name has there, a new one is 0.

    Classes are sorted by name, so one more would shift those behind it. Raises StageError where the checkpoint knows a
    class that is not here: what it learned of it would be lost in silence.
    """
    theirs = list(meta["classes"])
    if lost := sorted(set(theirs) - set(classes)):
        raise StageError(
            f"train.init_from: got a checkpoint of the classes {', '.join(theirs)}, and records of "
            f"{', '.join(classes) or 'none'}: without {', '.join(lost)}; expected each of its classes: change what "
            "encode.label_pattern or encode.label_column finds, and run encode again"
        )
    if COLUMNS not in tensors:
        return tensors
    old = tensors[COLUMNS]
    columns = [old[:, theirs.index(name)] if name in theirs else torch.zeros_like(old[:, 0]) for name in classes]
    return {**tensors, COLUMNS: torch.stack(columns, dim=1)}


def condition(labels: Tensor, num_classes: int) -> Condition:
    """labels (B,) integers, NO_LABEL for the null label -> what the network is told."""
    known = labels != NO_LABEL
    one_hot = F.one_hot(torch.where(known, labels, 0).long(), num_classes)
    return Condition(vector=(one_hot * known[:, None]).float())


def told(num_classes: int, batch: Mapping[str, Tensor], dropped: Tensor | None) -> Condition:
    """Of a batch of records; nothing where there are no classes. dropped (B,) bool: these get the null label."""
    if not num_classes:
        return Condition()
    labels = batch[LABEL]
    return condition(labels if dropped is None else torch.where(dropped, NO_LABEL, labels), num_classes)


def named(classes: Sequence[str], names: Sequence[str], device: torch.device | str = "cpu") -> Condition:
    """Of names of classes; "" is the null label. Raises ValueError for a name that is no class, with the nearest."""
    for name in names:
        if name and name not in classes:
            near = difflib.get_close_matches(name, classes, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            known = ", ".join(classes) if classes else "nothing: this model is unconditional"
            raise ValueError(f"label: got {name!r}, expected {known}{hint}")
    if not classes:
        return Condition()
    places = [classes.index(name) if name else NO_LABEL for name in names]
    return condition(torch.tensor(places, device=device), len(classes))
