"""What a training, DVC and `make lint` say after each kind of edit, in a copied workspace; and what is exported when
little is trained."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from truth.training_workspace import ROOT, merge, write_workspace

from flows.pipelines.dvc_stages import DVC, out_of_date
from flows.workspace.folder import make_workspace
from raphael.base.checkpoint.folder import read_checkpoint
from raphael.base.code.graph import CodeGraph
from raphael.base.code.stage_code import FILE
from raphael.base.config.params import load_config
from raphael.base.stage import Stage
from raphael.base.strict import read_yaml

LOOP = {
    "num_images": 32, "batch_size": 8, "log_every_images": 16, "checkpoint_every_images": 16, "sample_every_images": 32,
    "warmup_images": 16,
}  # fmt: skip
SETTINGS = {"train": {"num_workers": 0, "settings": {"edge_weight": 0.1}, "loop": LOOP}}
LOSS = "raphael/objectives/denoising.py"


def call(root: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True, timeout=600)


def train(root: Path, *options: str) -> subprocess.CompletedProcess:
    return call(root, sys.executable, "-m", "raphael.train", *options)


def check(root: Path) -> str:
    """What `make lint` says of the versions."""
    return call(root, sys.executable, "-m", "raphael.base.code.stage_code", "check").stderr


def edit(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new, 1))


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def trainings(root: Path) -> dict[str, dict[str, str]]:
    """Every training's checkpoints."""
    return {path.parent.name: digests(path) for path in sorted((root / "work/train").glob("*/checkpoints"))}


def change(root: Path, changes: dict) -> None:
    import yaml

    settings = read_yaml(root / "params.yaml")
    (root / "params.yaml").write_text(yaml.safe_dump(merge(settings, changes)))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the project's code, a finished training that DVC holds for up to date, and nothing to judge."""
    root = make_workspace(tmp_path_factory.mktemp("identity") / "template", [ROOT / "params.debug.yaml"])
    write_workspace(root, SETTINGS)
    call(root, sys.executable, "-m", "raphael.base.code.stage_code", "refresh")
    call(root, sys.executable, "-m", "raphael.base.code.stage_code", "changed", "all", "--same")
    done = train(root)
    assert done.returncode == 0, done.stderr
    done = call(root, *DVC, "commit", "--force", "train")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train" not in out_of_date(root) and check(root) == ""
    return root


