from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import yaml

from flows.workspace import settings
from raphael.base.config.data import FilterConfig
from raphael.base.config.params import Config, load_config
from raphael.base.strict import ConfigError


@pytest.fixture
def params(tmp_path: Path, project: Path) -> Path:
    return Path(shutil.copy(project / "params.yaml", tmp_path / "params.yaml"))


def test_an_override_changes_its_line_and_keeps_all_others(params: Path) -> None:
    before = params.read_text().splitlines()
    settings.apply(params, {"generate.seed": 7, "train.loop.learning_rate": 0.0005})
    after = params.read_text().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 2
    config = load_config(params)
    assert config.generate.seed == 7 and config.train.loop.learning_rate == 0.0005


def test_no_override_writes_nothing(params: Path) -> None:
    stamp = params.stat().st_mtime_ns
    settings.apply(params, {})
    settings.apply(params, {"generate.seed": load_config(params).generate.seed})
    assert params.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("generate.sed", 1, "did you mean seed"),
        ("generate.steps", 0, "generate.steps: got 0"),
        ("generate", 3, "expected a setting in it"),
        ("generate.seed.x", 3, "unknown key generate.seed.x"),
        ("train.edge_weight", 0.0, "unknown key train.edge_weight; did you mean train.settings.edge_weight?"),
        ("train.settings.edge_weigth", 0.0, "unknown key train.settings.edge_weigth; did you mean edge_weight"),
        ("model.system", "ddpm", "model.system ddpm.*make demo SYSTEM=ddpm takes params.ddpm.yaml"),
    ],
)
def test_a_wrong_override_is_named_and_the_file_left_alone(params: Path, key: str, value: object, said: str) -> None:
    before = params.read_text()
    with pytest.raises(ConfigError, match=said) as caught:
        settings.apply(params, {key: value})
    assert "\n" not in str(caught.value) and str(params.parent) not in str(caught.value)
    assert params.read_text() == before
    assert [file.name for file in params.parent.iterdir()] == ["params.yaml"]


def test_a_setting_with_a_default_can_be_set_where_the_file_leaves_it_out(
    params: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filters = dataclasses.make_dataclass(
        "FilterConfig", [("max_side_px", int, dataclasses.field(default=0))], bases=(FilterConfig,), frozen=True
    )
    larger = dataclasses.make_dataclass("Config", [("filter", filters)], bases=(Config,), frozen=True)
    assert settings.may_be_left_out("filter.max_side_px", larger)
    for key in ("filter.min_aesthetic", "filter.no_such", "filter.max_side_px.x", "no_such.max_side_px", "filter"):
        assert not settings.may_be_left_out(key, larger)
    monkeypatch.setattr(settings, "may_be_left_out", lambda key: key == "filter.max_side_px")
    text = settings.merged(params, {"filter.max_side_px": 150})
    assert yaml.safe_load(text)["filter"]["max_side_px"] == 150
    with pytest.raises(ConfigError, match="unknown key filter.max_side"):
        settings.merged(params, {"filter.max_side": 150})


OVERLAYS = [f"params.{name}.yaml" for name in ("debug", "coco", "scenes", "ddpm", "imagen", "glide")]


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_load_on_top_of_the_settings_and_change_only_what_they_name(
    project: Path, params: Path, name: str
) -> None:
    overlay, before = settings.flat(project / name), settings.flat(params)
    settings.write(params, settings.merged(params, overlay))
    if "model.system" in overlay:  # of another system: what was RAPHAEL's own is gone
        before = {key: value for key, value in before.items() if not key.startswith("train.settings.")}
    assert settings.flat(params) == {**before, **overlay}


def test_assignments_are_read_as_yaml() -> None:
    assert settings.parse(["a.b=1", "c=[x, y]", "d=text", "e="]) == {"a.b": 1, "c": ["x", "y"], "d": "text", "e": ""}
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        settings.parse(["a.b"])
