"""`make up` and `make down`: the Prefect server, the MLflow page, and the process that serves the deployments.

    python -m flows.serve up      start what does not run yet, wait until it answers, print the addresses
    python -m flows.serve down    end exactly what `up` started
    python -m flows.serve run     serve the deployments in the foreground (what `up` starts in the background)

Everything listens on loopback. Addresses: PREFECT_API_URL (else prefect.toml) and RAPHAEL_MLFLOW_PORT (else 5000).
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from flows.demo import check_environment
from flows.environment import prepare
from flows.pipeline import read_pipeline
from flows.servers import answers, loopback_port, prefect_api, prefect_command, running, start, stop, wait
from raphael.stage import StageError, one_clear_line, write_json

NAMES = ("full", "data", "train", "evaluate", "ablation", "sweep")
SERVERS = ("serve", "mlflow", "prefect")  # in the order of ending
NO_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # a dozen idle processes for evaluations that we do not use
READY = "deployments.ready"


def up(root: Path) -> None:
    """Start the three processes that are not running, each once the one before answers. Raises StageError, one line."""
    read_pipeline(root)
    check_environment()
    api, mlflow_port = prefect_api(root), int(os.environ.get("RAPHAEL_MLFLOW_PORT", "5000"))
    port = loopback_port(api)
    page = f"http://127.0.0.1:{mlflow_port}"
    store = ["--backend-store-uri", f"sqlite:///{root / 'mlflow.db'}", "--default-artifact-root", str(root / "mlruns")]
    mlflow_command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(mlflow_port)]
    before = {name for name in SERVERS if running(root, name)}
    ready = root / ".run" / READY
    try:
        start(root, "prefect", prefect_command(port), port)
        start(root, "mlflow", [*mlflow_command, "--workers", "1", *store], mlflow_port, NO_JOBS)
        wait(root, "prefect", lambda: answers(f"{api}/health"))
        wait(root, "mlflow", lambda: answers(f"{page}/health"))
        if "serve" not in before:
            ready.unlink(missing_ok=True)
        start(root, "serve", [sys.executable, "-m", "flows.serve", "run"], None)
        wait(root, "serve", ready.exists)
    except BaseException:
        for name in SERVERS:  # half of it would be no use, and would hold the ports
            if name not in before:
                stop(root, name)
        raise
    print(f"Prefect      {api.removesuffix('/api')}")
    print(f"MLflow       {page}")
    print(f"deployments  {', '.join(f'raphael/{name}' for name in NAMES)}")
    print("\nnext: source .venv/bin/activate && prefect deployment run raphael/full --watch\nmake down stops all of it")


def down(root: Path) -> None:
    """End what `up` started, known by process id and start time, and whatever that started."""
    for name in SERVERS:
        if stop(root, name):
            print(f"{name}: stopped")


def run(root: Path) -> None:
    """Register the deployments and serve them, one run at a time, until told to stop. Raises StageError."""
    import httpx
    from prefect import serve

    from flows.ablation import ablation
    from flows.data import data
    from flows.evaluate import evaluate
    from flows.full import full
    from flows.sweep import sweep
    from flows.train import train

    flows = {"full": full, "data": data, "train": train, "evaluate": evaluate}
    flows |= {"ablation": ablation, "sweep": sweep}
    api = prefect_api(root)
    try:
        deployments = [flow.to_deployment(name, concurrency_limit=1, tags=["raphael"]) for name, flow in flows.items()]
        _announce(root, lambda: all(answers(f"{api}/deployments/name/raphael/{name}") for name in NAMES))
        serve(*deployments, limit=1, pause_on_shutdown=False, print_starting_message=False)
    except httpx.ConnectError:
        raise StageError(f"no Prefect server answers at {api}; start it with make up") from None


def _announce(root: Path, registered: Callable[[], bool]) -> None:
    """Write .run/deployments.ready once the server knows all deployments; `serve` itself does not return to say so."""

    def watch() -> None:
        while not registered():
            time.sleep(0.3)
        write_json(root / ".run" / READY, list(NAMES))

    threading.Thread(target=watch, daemon=True).start()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["up", "down", "run"])
    arguments = parser.parse_args(argv)
    with one_clear_line("serve") as outcome:
        root = Path.cwd()
        prepare(root)
        {"up": up, "down": down, "run": run}[arguments.action](root)
    return outcome.status


if __name__ == "__main__":
    raise SystemExit(main())
