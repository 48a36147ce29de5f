"""A Ray cluster of several nodes on this machine, and a training that spans them, whose nodes a test may kill."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from truth.toy_training import LOOP, ToyData, ToyObjective

from raphael.base.ray_cluster import MARK, end_processes, free_ports, token

ROOT = Path(__file__).resolve().parents[2]
UP_S = 240.0
ALONE = ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")  # what a Ray of one machine may have left in ours
START = """
import os, sys, threading, time
from raphael.base.ray_cluster import _patience

def leave_with(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # Ray's processes end with this one

threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()
from ray.scripts.scripts import main
with _patience():
    main()
"""


class Node:
    """`ray start --block` with room for one worker. package: where `raphael` is imported from on this node."""

    def __init__(self, address: str, head: bool, package: Path = ROOT):
        self.mark = secrets.token_hex(16)
        self.folder = Path(tempfile.mkdtemp(prefix="rr", dir="/tmp"))  # short: names of sockets have 107 characters
        agent, metrics, runtime, http = free_ports(4)
        self.metrics_port = metrics
        command = [sys.executable, "-c", START, "start", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=1"]
        port = address.split(":")[1]
        command += ["--head", f"--port={port}", "--include-dashboard=false"] if head else [f"--address={address}"]
        command += ["--object-store-memory=90000000", f"--temp-dir={self.folder}", "--disable-usage-stats"]
        command += [f"--metrics-export-port={metrics}", f"--runtime-env-agent-port={runtime}"]
        command += [f"--dashboard-agent-grpc-port={agent}", f"--dashboard-agent-listen-port={http}"]
        command += ["--include-log-monitor=false"]
        self.log = open(self.folder / "said", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, env=self.environment(package), stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def environment(self, package: Path) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if name not in ALONE},
            "PYTHONPATH": f"{package}{os.pathsep}{ROOT / 'tests'}",
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token(),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_agent_register_timeout_ms": "120000",
            "RAY_memory_monitor_refresh_ms": "0",  # what others on this machine use is not the test's question
            "RAY_health_check_timeout_ms": "60000",  # a busy machine's node may be slow; one that is gone refuses
            "GLOO_SOCKET_IFNAME": "lo",
            MARK: self.mark,
        }

    def processes(self) -> list[psutil.Process]:
        """Everything that was started by this node, its workers too; some of Ray's overwrite their environment."""
        found = []
        with contextlib.suppress(psutil.Error):
            one = psutil.Process(self.process.pid)
            found += [one, *one.children(recursive=True)]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process not in found and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def kill(self) -> None:
        """As a power cut would: every process at once, by SIGKILL."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                os.kill(process.pid, signal.SIGKILL)
        self.end()

    def end(self) -> None:
        end_processes(self.processes())
        self.process.wait(30)
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def said(self) -> str:
        return (self.folder / "said").read_text() if self.folder.exists() else ""


class TwoNodes:
    """`with TwoNodes() as nodes:` a head and a second node; nodes.address is what RAY_ADDRESS has to be."""

    def __init__(self) -> None:
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        self.nodes: list[Node] = []

    def __enter__(self) -> TwoNodes:
        try:
            self.add(head=True)
            self.add()
        except BaseException:
            self.__exit__()
            raise
        return self

    def add(self, head: bool = False, package: Path = ROOT) -> Node:
        """Start a node and wait until it says that it runs."""
        node = Node(self.address, head, package)
        self.nodes.append(node)
        deadline = time.monotonic() + UP_S
        while "Ray runtime started" not in node.said():
            if node.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a Ray node did not start: {node.said()[-2000:]}")
            time.sleep(0.2)
        return node

    @property
    def second(self) -> Node:
        return self.nodes[-1]

    def kill_second(self) -> None:
        self.nodes.pop().kill()

    def drain_second(self) -> None:
        """Say, as a cloud would through Ray's autoscaler, that the second node will be taken away in half a minute."""
        import ray

        (node,) = [one for one in ray.nodes() if one["Alive"] and one["MetricsExportPort"] == self.second.metrics_port]
        command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "drain-node"]
        command += [f"--address={self.address}", f"--node-id={node['NodeID']}", "--deadline-remaining-seconds=30"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=a test"]
        subprocess.run(command, env=self.second.environment(ROOT), check=True, capture_output=True, timeout=120)

    def __exit__(self, *_: object) -> None:
        while self.nodes:
            self.nodes.pop().end()


class Witness(ToyData):
    """Writes down which samples a worker took at which step, and takes its time."""

    def __init__(self, job: dict[str, Any], world: Any, objective: ToyObjective):
        super().__init__()
        self.pause_s, self.objective, self.world = job["pause_s"], objective, world
        self.file = Path(job["folder"]) / "order" / f"{os.getpid()}.jsonl"
        self.file.parent.mkdir(exist_ok=True)

    def batch(self, indices: Any) -> dict[str, Any]:
        time.sleep(self.pause_s)
        here = os.environ.get(MARK, "")  # of the node
        row = {"step": int(self.objective.calls), "rank": self.world.rank, "size": self.world.size, "node": here}
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "indices": indices.tolist()}) + "\n")
        return super().batch(indices)


def work(job: dict[str, Any], world: Any) -> None:
    """The toy training; a worker that is gone is missed after seconds."""
    from raphael.train.loop import Hooks, train

    objective = ToyObjective()
    world = replace(world, parallel=replace(world.parallel, collective_timeout_s=job["limit_s"]))
    data = Witness(job, world, objective)
    train(objective, data, LOOP, 7, folder=Path(job["folder"]) / "checkpoints", world=world, hooks=Hooks(say=_mute))


def _mute(line: str) -> None:
    pass


def order(folder: Path) -> list[dict[str, Any]]:
    """What the witnesses wrote."""
    files = sorted((folder / "order").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
