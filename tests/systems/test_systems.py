"""The seam of systems: found by name, trained part by part, told from each other by their checkpoints."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from truth.training_workspace import ROOT, merge, write_workspace

import raphael.systems
from flows.demo import choose_workspace, overlays_of
from flows.workspace.folder import make_workspace
from flows.workspace.settings import flat, merged
from raphael.base import records
from raphael.base.checkpoint.folder import read_checkpoint, write_checkpoint
from raphael.base.checkpoint.home import CheckpointHome
from raphael.base.config.params import ModelConfig, load_config
from raphael.base.config.preset import Preset
from raphael.base.config.systems import Part, System, expect_system, find_system, system_of
from raphael.base.config.unet import PlainUNetConfig
from raphael.base.probe_set import ProbeSet
from raphael.base.stage import Stage, StageError
from raphael.base.strict import ConfigError
from raphael.systems import SYSTEMS, module_of, train_stage
from raphael.systems.export import weights_of
from raphael.systems.job import loop_of

LOOP = {
    "num_images": 128, "batch_size": 8, "log_every_images": 16, "checkpoint_every_images": 16, "warmup_images": 16,
    "sample_every_images": 32, "ema_more_decays": [0.5],
}  # fmt: skip
PAIR = {"system": "pair", "preset": "none", "settings": {"width": 6}}


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch):
    """The system `pair` of the tests, among the others. Returns its training.py."""
    home = str(ROOT / "tests/truth/systems")
    monkeypatch.setattr(raphael.systems, "__path__", [*raphael.systems.__path__, home])
    monkeypatch.setattr(raphael.systems, "SYSTEMS", (*SYSTEMS, "pair"))
    module = module_of("pair", "training")
    monkeypatch.setattr(module, "FAIL_AT", {})
    return module


def pair_workspace(folder: Path) -> Path:
    write_workspace(folder, {"train": {"num_workers": 0, "loop": LOOP}})
    settings = yaml.safe_load((folder / "params.yaml").read_text())
    settings["model"] = PAIR
    del settings["train"]["settings"]  # RAPHAEL's
    (folder / "params.yaml").write_text(yaml.safe_dump(settings))
    return folder


def run_stage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    train_stage.run(load_config("params.yaml"), Stage("train", folder, system="pair"))


def published(folder: Path) -> dict[str, str]:
    files = [file for place in ("models/raphael", "reports") for file in (folder / place).rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_every_system_of_the_list_says_what_it_is_and_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom raphael.systems import SYSTEMS, find\n"
        "found = [find(name) for name in SYSTEMS]\n"
        "print([system.name for system in found] == list(SYSTEMS), [m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True []\n", done.stdout + done.stderr
    packages = {file.parent.name for file in (ROOT / "raphael/systems").glob("*/system.py")}
    assert packages == set(SYSTEMS)
    for name in SYSTEMS:
        assert {"training", "identity", "described"} <= set(vars(module_of(name, "training")))


def test_a_look_inside_a_system_that_has_nothing_to_show_is_refused_before_an_image_is_drawn() -> None:
    from raphael.base.config.preset import DiffusionConfig
    from raphael.net.plain import PlainBlock
    from raphael.net.unet import UNet

    sizes = {"channels": (8, 8), "res_blocks": 1, "attention_levels": (1,), "head_dim": 4, "norm_groups": 2}
    unet = UNet(PlainUNetConfig(latent_channels=3, **sizes, vector_dim=1), PlainBlock)
    diffusion = DiffusionConfig(10, "cosine", 1e-4, 0.02, "v", zero_terminal_snr=True)
    meta = {"classes": ["circle"], "picture": {"sizes_px": [[8, 8]]}}
    pipeline, asked = module_of("ddpm", "pipeline").PIPELINE(unet, diffusion, meta), []
    unet.register_forward_hook(lambda *given: asked.append(1))
    with pytest.raises(ValueError, match="collect: got true, expected false: the system ddpm has no maps"):
        pipeline("circle", num_inference_steps=2, collect=True)
    assert not asked and not pipeline.can_look_inside
    pipeline("circle", num_inference_steps=2)
    assert asked, "without it the images are drawn"


def test_the_fields_that_a_system_names_are_those_of_records() -> None:
    known = {value for name, value in vars(records).items() if name.isupper() and isinstance(value, str)}
    for name in SYSTEMS:
        fields = [(field,) if isinstance(field, str) else field for field in find_system(name).fields]
        assert fields and {one for names in fields for one in names} <= known, name


@pytest.mark.parametrize("preset", ["tiny-debug", "scenes", "without edge heads"])
def test_raphael_names_the_fields_that_its_objective_reads(preset: str, tmp_path: Path) -> None:
    from raphael.objectives.denoising import needed_fields

    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    if preset == "without edge heads":
        changed = yaml.safe_load((ROOT / "raphael/presets/tiny-debug.yaml").read_text())
        changed["unet"]["edge_tokens"] = "none"
        (tmp_path / "preset.yaml").write_text(yaml.safe_dump(changed))
        preset, settings["encode"]["fields"] = str(tmp_path / "preset.yaml"), ["moments", "token_ids"]
    settings["model"] = {"preset": preset}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    config = load_config(tmp_path / "params.yaml")
    assert find_system("raphael").needs(config) == needed_fields(config.model.load().unet)


def test_settings_whose_records_would_lack_what_the_system_reads_say_what_to_set(tmp_path: Path) -> None:
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    settings["encode"]["fields"] = ["moments"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    message = r"encode.fields: got \['moments'\] with model.system raphael, expected token_ids, edges too: it trains "
    with pytest.raises(ConfigError, match=message + r"on them; set encode.fields: \[moments, token_ids, edges\]"):
        load_config(tmp_path / "params.yaml")


def test_the_stage_train_asks_the_records_for_the_systems_fields_before_it_begins(tmp_path: Path, monkeypatch) -> None:
    config = write_workspace(tmp_path, {"train": {"num_workers": 0, "loop": LOOP}})
    system = replace(find_system("raphael"), more_fields=lambda config: ("label",))
    monkeypatch.setattr(train_stage, "find_system", lambda name: system)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match="records without the field label.*encode.fields.* and run the stage encode"):
        train_stage.open_folders(config, Stage("train", tmp_path))


def test_an_unknown_system_is_named_with_the_list_and_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model.system: got 'rafael', expected one of raphael.*; did you mean raphael"
    ):
        find_system("rafael")
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(merge(settings, {"model": {"system": "nothing"}})))
    with pytest.raises(ConfigError, match=r"params.yaml: model.system: got 'nothing', expected one of raphael"):
        load_config(tmp_path / "params.yaml")
    with pytest.raises(ConfigError, match="SYSTEM: got 'raphel'.*did you mean raphael"):
        choose_workspace("scenes", "", "raphel")


def test_an_overlay_of_a_system_that_is_not_there_gets_the_list(tmp_path: Path) -> None:
    (tmp_path / "params.other.yaml").write_text("model: {system: other, settings: {width: 3}}\n")
    with pytest.raises(ConfigError, match=r"model.system: got 'other', expected one of raphael"):
        make_workspace(tmp_path / "space", [tmp_path / "params.other.yaml"])
    assert not (tmp_path / "space/params.yaml").exists()


def test_settings_without_a_system_are_raphaels_and_so_are_checkpoints(tmp_path: Path) -> None:
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    del settings["model"]["system"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    config = load_config(tmp_path / "params.yaml")
    assert config.model.system == "raphael" and isinstance(config.model.load(), Preset)
    assert system_of({"unet": {}}) == "raphael" and system_of({"system": "pair"}) == "pair"
    assert overlays_of("raphael") == []


def test_settings_of_another_system_are_not_raphaels(tmp_path: Path, pair) -> None:
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())

    own = settings["train"].pop("settings")

    def load(**model: object):
        train = settings["train"] | ({"settings": own} if "system" not in model else {})
        (tmp_path / "params.yaml").write_text(yaml.safe_dump({**settings, "model": model, "train": train}))
        return load_config(tmp_path / "params.yaml").model.load()

    assert load(**PAIR).width == 6
    with pytest.raises(ConfigError, match=r"unknown key weidth; did you mean width.*\(model.system pair\)"):
        load(**{**PAIR, "settings": {"weidth": 6}})
        load_config(tmp_path / "params.yaml").model.load()
    with pytest.raises(ConfigError, match=r"model.settings: got width, expected unet.latent_channels"):
        load(preset="tiny", settings={"width": 6})


def test_a_system_named_over_the_settings_of_another_says_how_to_get_its_own(tmp_path: Path) -> None:
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    settings["model"]["system"] = "ddpm"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    message = r"train.settings.balance: a setting of the training of raphael, which the system ddpm does not read: "
    with pytest.raises(
        ConfigError, match=message + r"take it out \(model.system ddpm\); make demo SYSTEM=ddpm takes params.ddpm.yaml$"
    ):
        load_config(tmp_path / "params.yaml")
    assert (ROOT / "params.ddpm.yaml").is_file()


@pytest.mark.parametrize(
    ("system", "place", "key", "said"),
    [
        ("raphael", "train", "edge_weight", "expected in train.settings: write train.settings.edge_weight$"),
        ("ddpm", "train", "label_drop", "expected in train.settings: write train.settings.label_drop$"),
        ("ddpm", "model.settings", "label_drop", "expected in train.settings: write train.settings.label_drop$"),
        ("ddpm", "train", "caption_drop", r"of raphael, which the system ddpm does not read: take it out .*ddpm\)$"),
        (
            "ddpm",
            "train.settings",
            "balance",
            r"of raphael, which the system ddpm does not read: take it out .*ddpm\)$",
        ),
        ("raphael", "train.settings", "label_drop", r"of ddpm, which the system raphael does not read: take it out"),
    ],
)
def test_a_setting_of_a_training_is_refused_where_nobody_would_read_it(tmp_path, system, place, key, said) -> None:
    overlay = {} if system == "raphael" else flat(ROOT / f"params.{system}.yaml")
    text = merged(ROOT / "params.yaml", overlay)
    (tmp_path / "params.yaml").write_text(text)
    load_config(tmp_path / "params.yaml")
    settings = yaml.safe_load(text)
    section = settings
    for name in place.split("."):
        section = section[name]
    section[key] = 0.5
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    where = re.escape(f"params.yaml: {place}.{key}: a setting of the training ")
    with pytest.raises(ConfigError, match=where + ".*" + said) as caught:
        load_config(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)


def test_the_name_of_a_training_is_that_of_before_its_settings_had_a_section_of_their_own() -> None:
    """Unfinished work and trained models of then are found again: each system's mapping as it was."""
    from raphael.systems.ddpm.training import identity as of_ddpm
    from raphael.systems.raphael.training import decisive

    config = load_config(ROOT / "params.yaml")
    train, own = config.train, dict(config.train.settings)
    assert not own.pop("phases") and own.pop("num_probe")
    shared = {"seed": train.seed, "num_heldout": train.num_heldout, "patience": train.patience}
    assert decisive(config) == {**shared, "init_sha256": "", "loop": train.loop.decisive(), **own}
    overlay = yaml.safe_load((ROOT / "params.ddpm.yaml").read_text())
    own = overlay["train"]["settings"]
    config = replace(config, model=ModelConfig(**overlay["model"]), train=replace(train, settings=own))
    settings = of_ddpm(config, None)[0]["settings"]
    assert list(settings) == ["unet", "diffusion", "label_drop", "timestep_shift"]
    assert settings["label_drop"] == own["label_drop"] and settings["timestep_shift"] == own["timestep_shift"]


