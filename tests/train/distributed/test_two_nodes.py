"""A training over two simulated Ray nodes, of which one is lost: it returns, or the other goes on, or nothing is lost.

Each node is a `ray start` of its own with room for one worker. All of them are on this machine: what a network between
them does is not tested here.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from truth import ray_nodes, toy_training
from truth.ray_nodes import TwoNodes, order
from truth.toy_training import LOOP, ToyData, ToyObjective, fingerprint

from raphael.base.checkpoint.home import CheckpointHome
from raphael.base.randomness import SampleRng
from raphael.base.ray_cluster import token
from raphael.base.stage import StageError
from raphael.train.batches import Batches
from raphael.train.distributed.ray_trainer import Cluster, fit

ROOT = Path(__file__).parents[3]
STEPS = LOOP.num_images // LOOP.batch_size
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def nodes():
    with TwoNodes() as both:
        yield both


@pytest.fixture(autouse=True)
def environment(nodes, monkeypatch):
    before = dict(os.environ)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    os.environ.update(RAY_ADDRESS=nodes.address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token())
    while len(nodes.nodes) < 2:  # a test before killed one
        nodes.add()
    yield
    os.environ.clear()
    os.environ.update(before)


def cluster(folder, **changes):
    settings = {"timeout_s": 12.0, "placement_timeout_s": 60.0, "batch_size": LOOP.batch_size, **changes}
    return Cluster(2, False, "nodes", folder / "ray", checkpoints=folder / "checkpoints", **settings)


class AtCheckpoints:
    """A watch() that does what it was told when the training has written a checkpoint at so many images."""

    def __init__(self, folder, deeds):
        self.home, self.deeds = CheckpointHome(folder / "checkpoints"), dict(deeds)

    def __call__(self):
        done = max((int(path.name) for path in self.home.all()), default=0)
        for images in [images for images in self.deeds if images <= done]:
            self.deeds.pop(images)()


def span(folder, deeds=(), pause_s=0.05, **changes):
    """Train over the nodes; returns what was said."""
    said = []
    folder.mkdir(exist_ok=True)
    job = {"folder": str(folder), "pause_s": pause_s, "limit_s": 12.0}
    fit(ray_nodes.work, job, cluster(folder, **changes), AtCheckpoints(folder, deeds), said.append)
    return said


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The truth: the same training by two plain processes, without Ray."""
    folder = tmp_path_factory.mktemp("plain")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, toy_training.__file__, str(folder), "0", "9", "2", str(rank)],
            env={**environment, "TOY_ATTEMPT": "0"},
        )
        for rank in (0, 1)
    ]
    assert [rank.wait(300) for rank in ranks] == [0, 0]
    return folder / "checkpoints"


def test_two_nodes_train_together_as_two_processes_do(nodes, tmp_path, two_processes):
    assert span(tmp_path, pause_s=0.0) == []
    rows = order(tmp_path)
    assert {(row["rank"], row["size"]) for row in rows} == {(0, 2), (1, 2)}
    assert {row["node"] for row in rows} == {node.mark for node in nodes.nodes}
    assert fingerprint(tmp_path / "checkpoints") == fingerprint(two_processes)


def test_a_node_that_is_killed_and_replaced_changes_no_bit(nodes, tmp_path, two_processes):
    first = nodes.second.mark

    def replace_node():
        nodes.kill_second()
        nodes.add()

    span(tmp_path, {192: replace_node})
    rows, second = order(tmp_path), nodes.second.mark
    before, after = ({row["step"] for row in rows if row["node"] == node} for node in (first, second))
    assert {0, 23} <= before and STEPS - 1 in after and STEPS - 1 not in before and 0 not in after
    assert fingerprint(tmp_path / "checkpoints") == fingerprint(two_processes)


def test_a_node_that_will_be_taken_away_makes_every_point_logged_a_checkpoint(nodes, tmp_path, two_processes):
    home, seen = CheckpointHome(tmp_path / "checkpoints"), []

    def lose():
        seen.extend(int(path.name) for path in home.all())
        nodes.kill_second()
        nodes.add()

    span(tmp_path, {96: nodes.drain_second, 160: lose}, pause_s=0.8)
    assert 160 in seen and 160 % LOOP.checkpoint_every_images and 160 % LOOP.log_every_images == 0
    steps = [row["step"] for row in order(tmp_path) if row["node"] == nodes.second.mark]
    assert min(steps) >= 160 // LOOP.batch_size, "nothing before the last point logged is computed again"
    assert fingerprint(tmp_path / "checkpoints") == fingerprint(two_processes)


