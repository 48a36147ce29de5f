"""Dockerfile and compose.yaml say what `make setup` and `make up` do; no container engine is needed to see that."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from flows.environment import SWITCHES

PROJECT = Path(__file__).resolve().parent.parent


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, rest), continuation lines joined."""
    text = re.sub(r"^#.*\n", "", (PROJECT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line.strip()]
    return [tuple(line.split(None, 1)) for line in lines]


def test_the_image_knows_only_dockers_instructions_and_starts_from_a_supported_python() -> None:
    known = {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "CMD"}
    assert {name for name, _ in instructions()} <= known
    assert instructions()[0] == ("FROM", "python:3.11-slim")


def test_the_image_is_set_up_by_make_setup_and_by_nothing_else() -> None:
    runs = [rest for name, rest in instructions() if name == "RUN"]
    assert "apt-get install" in runs[0]
    for run in runs[1:]:
        assert "make setup" in run
        assert not re.search(r"\b(pip|uv|conda)\b", run), f"{run}: the environment comes from make setup"


def test_what_the_image_copies_is_there_and_not_left_out_by_dockerignore() -> None:
    ignored = [line for line in (PROJECT / ".dockerignore").read_text().splitlines() if line]
    for name, rest in instructions():
        if name == "COPY":
            for source in rest.split()[:-1]:
                assert (PROJECT / source).exists(), f"COPY {source}: not there"
                assert source not in ignored
    assert {".venv", "data", "models", ".git"} <= set(ignored)


def test_switches_against_telemetry_are_the_same_everywhere() -> None:
    make = dict(re.findall(r"^export (\w+) := (\w+)$", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {name: make.get(name) for name in SWITCHES} == SWITCHES
    image = dict(pair.split("=") for name, rest in instructions() if name == "ENV" for pair in rest.split())
    assert {name: image.get(name) for name in SWITCHES} == SWITCHES
    for name, service in compose()["services"].items():
        assert {switch: service["environment"].get(switch) for switch in SWITCHES} == SWITCHES, name


def compose() -> dict:
    return yaml.safe_load((PROJECT / "compose.yaml").read_text())


def test_compose_has_the_three_services_on_loopback_ports() -> None:
    services = compose()["services"]
    assert set(services) == {"prefect", "mlflow", "worker"}
    for name, service in services.items():
        assert service["init"] is True, f"{name}: without init, what a stopped container leaves running stays"
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name}: {port} is published to everyone"
        for volume in service["volumes"]:
            assert volume.split(":")[0] in compose()["volumes"], f"{name}: no volume {volume}"
    assert services["worker"]["shm_size"] == "8gb"
    assert set(services["worker"]["depends_on"]) == {"prefect", "mlflow"}


def test_the_worker_speaks_to_the_addresses_that_the_services_listen_on() -> None:
    services = compose()["services"]
    worker = services["worker"]["environment"]
    assert worker["PREFECT_API_URL"] == "http://prefect:4200/api" and "4200" in services["prefect"]["command"]
    assert worker["MLFLOW_TRACKING_URI"] == "http://mlflow:5000" and "--port=5000" in services["mlflow"]["command"]
    allowed = next(word for word in services["mlflow"]["command"] if word.startswith("--allowed-hosts="))
    assert "mlflow:5000" in allowed


@pytest.mark.slow
def test_the_images_own_steps_make_a_working_environment(tmp_path: Path) -> None:
    """COPY and RUN as the Dockerfile has them, in an empty folder; apt's line is the machine's business."""
    context = tmp_path / "context"
    leave = shutil.ignore_patterns(*[line for line in (PROJECT / ".dockerignore").read_text().split() if line])
    shutil.copytree(PROJECT, context, ignore=leave)
    image = tmp_path / "image"
    image.mkdir()
    for name, rest in instructions():
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                shutil.copytree(context / source, image / target, dirs_exist_ok=True)
        elif name == "RUN" and "apt-get" not in rest:
            subprocess.run(["bash", "-c", rest], cwd=image, check=True, stdin=subprocess.DEVNULL)
    done = subprocess.run([".venv/bin/raphael", "--help"], cwd=image, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert subprocess.run([".venv/bin/dvc", "status"], cwd=image).returncode == 0
