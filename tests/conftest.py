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


@pytest.fixture(scope="session")
def s3_server():
    """moto's S3 on loopback, for the whole session."""
    from truth.s3_server import start_server

    server = start_server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server):
    """It with an empty bucket, and the environment that leads there."""
    from truth.s3_server import environment

    s3_server.fresh()
    with environment(s3_server.url):
        yield s3_server
