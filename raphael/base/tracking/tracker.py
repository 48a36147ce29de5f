"""Numbers, images and models of a run, in MLflow. The only `import mlflow` of the package.

Where they go: the environment's MLFLOW_TRACKING_URI, else tracking.uri, else SQLite in the workspace (mlflow.db,
artifacts in mlruns/ beside it), always as an absolute address: a Ray worker has another working directory. The driver
creates the run and hands its id to whoever logs, so that a restart resumes in the same run, and a crash can be marked
as one.

A tracking server that is away never stops a training: one warning, points go on into a file, and are sent when it is
back.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from raphael.base.stage import read_json, write_json
from raphael.base.strict import ConfigError, flatten, to_dict
from raphael.base.tracking.pipeline_run import PARENT, SOURCE, parent_run

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from raphael.base.config.params import Config

T = TypeVar("T")
RUNS_FILE = Path("work") / "mlflow_run.json"  # sha256 of a trained model -> its run, so that evaluation logs there too
RETRY_AFTER_S = 60.0
MAX_BATCH = 100  # params in one request, MLflow's own limit
MAX_PARAM_CHARS = 6000


class NullTracker:
    """Keeps nothing. What a tracker can do, and what it does by default."""

    run_id: str | None = None
    uri = ""

    def log(self, metrics: dict[str, float], step: int, again: bool = False, model_id: str | None = None) -> None:
        """Add a point to each metric. A step at or before the last one is taken as logged already, but for `again`.

        model_id: the numbers are also those of this logged model (raphael/base/tracking/registry.py).
        """

    def image(self, key: str, image: Any, step: int, again: bool = False) -> None:
        """Add an image (uint8 (H, W, 3) or PIL) to the series `key`; once per step, but for `again`."""

    def table(self, name: str, columns: dict[str, list[Any]]) -> None:
        """A table of the run, once per name: columns of texts, numbers or PIL images. MLflow's pages compare it."""

    def params(self, params: dict[str, Any]) -> None:
        """Settings, nested mappings flattened with dots. Known ones are left as they are."""

    def tags(self, tags: dict[str, str]) -> None: ...

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Say which data the run read: a name, its hash (the first 36 characters count), where it lies, what for."""

    def artifact(self, path: str | Path, folder: str | None = None) -> None: ...

    def close(self, status: str = "FINISHED") -> None:
        """End the run: FINISHED, FAILED or KILLED."""


Tracker = NullTracker  # the interface is what the do-nothing tracker has


class MlflowTracker(NullTracker):
    """Logs into the run `run_id` at `uri`. journal: a file that keeps what could not be sent.

    run_id None: the server was away when the run should have been created; everything goes to the journal.
    """

    def __init__(self, uri: str, run_id: str | None, journal: str | Path):
        self.uri, self.run_id = uri, run_id
        self.journal = Path(journal)
        self.retry_at_s = 0.0
        self.warned = False
        self.last_steps: dict[str, int] = {}
        self.client: MlflowClient | None = None

    def log(self, metrics: dict[str, float], step: int, again: bool = False, model_id: str | None = None) -> None:
        about = {"again": again} | ({"model_id": model_id} if model_id else {})
        self._keep({"step": step, "time_ms": int(time.time() * 1000), "metrics": metrics, **about})
        self._flush()

    def image(self, key: str, image: Any, step: int, again: bool = False) -> None:
        def send(client: MlflowClient) -> None:
            name = re.compile(re.escape(key.replace("/", "~")) + rf"[%+]step[%+]{step}[%+]")  # as MLflow names it
            known = [] if again else client.list_artifacts(self.run_id, "images")
            if not any(name.match(Path(item.path).name) for item in known):
                client.log_image(self.run_id, image, key=key, step=step, synchronous=True)

        self.send(send)

    def table(self, name: str, columns: dict[str, list[Any]]) -> None:
        def send(client: MlflowClient) -> None:
            if not any(item.path == f"{name}.json" for item in client.list_artifacts(self.run_id)):
                client.log_table(self.run_id, columns, f"{name}.json")

        self.send(send)

    def params(self, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        flat = flatten(params)

        def send(client: MlflowClient) -> None:
            known = client.get_run(self.run_id).data.params  # a second, different value is an error to MLflow
            new = [Param(name, str(value)[:MAX_PARAM_CHARS]) for name, value in flat.items() if name not in known]
            for start in range(0, len(new), MAX_BATCH):
                client.log_batch(self.run_id, params=new[start : start + MAX_BATCH], synchronous=True)

        self.send(send)

    def tags(self, tags: dict[str, str]) -> None:
        self.send(lambda client: [client.set_tag(self.run_id, name, value) for name, value in tags.items()])

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(name=name, digest=digest[:36], source_type="local", source=json.dumps({"uri": source}))
        entry = DatasetInput(data, [InputTag("mlflow.data.context", context)])
        self.send(lambda client: client.log_inputs(self.run_id, [entry]))

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        self.send(lambda client: client.log_artifact(self.run_id, str(path), folder))

    def close(self, status: str = "FINISHED") -> None:
        self._flush(now=True)
        self.send(lambda client: client.set_terminated(self.run_id, status))

    def send(self, action: Callable[[MlflowClient], T], now: bool = False) -> T | None:
        """Do it; where the server is away, say so once and come back to it after a while."""
        if self.run_id is None or (time.monotonic() < self.retry_at_s and not now):
            return None
        try:
            if self.client is None:
                self.client = connect(self.uri)
            return action(self.client)
        except Exception as error:  # of MLflow, SQLAlchemy, requests, the disk: none of them is worth a training
            self.retry_at_s = time.monotonic() + RETRY_AFTER_S
            if not self.warned:
                self.warned = True
                warn_away(self.uri, error, f"points are kept in {self.journal} and sent when it is back")
            return None

    def _keep(self, entry: dict[str, Any]) -> None:
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        with open(self.journal, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _flush(self, now: bool = False) -> None:
        """Send what the journal holds, then empty it. Killed in between, the steps tell what had arrived."""
        if not self.journal.exists():
            return
        entries = [
            json.loads(line) for line in self.journal.read_text(encoding="utf-8").splitlines() if line.endswith("}")
        ]

        def send(client: MlflowClient) -> bool:
            for entry in entries:
                self._send_point(client, entry)
            return True

        if self.send(send, now):
            self.journal.unlink()

    def _send_point(self, client: MlflowClient, entry: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        step, points = entry["step"], []
        for name, value in entry["metrics"].items():
            if name not in self.last_steps:  # first time in this process: an earlier one may have logged it
                history = client.get_metric_history(self.run_id, name)
                self.last_steps[name] = max((point.step for point in history), default=-1)
            if step > self.last_steps[name] or entry.get("again"):
                points.append(Metric(name, float(value), entry["time_ms"], step, model_id=entry.get("model_id")))
        for start in range(0, len(points), 1000):
            client.log_batch(self.run_id, metrics=points[start : start + 1000], synchronous=True)
        self.last_steps.update({point.key: step for point in points})


def resolve_uri(config: Config, root: str | Path) -> str:
    """The absolute address of the tracking store. Raises ConfigError for MLflow's file store, which is no more."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or config.tracking.uri
    if not uri:
        return f"sqlite:///{Path(root).resolve() / 'mlflow.db'}"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{Path(root).resolve() / uri.removeprefix('sqlite:///')}"
    if "://" not in uri or uri.startswith("file:"):
        raise ConfigError(
            f"tracking.uri: got {public(uri)!r}, expected sqlite:///PATH, http://HOST:PORT or nothing "
            "(mlflow.db in the workspace)"
        )
    return uri


