"""The stage generate: images do not depend on how many processes generate them, nor on one that died."""

import hashlib

import pytest
from truth.device_cases import generated_workspace
from truth.killed_worker import DiesOnce

from raphael.base.config.params import load_config
from raphael.base.stage import Stage
from raphael.generate import stage as generate_stage

COUNT = 3  # blocks


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = generated_workspace(tmp_path_factory.mktemp("generate"), "cpu")
    text = (root / "params.yaml").read_text()
    assert "batch_size: 3" in text
    (root / "params.yaml").write_text(text.replace("batch_size: 3", "batch_size: 1"))
    return root


def bytes_of(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.png"))}


@pytest.fixture(autouse=True)
def workers_find_the_truth(monkeypatch, project):
    monkeypatch.syspath_prepend(project / "tests")


def made_by(workspace, folder, processes, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(generate_stage, "available", lambda: processes)
    folder.mkdir(exist_ok=True)
    config = load_config("params.yaml")
    listed = generate_stage.read_json(generate_stage.PROMPTS)
    blocks = generate_stage.unfinished_blocks(generate_stage.image_entries(listed, 1), 1, folder)
    work = generate_stage.Work(workspace, config, "cpu", folder, blocks)
    generate_stage.generate_blocks(work, Stage("generate", workspace), COUNT, COUNT - len(blocks))
    return bytes_of(folder)


def test_two_processes_generate_the_bytes_of_one_and_one_that_dies_is_started_again(
    workspace, tmp_path, monkeypatch, capfd
):
    one = made_by(workspace, tmp_path / "one", 1, monkeypatch)
    assert len(one) == COUNT
    run = generate_stage.run_processes
    monkeypatch.setattr(generate_stage, "run_processes", lambda task, *rest: run(DiesOnce(task, tmp_path), *rest))
    assert made_by(workspace, tmp_path / "two", 2, monkeypatch) == one
    assert "worker 0 of 2 died (exit code -9); what it finished stays" in capfd.readouterr().err
