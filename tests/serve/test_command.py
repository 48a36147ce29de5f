"""`raphael serve` as a person starts and ends it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import httpx
import pytest
from truth.tiny_raphael import write_pipeline

from raphael.cli.main import main
from raphael.pretrained.find import default_pipeline
from raphael.serve import models as serving
from raphael.serve.info import Catalogue
from raphael.serve.models import bytes_of, default_checkpoints, found_folders, open_models
from raphael.serve.server import local_perform


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


def test_every_pipeline_folder_of_a_workspace_is_served_beside_those_that_are_named(tiny, monkeypatch, tmp_path, capfd):
    """By its folder's name, also a link's; what is no model is left out with a word, and so are more than the bound."""
    root = tmp_path / "models"
    for name in ("raphael", "second", "third"):
        shutil.copytree(tiny.folder, root / name)
    (root / "linked").symlink_to(root / "second")
    (root / "again").symlink_to(root / "raphael")  # the same as one that is named
    for name in ("broken", ".temporary.7", "autoencoder"):
        (root / name).mkdir()
        (root / name / "meta.json").write_text("{}")
    for name in ("broken", ".temporary.7"):
        (root / name / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    named = default_checkpoints(default_pipeline()[0])
    found = found_folders(named)
    assert [str(folder) for folder in found] == [f"models/{name}" for name in ("broken", "linked", "second", "third")]
    opened = open_models(["models/raphael"], "cpu", found=found)
    assert list(opened) == ["raphael", "linked", "second", "third"]
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("raphael serve: models/broken is left out: ")
    monkeypatch.setattr(serving, "MOST_FOUND", 2)
    assert len(found_folders(named)) == 2
    assert "models: got 4 models, expected at most 2" in (said := capfd.readouterr().err) and "second, third" in said


def test_models_that_nobody_named_share_a_bound_in_memory_and_are_read_again(tiny, running, tmp_path):
    """Their pictures stay the same to the byte; a folder with another model by now is refused, not served."""
    folders = [tmp_path / name for name in ("second", "third")]
    for folder in folders:
        shutil.copytree(tiny.folder, folder)
    models = open_models([str(tiny.folder)], "cpu", found=folders)
    shelf = models["second"].shelf
    assert [served.here for served in models.values()] == [True] * 3
    shelf.room = bytes_of(models["second"].pipeline)  # one of the two
    catalogue = Catalogue(tuple(served.info for served in models.values()))
    with running(catalogue, local_perform(models)) as server:

        def asked(name: str) -> httpx.Response:
            return server.client.post("/v1/images", json={"model": name, "prompt": "a", "seed": 1, "guidance_scale": 1})

        pictures = [asked(name).json()["images"] for name in ("second", "third", "second", "tiny")]
        assert pictures[0] == pictures[1] == pictures[2] == pictures[3]
        assert [name for name, served in models.items() if served.here] == ["tiny", "second"]
        shutil.rmtree(folders[1])
        gone = asked("third")
        assert gone.status_code == 503 and gone.json()["field"] == "model"
        write_pipeline(folders[1], seed=1)
        other = asked("third")
        assert other.status_code == 503 and "another one by now" in other.json()["detail"]
        assert asked("second").json()["images"] == pictures[0]


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
