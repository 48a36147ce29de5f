"""Data stages that are killed, starved of disk or robbed of a worker, and what is compared afterwards.

An undisturbed workspace is made once. A disturbed run works on a copy of it as it was before its stage; what it leaves
is compared with the undisturbed files: byte for byte, of a tar its members' names and bodies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from truth.image_workspace import SMALL, merge, small_preset

ROWS = 240
SOURCE_ROWS = 600  # three pieces: then two processes draw


@dataclass(frozen=True)
class Kind:
    """How a stage is called: its module, its report and work folder, what it writes."""

    module: str
    name: str
    output: str


STAGES = {
    "source": Kind("source", "source", "data/source"),
    "select": Kind("select", "select", "data/selected"),
    "download": Kind("download", "download", "data/shards"),
    "score": Kind("score", "score", "data/scores"),
    "filter": Kind("filter", "filter", "data/filtered"),
    "captions": Kind("captions", "captions", "data/captions"),
    "autoencoder": Kind("autoencoder", "autoencoder", "models/autoencoder"),
    "clip": Kind("clip", "clip", "models/clip"),
    "encode": Kind("encode", "encode", "data/records"),
}  # in the order of dvc.yaml


def command(project: Path, stage: str, root: Path) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", f"data_pipeline.{STAGES[stage].module}", "--params", str(root / "params.yaml")]
    return {"args": arguments, "env": environment, "start_new_session": True}


def run(project: Path, stage: str, root: Path, **more) -> subprocess.CompletedProcess:
    return subprocess.run(**command(project, stage, root), capture_output=True, text=True, timeout=500, **more)


def run_here(stage: str, root: Path) -> None:
    """Run a stage in this process."""
    from raphael.base.config.params import load_config
    from raphael.base.stage import Stage

    with contextlib.chdir(root):
        module = importlib.import_module(f"data_pipeline.{stage}.stage")
        module.run(load_config(root / "params.yaml"), Stage(stage, root))


def finish(project: Path, stage: str, root: Path) -> float:
    """Run a stage to its end. Returns the seconds that it took."""
    started_s = time.monotonic()
    done = run(project, stage, root)
    assert done.returncode == 0, done.stderr[-2000:]
    return time.monotonic() - started_s


def change(root: Path, section: str, **values) -> None:
    """Other settings in a workspace's params.yaml."""
    params = yaml.safe_load((root / "params.yaml").read_text())
    merge(params[section], values)
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def write_settings(project: Path, root: Path, rows: int = ROWS) -> None:
    """Small networks and shards; similarities computed by a small random CLIP, in place of the list's."""
    import torch

    from raphael.base.config.params import load_config
    from raphael.encoders.clip import build_clip, save_clip

    params = yaml.safe_load((project / "params.yaml").read_text())
    params["source"]["scenes"].update(num_rows=rows, bad_share=0.3, num_heldout_prompts=2)
    params["download"].update(shard_rows=40, timeout_s=1.0, deadline_s=20.0, retries=1, stall_s=120.0)
    params["score"].update(similarity=True, clip="scoring_clip", replace=True)
    params["filter"].update(min_similarity=-1.0)
    for section, values in SMALL.items():
        merge(params[section], values)
    params["encode"]["batch_size"] = 2
    params["model"] = {"preset": small_preset(root, project)}
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    torch.manual_seed(0)
    clip = load_config(project / "params.yaml").clip
    small = dataclasses.replace(clip, text_width=32, text_heads=2, text_layers=1, embed_dim=16, image_width=8)
    save_clip(build_clip(small), root / "scoring_clip")


def copy_without(root: Path, stage: str, target: Path) -> Path:
    """The workspace as it is before a stage runs."""
    shutil.copytree(root, target, symlinks=True)
    shutil.rmtree(target / STAGES[stage].output)
    shutil.rmtree(target / "work" / STAGES[stage].name, ignore_errors=True)  # finished chunks and checkpoints
    (target / f"reports/{STAGES[stage].name}.json").unlink()
    return target


def content(root: Path, stage: str) -> dict[str, str]:
    """File -> digest of what a stage leaves: its outputs and its report; of a tar, its members' names and bodies."""
    found = {}
    for path in sorted([*(root / STAGES[stage].output).rglob("*"), root / f"reports/{STAGES[stage].name}.json"]):
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                body = b"".join(member.name.encode() + tar.extractfile(member).read() for member in tar)
        elif path.parent.name == "reports":  # but for who did the work
            report = json.loads(path.read_text())
            body = json.dumps({name: value for name, value in report.items() if name != "engine"}).encode()
        elif path.is_file():
            body = path.read_bytes()
        else:
            continue
        found[path.relative_to(root).as_posix()] = hashlib.sha256(body).hexdigest()
    return found


