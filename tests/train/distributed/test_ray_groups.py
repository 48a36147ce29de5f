"""How large a group of Ray workers is, and when it changes; Ray itself is played by a few lines."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from raphael.base.config.params import load_config
from raphael.base.stage import StageError
from raphael.base.strict import ConfigError
from raphael.train.distributed import ray_trainer
from raphael.train.distributed.ray_trainer import Cluster, Group, Regroup, fit

ROOT = Path(__file__).parents[3]


class WorkerGroupStartupTimeoutError(Exception):
    """Named as Ray's own, which is private."""


class WorkerGroupStartupFailedError(Exception):
    pass


class ControllerError(Exception):
    def __init__(self, failure):
        super().__init__(str(failure))
        self.controller_failure = failure


class Stage:
    """A cluster with room for so many workers; a group of more finds none."""

    def __init__(self, room):
        self.room, self.sizes, self.failures = room, [], 0

    def trainer(self, work, job, group):
        stage = self

        class Trainer:
            def fit(self):
                stage.sizes.append(group.workers)
                if stage.failures:
                    stage.failures -= 1
                    raise ControllerError(WorkerGroupStartupFailedError("the node is gone"))
                if group.workers > stage.room:
                    raise ControllerError(WorkerGroupStartupTimeoutError("long\nwords"))

        return Trainer()


@pytest.fixture
def stage(monkeypatch):
    before = dict(os.environ)
    stage = Stage(room=8)
    monkeypatch.setattr(ray_trainer, "_trainer", stage.trainer)
    monkeypatch.setattr(ray_trainer, "fits", lambda count, need: count <= stage.room)
    words = lambda: f"1 node with {stage.room} CPU in all"  # noqa: E731
    monkeypatch.setattr(ray_trainer, "room_in_cluster", lambda need: (stage.room, words()))
    monkeypatch.setattr(ray_trainer, "start", lambda workers, without: None)
    monkeypatch.setattr(ray_trainer, "stop", lambda: None)
    monkeypatch.setattr(ray_trainer, "RETRY_S", 0.0)
    monkeypatch.setattr(ray_trainer, "NODES_POLL_S", 0.0)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    yield stage
    os.environ.clear()
    os.environ.update(before)


def cluster(folder, **changes):
    return replace(Cluster(8, False, "x", folder, batch_size=16, placement_timeout_s=7.0), **changes)


def run(folder, **changes):
    said = []
    fit(None, None, cluster(folder, **changes), say=said.append)
    return said


def test_where_there_is_room_all_workers_train(stage, tmp_path):
    assert run(tmp_path, min_workers=2) == [] and stage.sizes == [8]
    assert os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "7"


@pytest.mark.parametrize(("room", "size"), [(7, 4), (5, 4), (4, 4), (3, 2)])
def test_else_as_many_as_there_is_room_for_and_as_share_a_batch_evenly(stage, tmp_path, room, size):
    stage.room = room
    said = run(tmp_path, min_workers=2)
    assert stage.sizes == [8, size]
    assert said == [f"no room for 8 workers within 7 s: resuming with {size} from the newest checkpoint"]


@pytest.mark.parametrize(("fewest", "room", "named"), [(0, 7, 8), (4, 3, 4), (3, 2, 4)])
def test_with_less_room_than_the_least_it_ends_with_what_is_missing(stage, tmp_path, fewest, room, named):
    stage.room = room
    with pytest.raises(StageError) as caught:
        run(tmp_path, min_workers=fewest)
    line = str(caught.value)
    assert f"no room for 8 workers within 7 s: got 1 node with {room} CPU in all" in line and "\n" not in line
    assert f"expected {named} CPU at least" in line and stage.sizes == [8]


def test_a_group_that_does_not_start_is_tried_again_but_not_for_ever(stage, tmp_path):
    stage.failures = 2
    assert run(tmp_path) == ["a worker did not start (the node is gone)"] * 2 and stage.sizes == [8, 8, 8]
    stage.failures = 99
    with pytest.raises(StageError, match="a worker did not start .the node is gone"):
        run(tmp_path)
    assert 99 - stage.failures == ray_trainer.START_RETRIES + 1


def test_a_group_grows_only_when_a_checkpoint_was_just_written(stage, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "000000000096").mkdir(parents=True)
    group, said = Group(cluster(tmp_path, min_workers=2, checkpoints=checkpoints), 4), []
    stage.room = 4
    group.look(said.append)
    (checkpoints / "000000000192").mkdir()
    group.look(said.append)  # no more room
    stage.room = 8
    group.look(said.append)  # no checkpoint
    (checkpoints / ".000000000288.tmp").mkdir()
    group.look(said.append)  # an unfinished one
    (checkpoints / "000000000288").mkdir()
    with pytest.raises(Regroup, match="room for 8 workers again") as caught:
        group.look(said.append)
    assert caught.value.workers == 8 and said == []


def test_lost_and_returned_nodes_are_said_once(stage, tmp_path):
    group, said = Group(cluster(tmp_path, min_workers=2), 8), []
    for room in (8, 6, 6, 4, 8, 8):
        stage.room = room
        group.look(said.append)
    assert [line.split(":")[0] for line in said] == ["a node is lost", "the cluster has room for 8 workers again"]
    assert "up to 7 s (train.parallel.placement_timeout_s), then on with 4 or fewer" in said[0]


def test_a_worker_leaves_when_its_group_is_over(tmp_path):
    fence = tmp_path / "group.txt"
    fence.write_text("mine")
    code = (
        "import sys, time; from pathlib import Path; from raphael.train.distributed.ray_trainer import follow_fence; "
        "follow_fence(Path(sys.argv[1]), 'mine', 0.05); print('in', flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code, str(fence)], stdout=subprocess.PIPE, cwd=ROOT)
    assert worker.stdout.readline() == b"in\n"
    for harmless in ("", "mine"):
        fence.write_text(harmless)
        time.sleep(0.3)
        assert worker.poll() is None
    fence.write_text("another's")
    assert worker.wait(20) == 1
    worker.stdout.close()


def test_every_group_has_a_token_of_its_own_and_ends_its_workers(stage, tmp_path):
    one = Group(cluster(tmp_path), 8)
    two = Group(cluster(tmp_path), 8)
    assert two.fence.read_text() == two.token != one.token
    run(tmp_path)
    assert two.fence.read_text() not in ("", two.token)


def test_more_than_all_workers_cannot_be_the_least(tmp_path):
    import yaml

    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    settings["train"] |= {"num_workers": 2}
    settings["train"]["parallel"]["min_workers"] = 3
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match="parallel.min_workers: got 3 with num_workers 2, expected at most"):
        load_config(tmp_path / "params.yaml")
