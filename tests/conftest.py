"""What every test finds: no telemetry, no network for model hubs, real data where it lies beside the project."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from flows.environment import HABITS, SWITCHES

PROJECT = Path(__file__).resolve().parent.parent

os.environ.update(SWITCHES)  # before any test module imports the libraries that read them
os.environ.update({"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"})
for name, value in HABITS.items():
    os.environ.setdefault(name, value)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell that starts the tests in the background has Ctrl-C ignored, and all our children would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def project() -> Path:
    """The project's root."""
    return PROJECT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Photographs, captions and small weights for tests, where the machine has them beside the project."""
    folder = PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the project: tests on photographs and real weights are left out")
    return folder


# What starts servers, clusters or whole stages: one after the other, in one of the processes of `make test`
TOGETHER = ("attacks/", "flows/", "serve/test_replicas.py", "train/distributed/", "test_chain.py", "test_cluster.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which tests stay in one process: those of a file, for their fixtures, and those above."""
    for item in items:
        place = item.path.relative_to(PROJECT / "tests").as_posix()
        item.add_marker(pytest.mark.xdist_group("servers" if place.startswith(TOGETHER) else place))