def leftovers(root: Path, undisturbed: Path) -> set[str]:
    """Unfinished work, temporary names and progress of nobody, beyond what undisturbed runs keep on purpose (scored
    shards, the chunks of `encode`, the trainings' checkpoints)."""

    def found(folder: Path) -> set[str]:
        places = [*(folder / "work").glob("*/*/**/*"), *(folder / "work/progress").glob("*"), *folder.rglob(".*")]
        return {path.relative_to(folder).as_posix() for path in places}

    return found(root) - found(undisturbed)


def kill_at_random(project: Path, stage: str, root: Path, after_s: float) -> float | None:
    """Start a stage and kill its process group after a while. Returns the seconds of a run that ended before that."""
    started_s = time.monotonic()
    with subprocess.Popen(**command(project, stage, root), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        try:
            run.wait(timeout=after_s)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            return None
    return time.monotonic() - started_s


def killed_and_finished(project: Path, root: Path, seconds: float, stage: str, target: Path, kills: int) -> int:
    """Kill a stage so many times and let it end. Returns how many runs were killed: a run that was quicker than its
    kill does not count; its results are removed, it is tried again, and its seconds are the new measure."""
    copy_without(root, stage, target)
    rng = random.Random(f"{stage} {kills}")
    hits = 0
    for _ in range(6 * kills):
        if hits == kills:
            break
        ended_s = kill_at_random(project, stage, target, rng.uniform(0.15, 1.0) * seconds)
        if ended_s is None:
            hits += 1
            continue
        seconds = min(seconds, ended_s)
        shutil.rmtree(target / STAGES[stage].output, ignore_errors=True)
    finish(project, stage, target)
    return hits


# ---- a disk that is full -------------------------------------------------------------------------------------------

ROOM_BYTES = 400 << 20


def can_mount() -> bool:
    """Whether a file system in memory can be made here, seen by the test's own processes alone."""
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
        ).returncode
    )


def on_a_small_disk(project: Path, stage: str, root: Path, slack_bytes: int) -> subprocess.CompletedProcess:
    """Run a stage in a tmpfs that has `slack_bytes` to spare, then again with room for all, and bring the workspace
    back. Standard output: the two exit statuses."""
    made = command(project, stage, root)
    words, place = shlex.join(made["args"]), shlex.quote(str(root))
    script = f"""
        set -u
        mkdir {place}.out
        mount -t tmpfs -o size={ROOM_BYTES} tmpfs {place}.disk && cp -a {place}/. {place}.disk && sync
        used=$(df --output=used -B1 {place}.disk | tail -1)
        mount -o remount,size=$((used + {slack_bytes})) {place}.disk
        mount --bind {place}.disk {place}
        {words} > {place}.out/first; echo $?
        mount -o remount,size={ROOM_BYTES} {place}.disk
        {words} > {place}.out/second 2>&1; echo $?
        cp -a {place}/. {place}.out
    """
    (root.parent / f"{root.name}.disk").mkdir()
    return subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], env=made["env"], capture_output=True, text=True, timeout=500
    )


# ---- what was run --------------------------------------------------------------------------------------------------


class Tally:
    """Faults by stage and kind, written at once where `path` says, over what is there: tests run one by one add up."""

    def __init__(self, path: str | None):
        self.path = Path(path) if path else None

    def add(self, stage: str, fault: str, number: int = 1) -> None:
        if self.path is None:
            return
        from benchmarks._machine import machine
        from raphael.base.stage import write_json

        survived = json.loads(self.path.read_text())["survived"] if self.path.exists() else {}
        survived.setdefault(stage, {})[fault] = number
        facts = {
            "benchmark": "data-faults",
            "measured": f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}",
            **machine(),
            "rows": {stage: SOURCE_ROWS if stage == "source" else ROWS for stage in STAGES},
            "outcome": "after each the same command ended in the undisturbed run's files (byte for byte, tars by key "
            "and pixels), and nothing temporary stayed",
            "survived": {stage: survived[stage] for stage in STAGES if stage in survived},
        }
        write_json(self.path, facts)
