"""What Ray's trainer is kept from starting, and that Ray still has the hooks by which it is."""

from __future__ import annotations

import pickle

import pytest

from raphael.train.distributed import lean_ray
from raphael.train.distributed.lean_ray import lean


class DatasetsCallback:
    def before_init_train_context(self, workers):
        raise AssertionError("an actor for data sets was started")


class PlacementGroupCleanerCallback:
    pass


class Policy:
    def after_controller_start(self, context):
        raise AssertionError("an autoscaler was asked")

    _maybe_send_resource_request = after_controller_start


class RaysTrainer:
    def _create_default_callbacks(self):
        return [DatasetsCallback(), PlacementGroupCleanerCallback()]

    def _initialize_and_run_controller(self, **settings):
        self.given = settings
        return "result"


def test_on_a_ray_of_ours_nobody_tidies_up_and_no_autoscaler_is_asked(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    trainer, policy = lean(RaysTrainer)(), Policy()
    (datasets,) = trainer._create_default_callbacks()
    assert pickle.loads(pickle.dumps(datasets)).before_init_train_context([1, 2]) == {
        "dataset_shard_provider": [None, None]
    }
    assert trainer._initialize_and_run_controller(scaling_policy=policy, more=1) == "result"
    there = pickle.loads(pickle.dumps(trainer.given["scaling_policy"]))
    assert there.after_controller_start("run") is None and there._maybe_send_resource_request() is None


def test_a_cluster_keeps_both(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    trainer, policy = lean(RaysTrainer)(), Policy()
    assert [type(one) for one in trainer._create_default_callbacks()] == [
        DatasetsCallback,
        PlacementGroupCleanerCallback,
    ]
    trainer._initialize_and_run_controller(scaling_policy=policy)
    with pytest.raises(AssertionError, match="autoscaler"):
        trainer.given["scaling_policy"].after_controller_start("run")


def test_a_ray_without_these_hooks_is_taken_as_it_is():
    class Other:
        pass

    assert lean(Other) is Other


def test_the_ray_that_is_installed_has_all_of_them():
    """A newer Ray may not: then this fails, trainings go on, and start some ten seconds later."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback as Its
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback as Tidying
    from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy

    assert lean(TorchTrainer) is not TorchTrainer
    assert Its.__name__ == lean_ray.DATASETS and hasattr(Its, "before_init_train_context")
    assert Tidying.__name__ == lean_ray.TIDYING
    assert all(hasattr(FixedScalingPolicy, name) for name in lean_ray.REQUESTS)
