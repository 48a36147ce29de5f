import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml

from raphael.base.config.params import Config, load_config
from raphael.base.config.preset import PRESETS, RaphaelUNetConfig, load_preset, preset_names
from raphael.base.strict import ConfigError, Range, load, to_dict

PARAMS = Path(__file__).parents[2] / "params.yaml"


@dataclass(frozen=True)
class Inner:
    share: Annotated[float, Range(0, 1)]
    name: Literal["a", "b"]


@dataclass(frozen=True)
class Outer:
    inner: Inner
    sizes: tuple[int, ...]
    limit: int | None
    on: bool = False


GOOD = {"inner": {"share": 0.5, "name": "a"}, "sizes": [1, 2], "limit": None}


def test_what_is_loaded_can_be_written_and_loaded_again():
    outer = load(Outer, GOOD, "f.yaml")
    assert outer == Outer(Inner(0.5, "a"), (1, 2), None, False)
    assert load(Outer, to_dict(outer), "f.yaml") == outer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"innr": 1}, "f.yaml: unknown key innr; did you mean inner? (accepted: inner, sizes, limit, on)"),
        ({"inner": {"share": 0.5}}, "f.yaml: missing key inner.name (one of a, b)"),
        ({"inner": {"share": 1.5, "name": "a"}}, "f.yaml: inner.share: got 1.5, expected a number from 0 to 1"),
        (
            {"inner": {"share": float("nan"), "name": "a"}},
            "f.yaml: inner.share: got nan, expected a number from 0 to 1",
        ),  # noqa: E501
        ({"inner": {"share": "x", "name": "a"}}, "f.yaml: inner.share: got 'x', expected a number from 0 to 1"),
        ({"inner": {"share": 0, "name": "c"}}, "f.yaml: inner.name: got 'c', expected one of a, b"),
        ({"inner": 3}, "f.yaml: inner: got 3, expected a mapping of settings"),
        ({"sizes": [1, 2.5]}, "f.yaml: sizes[1]: got 2.5, expected an integer"),
        ({"sizes": 1}, "f.yaml: sizes: got 1, expected a list of an integer"),
        ({"limit": True}, "f.yaml: limit: got True, expected an integer"),
        ({"on": 1}, "f.yaml: on: got 1, expected true or false"),
    ],
)
def test_a_wrong_key_names_itself_its_file_and_what_is_accepted(change, message):
    with pytest.raises(ConfigError) as error:
        load(Outer, {**GOOD, **change}, "f.yaml")
    assert str(error.value) == message


def test_yaml_numbers_without_a_dot_before_the_exponent_are_numbers():
    assert load(Inner, yaml.safe_load("{share: 1e-4, name: a}"), "f").share == 1e-4


def test_the_projects_settings_load_and_survive_the_way_to_plain_values():
    config = load_config(PARAMS)
    plain = to_dict(config)
    del plain["file"]
    assert replace(load(Config, plain, str(PARAMS)), file=str(PARAMS)) == config


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads(name):
    assert load_preset(name).diffusion.num_steps == 1000


def test_a_field_with_one_value_in_all_presets_is_a_default_and_no_line_of_each():
    named = [yaml.safe_load((PRESETS / f"{name}.yaml").read_text())["unet"] for name in preset_names()]
    everywhere = set.intersection(*map(set, named))
    alike = [name for name in sorted(everywhere) if all(unet[name] == named[0][name] for unet in named)]
    assert not alike, f"one value in all presets: {alike}; give it the default and take it out of the files"


def test_the_meta_of_a_checkpoint_from_before_the_defaults_still_loads():
    config = load_preset("sd").unet
    assert load(RaphaelUNetConfig, to_dict(config), "meta.json", "unet") == config and "mask_threshold" in to_dict(
        config
    )


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("score", {"distributor": "ray"}, "score.distributor: got 'ray', expected pipeline.engine instead"),
        ("score", {"workers": 2}, "score.workers: got 2, expected pipeline.workers instead"),
        ("pipeline", {"engine": "spark"}, "pipeline.engine: got 'spark', expected one of local, ray"),
        ("pipeline", {"workers": 0}, "pipeline.workers: got 0, expected an integer at least 1"),
        ("pipeline", {"resources": {"train": {}}}, "pipeline: resources: got train, expected some of score, filter"),
        ("pipeline", {"resources": {"score": {"gpus": "all"}}}, "pipeline.resources.score.gpus: got 'all', expected"),
    ],
)
def test_where_stages_run_is_said_in_one_place_and_checked(tmp_path, section, values, message):
    data = yaml.safe_load(PARAMS.read_text())
    data[section].update(values)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(tmp_path / "params.yaml")


def test_where_stages_run_changes_no_name_of_what_they_made():
    config = load_config(PARAMS)
    assert "pipeline" not in to_dict(config)
    assert config.pipeline.of("encode").gpus == "auto" and config.pipeline.workers == 1


def test_edge_weights_are_one_for_each_transformer_block_of_the_preset(tmp_path):
    data = yaml.safe_load(PARAMS.read_text())
    data["train"]["settings"]["edge_block_weights"] = [1.0, 0.5]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(data))
    blocks = load_preset(data["model"]["preset"]).unet.num_blocks
    with pytest.raises(
        ConfigError, match=rf"edge_block_weights: got 2 numbers, expected {blocks}, one for each .* demo"
    ):
        load_config(tmp_path / "params.yaml")
    data["train"]["settings"]["edge_block_weights"] = [0.5] * blocks
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(data))
    assert load_config(tmp_path / "params.yaml").training().edge_block_weights == (0.5,) * blocks
    data["train"]["settings"]["edge_block_weights"] = [-1.0] * blocks
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=r"train.settings.edge_block_weights\[0\]: got -1.0"):
        load_config(tmp_path / "params.yaml")


