"""The comparison of the systems: its plan, what a budget buys, what is told apart, and the page of made-up results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from flows.arms.cases import Case
from flows.systems.page import render
from flows.systems.plan import PLAN, RECIPE, Budget, budget_of, budgets, cases_of, load_plan, make_case
from flows.systems.results import NOT_TOLD, ONE_SEED, TOLD, collect, difference, numbers_of, summary
from raphael.base.config.params import load_config
from raphael.base.strict import ConfigError

PROJECT = Path(__file__).resolve().parents[3]


def plan_of(tmp_path: Path, change=lambda data: None):
    data = yaml.safe_load(PLAN.read_text())
    change(data)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return load_plan(tmp_path / "plan.yaml")


@pytest.fixture(scope="module")
def counted() -> dict[str, Budget]:
    return budgets(load_plan())


def test_every_arm_spends_the_plans_flop_to_within_a_batch(counted):
    plan = load_plan()
    assert list(counted) == ["raphael", "dense", "imagen", "glide"]
    for budget in counted.values():
        assert abs(budget.flop - plan.flop) <= budget.flop_per_image * budget.batch_size
        assert budget.num_images % budget.batch_size == 0 and sum(budget.parts.values()) == budget.num_images


def test_a_cascades_parts_by_their_images_spend_what_the_mean_over_shares_says(counted):
    """sum over parts of images x that part's own cost, counted apart, is the plan's flop."""
    import torch

    from raphael.net.condition import Condition
    from raphael.summary.model import count_flops
    from raphael.systems.imagen.training import networks

    config, budget, spent = load_config_of("imagen"), counted["imagen"], 0.0
    base = config.model.load().base.unet
    for part, side in (("base", 32), ("upsampler", 64)):
        with torch.device("meta"):
            x, t = torch.empty(1, 3, side, side), torch.empty(1)
            told = {"picture": x, "level": t} if part == "upsampler" else {}
            network = networks(config, part).to("meta").eval()
            condition = Condition(torch.empty(1, base.context_length, base.context_dim), **told)
            spent += budget.parts[part] * 3 * count_flops(lambda n=network, i=(x, t, condition): n(*i))
    assert spent == pytest.approx(load_plan().flop, rel=1e-3)


def load_config_of(system: str):
    from flows.workspace import settings

    text = settings.merged(PROJECT / "params.yaml", settings.flat(PROJECT / f"params.{system}.yaml"))
    file = PROJECT / f".{system}.test.yaml"
    try:
        file.write_text(text)
        return load_config(file)
    finally:
        file.unlink()


def test_the_dense_twin_costs_what_raphael_costs_an_image(counted):
    assert counted["dense"].flop_per_image == pytest.approx(counted["raphael"].flop_per_image, rel=0.02)


def test_what_a_plan_gets_wrong_is_named_in_one_line(tmp_path):
    def arm(data, **changes):
        data["arms"]["imagen"] |= changes

    for change, message in (
        (lambda data: data.pop("flop"), "missing key flop"),
        (lambda data: data.update(flop=0), "flop: got 0, expected a number at least 1"),
        (lambda data: data.update(seeds=[]), "seeds: got none"),
        (lambda data: data.update(arms={"imagen": data["arms"]["imagen"]}), "arms: got imagen, expected two or more"),
        (
            lambda data: arm(data, system="imagine"),
            "imagen.system: got 'imagine', expected one of raphael, .*imagen",
        ),
        (lambda data: data.update(protocol="systems/v9"), "protocol: got 'systems/v9', did you mean systems/v1"),
        (lambda data: arm(data, recipe={"places": "none"}), "missing key arms.imagen.recipe.text_layers"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            plan_of(tmp_path, change)
        assert "\n" not in str(error.value)


def test_a_system_without_its_overlay_is_refused(tmp_path, monkeypatch):
    from flows.workspace import folder

    monkeypatch.setattr(folder, "PROJECT", tmp_path)
    with pytest.raises(ConfigError, match="params.imagen.yaml: no such file; expected the settings of SYSTEM=imagen"):
        plan_of(tmp_path)


def test_arms_of_other_data_or_another_measure_are_refused_with_the_key(tmp_path):
    plan = plan_of(tmp_path, lambda data: data["arms"]["imagen"].update(params=["source.scenes.num_rows=7"]))
    with pytest.raises(ConfigError, match="arms.imagen: source.scenes.num_rows: got 7, and 50000 of raphael"):
        budgets(plan)
    plan = plan_of(tmp_path, lambda data: data["shared"]["evaluate"].pop("num_probe"))
    with pytest.raises(ConfigError, match="arms.imagen: evaluate.num_probe: got 0, and 200 of raphael"):
        budgets(plan)


def test_too_little_flop_for_a_batch_of_each_part_says_how_much_is_needed():
    with pytest.raises(ConfigError, match="flop: got 1e.10, 7.1 images of imagen .*; expected at least 4.52e.10"):
        budget_of(1e10, load_config_of("imagen"))


def test_a_case_is_a_workspace_with_the_images_and_the_order_that_its_budget_buys(tmp_path, counted):
    plan = load_plan()
    make_case(plan, Case("dense", 1, tmp_path / "dense-1"), counted["dense"], {"tracking.experiment": "here"})
    config = load_config(tmp_path / "dense-1/params.yaml")
    assert config.train.loop.num_images == counted["dense"].num_images and config.train.seed == 1
    (phase,) = config.training().phases
    assert phase.until_images % 16 == 0
    assert phase.until_images == pytest.approx(0.117 * counted["dense"].num_images, abs=16)
    preset = yaml.safe_load((tmp_path / "dense-1/raphael/presets/scenes.yaml").read_text())
    assert preset["unet"]["space_layer"] == "dense" and config.evaluate.protocol == "systems/v1"
    scenes = yaml.safe_load((PROJECT / "params.scenes.yaml").read_text())["train"]["settings"]["phases"][0]
    assert phase.captions == scenes["captions"], "the same captions as the shipped model's first phase"


def test_cases_come_seed_by_seed_and_an_arm_may_have_more_seeds(tmp_path):
    plan = plan_of(tmp_path, lambda data: data["arms"]["dense"].update(seeds=[0, 1, 2]))
    names = [case.name for case in cases_of(plan, tmp_path)]
    assert names == ["raphael-0", "dense-0", "imagen-0", "glide-0", "dense-1", "dense-2"]


def test_what_was_found_in_words_is_no_other_plan(tmp_path):
    words = plan_of(tmp_path, lambda data: data["arms"]["imagen"].update(found="good at grounds"))
    assert words.sha256 == load_plan().sha256
    assert plan_of(tmp_path, lambda data: data.update(flop=1e14)).sha256 != words.sha256


def share(value, low, high, n=100, chance=None):
    return {"label": "x", "group": "reader", "better": "higher", "value": value, "low": low, "high": high, "n": n,
            "chance": chance}  # fmt: skip


def test_one_seed_is_never_told_apart_and_three_are_by_two_standard_errors():
    a, b = summary([share(0.9, 0.83, 0.94)]), summary([share(0.5, 0.4, 0.6)])
    found = difference(a, b, at_chance=False)
    assert found["said"] == ONE_SEED and found["difference"] == pytest.approx(0.4)
    assert found["low"] == pytest.approx(0.4 - math.hypot(0.07, 0.1))  # Newcombe's method 10, by hand
    assert found["high"] == pytest.approx(0.4 + math.hypot(0.04, 0.1))
    near = summary([share(0.55, 0.45, 0.65)])
    assert difference(near, b, at_chance=False)["said"] == NOT_TOLD
    three = [summary([share(value + shift, 0, 1) for shift in (-0.01, 0.0, 0.01)]) for value in (0.6, 0.5)]
    assert difference(*three, at_chance=False)["said"] == TOLD
    assert difference(*three, at_chance=True)["said"] == NOT_TOLD


def evaluated(shape: float, side: float) -> dict:
    facts = {"shape": (shape, shape - 0.05, shape + 0.05), "side": (side, side - 0.05, side + 0.05)}
    rows = {
        name: {"win_share": value, "win_share_low": low, "win_share_high": high, "win_share_n": 200}
        for name, (value, low, high) in facts.items()
    }
    right = {"shape_accuracy": shape, "shape_accuracy_n": 60, "shape_accuracy_low": shape - 0.1,
             "shape_accuracy_high": shape + 0.1}  # fmt: skip
    return {"probe": {"facts": rows}, **right, "chance": {"shape_accuracy": 0.14}, "fd_random64_240": 0.3}


def test_the_page_shows_intervals_recipes_images_and_ranks_nothing_at_chance():
    plan, ones = load_plan(), []
    for arm, shape in (("raphael", 0.9), ("dense", 0.88), ("imagen", 0.6)):
        facts = {"flop": 3e14, "flop_per_image": 1.4e9, "images": 1000, "parts": {"a": 800, "b": 200}, "parameters": 7}
        numbers = numbers_of(evaluated(shape, 0.52))
        same = {"arm": arm, "seed": 0, "system": plan.arms[arm].system, "seconds_an_image": 0.25}
        ones.append({**facts, **same, "numbers": numbers})
    results = collect(plan, ones)
    assert list(results["metrics"]) == ["probe_shape", "probe_side", "shape_accuracy", "fd_random64_240"]
    assert results["metrics"]["probe_side"]["at_chance"] and not results["metrics"]["probe_shape"]["at_chance"]
    said = {(pair["a"], pair["b"]): pair["said"] for pair in results["metrics"]["probe_shape"]["pairs"]}
    assert said == {("raphael", "dense"): NOT_TOLD, ("raphael", "imagen"): ONE_SEED, ("dense", "imagen"): ONE_SEED}
    assert {pair["said"] for pair in results["metrics"]["fd_random64_240"]["pairs"]} == {NOT_TOLD}
    image = {"src": "data:image/png;base64,AAAA", "read": "red star, on white", "wrong": ["shape"]}
    page = render(results, [{"prompt": "a <red> circle", "images": {"raphael": image}}])
    assert "a &lt;red&gt; circle" in page and "wrong: shape" in page and page.count("<img") == 1
    assert "At chance in every arm, so not told apart: side of a relation." in page and "differs in one seed" in page
    for words in (*RECIPE.values(), "no: its training has no order of learning", "0.8500 to 0.9500", "no interval"):
        assert words in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    json.dumps(results, allow_nan=False)
