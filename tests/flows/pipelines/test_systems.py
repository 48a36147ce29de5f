"""The flow full on another system than the default one: the same stages by the same dvc.yaml, with its own settings."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from truth.class_workspace import LOOP, SMALL

from flows.environment import SWITCHES, prepare
from flows.pipelines import full, stages
from flows.pipelines.dvc_stages import out_of_date
from flows.workspace.folder import PROJECT, make_workspace
from raphael.base.config.params import load_config
from raphael.base.pipeline import read_pipeline
from raphael.base.stage import read_json
from raphael.base.strict import ConfigError, flatten


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workspace(tmp_path_factory.mktemp("systems") / "ddpm", [PROJECT / "params.ddpm.yaml"])
    prepare(root)
    return root


def run(root: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict | None) -> list[str]:
    """The stages that the flow's body would have DVC run, in their order."""
    ran: list[str] = []

    def reproduce(root: Path, name: str, *heard: object) -> str:
        ran.append(name)
        return "ran"

    monkeypatch.setattr(stages, "_logger", lambda: logging.getLogger("flows"))
    monkeypatch.setattr(stages, "reproduce", reproduce)
    monkeypatch.setattr(stages, "available", lambda: 1)  # nothing beside anything
    monkeypatch.setattr(stages, "_stage_task", lambda stage, begun: lambda *told: stages._run_stage(*told, begun))
    monkeypatch.setattr(stages, "publish_summary", lambda root, outcome: None)
    monkeypatch.chdir(root)
    full.full.fn(overrides)
    return ran


def test_the_flow_runs_every_stage_of_a_ddpm_by_the_projects_dvc_yaml(ddpm: Path, monkeypatch) -> None:
    changes = {"model.system": "ddpm", "train.settings.label_drop": 0.3, "model.settings.unet.res_blocks": 2}
    assert run(ddpm, monkeypatch, changes) == full.STAGES == list(read_pipeline(ddpm))
    config = load_config(ddpm / "params.yaml")
    assert config.training().label_drop == 0.3 and config.model.load().unet.res_blocks == 2
    assert (ddpm / "dvc.yaml").read_bytes() == (PROJECT / "dvc.yaml").read_bytes()
    assert set(out_of_date(ddpm)) == set(full.STAGES), "DVC finds the settings and versions that each stage names"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"model.system": "raphael"}, "unet.latent_channels|encode.fields|train.settings"),
        ({"model.system": "dppm"}, "model.system: got 'dppm', expected one of raphael, ddpm.*did you mean ddpm"),
        ({"train.settings.edge_weight": 0.1}, "of the training of raphael, which the system ddpm does not read"),
        ({"train.caption_drop": 0.1}, "unknown key train.caption_drop"),
        ({"evaluate.num_probe": 20}, "evaluate.num_probe: got 20, expected 0"),
    ],
)
def test_an_override_that_the_system_cannot_take_is_one_line_and_changes_nothing(
    ddpm: Path, monkeypatch, overrides: dict, said: str
) -> None:
    before = (ddpm / "params.yaml").read_bytes()
    with pytest.raises(ConfigError, match=said) as caught:
        run(ddpm, monkeypatch, overrides)
    assert "\n" not in str(caught.value) and (ddpm / "params.yaml").read_bytes() == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_chain_of_a_ddpm_runs_through_prefect_at_debug_size(tmp_path: Path) -> None:
    debug = {
        "source.scenes.num_rows": 120, "source.scenes.num_heldout_prompts": 4, "source.scenes.num_probe_scenes": 6,
        "picture.sizes_px": [[32, 32]], "train.num_workers": 0, "generate.steps": 2, "generate.images_per_prompt": 2,
        **{f"model.settings.{key}": value for key, value in flatten(SMALL).items()},
        **{f"train.loop.{key}": value for key, value in LOOP.items()},
    }  # fmt: skip
    root = make_workspace(tmp_path / "ddpm", [PROJECT / "params.ddpm.yaml"], debug)
    command = [sys.executable, "-m", "flows.demo", "--workspace", str(root)]
    env = {**os.environ, **SWITCHES, "PREFECT_HOME": str(root / ".run/prefect"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert out_of_date(root) == {}
    measured = read_json(root / "reports/evaluate.json")
    assert {"class_accuracy", "class_accuracy_ceiling", "fd_random64_12"} <= measured.keys()
    assert json.loads((root / "models/raphael/meta.json").read_text())["system"] == "ddpm"
    assert (root / "reports/index.html").is_file()
