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