def test_an_overlay_may_set_what_only_its_system_knows(tmp_path: Path, pair) -> None:
    (tmp_path / "params.pair.yaml").write_text(yaml.safe_dump({"model": {**PAIR, "settings": {"width": 5, "gain": 2}}}))
    folder = make_workspace(tmp_path / "space", [tmp_path / "params.pair.yaml"], {"model.settings.gain": 3.0})
    loaded = load_config(folder / "params.yaml").model.load()
    assert (loaded.width, loaded.gain) == (5, 3.0)
    assert not load_config(folder / "params.yaml").train.settings, "RAPHAEL's are gone with RAPHAEL"


def test_parts_are_named_once_and_need_only_what_comes_before() -> None:
    system = find_system("raphael")
    with pytest.raises(AssertionError, match="needs"):
        replace(system, parts=(Part("a", 0.5, needs=("b",)), Part("b", 0.5)))
    with pytest.raises(AssertionError, match="shares"):
        replace(system, parts=(Part("a", 0.5), Part("b", 0.6)))
    assert isinstance(system, System)


def test_a_part_takes_its_share_of_the_images_in_whole_batches() -> None:
    loop = load_config(ROOT / "params.yaml").train.loop
    assert loop_of(loop, 1.0) is loop
    shares = [loop_of(loop, share) for share in (0.25, 0.75)]
    assert sum(part.num_images for part in shares) == loop.num_images
    assert all(part.num_images % loop.batch_size == 0 for part in shares)
    assert loop_of(loop, 1e-9).num_images == loop.batch_size


