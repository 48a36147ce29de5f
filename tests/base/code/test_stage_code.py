"""Edits of a copied project, as `make lint` and DVC's table see them; runs are in tests/train/test_identity.py."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from raphael.base.code.stage_code import FILE, StageCode, Table, entries_of, faults, main, programs_of
from raphael.base.stage import Stage

PROJECT = Path(__file__).resolve().parents[3]
IGNORED = shutil.ignore_patterns("__pycache__")
LOSS = "raphael/objectives/denoising.py"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project's code, its changes judged, in a folder without git."""
    for name in ("raphael", "data_pipeline"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=IGNORED)
    if (cache := PROJECT / "raphael/__pycache__/code_summaries").exists():
        (tmp_path / "raphael/__pycache__").mkdir()
        shutil.copy(cache, tmp_path / "raphael/__pycache__")
    shutil.copy(PROJECT / "dvc.yaml", tmp_path)
    table = Table(tmp_path)
    table.refresh(entries_of(tmp_path))
    for stage in table.stages:
        table.record(stage, results_change=False)
    table.write()
    return tmp_path


def edit(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new, 1))


def heavier_edges(root: Path) -> None:
    edit(root, LOSS, '"edge": self', '"edge": 1000 * self')


def test_every_stage_of_the_pipeline_has_a_version_that_dvc_sees_and_its_code_is_the_recorded_one() -> None:
    assert faults(PROJECT, PROJECT / "nowhere") == []
    assert list(Table().stages) == list(entries_of(PROJECT))
    assert {name.partition("@")[0] for name in Table().stages} == set(programs_of(PROJECT))


def test_edits_that_cannot_change_a_result_need_no_word(copy: Path) -> None:
    edit(copy, "raphael/diffusion/samplers.py", "\n\n\n", "\n\n\n# A comment.\n")
    edit(copy, "data_pipeline/select/stage.py", "\n\n\n", "\n\n\n# A comment.\n")
    edit(copy, "raphael/objectives/adversarial.py", '"""', '"""Of patches. ')
    edit(copy, LOSS, "import torch\n", "import torch\n\n\n\n")
    (copy / "raphael/net/new.py").write_text("VALUE = 1\n")
    assert faults(copy, copy) == []


def test_code_of_one_stage_concerns_that_stage_alone(copy: Path) -> None:
    edit(
        copy,
        "data_pipeline/select/stage.py",
        "def run(config: Config, stage: Stage) -> None:\n",
        "def run(config, stage):\n    1 + 1\n",
    )
    edit(copy, "raphael/objectives/adversarial.py", "import torch\n", "import torch\n\ntorch.set_num_threads(1)\n")
    named = [line.split(":")[0] for line in faults(copy, copy)]
    assert "select" in named and "autoencoder" in named and not {"download", "score", "train", "generate"} & set(named)


def test_a_changed_loss_fails_the_check_until_someone_says_what_it_means(copy: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(copy)
    before = Table(copy).code("train").version
    heavier_edges(copy)
    assert main(["check"], copy) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"train: the code of this stage changed since version {before} was recorded: {LOSS};")
    assert "changed train --same" in line and f"--results (they change: version {before + 1})" in line
    assert main(["changed", "train", "--results"], copy) == 0 and main(["check"], copy) == 0
    assert Table(copy).code("train").version == before + 1, "the number that DVC and the work's folder see"


def test_said_to_be_the_same_the_number_stays_and_former_work_counts(copy: Path) -> None:
    before = Table(copy).code("train")
    heavier_edges(copy)
    assert main(["changed", "all", "--same"], copy) == 0
    after = Table(copy).code("train")
    assert after.version == before.version and before.digest in after.known and after.declared
    assert main(["changed", "train", "--results"], copy) == 0
    assert before.digest not in Table(copy).code("train").known


def test_a_moved_module_needs_no_word_on_results_and_refresh_takes_its_name_over(copy: Path) -> None:
    before = Table(copy).code("train")
    (copy / "raphael/objectives/denoise").mkdir()
    (copy / "raphael/objectives/denoise/__init__.py").touch()
    (copy / LOSS).rename(copy / "raphael/objectives/denoise/loss.py")
    for file in (copy / "raphael").rglob("*.py"):
        text = re.sub(r"raphael\.objectives\.denoising\b", "raphael.objectives.denoise.loss", file.read_text())
        file.write_text(text)
    (copy / "raphael/train/__main__.py").rename(copy / "raphael/train/run.py")
    edit(copy, "dvc.yaml", "python -m raphael.train\n", "python -m raphael.train.run\n")
    assert any("has no entry for it as raphael.train.run" in line for line in faults(copy, copy))
    assert main(["refresh"], copy) == 0 and faults(copy, copy) == []
    after = Table(copy).code("train")
    assert after.digest == before.digest and after.version == before.version
    assert "raphael.objectives.denoise.loss" in Table(copy).stages["train@raphael"]["files"]


def another_system(root: Path, name: str, lines: str) -> Path:
    """A package with a training of its own; nothing is imported, so it need not run."""
    folder = root / "raphael/systems" / name
    folder.mkdir()
    (folder / "__init__.py").write_text('"""Another."""\n')
    (folder / "system.py").write_text("SYSTEM = 1\n")
    (folder / "training.py").write_text(lines)
    return folder


