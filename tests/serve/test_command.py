"""`raphael serve` as a person starts and ends it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import httpx
import pytest

from raphael.cli.main import main
from raphael.serve.models import open_models


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "expected --token FILE"),
        (["--checkpoint", "nothing"], "nothing: no such folder; expected a pipeline folder"),
        (["--checkpoint", "models:/x"], "expected models:/NAME@ALIAS"),
        (["--port", "70000"], "expected a free port"),
        (["--queue", "-1"], "expected a queue from 0"),
    ],
)
def test_what_cannot_be_served_is_one_line(options, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAPHAEL_SERVE_TOKEN", raising=False)
    assert main(["serve", "--port", "0", "--device", "cpu", *options]) == 1
    said = capsys.readouterr().err.splitlines()
    assert words in said[-1] and not any("Traceback" in line for line in said)


def test_models_of_one_name_get_a_number_and_the_first_is_the_default(tiny):
    models = open_models([str(tiny.folder)] * 3, "cpu")
    assert list(models) == ["tiny", "tiny-2", "tiny-3"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_one_line_when_it_is_ready_serves_a_picture_and_ends_at_the_first_signal(tiny, number, tmp_path):
    """While a job runs, one waits and one is watched; nothing is written into the folder that it was started in."""
    command = [sys.executable, "-m", "raphael.cli", "serve", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--checkpoint", str(tiny.folder)], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"raphael serve: (http://127.0.0.1:\d+/) \(tiny\), ready after [\d.]+ s; .*\n", line)
        assert found, line
        client = httpx.Client(base_url=found[1], timeout=30, trust_env=False)
        picture = client.post("/v1/images", json={"prompt": "x", "seed": 1, "num_inference_steps": 1})
        assert picture.status_code == 200
        long = {"prompt": "x", "num_inference_steps": 100, "n": 8, "width": 160, "height": 160}
        jobs = [client.post("/v1/images?wait=false", json=long).json()["id"] for _ in range(2)]
        with client.stream("GET", f"/v1/jobs/{jobs[0]}/events") as stream:
            lines = stream.iter_lines()
            next(lines)
            asked_s = time.monotonic()
            process.send_signal(number)
            assert "event: failed" in list(lines)
        assert process.wait(timeout=20) == 0
        assert time.monotonic() - asked_s < 10  # 0.5 on a quiet machine
    finally:
        process.kill()
        out, errors = process.communicate()
    assert out == "" and errors.splitlines() == ["raphael serve: device cpu"], errors
    assert not list(tmp_path.iterdir())