@pytest.fixture
def trained(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "workspace", symlinks=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_edit_that_cannot_matter_leaves_the_training_up_to_date(trained: Path) -> None:
    before, model = trainings(trained), digests(trained / "models/raphael")
    edit(trained, "raphael/diffusion/samplers.py", "\n\n\n", "\n\n\n# A comment.\n")
    edit(trained, LOSS, '"""RAPHAEL', '"""This is RAPHAEL')
    edit(trained, "data_pipeline/common/rules.py", "\n\n\n", "\n\n\nMORE = 1\n\n\n")
    (trained / "raphael/net/new.py").write_text("VALUE = 1\n")
    assert check(trained) == "" and "train" not in out_of_date(trained)
    done = train(trained)
    assert done.returncode == 0 and "the code of this stage" not in done.stdout + done.stderr
    assert trainings(trained) == before and digests(trained / "models/raphael") == model


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_changed_loss_passes_off_no_old_work_and_throws_none_away(trained: Path) -> None:
    before, model = trainings(trained), digests(trained / "models/raphael")
    original = (trained / LOSS).read_text()
    edit(trained, LOSS, '"edge": self', '"edge": 1000 * self')
    # not said yet: lint knows, DVC does not, and the stage refuses
    line = check(trained)
    assert line.startswith("train: the code of this stage changed since version") and LOSS in line
    assert "train" not in out_of_date(trained)
    done = train(trained)
    assert done.returncode == 1
    assert f"({next(iter(before))}, version" in done.stderr.replace("work/train/", "") and LOSS in done.stderr
    assert "the code of this stage changed since this work was made" in done.stderr
    assert "changed train --same" in done.stderr and "--results" in done.stderr and done.stderr.count("\n") == 1
    assert trainings(trained) == before and digests(trained / "models/raphael") == model
    # said
    done = call(trained, sys.executable, "-m", "raphael.base.code.stage_code", "changed", "train", "--results")
    assert done.returncode == 0 and check(trained) == ""
    assert "train" in out_of_date(trained)
    done = train(trained)
    assert done.returncode == 0, done.stderr
    after = trainings(trained)
    (name,) = before
    assert len(after) == 2 and after[name] == before[name], "the old training stays as it was"
    assert digests(trained / "models/raphael")["meta.json"] != model["meta.json"]
    # taken back: the restored code is not that of the raised version
    (trained / LOSS).write_text(original)
    assert LOSS in check(trained)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tried_anew_and_taken_back_the_former_training_is_exported_as_it_was(trained: Path) -> None:
    before, model = trainings(trained), digests(trained / "models/raphael")
    original = (trained / LOSS).read_text()
    edit(trained, LOSS, '"edge": self', '"edge": 1000 * self')
    done = train(trained, "--anew")
    assert done.returncode == 0 and "the code of this stage changed since version" in done.stdout, done.stderr
    changed = digests(trained / "models/raphael")
    assert changed != model and len(trainings(trained)) == 2
    (trained / LOSS).write_text(original)
    assert "its result was made by code that is not recorded" in check(trained)
    done = train(trained)
    assert done.returncode == 0 and "was made by other code and is left as it is" in done.stdout, done.stderr
    assert digests(trained / "models/raphael") == model and trainings(trained).items() > before.items()
    assert check(trained) == ""


WATCHED = """
import inspect, json, runpy, sys, threading
from pathlib import Path

root, seen = Path.cwd(), set()

def watch(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_flags & inspect.CO_NEWLOCALS and code.co_filename.startswith(str(root)):
        seen.add((code.co_filename, code.co_qualname.split(".")[0]))

sys.argv = ["train"]
threading.setprofile(watch)
sys.setprofile(watch)
try:
    runpy.run_module("raphael.train", run_name="__main__", alter_sys=True)
finally:
    sys.setprofile(None)
    Path("seen.json").write_text(json.dumps(sorted(seen)))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_function_runs_in_a_training_that_its_digest_does_not_hold(trained: Path) -> None:
    shutil.rmtree(trained / "work/train")
    done = call(trained, sys.executable, "-c", WATCHED)
    seen = {
        (".".join(Path(file).relative_to(trained).with_suffix("").parts).removesuffix(".__init__"), name)
        for file, name in json.loads((trained / "seen.json").read_text())
    }
    assert len(seen) > 100, done.stderr
    table = json.loads((trained / FILE).read_text())
    known = CodeGraph(trained, table["left_out"]).definitions("raphael.train", table["stages"]["train@raphael"]["also"])
    unknown = {(module, name) for module, name in seen - known if module not in table["left_out"] and name[0] != "<"}
    assert not unknown


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_settings_of_the_grids_do_not_touch_a_training(trained: Path) -> None:
    before, model = trainings(trained), digests(trained / "models/raphael")
    change(trained, {"generate": {"steps": 3}})
    assert "train" not in out_of_date(trained)
    done = train(trained)
    assert done.returncode == 0 and trainings(trained) == before, done.stderr
    assert digests(trained / "models/raphael") == model


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_another_rate_trains_beside_the_former_training_which_stays(trained: Path) -> None:
    before = trainings(trained)
    change(trained, {"train": {"loop": {"learning_rate": 3e-3}}})
    assert "train" in out_of_date(trained)
    done = train(trained)
    assert done.returncode == 0 and len(trainings(trained)) == 2 and trainings(trained).items() > before.items()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_with_three_tensors_trained_all_are_exported_and_the_folder_generates(tmp_path, monkeypatch) -> None:
    from raphael.generate.pipeline import RaphaelPipeline
    from raphael.systems import train_stage as stage_train
    from raphael.systems.raphael import training as denoiser

    write_workspace(tmp_path, SETTINGS)
    built = denoiser.build_denoising
    start: dict[str, torch.Tensor] = {}
    names: list[str] = []

    def three(*arguments):
        objective, records = built(*arguments)
        parameters = dict(objective.unet.named_parameters())
        names[:] = [
            name for name in parameters if name.endswith(("cross_attention.q.weight", "cross_attention.k.weight"))
        ][:3]
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in names)
        start.update({name: tensor.clone() for name, tensor in objective.unet.state_dict().items()})
        return objective, records

    monkeypatch.setattr(denoiser, "build_denoising", three)
    monkeypatch.chdir(tmp_path)
    stage_train.run(load_config("params.yaml"), Stage("train", tmp_path))
    groups, meta = read_checkpoint(tmp_path / "models/raphael")
    assert len(names) == 3
    for group, tensors in groups.items():
        assert tensors.keys() == start.keys(), group
        changed = {name for name, tensor in tensors.items() if not torch.equal(tensor, start[name])}
        assert changed == set(names), group
    assert meta["revisions"] and meta["git_revision"] == meta["revisions"][-1]["git_revision"]
    images = RaphaelPipeline.from_pretrained(tmp_path / "models/raphael")("a red circle", num_inference_steps=1).images
    assert images[0].size == (32, 32)
    stage_train.run(load_config("params.yaml"), Stage("train", tmp_path))  # from its checkpoint
    again, _ = read_checkpoint(tmp_path / "models/raphael")
    assert all(torch.equal(tensor, groups["raw"][name]) for name, tensor in again["raw"].items())
