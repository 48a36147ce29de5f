"""`make up` and `make down`: the Prefect server, the MLflow page, what serves the deployments, and what serves images.

    python -m flows.serve up      start what does not run yet, wait until it answers, print the addresses
    python -m flows.serve down    end exactly what `up` started
    python -m flows.serve run     serve the deployments in the foreground (what `up` starts in the background)

Everything listens on loopback and asks for the string that `up` writes to .run/login (flows/serve/access.py).
Addresses: PREFECT_API_URL (else prefect.toml), RAPHAEL_MLFLOW_PORT (else 5000), RAPHAEL_SERVE_PORT (else 8000).
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
from flows.pipelines.dvc_stages import read_pipeline
from flows.serve import access
from flows.serve.servers import answers, loopback_port, owns, prefect_api, prefect_command, running, start, stop, wait
from raphael.base.stage import StageError, one_clear_line, write_json
from raphael.serve.door.access import TOKEN

NAMES = ("full", "data", "train", "evaluate", "ablation", "sweep", "systems")
SERVERS = ("images", "serve", "mlflow", "prefect")  # in the order of ending
UNAUTHORIZED = 401
READY = "deployments.ready"
WHERE = f"""\
Prefect      {{api}}
MLflow       {{page}}
images       {{images}}
log in       with the line in .run/{access.LOGIN}, which only you can read: Prefect's page takes all of it, MLflow's the
             user before the colon and the password after it, which is the images' token. The prefect command finds it
             by itself in this folder
deployments  {{names}}"""


def up(root: Path) -> None:
    """Start the processes that are not running, each once the one before answers. Raises StageError, one line."""
    read_pipeline(root)
    check_environment()
    api, mlflow_port = prefect_api(root), int(os.environ.get("RAPHAEL_MLFLOW_PORT", "5000"))
    port = loopback_port(api)
    page = f"http://127.0.0.1:{mlflow_port}"
    store = ["--backend-store-uri", f"sqlite:///{root / 'mlflow.db'}", "--default-artifact-root", str(root / "mlruns")]
    mlflow_command = [sys.executable, "-m", "flows.serve.guard", "mlflow", "--port", str(mlflow_port), *store]
    before = {name for name in SERVERS if running(root, name)}
    auth = auth_string(root, before)
    ready = root / ".run" / READY
    try:
        start(root, "prefect", prefect_command(port), port, access.for_prefect_server(auth, port, root))
        start(root, "mlflow", mlflow_command, mlflow_port, access.for_mlflow_server(auth, mlflow_port))
        wait(root, "prefect", lambda: owns(root, "prefect", port) and answers(f"{api}/health"))
        wait(root, "mlflow", lambda: owns(root, "mlflow", mlflow_port) and answers(f"{page}/health"))
        if "serve" not in before:
            ready.unlink(missing_ok=True)
        start(root, "serve", [sys.executable, "-m", "flows.serve", "run"], None, access.for_prefect_client(auth))
        wait(root, "serve", ready.exists)
        images = offer_images(root, auth)
    except BaseException:
        for name in SERVERS:  # half of it would be no use, and would hold the ports
            if name not in before:
                stop(root, name)
        if not before:
            access.forget(root)
        raise
    names = ", ".join(f"raphael/{name}" for name in NAMES)
    print(WHERE.format(api=api.removesuffix("/api"), page=page, images=images, names=names))
    elsewhere = f"PREFECT_API_URL={api} " if "PREFECT_API_URL" in os.environ else ""
    print(f"\nnext: source .venv/bin/activate && {elsewhere}prefect deployment run raphael/full --watch")
    print("make down stops all of it")


def offer_images(root: Path, auth: str) -> str:
    """Start `raphael serve` with the string's password as its token. -> its address, or why there is none: trainings
    and their pages go on without it."""
    port = int(os.environ.get("RAPHAEL_SERVE_PORT", "8000"))
    page, command = f"http://127.0.0.1:{port}", [sys.executable, "-m", "raphael.cli", "serve", "--port", str(port)]
    try:
        start(root, "images", command, port, {TOKEN: auth.partition(":")[2]})
        wait(root, "images", lambda: owns(root, "images", port) and answers(f"{page}/healthz"))
    except StageError as error:
        stop(root, "images")
        return f"not served: {error}"
    return page


def auth_string(root: Path, running_now: set[str]) -> str:
    """The string of what runs, or a new one where nothing does. Raises StageError where what runs has none."""
    auth = access.known(root) if running_now else access.renew(root)
    if auth is None:
        raise StageError(
            f"got {', '.join(sorted(running_now))} running without .run/{access.LOGIN}; say make down, then make up"
        )
    access.refuse_another_string(auth)
    return auth


def down(root: Path) -> None:
    """End what `up` started, known by process id and start time, and whatever that started."""
    for name in SERVERS:
        if stop(root, name):
            print(f"{name}: stopped")
    access.forget(root)


def run(root: Path) -> None:
    """Register the deployments and serve them, one run at a time, until told to stop. Raises StageError."""
    import httpx
    from prefect import serve
    from prefect.settings import get_current_settings

    from flows.ablation.flow import ablation
    from flows.pipelines.data import data
    from flows.pipelines.evaluate import evaluate
    from flows.pipelines.full import full
    from flows.pipelines.train import train
    from flows.sweep.flow import sweep
    from flows.systems.flow import systems

    flows = {"full": full, "data": data, "train": train, "evaluate": evaluate}
    flows |= {"ablation": ablation, "sweep": sweep, "systems": systems}
    api, secret = prefect_api(root), get_current_settings().api.auth_string
    auth = secret.get_secret_value() if secret else None
    try:
        deployments = [flow.to_deployment(name, concurrency_limit=1, tags=["raphael"]) for name, flow in flows.items()]
        _announce(root, lambda: all(answers(f"{api}/deployments/name/raphael/{name}", auth) for name in NAMES))
        serve(*deployments, limit=1, pause_on_shutdown=False, print_starting_message=False)
    except httpx.ConnectError:
        raise StageError(f"no Prefect server answers at {api}; start it with make up") from None
    except httpx.HTTPStatusError as error:
        if error.response.status_code != UNAUTHORIZED:
            raise
        raise StageError(
            f"the Prefect server at {api} does not take our auth string; start it with make up, or set"
            " PREFECT_API_AUTH_STRING to the server's"
        ) from None


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
