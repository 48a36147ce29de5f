"""The setting `device`: what it means, where it is refused, and that every path moves all of itself there."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from truth.device_cases import CASES

from raphael.base import devices, precision
from raphael.base.config.params import load_config
from raphael.base.stage import device_of, main
from raphael.base.strict import ConfigError
from raphael.systems import train_stage
from raphael.systems.raphael.training import decisive

CLOSE = 2e-3  # of a path's numbers; one rounding more or less, where updates of Muon and AdamW amplify it
QUICK = {"encode", "clip_pretrained", "score", "generate"}  # of `make test`; the others take two minutes
PATHS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
CLOSE_IN_BF16 = 0.1  # of pixels: the experts' plans on a CPU and off it round in other places
STAGES = {"clip_pretrained": "clip", "report_page": "report"}  # whose case has another name
STAGES |= {name: name for name in ("autoencoder", "clip", "encode", "train", "generate", "evaluate")}


@pytest.fixture(scope="module")
def config(project):
    return load_config(project / "params.yaml")


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.setattr(devices, "has_gpu", lambda: True)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(devices, "has_gpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def moved(tmp_path_factory, project):
    """moved(name): what a case did on the pretended GPU. In a process of its own, since its device is registered for
    good; the quick cases share one, and the slow ones."""

    @functools.cache
    def of_group(quick: bool):
        folder = tmp_path_factory.mktemp("devices")
        environment = {**os.environ, "PYTHONPATH": f"{project}{os.pathsep}{project / 'tests'}", "OMP_NUM_THREADS": "1"}
        names = [name for name in CASES if (name in QUICK) == quick]
        asked = [sys.executable, "-m", "truth.device_proof", str(folder / "out.json"), str(folder / "cases"), *names]
        done = subprocess.run(asked, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads((folder / "out.json").read_text())

    return lambda name: of_group(name in QUICK or name == "refusals")[name]


def test_the_pretended_gpu_refuses_what_stayed_behind_and_sees_what_the_cpu_computed(moved):
    said = moved("refusals")["said"]
    assert said.pop("what is right") == "nothing" and len(said) == 5 and set(said.values()) == {"refused"}, said
    assert moved("refusals")["here"] == ["addmm at the tests"]


@pytest.mark.parametrize("name", PATHS)
def test_every_module_and_batch_of_a_path_is_moved_to_the_device(moved, name):
    result = moved(name)
    assert not result["error"], result["error"]
    assert sum(result["there"].values()) > 0, "nothing was computed on the device"
    assert not result["here"], "computed on the CPU though the device is another"


@pytest.mark.parametrize("name", PATHS)
def test_the_device_changes_no_result_beyond_rounding(moved, name):
    assert not moved(name)["error"], moved(name)["error"]
    apart = {
        key: by / size
        for key, (by, size) in moved(name)["differences"].items()
        if by > (CLOSE_IN_BF16 if "bf16" in key else CLOSE) * max(size, 1.0)
    }
    assert moved(name)["differences"] and not apart


@pytest.mark.parametrize("name", [path for path in PATHS if path.values[0] in STAGES])
def test_the_first_line_of_a_stage_says_its_device(moved, name):
    stage = STAGES[name]
    lines = [line for line in moved(name)["printed"].splitlines() if line.startswith(f"{stage}: ")]
    assert lines[0] == f"{stage}: device pretend"


def test_auto_is_the_gpu_where_there_is_one_and_cpu_is_the_cpu_all_the_same(one_gpu):
    assert devices.resolve("auto") == devices.resolve("cuda") == torch.device("cuda")
    assert devices.resolve("cpu") == torch.device("cpu")


def test_without_a_gpu_auto_is_the_cpu_and_cuda_an_error_of_one_line(no_gpu):
    assert devices.resolve("auto") == devices.resolve("cpu") == torch.device("cpu")
    with pytest.raises(
        ConfigError, match=r"--device: got cuda, but torch \S+ .* sees no GPU here; set it to"
    ) as caught:
        devices.resolve("cuda", "--device")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="device: got 'gpu', expected one of auto, cpu, cuda"):
        devices.resolve("gpu")


@pytest.mark.parametrize(
    ("device", "use_gpu", "workers", "expected"),
    [
        ("auto", False, 0, "cuda"),
        ("cuda", False, 0, "cuda"),
        ("cpu", False, 0, "cpu"),
        ("auto", True, 0, "cuda"),
        ("cuda", True, 0, "cuda"),
        ("auto", False, 2, "cpu"),  # Ray's workers have what use_gpu gives them
        ("cpu", False, 2, "cpu"),
        ("auto", True, 2, "cuda"),
        ("cuda", True, 2, "cuda"),
        ("cpu", True, 0, "device: got cpu with train.use_gpu true"),
        ("cpu", True, 2, "device: got cpu with train.use_gpu true"),
        ("cuda", False, 2, "device: got cuda with train.use_gpu false and num_workers 2"),
    ],
)
def test_device_and_use_gpu_of_a_training_agree_or_are_refused(one_gpu, config, device, use_gpu, workers, expected):
    asked = replace(config, device=device, train=replace(config.train, use_gpu=use_gpu, num_workers=workers))
    if ":" in expected:
        with pytest.raises(ConfigError, match=expected):
            train_stage.device_of(asked)
    else:
        assert train_stage.device_of(asked) == torch.device(expected)


def test_the_gpus_of_a_cluster_are_not_looked_for_here(no_gpu, config, monkeypatch):
    from data_pipeline.score import stage as score

    train = replace(config.train, use_gpu=True, num_workers=8)
    assert train_stage.device_of(replace(config, device="cuda", train=train)).type == "cuda"
    assert devices.describe(torch.device("cuda")) == "cuda"
    ray = replace(config.pipeline, engine="ray")
    scored = replace(config, device="cuda", score=replace(config.score, watermark="marks"), pipeline=ray)
    with pytest.raises(ConfigError, match="sees no GPU here"):
        score.device_of(scored)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert score.device_of(scored).type == "cuda"
    monkeypatch.delenv("RAY_ADDRESS")
    assert score.device_of(replace(scored, pipeline=replace(ray, address="10.0.0.1:6379"))).type == "cuda"


def test_the_device_is_no_part_of_what_a_training_is_known_by(config):
    assert decisive(replace(config, device="cuda")) == decisive(config)


def test_no_stage_of_the_pipeline_becomes_out_of_date_by_the_device(project):
    from flows.pipelines.dvc_stages import read_pipeline

    assert not [name for name, entry in read_pipeline(project).items() if "device" in entry.params]


def test_settings_of_before_load_with_the_device_auto(tmp_path, project):
    text = (project / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text("".join(line for line in text.splitlines(True) if line[:7] != "device:"))
    assert load_config(tmp_path / "params.yaml").device == "auto"
    (tmp_path / "params.yaml").write_text(text.replace("device: auto", "device: tpu"))
    with pytest.raises(ConfigError, match="device: got 'tpu', expected one of auto, cpu, cuda"):
        load_config(tmp_path / "params.yaml")


@pytest.fixture
def workspace(tmp_path, project, monkeypatch):
    monkeypatch.chdir(tmp_path)  # main() changes folder; this one is undone
    (tmp_path / "params.yaml").write_text((project / "params.yaml").read_text())
    return ["--params", str(tmp_path / "params.yaml")]


def test_the_option_wins_over_the_settings_and_is_what_the_stage_sees(workspace, one_gpu, capsys):
    seen = []
    toy = lambda config, stage: seen.append(config.device)  # noqa: E731
    assert main("toy", toy, "", workspace, device=lambda config: torch.device("cpu")) == 0
    assert main("toy", toy, "", [*workspace, "--device", "cpu"], device=device_of) == 0
    assert seen == ["auto", "cpu"] and capsys.readouterr().out == "toy: device cpu\n" * 2


def test_a_stage_asks_for_its_device_before_it_does_anything(workspace, no_gpu, capsys):
    assert main("toy", lambda *_: pytest.fail("it ran"), "", [*workspace, "--device", "cuda"], device=device_of) == 1
    assert capsys.readouterr().err.startswith("toy: error: device: got cuda, but torch")


def test_a_stage_of_pure_data_says_no_device_and_has_no_such_option(workspace, capsys):
    assert main("toy", lambda *_: None, "", workspace) == 0 and capsys.readouterr().out == ""
    with pytest.raises(SystemExit):
        main("toy", lambda *_: None, "", [*workspace, "--device", "cpu"])


@pytest.mark.parametrize("module", ["raphael.base.devices", "raphael.base.stage", "data_pipeline.source.__main__"])
def test_where_nothing_is_computed_torch_is_not_imported(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_precision_of_none_leaves_the_callers_autocast_alone():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with precision.autocast(None, "cpu"):
            assert (x @ x).dtype == torch.bfloat16
        with precision.autocast("fp32", "cpu"):
            assert (x @ x).dtype == torch.float32
    with precision.autocast(None, "cpu"):
        assert (x @ x).dtype == torch.float32


def test_true_float32_leaves_cudnn_on_and_every_other_flag_as_it_was():
    cudnn = torch.backends.cudnn
    before = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    with precision.without_tf32():
        assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic) == before[:3] and not cudnn.allow_tf32
    assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == before
