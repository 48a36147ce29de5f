"""What a network is conditioned on, as one value: samplers and guidance pass it through and look at none of it.

Letters of the shapes: B samples, N tokens, D their width, V a vector's width, H heads, P pixels (queries).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionSite:
    """Where in the network an attention map arises."""

    kind: Literal["self", "cross"]
    block: int  # transformer blocks are counted in the order of the forward pass
    height: int
    width: int


@dataclass(frozen=True)
class HookCall:
    """What a hook is told with the tensor that it gets: where, when, and of which rows."""

    site: AttentionSite
    rows: Tensor  # (R,) int64, on the CPU: which rows of the hooked condition the tensor's rows are
    sigma: float | None  # the step's noise level; None where the network was not asked by a denoiser
    progress: float | None  # of sampling: 0 at the last timestep (noise), 1 at timestep 0 (clean); None as sigma
    conditional: Tensor  # (R,) bool, on the CPU: False on the unconditional rows of guidance


AttentionBias = Callable[[HookCall, Tensor], Tensor | float]  # scores (R, H, P, N) -> what is added to them
AttentionEdit = Callable[[HookCall, Tensor], Tensor]  # probabilities (R, H, P, N) -> probabilities (R, H, P, N)


@dataclass(frozen=True)
class AttentionHooks:
    """bias: an added score of cross-attention (paint-with-words); edit: map -> map of both attentions
    (prompt-to-prompt, recording). They get the rows that they were put on, and never a row of `concat`'s second half:
    an edit cannot reach the unconditional rows of guidance.
    """

    bias: AttentionBias | None = None
    edit: AttentionEdit | None = None


@dataclass(frozen=True)
class Step:
    """Of the denoiser: told to hooks."""

    sigma: float
    progress: float


@dataclass(frozen=True, eq=False)
class Condition:
    """All rows have one number B; what is None the network is not told. `Condition()` is an unconditional network's.

    The last four belong to `hooks`: which row of the condition that the hooks were put on each row is (-1: none, the
    hooks do not see it; None: all, in order), the step, and which rows are not guidance's null ones (None: all).
    Raises ValueError where shapes do not fit each other; whether they fit a network, the network says.
    """

    tokens: Tensor | None = None  # (B, N, D)
    mask: Tensor | None = None  # (B, N) bool, True on real tokens; None: all are
    vector: Tensor | None = None  # (B, V): a label, an image's embedding; what it means is the model's
    picture: Tensor | None = None  # (B, C', h, w), joined to x
    control: tuple[Tensor, ...] | None = None  # residuals: one for each skip, then the middle's (`UNet.control_shapes`)
    level: Tensor | None = None  # (B,) of augmentation, in timesteps
    hooks: AttentionHooks | None = None
    hooked: Tensor | None = None  # (B,) int64, on the CPU
    step: Step | None = None
    conditional: Tensor | None = None  # (B,) bool, on the CPU

    def __post_init__(self) -> None:
        sizes = {name: len(tensor) for name, tensor in self._tensors()}
        if len(set(sizes.values())) > 1:
            got = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(f"condition: got rows {got}, expected one number for all")
        for name, rank, shape in (("tokens", 3, "(B, N, D)"), ("vector", 2, "(B, V)"), ("picture", 4, "(B, C, h, w)")):
            tensor = getattr(self, name)
            if tensor is not None and tensor.dim() != rank:
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}")
        if self.level is not None and self.level.dim() != 1:
            raise ValueError(f"level: got shape {tuple(self.level.shape)}, expected (B,)")
        if self.mask is None:
            return
        if self.tokens is None:
            raise ValueError("mask: got one without tokens, expected the tokens that it is of")
        if tuple(self.mask.shape) != tuple(self.tokens.shape[:2]):
            want = tuple(self.tokens.shape[:2])
            raise ValueError(f"mask: got shape {tuple(self.mask.shape)}, expected (B, N) = {want}")
        if self.mask.dtype != torch.bool:
            raise ValueError(f"mask: got {self.mask.dtype}, expected torch.bool, True on tokens that count")

    @property
    def num_rows(self) -> int | None:
        """B; None of a condition that tells nothing and so fits any batch."""
        return next((len(tensor) for _, tensor in self._tensors()), None)

    def rows(self, index: slice | Tensor | list[int]) -> Condition:
        """Those rows, in that order; a row may be taken again."""
        if self.num_rows is None:
            return self
        index = torch.tensor(index, dtype=torch.int64) if isinstance(index, list) else index
        if isinstance(index, slice):
            return self._of_rows(lambda tensor: tensor[index])
        return self._of_rows(lambda tensor: tensor[index.to(tensor.device)])

    def expand(self, num_rows: int) -> Condition:
        """One row for a whole batch, without a copy. Raises ValueError on another number of rows than 1."""
        if self.num_rows in (None, num_rows):
            return self
        if self.num_rows != 1:
            raise ValueError(f"expand: got {self.num_rows} rows, expected 1 to stand for {num_rows}")
        return self._of_rows(lambda tensor: tensor.expand(num_rows, *tensor.shape[1:]))

    def concat(self, other: Condition, null: bool = False) -> Condition:
        """These rows, then the other's. Hooks stay with their own rows.

        null: the other's rows are guidance's unconditional ones, which hooks that see them are told. A missing mask
        beside one that is there counts all tokens; the shorter tokens are `padded`. Raises ValueError
        where only one of the two has a field, or both have hooks that differ.
        """
        if self.tokens is not None and other.tokens is not None and self.tokens.shape[1] != other.tokens.shape[1]:
            length = max(self.tokens.shape[1], other.tokens.shape[1])
            return self.padded(length).concat(other.padded(length), null)
        for name in ("tokens", "vector", "picture", "control", "level"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if (mine is None) != (theirs is None):
                which = "second" if mine is not None else "first"
                raise ValueError(f"concat: got no {name} in the {which} condition, expected it in both or in neither")
            if mine is not None and _shape(mine) != _shape(theirs):
                raise ValueError(f"concat: {name}: got {_shape(mine)} and {_shape(theirs)} a row, expected one shape")
        if self.hooks is not None and other.hooks is not None and self.hooks != other.hooks:
            raise ValueError("concat: got two sets of hooks, expected one: put them on the joined condition")
        hooks = self.hooks or other.hooks
        if hooks is not None and self.num_rows is None:
            raise ValueError("concat: got hooks on a condition without rows, expected rows that say which they act on")
        mask = None
        if self.mask is not None or other.mask is not None:
            mask = torch.cat([self._mask(), other._mask()])
        conditional = None
        if self.num_rows is not None and (null or self.conditional is not None or other.conditional is not None):
            theirs = other._conditional()
            conditional = torch.cat([self._conditional(), torch.zeros_like(theirs) if null else theirs])
        return Condition(
            mask=mask,
            control=self.control and tuple(torch.cat(pair) for pair in zip(self.control, other.control, strict=True)),
            **{name: _cat(getattr(self, name), getattr(other, name)) for name in _PLAIN},
            hooks=hooks,
            hooked=None if hooks is None else torch.cat([self._owned(), other._owned()]),
            step=self.step or other.step,
            conditional=conditional,
        )

    def padded(self, num_tokens: int) -> Condition:
        """Its tokens repeated, masked, up to that number: to attention that ignores the mask, tokens that all stand
        there twice are the same. Raises ValueError where hooks count them."""
        own = self.tokens.shape[1]
        if num_tokens == own:
            return self
        if self.hooks is not None:
            raise ValueError(f"hooks: got {own} tokens beside {num_tokens}, expected one number: hooks count them")
        place = torch.arange(num_tokens, device=self.tokens.device)
        mask = self._mask()[:, place % own] & (place < own)
        return dataclasses.replace(self, tokens=self.tokens[:, place % own], mask=mask)

    def to(self, device: torch.device | str) -> Condition:
        """On that device. Numbers of rows stay on the CPU, where hooks read them."""
        return self._map(lambda tensor: tensor.to(device))

    def with_hooks(self, hooks: AttentionHooks | None) -> Condition:
        """These rows, all of them seen by the hooks and numbered in order."""
        return dataclasses.replace(self, hooks=hooks, hooked=None)

    def at(self, sigma: Tensor, progress: Tensor) -> Condition:
        """Told the noise level and progress, (B,) each, that its hooks hand on; itself where it has no hooks.

        Raises ValueError where rows that hooks act on lie at different noise levels: a hook is asked once for all.
        """
        if self.hooks is None:
            return self
        own = slice(None) if self.hooked is None else (self.hooked >= 0).to(sigma.device)
        levels = set(sigma[own].tolist())
        if len(levels) > 1:
            raise ValueError(f"hooks: got rows at noise levels {sorted(levels)}, expected one: ask for each apart")
        if not levels:
            return self
        return dataclasses.replace(self, step=Step(levels.pop(), float(progress[own][0])))

    def _tensors(self) -> list[tuple[str, Tensor]]:
        named = [(name, getattr(self, name)) for name in (*_PLAIN, "mask", "hooked", "conditional")]
        named += [("control", residual) for residual in self.control or ()]
        return [(name, tensor) for name, tensor in named if tensor is not None]

    def _of_rows(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """`change` of every tensor, and of what the hooks are told of the rows."""
        own = {"hooked": self._hooked(), "conditional": self.conditional}
        numbers = {name: value if value is None else change(value) for name, value in own.items()}
        return self._map(change, **numbers)

    def _map(self, change: Callable[[Tensor], Tensor], **numbers: Tensor | None) -> Condition:
        """`change` of every tensor but what the hooks are told of the rows, which is `numbers`."""
        changed = {name: change(value) for name in (*_PLAIN, "mask") if (value := getattr(self, name)) is not None}
        control = self.control and tuple(change(residual) for residual in self.control)
        return dataclasses.replace(self, **changed, control=control, **numbers)

    def _mask(self) -> Tensor:
        if self.mask is not None:
            return self.mask
        return torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)

    def _hooked(self) -> Tensor | None:
        """The numbers of the rows, where there are hooks to number them for."""
        if self.hooks is None or self.hooked is not None:
            return self.hooked
        return torch.arange(self.num_rows)

    def _conditional(self) -> Tensor:
        return torch.ones(self.num_rows, dtype=torch.bool) if self.conditional is None else self.conditional

    def _owned(self) -> Tensor:
        own = self._hooked()
        return torch.full((self.num_rows,), -1) if own is None else own


_PLAIN = ("tokens", "vector", "picture", "level")


def _cat(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else torch.cat([one, other])


def _shape(value: Tensor | tuple[Tensor, ...]) -> list[tuple[int, ...]]:
    """Of one row."""
    tensors = value if isinstance(value, tuple) else (value,)
    return [tuple(tensor.shape[1:]) for tensor in tensors]