@pytest.mark.slow
def test_parts_are_trained_one_after_another_and_resume_where_the_machine_failed(tmp_path, monkeypatch, pair) -> None:
    """Killed in the second part, the first is not trained again, and both end in the bytes of a run that was not."""
    whole, broken = pair_workspace(tmp_path / "whole"), pair_workspace(tmp_path / "broken")
    run_stage(whole, monkeypatch)
    model = whole / "models/raphael"
    _, meta = read_checkpoint(model)
    assert meta["system"] == "pair" and list(meta["parts"]) == ["mean", "rest"] and meta["images_seen"] == 128
    images = {}
    for name in meta["parts"]:
        groups, about = read_checkpoint(model / name)
        images[name] = about["images_seen"]
        assert set(groups) == {"ema", "ema_0.5", "raw"} and about["part"] == name
        assert set(groups["raw"]) == {"weight", "bias"} and (model / name / "curves.json").is_file()
    assert images == {"mean": 32, "rest": 96}
    report = json.loads((whole / "reports/train.json").read_text())
    assert report["total"] == 128 and {name: part["images"] for name, part in report["parts"].items()} == images

    pair.FAIL_AT["rest"] = 8
    with pytest.raises(RuntimeError, match="the machine is gone"):
        run_stage(broken, monkeypatch)
    (home,) = broken.glob("work/train/*/checkpoints")
    done = CheckpointHome(home / "mean").all()
    assert [path.name for path in done][-1] == f"{32:012d}" and CheckpointHome(home / "rest").all()
    before = {path: path.stat().st_mtime_ns for path in done}
    pair.FAIL_AT.clear()
    run_stage(broken, monkeypatch)
    assert {path: path.stat().st_mtime_ns for path in done} == before, "a finished part is left alone"
    assert published(broken) == published(whole)