def test_each_system_has_its_own_version_of_the_stages_that_ask_it(copy: Path, capsys) -> None:
    """Its training's code counts for its own training; another system's does not, and the loop's counts for all."""
    before = Table(copy).code("train")
    folder = another_system(copy, "other", "def training(job):\n    return 1\n")
    assert any(line.startswith("train@other: ") and "refresh" in line for line in faults(copy, copy))
    assert main(["refresh"], copy) == 0 and faults(copy, copy) == []
    mine, theirs = Table(copy).code("train"), Table(copy).code("train", "other")
    assert mine.digest == before.digest and mine.version == before.version
    assert (theirs.label, theirs.version) == ("train@other", 1) and theirs.digest != mine.digest
    assert "raphael.systems.other.training" in theirs.files and "raphael.systems.other.training" not in mine.files
    assert "raphael.systems.raphael.training" in mine.files and "raphael.systems.raphael.training" not in theirs.files
    assert Table(copy).code("encode", "other").label == "encode", "a stage that asks no system has one entry"

    edit(copy, "raphael/systems/other/training.py", "return 1", "return 2")
    (line,) = faults(copy, copy)
    assert line.startswith("train@other: the code of this stage changed") and "changed train@other --same" in line
    assert main(["changed", "train@other", "--results"], copy) == 0 and faults(copy, copy) == []
    assert Table(copy).code("train", "other").version == 2 and Table(copy).code("train").version == before.version
    (folder / "evaluate.yaml").write_text("name: other\n")
    edit(copy, "raphael/systems/__init__.py", "SYSTEMS = (", 'SYSTEMS = ("other", ')
    named = {line.split(":")[0] for line in faults(copy, copy)}
    assert named == {"evaluate@other", "report@other"}, "its files are its own, and so is its name in the list"
    edit(copy, "raphael/train/meter.py", "import time\n", "import time\n\nprint(time)\n")
    named = {line.split(":")[0] for line in faults(copy, copy)}
    assert {"train", "train@other"} <= named
    shutil.rmtree(folder)
    assert any("has an entry for it, dvc.yaml has not" in line for line in faults(copy, copy))


def test_a_table_from_before_there_were_systems_keeps_its_versions_and_digests(copy: Path) -> None:
    table = json.loads((copy / FILE).read_text())
    theirs = {name for name in table["stages"] if "@" in name and not name.endswith("@raphael")}
    old = {name.partition("@")[0]: entry for name, entry in table["stages"].items() if name not in theirs}
    old["train"]["version"], old["train"]["same"] = 7, ["of old"]
    (copy / FILE).write_text(json.dumps({**table, "stages": old}))
    assert Table(copy).code("train").version == 7
    assert main(["refresh"], copy) == 0 and faults(copy, copy) == []
    after = Table(copy).code("train")
    assert after.version == 7 and "of old" in after.known and list(Table(copy).stages) == list(entries_of(copy))


def test_a_new_stage_fails_until_it_has_an_entry_that_dvc_sees(copy: Path) -> None:
    (copy / "data_pipeline/count.py").write_text("if __name__ == '__main__':\n    print(1)\n")
    pipeline = yaml.safe_load((copy / "dvc.yaml").read_text())
    pipeline["stages"]["count"] = {"cmd": "python -m data_pipeline.count"}
    (copy / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    assert [line.split(";")[0][:40] for line in faults(copy, copy)] == [
        f"count: {FILE} has no entry for it as data"[:40],
        "count: dvc.yaml does not see its version"[:40],
    ]
    pipeline["stages"]["count"]["params"] = [{FILE.as_posix(): ["stages.count.version"]}]
    (copy / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    assert main(["refresh"], copy) == 0 and faults(copy, copy) == []


def test_a_result_of_code_that_nobody_recorded_is_named(copy: Path, monkeypatch, capsys) -> None:
    real = Table(copy).code("train")
    tried = StageCode("train", real.version, "tried", {}, real.known, {})
    monkeypatch.setattr(Stage, "code", property(lambda stage: tried))
    Stage("train", copy).report(1, 1)
    (line,) = faults(copy, copy)
    assert "its result was made by code that is not recorded" in line and "dvc repro --force" in line
    monkeypatch.setattr(Stage, "code", property(lambda stage: real))
    Stage("train", copy).report(1, 1)
    assert faults(copy, copy) == []


def test_mistakes_are_one_line(copy: Path, capsys) -> None:
    assert main(["changed", "trian", "--same"], copy) == 1
    assert "got the stage trian, expected all, or some of source" in capsys.readouterr().err
    table = json.loads((copy / FILE).read_text())
    table["left_out"]["raphael.gone"] = "was here once"
    (copy / FILE).write_text(json.dumps(table))
    assert faults(copy, copy) == [f"{FILE}: raphael.gone: no such module or file; correct the name"]
    (copy / FILE).write_text("<<<<<<< HEAD\n")
    assert main(["check"], copy) == 1
    assert "after a merge take either side" in capsys.readouterr().err


def test_a_stage_asks_for_its_code_without_loading_any_of_it_and_in_no_time() -> None:
    import subprocess
    import sys

    program = (
        "import sys, time; from raphael.base.stage import Stage; Stage('train').code\n"
        "begun = time.process_time(); from raphael.base.code import stage_code; stage_code.Table().code('train')\n"
        "loaded = [name for name in ('torch', 'numpy', 'raphael.train') if name in sys.modules]\n"
        "print(loaded, time.process_time() - begun)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PROJECT)
    loaded, seconds = done.stdout.rsplit(" ", 1)
    assert loaded == "[]" and float(seconds) < 0.3, done.stdout + done.stderr