def test_gates_that_loss_free_balance_would_move_stay_as_they_are_under_an_adapter(project, tmp_path):
    data = yaml.safe_load((project / "params.yaml").read_text())
    data["train"].update(lora={"rank": 4}, init_from="models/raphael", init_sha256="0" * 16)
    data["train"]["settings"]["balance"] = "loss_free"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(
        ConfigError, match="train.lora.rank: got 4 with train.settings.balance loss_free, expected none"
    ):
        load_config(tmp_path / "params.yaml")


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match="got 'huge', expected one of demo, demo-debug, raphael-3b, "):
        load_preset("huge")


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    data = yaml.safe_load(PARAMS.read_text())
    data["train"]["loop"]["betas"] = [0.9]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match="train.loop: betas: got .0.9,., expected two numbers"):
        load_config(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "got an empty list, expected at least one"),
        ([[64, 64], [64]], r"got \[64\], expected \[height, width\]"),
        ([[64, 96], [128, 192]], r"got \[64, 96\] and \[128, 192\], of one aspect ratio"),
        ([[64, 64], [64, 72]], r"got \[64, 72\], expected multiples of 16 \(autoencoder 4 x U-Net 4\)"),
    ],
)
def test_image_sizes_must_fit_the_networks_and_differ_in_shape(tmp_path, sizes, message):
    data = yaml.safe_load(PARAMS.read_text())
    data["picture"]["sizes_px"] = sizes
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=f"sizes_px: {message}"):
        load_config(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("train", "loop", "message"),
    [
        ({"num_heldout": 9}, {}, "num_heldout: got 9 with loop.heldout_every_images 0, expected both 0 or neither"),
        ({}, {"heldout_every_images": 9}, "num_heldout: got 0 with loop.heldout_every_images 9, expected both 0"),
        ({"sample_weights": ["ema_0.5"]}, {}, "sample_weights: got ema_0.5, expected some of raw, ema"),
        ({}, {"ema_more_decays": [0.9, 0.9]}, "ema_more_decays: got [0.9, 0.9] beside ema_decay 0.99, expected decays"),
        ({}, {"ema_start_images": 27200}, "ema_start_images: got 27200 of 27200 images, expected fewer"),
        ({"parallel": {"strategy": "fsdp2"}}, {"ema_on_cpu": True}, "loop.ema_on_cpu: got true with"),
    ],
)
def test_what_is_seen_of_a_training_must_be_possible(tmp_path, train, loop, message):
    data = yaml.safe_load(PARAMS.read_text())
    data["train"]["parallel"].update(train.pop("parallel", {}))
    data["train"].update(train)
    data["train"]["loop"].update(loop)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(tmp_path / "params.yaml")


@pytest.mark.parametrize("section", ["autoencoder", "clip"])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("sample_every_images", 100, "got 100, expected 0"),
        ("heldout_every_images", 100, "got 100, expected 0"),
        ("ema_more_decays", [0.5], "got [0.5], expected []"),
    ],
)
def test_what_the_loop_of_a_section_would_ignore_is_refused(tmp_path, section, name, value, said):
    data = yaml.safe_load(PARAMS.read_text())
    data[section]["loop"] |= {name: value, "ema_decay": 0.9}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=re.escape(f"{section}: loop.{name}: {said}: only train reads it")):
        load_config(tmp_path / "params.yaml")


def test_emas_are_named_by_their_decays():
    loop = replace(load_config(PARAMS).train.loop, ema_more_decays=(0.9, 0.99999))
    assert loop.ema_decays == {"ema": 0.99, "ema_0.9": 0.9, "ema_0.99999": 0.99999}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"edge_detector": "pidinet"},
            "edge_weights: got '' with edge_detector pidinet, expected the path of its .pth",
        ),
        ({"edge_weights": "x.pth"}, "edge_weights: got 'x.pth' with edge_detector sobel, expected \"\": it has none"),
        ({"edge_detector": "laplace"}, "encode.edge_detector: got 'laplace', expected one of sobel, canny, pidinet"),
    ],
)
def test_an_edge_detector_and_its_weights_come_together(tmp_path, changes, message):
    data = yaml.safe_load(PARAMS.read_text())
    data["encode"].update(changes)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(tmp_path / "params.yaml")


def test_a_level_that_does_not_exist_is_refused(tmp_path):
    data = yaml.safe_load((PRESETS / "tiny.yaml").read_text())
    data["unet"]["attention_levels"] = [7]
    path = tmp_path / "odd.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match="attention_levels: got 7, expected 0 to 2"):
        load_preset(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_space_experts": 0}, "unet.num_space_experts: got 0, expected an integer at least 1"),
        ({"num_time_experts": 0}, "unet.num_time_experts: got 0, expected an integer at least 1"),
        ({"attention_levels": [-1]}, "attention_levels: got -1, expected 0 to 2, a level"),
        ({"channels": []}, "channels: got an empty list, expected one width per level"),
        ({"channels": [64, 96, 97]}, "channels: got 97, expected a multiple of norm_groups 4"),
        ({"context_length": 16}, "text.context_length: got 32, expected 16, what the unet reads"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused_when_its_preset_is_read(tmp_path, changes, message):
    data = yaml.safe_load((PRESETS / "tiny.yaml").read_text())
    data["unet"].update(changes)
    path = tmp_path / "odd.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_preset(str(path))


@pytest.mark.parametrize("text", ["a: [", "- 1"])
def test_a_broken_file_is_one_line(tmp_path, text):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "params.yaml")
    assert "\n" not in str(error.value) and "params.yaml" in str(error.value)
