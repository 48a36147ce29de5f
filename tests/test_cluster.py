"""The cluster recipes against Ray's own schema, a small one of KubeRay's, and what the project needs of them."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from data_pipeline.engine.run import device_of
from flows.workspace import settings
from raphael.base.config.data import STAGES_ON_ENGINE
from raphael.base.config.params import load_config
from raphael.base.config.preset import load_preset
from raphael.base.images.sizes import least_short_side

PROJECT = Path(__file__).parents[1]
CLUSTER = PROJECT / "cluster"
GPUS = 32

STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
CONTAINER = {
    "type": "object",
    "required": ["name", "image", "resources", "securityContext"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9-]+$"},
        "image": {"type": "string", "pattern": "@sha256:[0-9a-f]{64}$"},  # a tag may move
        "securityContext": {
            "const": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        },
        "env": {"type": "array", "items": {"type": "object", "required": ["name", "value"]}},
        "resources": {
            "type": "object",
            "required": ["limits", "requests"],
            "properties": {"limits": STRINGS, "requests": STRINGS},
        },
        "volumeMounts": {"type": "array", "items": {"type": "object", "required": ["name", "mountPath"]}},
    },
}
TEMPLATE = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "spec": {
            "type": "object",
            "required": ["containers", "securityContext"],
            "properties": {
                "containers": {"type": "array", "minItems": 1, "items": CONTAINER},
                "securityContext": {
                    "properties": {"runAsNonRoot": {"const": True}, "runAsUser": {"const": 1000}},
                    "required": ["runAsNonRoot", "runAsUser"],
                },
            },
        }
    },
}
GROUP = {"rayStartParams": STRINGS, "template": TEMPLATE}
WORKERS = {
    **GROUP,
    "groupName": {"type": "string"},
    **{name: {"type": "integer", "minimum": 0} for name in ("replicas", "minReplicas", "maxReplicas")},
}
KUBERAY = {  # the fields of ray.io/v1 RayJob that we use, no others
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "spec": {
            "type": "object",
            "required": ["entrypoint", "rayClusterSpec"],
            "additionalProperties": False,
            "properties": {
                "entrypoint": {"type": "string"},
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
                "backoffLimit": {"type": "integer"},
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": {"type": "integer"},
                "rayClusterSpec": {
                    "type": "object",
                    "required": ["rayVersion", "headGroupSpec", "workerGroupSpecs"],
                    "additionalProperties": False,
                    "properties": {
                        "rayVersion": {"type": "string"},
                        "authOptions": {"type": "object", "properties": {"mode": {"enum": ["disabled", "token"]}}},
                        "enableInTreeAutoscaling": {"type": "boolean"},
                        "autoscalerOptions": {"type": "object"},
                        "headGroupSpec": {
                            "type": "object",
                            "required": list(GROUP),
                            "additionalProperties": False,
                            "properties": GROUP,
                        },
                        "workerGroupSpecs": {
                            "type": "array",
                            "minItems": 1,
                            "items": {
                                "type": "object",
                                "required": list(WORKERS),
                                "additionalProperties": False,
                                "properties": WORKERS,
                            },
                        },
                    },
                },
            },
        },
    },
}


def read(name: str) -> dict:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def installed(package: str) -> Path:
    """Where a package lies, without importing it."""
    from importlib.util import find_spec

    return Path(find_spec(package).origin).parent


def locked(package: str) -> str:
    return versions("requirements.lock")[package]


def versions(file: str) -> dict[str, str]:
    """Package -> version of a lock."""
    text = (PROJECT / file).read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9._-]+)(?:\[.*?\])?==(\S+)", text, flags=re.MULTILINE))


def test_the_autoscaling_cluster_fits_rays_own_schema():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((installed("ray") / "autoscaler/ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(read("ray-cluster.yaml"), schema)


def test_the_clusters_lock_agrees_with_the_projects_and_holds_all_that_rays_job_server_imports():
    """Without ray[default] a head starts and `ray job submit` finds nobody: its job server is left out in silence."""
    ours, clusters = versions("requirements.lock"), versions("cluster/requirements.lock")
    assert {name: ours[name] for name in clusters if name in ours} == {
        name: version for name, version in clusters.items() if name in ours
    }
    needed = [
        re.match(r"[\w.-]+", line)[0].replace("_", "-").lower()
        for line in metadata.requires("ray")
        if re.search(r"extra == ['\"]default['\"]", line)
    ]
    assert "aiohttp-cors" in needed and set(needed) <= clusters.keys()
    assert "make setup cluster" in (PROJECT / "Dockerfile").read_text(encoding="utf-8")


def test_the_job_fits_kuberays_form():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(read("kuberay-job.yaml"), KUBERAY)


def test_both_clusters_grow_to_the_gpus_that_the_settings_ask_for():
    """8 GPUs a node: p5.48xlarge has eight, as the manifest's limits say."""
    nodes = read("ray-cluster.yaml")
    assert nodes["available_node_types"]["gpu8"]["max_workers"] * 8 == GPUS
    assert nodes["max_workers"] == nodes["available_node_types"]["gpu8"]["max_workers"]
    assert nodes["head_node_type"] in nodes["available_node_types"]
    (group,) = read("kuberay-job.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert group["maxReplicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"]) == GPUS
    assert read("params.raphael-3b.yaml")["train"]["num_workers"] == GPUS


def test_every_volume_that_is_mounted_is_there():
    spec = read("kuberay-job.yaml")["spec"]["rayClusterSpec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        names = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= names


def test_ray_asks_for_a_token_in_both_and_the_versions_are_the_locks():
    nodes = read("ray-cluster.yaml")
    starts = [command for kind in ("head", "worker") for command in nodes[f"{kind}_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert "--env RAY_AUTH_MODE=token" in nodes["docker"]["run_options"]
    assert any(target.endswith(".ray/auth_token") for target in nodes["file_mounts"])
    spec = read("kuberay-job.yaml")["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == locked("ray")


def test_what_listens_beyond_loopback_asks_for_a_token():
    nodes = read("ray-cluster.yaml")
    (start,) = [command for command in nodes["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start
    spec = read("kuberay-job.yaml")["spec"]["rayClusterSpec"]
    if spec["headGroupSpec"]["rayStartParams"].get("dashboard-host") != "127.0.0.1":
        assert spec["authOptions"]["mode"] == "token"


def test_the_settings_load_and_have_the_presets_sizes_and_the_papers_numbers(tmp_path):
    text = settings.merged(PROJECT / "params.yaml", settings.flat(CLUSTER / "params.raphael-3b.yaml"))
    (tmp_path / "params.yaml").write_text(text)
    config = load_config(tmp_path / "params.yaml")
    assert sorted(config.picture.sizes_px) == sorted(load_preset("raphael-3b").sizes_px)
    loop = config.train.loop
    assert (loop.learning_rate, loop.betas, loop.weight_decay) == (1e-4, (0.9, 0.999), 0.0)
    assert loop.warmup_images == 20_000 * loop.batch_size
    assert config.clip.context_length == load_preset("raphael-3b").unet.context_length


def test_the_nodes_containers_have_no_more_rights_than_they_need_and_one_image() -> None:
    docker = read("ray-cluster.yaml")["docker"]
    assert re.search(r"@sha256:[0-9a-f]{64}$", docker["image"])
    assert {"--security-opt=no-new-privileges", "--cap-drop=ALL"} <= set(docker["run_options"])


def test_the_settings_are_those_of_laions_photographs_and_nothing_of_the_demo_is_left(tmp_path, monkeypatch):
    overlay = settings.flat(CLUSTER / "params.raphael-3b.yaml")
    (tmp_path / "params.yaml").write_text(settings.merged(PROJECT / "params.yaml", overlay))
    config, demo = load_config(tmp_path / "params.yaml"), load_config(PROJECT / "params.yaml")
    assert config.source.kind == "parquet" and config.download.local_host == ""
    assert config.select.score_rules and config.score.computed == ("aesthetic",) and config.filter.opt_out
    assert (config.filter.min_aesthetic, config.filter.max_watermark, config.filter.max_unsafe) == (4.7, 0.5, 0.5)
    assert config.download.encode_format == "jpg" and config.encode.edge_detector == "pidinet"
    assert config.picture.too_small == "drop"  # a list of small images ends in `filter`, not in a training on blur
    needed = least_short_side(config.picture.sizes_px, config.filter.max_aspect_ratio)
    assert config.download.image_size_px >= needed > demo.download.image_size_px
    assert config.filter.min_side_px == min(side for size in config.picture.sizes_px for side in size)
    assert config.filter.near_duplicate_bits == 4
    assert config.pipeline.engine == "ray" and config.pipeline.workers == GPUS
    gpus = {stage: config.pipeline.of(stage).gpus for stage in STAGES_ON_ENGINE}
    assert gpus == {"score": 1, "filter": 0, "captions": 0, "encode": 1}
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # of a head without a GPU
    assert [device_of(config, stage).type for stage in ("score", "encode")] == ["cuda", "cuda"]
