"""Dockerfile and compose.yaml say what `make setup` and `make up` do; no container engine is needed to see that."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from flows.environment import SWITCHES
from raphael.cli.main import build_parser
from raphael.serve.door.access import TOKEN

PROJECT = Path(__file__).resolve().parent.parent


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, rest), continuation lines joined."""
    text = re.sub(r"^#.*\n", "", (PROJECT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line.strip()]
    return [tuple(line.split(None, 1)) for line in lines]


def sources_of(copy: str) -> list[str]:
    """What a COPY takes from the context, without its options."""
    return [word for word in copy.split()[:-1] if not word.startswith("--")]


def test_the_image_knows_only_dockers_instructions_and_starts_from_a_supported_python() -> None:
    known = {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "CMD", "USER"}
    assert {name for name, _ in instructions()} <= known
    kind, base = instructions()[0]
    assert kind == "FROM" and re.fullmatch(r"python:3\.11-slim@sha256:[0-9a-f]{64}", base), "a tag alone may move"


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
            for source in sources_of(rest):
                assert (PROJECT / source).exists(), f"COPY {source}: not there"
                assert source not in ignored
    assert {".venv", "data", "models", ".git", ".env", ".run"} <= set(ignored)


def test_switches_against_telemetry_are_the_same_everywhere() -> None:
    make = dict(re.findall(r"^export (\w+) := (\w+)$", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {name: make.get(name) for name in SWITCHES} == SWITCHES
    image = dict(pair.split("=") for name, rest in instructions() if name == "ENV" for pair in rest.split())
    assert {name: image.get(name) for name in SWITCHES} == SWITCHES
    for name, service in compose()["services"].items():
        if name == "store":
            continue  # MinIO's own image knows other switches
        assert {switch: service["environment"].get(switch) for switch in SWITCHES} == SWITCHES, name


def compose() -> dict:
    return yaml.safe_load((PROJECT / "compose.yaml").read_text())


def test_compose_has_the_four_services_on_loopback_ports_and_a_store_for_whoever_asks() -> None:
    services = compose()["services"]
    assert set(services) == {"prefect", "mlflow", "worker", "images", "store", "store-volume"}
    assert {name for name, service in services.items() if "profiles" in service} == {"store", "store-volume"}
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
    assert worker["PREFECT_API_URL"] == "http://prefect:4200/api" and "--port=4200" in services["prefect"]["command"]
    assert worker["MLFLOW_TRACKING_URI"] == "http://mlflow:5000" and "--port=5000" in services["mlflow"]["command"]
    assert "mlflow:5000" in services["mlflow"]["environment"]["RAPHAEL_GUARD_HOSTS"]
    assert "prefect:4200" in services["prefect"]["environment"]["RAPHAEL_GUARD_HOSTS"]


def test_nothing_in_the_containers_runs_as_root_or_can_become_it() -> None:
    (user,) = {rest for name, rest in instructions() if name == "USER"}
    made = next(rest for name, rest in instructions() if name == "RUN")
    assert user == "raphael" and f"useradd --uid 1000 --create-home {user}" in made
    names = [name for name, _ in instructions()]
    assert names.index("USER") < names.index("COPY") < names.index("CMD")
    for name, service in compose()["services"].items():
        assert service["user"] == "1000:1000", name
        assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"], name
        assert not {"privileged", "cap_add", "pid", "network_mode", "userns_mode"} & service.keys(), name
        for volume in service["volumes"]:  # a new volume takes its owner from the image's folder
            assert volume.split(":")[1] in made and "install --directory --owner=raphael" in made


def test_both_servers_of_compose_are_started_by_the_door_with_a_password_that_nobody_wrote_down() -> None:
    services = compose()["services"]
    for name, port in (("prefect", 4200), ("mlflow", 5000)):
        command, settings = services[name]["command"], services[name]["environment"]
        assert command[:4] == ["python", "-m", "flows.serve.guard", name] and f"--port={port}" in command
        own = [f"127.0.0.1:{port}", f"localhost:{port}"]
        assert settings["RAPHAEL_GUARD_HOSTS"].split(",") == [*own, f"{name}:{port}"]
    pages = ",".join(f"http://{host}:4200" for host in ("127.0.0.1", "localhost"))
    assert services["prefect"]["environment"]["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == pages
    required = {
        "prefect": "PREFECT_SERVER_API_AUTH_STRING",
        "mlflow": "RAPHAEL_GUARD_AUTH",
        "worker": "PREFECT_API_AUTH_STRING",
    }
    for name, setting in required.items():
        # compose itself refuses to start without a value
        assert services[name]["environment"][setting].startswith("raphael:${RAPHAEL_PASSWORD:?"), name
    assert services["images"]["environment"][TOKEN].startswith("${RAPHAEL_PASSWORD:?")
    secrets = {"PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_PASSWORD", TOKEN, *required.values()}
    for service in services.values():
        for setting in secrets & service["environment"].keys():
            assert "${RAPHAEL_PASSWORD" in service["environment"][setting]
    assert "/.env" in (PROJECT / ".gitignore").read_text().split()


def test_the_images_service_reads_the_workspace_and_listens_where_it_is_published() -> None:
    service = compose()["services"]["images"]
    assert service["command"][:4] == ["python", "-m", "raphael.cli", "serve"]
    asked = build_parser().parse_args(service["command"][3:])
    assert (asked.host, asked.port, asked.name) == ("0.0.0.0", 8000, ["images:8000"])
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert service["volumes"] == ["workspace:/workspace:ro"] and service["working_dir"] == "/workspace"


def test_the_door_takes_the_options_that_compose_gives_it() -> None:
    """What stands behind `flows.serve.guard mlflow` is parsed by MLflow's own command line."""
    from mlflow.cli import server

    words = compose()["services"]["mlflow"]["command"][4:]
    known = server.make_context("mlflow server", [*words, "--workers", "1"]).params
    assert known["host"] == "0.0.0.0" and known["port"] == 5000
    assert known["allowed_hosts"] == "127.0.0.1:5000,localhost:5000,mlflow:5000"


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
            target = rest.split()[-1]
            for source in sources_of(rest):
                shutil.copytree(context / source, image / target, dirs_exist_ok=True)
        elif name == "RUN" and "apt-get" not in rest:
            subprocess.run(["bash", "-c", rest], cwd=image, check=True, stdin=subprocess.DEVNULL)
    done = subprocess.run([".venv/bin/raphael", "--help"], cwd=image, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert subprocess.run([".venv/bin/dvc", "status"], cwd=image).returncode == 0


def test_the_store_is_of_a_stated_release_and_the_worker_is_let_in() -> None:
    services = compose()["services"]
    store, worker = services["store"], services["worker"]["environment"]
    assert re.fullmatch(r"minio/minio:RELEASE\.[\dTZ-]+", store["image"]), "latest may be another one tomorrow"
    assert worker["AWS_ENDPOINT_URL"] == "http://store:9000" and "--address=:9000" in store["command"]
    assert worker["AWS_ACCESS_KEY_ID"] == store["environment"]["MINIO_ROOT_USER"]
    assert store["environment"]["MINIO_ROOT_PASSWORD"].startswith("${RAPHAEL_PASSWORD:?")
    assert worker["AWS_SECRET_ACCESS_KEY"] == "${RAPHAEL_PASSWORD}"
    first = services["store-volume"]
    assert store["depends_on"] == {"store-volume": {"condition": "service_completed_successfully"}}
    assert first["volumes"] == store["volumes"] and first["image"] == "raphael", "so that the volume is uid 1000's"
