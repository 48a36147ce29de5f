"""Ray Train's trainer without the processes that our trainings have no use for.

A controller of Ray Train 2.60 starts, beside the workers, actors that hold data sets, tidy up placement groups after a
controller's death, watch for machines that a cloud takes back, and ask an autoscaler for room. Each is a process that
imports Ray anew (3 to 5 s of a core) while the workers do the same, and the workers wait for the last one. On a Ray of
our own, which ends with its training and has one machine, none has
anything to do; on a cluster only data sets have not.

The hooks are Ray's private ones. Where a Ray no longer has these names, nothing changes but the seconds.
"""

from __future__ import annotations

import os
from typing import Any

DATASETS, TIDYING = "DatasetsCallback", "PlacementGroupCleanerCallback"
REQUESTS = ("after_controller_start", "_maybe_send_resource_request")  # of a scaling policy, to an autoscaler


def lean(trainer: type) -> type:
    """A class of trainers in the place of Ray's DataParallelTrainer and its kind."""

    class Trainer(trainer):
        def _create_default_callbacks(self) -> list[Any]:
            kept = []
            for callback in super()._create_default_callbacks():
                name = type(callback).__name__
                if name == DATASETS and hasattr(callback, "before_init_train_context"):
                    callback.before_init_train_context = no_data_sets
                if name != TIDYING or in_a_cluster():
                    kept.append(callback)
            return kept

        def _initialize_and_run_controller(self, **settings: Any) -> Any:
            policy = settings.get("scaling_policy")
            if not in_a_cluster() and all(hasattr(policy, name) for name in REQUESTS):
                for name in REQUESTS:
                    setattr(policy, name, nothing)
            return super()._initialize_and_run_controller(**settings)

    has_hooks = hasattr(trainer, "_create_default_callbacks") and hasattr(trainer, "_initialize_and_run_controller")
    return Trainer if has_hooks else trainer


def in_a_cluster() -> bool:
    return bool(os.environ.get("RAY_ADDRESS"))


# Both are sent to the controller, which finds them by this module's name.


def no_data_sets(workers: list[Any]) -> dict[str, list[None]]:
    """In the place of `DatasetsCallback.before_init_train_context`, which starts an actor that holds data sets."""
    return {"dataset_shard_provider": [None] * len(workers)}


def nothing(*_: Any, **__: Any) -> None:
    """In the place of what asks the autoscaler."""
