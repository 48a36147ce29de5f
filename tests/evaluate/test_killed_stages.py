"""kill -9 of generate, evaluate and report, then the same command: the same bytes (truth/killed_stages.py)."""

import json
import os
import subprocess
import sys

import pytest
from truth import killed_stages


def killed(folder, project, count, *stages):
    environment = {**os.environ, "PYTHONPATH": f"{project}{os.pathsep}{project / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, killed_stages.__file__, str(folder), str(count), "0", *stages]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=7000)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_a_few_random_kills_change_no_byte(tmp_path, project):
    rows = killed(tmp_path, project, 2)
    assert [row["stage"] for row in rows] == list(killed_stages.STAGES)
    for row in rows:
        assert row["kills"] == row["same"] == 2 and not row["differing"], row


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("stage", killed_stages.STAGES)
def test_a_hundred_random_kills_change_no_byte(tmp_path, project, stage):
    (row,) = killed(tmp_path, project, 100, stage)
    assert row["kills"] == row["same"] == 100, row


def test_a_byte_more_a_byte_less_and_a_file_that_stays_are_seen(tmp_path):
    for name in ("data/generated/00000.png", "reports/generate.json", "work/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12")
    assert killed_stages.content("generate", tmp_path) == {
        "data/generated/00000.png": b"12",
        "reports/generate.json": b"12",
    }
    assert killed_stages.names(tmp_path) == {"data/generated/00000.png", "reports/generate.json", "work/x"}
