import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from truth import ray_toy
from truth.toy_training import LOOP, ToyData, ToyObjective

from raphael.base.checkpoint.home import CheckpointHome
from raphael.base.ray_cluster import prepare_environment, reason
from raphael.base.stage import StageError
from raphael.train.distributed.ray_trainer import Cluster, fit, threads_per_worker
from raphael.train.loop import train

ROOT = Path(__file__).parents[3]

# Listeners that are not on loopback, each with its reason.
EXCEPTIONS = {
    # torch's TCPStore, by which the ranks find each other, has no setting for the address that it listens on; it
    # belongs to rank 0, lives as long as the training, and holds the ranks' addresses and counters
    "ray::RayTrainWorker": 1,
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """fit() sets what Ray reads; it should not outlast the test."""
    before = dict(os.environ)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    os.environ.clear()
    os.environ.update(before)


def listeners(process):
    """{(address, port): name of the process} of everything that `process` and its descendants listen on."""
    found = {}
    for one in [process, *process.children(recursive=True)]:
        try:
            for connection in one.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.ip, connection.laddr.port] = " ".join(one.cmdline()).split()[0]
        except (psutil.Error, IndexError):
            continue
    return found


def ray_processes():
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


def test_every_process_has_a_token_of_its_own():
    prepare_environment()
    assert os.environ["RAY_AUTH_MODE"] == "token" and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    own = os.environ.pop("RAY_AUTH_TOKEN")
    prepare_environment()
    assert os.environ["RAY_AUTH_TOKEN"] == own  # Ray keeps the first that it has read
    code = "import os, raphael.base.ray_cluster as r; r.prepare_environment(); print(os.environ['RAY_AUTH_TOKEN'])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert len(own) == len(other) == 64 and own != other


def test_a_clusters_own_token_is_left_alone(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray-head:6379")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    prepare_environment()
    assert os.environ["RAY_AUTH_TOKEN"] == "mine" and "GLOO_SOCKET_IFNAME" not in os.environ


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert threads_per_worker(Cluster(2, False, "x", Path("/"))) == 4
    assert threads_per_worker(Cluster(16, False, "x", Path("/"))) == 1


def test_the_limits_of_the_settings_reach_ray(monkeypatch, tmp_path):
    prepare_environment()
    import ray.train.torch

    from raphael.train.distributed import ray_trainer

    seen = {}

    class Trainer:
        def __init__(self, loop, **settings):
            seen.update(settings)

        def fit(self):
            pass

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    monkeypatch.setattr(ray_trainer, "start", lambda workers, without: None)
    monkeypatch.setattr(ray_trainer, "stop", lambda: None)
    fit(ray_toy.work, {}, Cluster(2, False, "x", tmp_path, max_failures=5, timeout_s=77.4))
    assert seen["run_config"].failure_config.max_failures == 5
    assert seen["torch_config"].timeout_s == 77 and seen["scaling_config"].num_workers == 2


def test_the_innermost_cause_is_what_a_person_reads():
    class WorkersFailed(Exception):
        worker_failures = {
            1: RuntimeError("later"),
            0: RuntimeError("Traceback ...\n  file\nTrainingError: the loss is not finite"),
        }

    assert reason(WorkersFailed("two failed")) == "worker 0: TrainingError: the loss is not finite"


def test_a_worker_that_ray_ended_for_lack_of_memory_says_so_and_not_what_one_may_set():
    from ray.exceptions import OutOfMemoryError

    assert reason(OutOfMemoryError("the node ran low on memory\n\nRefer to ...")) == "the node ran low on memory"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ray_workers_give_the_update_of_one_survive_a_death_and_listen_on_loopback_only(tmp_path):
    whole = ToyObjective()
    result = train(whole, ToyData(), LOOP, 7, folder=tmp_path / "alone")
    seen = {}
    process = psutil.Process()

    def watch():
        if (tmp_path / "checkpoints").exists():  # the workers are at it
            seen.update(listeners(process))

    job = {"folder": str(tmp_path), "pause_s": 0.05, "die_once": True}
    fit(ray_toy.work, job, Cluster(2, False, "toy", tmp_path / "ray"), watch)
    assert (tmp_path / "died").exists()
    groups, meta = CheckpointHome(tmp_path / "checkpoints").newest()
    for name, tensor in groups["model"].items():
        if name != "calls":
            assert (tensor - whole.state_dict()[name]).abs().max() < 2e-5, name
    assert [point["images"] for point in meta["history"]] == [point["images"] for point in result["history"]]

    assert len(seen) > 5
    outside = [
        name for (address, _), name in seen.items() if address.removeprefix("::ffff:") not in ("127.0.0.1", "::1")
    ]
    for name, allowed in EXCEPTIONS.items():
        for _ in range(2 * allowed):  # once before and once after the death of a worker
            if name in outside:
                outside.remove(name)
    assert not outside, seen
    assert not ray_processes()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_failure_in_a_worker_is_one_line_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(StageError, match="the loss is not finite") as caught:
        fit(
            ray_toy.work,
            {"folder": str(tmp_path), "pause_s": 0.0, "poison": 3},
            Cluster(2, False, "bad", tmp_path / "ray"),
        )
    assert "\n" not in str(caught.value)
    assert not ray_processes()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_fit_that_is_broken_off_leaves_no_thread_in_ray_and_another_can_begin(tmp_path):
    class Stop(Exception):
        pass

    def watch():
        if (tmp_path / "checkpoints").exists():
            raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            fit(
                ray_toy.work,
                {"folder": str(tmp_path), "pause_s": 0.2},
                Cluster(1, False, "off", tmp_path / "ray"),
                watch,
            )
        assert not [thread.name for thread in threading.enumerate() if thread.name == "ray-train-fit"]
        assert not ray_processes()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("patient", [True, False])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_save_a_second_one_ends_at_once_and_no_process_is_left(tmp_path, number, status, patient):
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
        f"from truth import ray_toy; ray_toy.main({str(tmp_path)!r}, pause_s={0.1 if patient else 2.0})"
    )
    with open(tmp_path / "said", "wb") as said:
        driver = subprocess.Popen([sys.executable, "-c", code], stdout=said, stderr=said, start_new_session=True)
    home, deadline = CheckpointHome(tmp_path / "checkpoints"), time.monotonic() + 600
    while not home.all() and time.monotonic() < deadline:
        time.sleep(0.2)
        assert driver.poll() is None
    family = psutil.Process(driver.pid).children(recursive=True)
    assert family
    os.kill(driver.pid, number)
    text = (tmp_path / "said").read_text
    while "asked to stop: the workers save after the next point logged" not in text():
        time.sleep(0.1)
        assert time.monotonic() < deadline
    if not patient:
        os.kill(driver.pid, number)
    assert driver.wait(120) == status, text()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, [one.cmdline() for one in alive]
    images = int(home.all()[-1].name)
    if patient:
        assert 96 < images < LOOP.num_images and images % LOOP.log_every_images == 0
    else:
        assert images == 96  # the last that was due