def create_run(
    config: Config, root: str | Path, name: str, params: dict[str, Any] | None = None, parent: str | None = None
) -> str | None:
    """Create a run in the experiment tracking.experiment; returns its id, None (after one warning) where nobody
    answers.

    All settings become params: the configuration's, the preset's under `preset`, and `params`. It stands under the run
    of the flow that started this process (raphael/base/tracking/pipeline_run.py), else under `parent`.
    """
    uri, root = resolve_uri(config, root), Path(root).resolve()
    try:
        client = connect(uri)
        experiment = client.get_experiment_by_name(config.tracking.experiment)
        if experiment is None:
            # SQLite has no place for files of its own; a server knows where its own are
            location = (root / "mlruns").as_uri() if uri.startswith("sqlite:") else None
            experiment_id = client.create_experiment(config.tracking.experiment, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
            if experiment.lifecycle_stage == "deleted":
                client.restore_experiment(experiment_id)
        tags = source_tags(root)
        if parent := parent_run(client, experiment_id, root, public(uri), tags) or parent:
            tags = {**tags, PARENT: parent}
        run_id = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
    except Exception as error:  # as in MlflowTracker.send
        warn_away(uri, error, "this run is not tracked there")
        return None
    tracker = MlflowTracker(uri, run_id, root / "work" / "tracking" / f"{run_id}.jsonl")
    tracker.params({**all_settings(config), **(params or {})})
    return run_id


def all_settings(config: Config) -> dict[str, Any]:
    """The configuration as a run has it, the preset's settings under `preset`."""
    settings = to_dict(config)
    del settings["file"]  # where they were read from is none, and would differ between runs that do not
    return {**settings, "preset": to_dict(config.model.load())}


def reopen_run(uri: str, run_id: str, root: Path | None = None) -> bool:
    """Whether the run exists; it is RUNNING again after, under the run of the flow that resumes it in `root`."""
    try:
        client = connect(uri)
        experiment_id = client.get_run(run_id).info.experiment_id
        client.update_run(run_id, status="RUNNING")
        if root and (parent := parent_run(client, experiment_id, root, public(uri), source_tags(root))):
            client.set_tag(run_id, PARENT, parent)
        return True
    except Exception as error:  # as in MlflowTracker.send
        warn_away(uri, error, f"the run {run_id} cannot be continued there")
        return False


@contextlib.contextmanager
def closing(tracker: Tracker) -> Iterator[Tracker]:
    """End the run with the block: FINISHED, KILLED when it was interrupted, FAILED when it failed."""
    try:
        yield tracker
    except (KeyboardInterrupt, SystemExit):
        tracker.close("KILLED")
        raise
    except BaseException:
        tracker.close("FAILED")
        raise
    tracker.close("FINISHED")


def remember_run(root: str | Path, sha256: str, uri: str, run_id: str | None) -> None:
    """Note which run made the model of that hash. Outside of the outputs: those are the same for equal settings."""
    path = Path(root) / RUNS_FILE
    runs = read_json(path) if path.exists() else {}
    if run_id is not None:
        write_json(path, {**runs, sha256: {"uri": public(uri), "run_id": run_id}})


def tracker_of_model(config: Config, root: str | Path, sha256: str) -> Tracker:
    """The tracker of the run that trained the model of that hash; a new run where it is not known (a pulled model)."""
    uri, path = resolve_uri(config, root), Path(root) / RUNS_FILE
    known = (read_json(path) if path.exists() else {}).get(sha256)
    run_id = known["run_id"] if known and known["uri"] == public(uri) else None
    if run_id is None or not reopen_run(uri, run_id):
        run_id = create_run(config, root, f"model-{sha256[:8]}", {"model_sha256": sha256})
        remember_run(root, sha256, uri, run_id)
    return MlflowTracker(uri, run_id, journal_of(root, run_id))


def tracker_of_evaluation(config: Config, root: str | Path, sha256: str, trained: str | None) -> Tracker:
    """A run for one evaluation of the model of that hash, which the run `trained` made."""
    run_id = create_run(config, root, f"evaluation-{sha256[:8]}", {"model_sha256": sha256}, trained)
    return MlflowTracker(resolve_uri(config, root), run_id, journal_of(root, run_id)) if run_id else NullTracker()


def journal_of(root: str | Path, run_id: str | None) -> Path:
    return Path(root).resolve() / "work" / "tracking" / f"{run_id or 'untracked'}.jsonl"


def connect(uri: str) -> MlflowClient:
    """A client that says nothing to third parties, does not chatter, and does not wait long for a server."""
    import logging

    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"), ("DO_NOT_TRACK", "true"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"), ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
    ):  # fmt: skip
        os.environ.setdefault(name, value)
    import mlflow
    from mlflow import MlflowClient

    told = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)  # "models:/" addresses are looked up there, whatever the client's own address is
    if told is None:  # it sets the variable, too, which `resolve_uri` would read as the user's word for any workspace
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def git_revision(root: str | Path) -> str:
    """The commit of the working tree, with -dirty where tracked files differ from it; "unknown" outside of git."""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def source_tags(root: str | Path) -> dict[str, str]:
    """What makes the run, and of which revision, under MLflow's names."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # None: a script, not `python -m`
    name = f"python -m {module.name.removesuffix('.__main__')}" if module else Path(sys.argv[0]).name
    revision = git_revision(root)
    tags = {"mlflow.source.type": "LOCAL", SOURCE: name, "git.revision": revision}
    return tags if revision == "unknown" else {**tags, "mlflow.source.git.commit": revision.removesuffix("-dirty")}


def dvc_hashes(root: str | Path) -> dict[str, str]:
    """path -> md5 of everything that dvc.lock says was read or written in the workspace; empty without a lock."""
    import yaml

    path = Path(root) / "dvc.lock"
    if not path.is_file():
        return {}
    hashes = {}
    for stage in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("stages", {}).values():
        for entry in (*stage.get("deps", ()), *stage.get("outs", ())):
            if entry["path"].startswith("data/") and "md5" in entry:
                hashes[entry["path"]] = entry["md5"]
    return hashes


def public(uri: str) -> str:
    """The address without a user's name and password."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.netloc else uri


def warn_away(uri: str, error: Exception, consequence: str) -> None:
    secret = urlsplit(uri).netloc.rpartition("@")[0]  # MLflow's messages repeat the whole address
    reason = (
        " ".join(str(error).split()).replace(f"{secret}@", "")[:200] if secret else " ".join(str(error).split())[:200]
    )
    print(
        f"tracking: {public(uri)} is away or refuses ({type(error).__name__}: {reason}); {consequence}",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def tempfile_folder() -> Iterator[Path]:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