def test_a_part_whose_network_is_not_there_is_named_with_what_is() -> None:
    tensors = {"net.weight": torch.ones(1), "head.bias": torch.ones(1)}
    assert list(weights_of(tensors, "net")) == ["weight"]
    with pytest.raises(StageError, match="Part.network: got 'unet', expected .*, which has head, net"):
        weights_of(tensors, "unet")


def test_the_work_of_a_training_in_parts_is_work_that_is_kept(tmp_path: Path) -> None:
    from raphael.base.stage_work import _holds_checkpoints

    (tmp_path / "checkpoints/mean/000000000016").mkdir(parents=True)
    assert _holds_checkpoints(tmp_path)


def test_a_checkpoint_of_another_system_says_which_and_how_to_use_it(tmp_path, capsys, pair, monkeypatch) -> None:
    from raphael.cli import instruments
    from raphael.cli.main import main

    scenes = ProbeSet(np.zeros((1, 8, 8, 3), np.uint8), [["a"]], ["single"], [{}], {})
    monkeypatch.setattr(instruments, "_read_scenes", lambda arguments: scenes)
    folder = tmp_path / "model"
    write_checkpoint(folder, {"ema": {"w": torch.ones(1)}}, {"system": "pair"})
    with pytest.raises(ConfigError, match="got a checkpoint of the system pair, expected one of raphael; it generates"):
        expect_system({"system": "pair"}, folder)
    for command in (["routes", "a"], ["knockouts"], ["swap"]):
        assert main([*command, "--checkpoint", str(folder), "--device", "cpu"]) == 1
        line = capsys.readouterr().err
        assert "got a checkpoint of the system pair, expected one of raphael" in line
        assert f'raphael generate "four" --checkpoint {folder}' in line and line.count("\n") == 1
    assert main(["export", str(folder), "--out", str(tmp_path / "out")]) == 1
    assert "a checkpoint of the system pair" in capsys.readouterr().err
