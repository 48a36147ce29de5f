"""What every process that we start finds in its environment, in one place.

The Makefile, the Dockerfile and compose.yaml repeat SWITCHES because they come before Python; a test
holds them together.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flows.serve.access import private_folder

SWITCHES = {  # each of these tries the network on its own account when left on, and complains when offline
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}
HABITS = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else Ray packs the whole folder, data too, when uv is in sight
    "TOKENIZERS_PARALLELISM": "false",
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",  # DVC owns results
}


SECRETS = ("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING", "RAPHAEL_GUARD_AUTH")


def prepare(root: Path) -> None:
    """Set up this process and its children. Must come before Prefect is imported, which reads its settings then.

    Prefect's home is `.run/prefect` in the workspace, so that a user's own profile is neither read nor written; other
    users see nothing of `.run`. Whatever the caller has set already wins, the switches apart.
    """
    private_folder(root / ".run")
    home = private_folder(root / ".run" / "prefect")  # Prefect's server dies on a home that is not there
    os.environ.update(SWITCHES)
    for name, value in {**HABITS, "PREFECT_HOME": str(home)}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("DVC_SITE_CACHE_DIR", str(root / ".run" / "dvc"))  # else /var/tmp/dvc, which all may write to
    programs = str(Path(sys.executable).parent)
    if programs not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", os.defpath)])


def stage_environment(root: Path) -> dict[str, str]:
    """The environment of a stage: this one, the workspace's own code first on the path (Ray's workers too), and no
    secret of the servers, which no stage needs."""
    paths = [str(root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    ours = {name: value for name, value in os.environ.items() if name not in SECRETS}
    return {**ours, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
