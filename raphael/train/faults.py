"""Bad steps: a loss or gradient that is not finite, or a loss far above the running median.

Such a step changes no weight, on any rank; its batch is saved to look at; so many in a row end the training.

All ranks must decide alike, and nothing may wait for the device at every step. So the verdict is a tensor: of the
gradient's norm, which is reduced over ranks already, and for spikes of the mean loss over ranks (one number more to
send). On a CPU reading it costs nothing; elsewhere the optimizer masks its update by it (Optimizers.step), and it is
read at the next point logged and always before a checkpoint. Until then no more is lost: a batch is a function of the
images seen, so it can be read again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from raphael.base.files import written_whole
from raphael.base.stage import StageError
from raphael.train.batches import Batches
from raphael.train.distributed.world import World

if TYPE_CHECKING:
    from raphael.train.state import State

FEWEST = 16  # losses before a median says anything
KEPT = 16  # saved batches, the newest
FOLDER = "bad_batches"
GOOD, NOT_FINITE, SPIKE = 0, 1, 2


class TrainingError(StageError):
    """The training cannot go on. One line."""


@dataclass
class BadSteps:
    """folder: of the checkpoints; batches are saved below it. say: hears of every bad step, on rank 0."""

    state: State
    world: World
    batches: Batches
    data: Any
    folder: Path
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.waiting: list[tuple[int, Tensor]] = []  # images before the step, verdict

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether the step with this loss (of this rank) and gradient norm (of all) is bad: bool (), on the device.

        Call before the optimizer's step. Raises TrainingError on the last bad step that is allowed (on a CPU; elsewhere
        `check` does).
        """
        factor = self.state.loop.spike_factor
        if factor:
            loss = self.world.sum(loss.detach().float().clone()) / self.world.size
        # alone, or reduced, the loss counts too; a rank's own does not, since the others cannot see it
        value = norm + loss.detach() if factor or self.world.size == 1 else norm
        finite = torch.isfinite(value.float())
        verdict = torch.where(finite, GOOD, NOT_FINITE)
        if factor:
            recent = self.state.recent
            known = (~recent.isnan()).sum() >= FEWEST
            verdict = torch.where(finite & known & (loss > factor * recent.nanmedian()), SPIKE, verdict)
            moved = torch.cat([recent[1:], loss.reshape(1)])
            self.state.recent = torch.where(verdict == GOOD, moved, recent)
        self.waiting.append((self.state.images, verdict))
        if verdict.device.type == "cpu":
            self.check()
        return verdict != GOOD

    def check(self) -> None:
        """Read the verdicts since the last time; save the batches of bad steps. Raises TrainingError."""
        if not self.waiting:
            return
        verdicts = torch.stack([verdict for _, verdict in self.waiting]).tolist()
        steps, self.waiting = [images for images, _ in self.waiting], []
        for images, verdict in zip(steps, verdicts, strict=True):
            if verdict == GOOD:
                self.state.bad_in_row = 0
                continue
            self.state.bad_in_row += 1
            line = self._line(images, verdict)
            if self.state.bad_in_row >= self.state.loop.max_bad_steps:
                raise TrainingError(
                    f"{line}; that was bad step {self.state.bad_in_row} in a row (loop.max_bad_steps "
                    f"{self.state.loop.max_bad_steps}); no bad step touched the weights and the last checkpoint is "
                    "whole: lower loop.learning_rate, lengthen loop.warmup_images, set loop.clip_norm, or look at "
                    "these samples"
                )
            self.say(f"skipped a step: {line}")

    def _line(self, images: int, verdict: int) -> str:
        epochs, indices = self.batches.everyone(images // self.batches.batch_size)
        names = getattr(self.data, "keys", None)
        keys = [str(names[index]) if names is not None else f"#{index}" for index in indices]
        shown = ", ".join(keys[:16]) + (f" and {len(keys) - 16} more" if len(keys) > 16 else "")
        medians = f"is above {self.state.loop.spike_factor:g} running medians"
        what = "is not finite" if verdict == NOT_FINITE else medians
        saved = self._save(images, epochs, indices, keys)
        return f"the loss {what} in the batch after {images:,} images (keys {shown}); {saved}"

    def _save(self, images: int, epochs: np.ndarray, indices: np.ndarray, keys: list[str]) -> str:
        """Write the whole batch, of all ranks, as the data set gives it. Says where it is, or why it is not."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        path = Path(self.folder) / FOLDER / f"{images:012d}.safetensors"
        if self.world.rank != 0:
            return f"the batch is in {path}"
        arrays = {"epochs": epochs, "indices": indices, **self.data.batch(indices)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            with written_whole(path) as temporary:
                save_file(arrays, temporary, {"keys": "\n".join(keys), "seed": str(self.batches.seed)})
            for old in sorted(path.parent.glob("[0-9]*.safetensors"))[:-KEPT]:
                old.unlink()
        except (OSError, SafetensorError) as error:  # what went wrong before is what a person has to read
            return f"the batch could not be saved ({error})"
        return f"the batch is in {path}"