def heldout_loss(folder):
    """Of the EMA weights of the newest checkpoint, on samples that nobody trained on."""
    groups, _ = CheckpointHome(folder).newest()
    objective = ToyObjective()
    objective.load_state_dict({**objective.state_dict(), **groups["model"], **groups["ema"]})
    data = ToyData(200)
    indices = np.arange(100, 200)
    batch = {name: torch.from_numpy(array) for name, array in data.batch(indices).items()}
    with torch.no_grad():
        losses = objective.heldout(batch, SampleRng(7, np.zeros(100, np.int64), indices), torch.ones(100))
    return losses.double().mean().item()


def check_same_training(folder, truth):
    """Same samples at every step, whoever took them; the held-out loss and the weights up to rounding."""
    taken = {}
    for row in order(folder):
        taken.setdefault((row["step"], row["size"]), {})[row["rank"]] = row["indices"]
    everyone = Batches(7, len(ToyData()), LOOP.batch_size)
    for (step, size), slices in taken.items():
        if len(slices) == size:  # of a step in which a worker died, not all had begun
            assert sorted(sum(slices.values(), [])) == sorted(everyone.everyone(step)[1].tolist()), step
    assert {step for (step, size), slices in taken.items() if len(slices) == size} == set(range(STEPS))
    assert heldout_loss(folder / "checkpoints") == pytest.approx(heldout_loss(truth), rel=1e-4)
    weights, expected = (CheckpointHome(home).newest()[0]["model"] for home in (folder / "checkpoints", truth))
    for name, tensor in weights.items():
        if name != "calls":
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-5, msg=name)
    return [size for step, size in sorted(taken)]


def test_one_node_goes_on_alone_and_grows_again_after_a_checkpoint(nodes, tmp_path, two_processes):
    said = span(tmp_path, {96: nodes.kill_second, 288: nodes.add}, pause_s=0.4, min_workers=1, placement_timeout_s=5.0)
    sizes = check_same_training(tmp_path, two_processes)
    assert set(sizes) == {1, 2}
    last = max(row["step"] for row in order(tmp_path) if row["size"] == 1)
    assert 36 <= last < STEPS - 1
    text = "\n".join(said)
    assert "no room for 2 workers within 5 s: resuming with 1 from the newest checkpoint" in text
    assert "room for 2 workers again: on with them instead of 1" in text


def test_one_node_goes_on_alone_to_the_end(nodes, tmp_path, two_processes):
    span(tmp_path, {192: nodes.kill_second}, min_workers=1, placement_timeout_s=5.0)
    check_same_training(tmp_path, two_processes)
    assert {row["size"] for row in order(tmp_path) if row["step"] == STEPS - 1} == {1}


def test_without_room_it_ends_with_what_is_missing_and_goes_on_later_to_the_same_bytes(nodes, tmp_path, two_processes):
    with pytest.raises(StageError) as caught:
        span(tmp_path, {192: nodes.kill_second}, placement_timeout_s=5.0)
    line = str(caught.value)
    assert line.startswith("no room for 2 workers within 5 s: got 1 node with 1 CPU in all") and "\n" not in line
    assert "expected 2 CPU at least, one a worker; nothing is lost: the same command resumes" in line
    nodes.add()
    span(tmp_path)
    assert fingerprint(tmp_path / "checkpoints") == fingerprint(two_processes)


def test_a_node_with_other_sources_is_named_and_nothing_is_lost(nodes, tmp_path, two_processes, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Ray lets workers import from the driver's directory first
    package = tmp_path / "other"
    shutil.copytree(ROOT / "raphael", package / "raphael", ignore=shutil.ignore_patterns("__pycache__"))
    with open(package / "raphael/base/stage.py", "a") as file:
        file.write("# another version\n")

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with pytest.raises(Stop):
        span(tmp_path / "run", {96: stop})
    before = fingerprint(tmp_path / "run/checkpoints")
    nodes.kill_second()
    nodes.add(package=package)
    with pytest.raises(StageError, match="the workers run different software: got raphael's sources") as caught:
        span(tmp_path / "run")
    assert "on worker 0 (" in str(caught.value) and "on worker 1 (" in str(caught.value)
    assert fingerprint(tmp_path / "run/checkpoints") == before
    nodes.kill_second()
    nodes.add()
    span(tmp_path / "run")
    assert fingerprint(tmp_path / "run/checkpoints") == fingerprint(two_processes)
