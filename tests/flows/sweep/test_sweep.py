"""A sweep over random weights of the smallest size: what is generated, how often, and what its page and runs hold."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from flows.ablation import plan as ablation_plan
from flows.sweep import results as sweep_results
from flows.sweep.flow import run
from flows.sweep.page import render
from flows.sweep.plan import PLAN, Model, SweepPoint, check_knobs, chosen_prompts, config_of, load_plan
from flows.sweep.points import Measure
from flows.sweep.trained import Trained, series_over
from flows.workspace import settings
from raphael.base.config.params import load_config
from raphael.base.config.systems import find_system
from raphael.base.stage import StageError, read_json
from raphael.base.strict import ConfigError
from raphael.base.tracking import tracker as tracking
from raphael.evaluate.report.sweep_figures import labels, over_number, ticks, trade_off

PROJECT = Path(__file__).resolve().parents[3]
NUM_IMAGES = 6


def plan_of(root: Path, **changes):
    data = yaml.safe_load(PLAN.read_text()) | {"num_prompts": NUM_IMAGES, "guidance_scale": [1.5, 4.0]}
    data |= {
        "knobs": {"mask_threshold": [0.2, 0.6]},
        "generate": ["generate.steps=2", "generate.batch_size=4"],
        "speed_steps": 1,
    }
    (root / "plan.yaml").write_text(yaml.safe_dump(data | changes, sort_keys=False))
    return load_plan(root / "plan.yaml")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A workspace with a model of random weights, prompts and training images; MLflow's data base is made once."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from PIL import Image

    from data_pipeline.source.scene_captions import heldout_prompts
    from tests.truth.tiny_raphael import write_pipeline

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("sweep")
    params = yaml.safe_load((PROJECT / "params.yaml").read_text())
    params["evaluate"]["max_reference_images"] = 10
    params["generate"]["guidance_scale"] = 4.0  # as one of the plan's
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    write_pipeline(root / "models/raphael")
    for folder in ("source", "shards", "captions"):
        (root / "data" / folder).mkdir(parents=True)
    prompts = heldout_prompts(0, 3, 32, 0.12)
    (root / "data/source/prompts.json").write_text(json.dumps({"source": "scenes", "prompts": prompts}))
    rng = np.random.default_rng(0)
    with tarfile.open(root / "data/shards/00000.tar", "w") as tar:
        for key in range(10):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(buffer, "PNG")
            member = tarfile.TarInfo(f"{key:09d}.png")
            member.size = buffer.tell()
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    kept = {"key": [f"{key:09d}" for key in range(10)], "shard": ["00000.tar"] * 10}
    pq.write_table(pa.table(kept), root / "data/captions/captions.parquet")
    return root


class PowerCut(Exception):
    pass


@pytest.fixture(scope="module")
def swept(root):
    """A sweep whose power is cut within its first point, resumed, and run once more: what each time generated."""
    import raphael.generate.stage as module

    generated, times, room, generate_block = [], [], [], module.generate_block

    def counted(pipeline, block, config, folder):
        if len(generated) >= room[-1]:
            raise PowerCut
        generate_block(pipeline, block, config, folder)
        generated.extend(f"{folder.parent.name}/{job['file']}" for job in block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "generate_block", counted)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for pictures in (4, 1000, 1000):
            room.append(pictures)
            generated.clear()
            with contextlib.suppress(PowerCut):
                run(root, plan_of(root))
            times.append(list(generated))
    return times


def test_a_resumed_sweep_generates_nothing_twice(root, swept):
    killed, resumed, again = swept
    assert len(killed) == 4 and again == []
    points = 3  # guidance 1.5; guidance 4 and alpha 0.2, the same point; alpha 0.6
    assert len(killed + resumed) == len(set(killed + resumed)) == points * NUM_IMAGES
    assert len(list((root / "work/sweep/points").glob("*.json"))) == points
    assert not list((root / "work/sweep/points").rglob("*.png")), "images are kept only on request"


def test_the_parent_has_a_child_a_point_with_the_keys_of_an_evaluation(root, swept):
    client = tracking.connect(tracking.resolve_uri(load_config(root / "params.yaml"), root))
    known = read_json(root / "work/sweep/runs.json")
    parent = client.get_run(known["run_id"])
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{known['run_id']}'")
    assert len(children) == 3 and parent.info.status == "FINISHED"
    assert {run.data.params["generate.guidance_scale"] for run in children} == {"1.5", "4.0"}
    assert {run.data.params["mask_threshold"] for run in children} == {"0.2", "0.6"}
    for child in children:
        result = read_json(root / "work/sweep/points" / f"{child.data.tags['sweep.key']}.json")
        assert child.data.metrics == {f"evaluate/{name}": value for name, value in result["metrics"].items()}
        assert f"evaluate/fd_clip_self_{NUM_IMAGES}" in child.data.metrics and child.info.status == "FINISHED"
        (grid,) = {
            item.path for item in client.list_artifacts(child.info.run_id, "images") if item.path.endswith(".png")
        }
        assert "evaluate~first_pictures" in grid
    assert [item.path for item in client.list_artifacts(known["run_id"])] == ["sweep.html"]


def test_runs_of_a_sweep_carry_the_hash_by_which_reports_and_images_know_the_model(root, swept):
    from raphael.generate.pipeline import RaphaelPipeline

    identity = RaphaelPipeline.from_pretrained(root / "models/raphael").identity
    client = tracking.connect(tracking.resolve_uri(load_config(root / "params.yaml"), root))
    for run_id in read_json(root / "work/sweep/runs.json")["children"].values():
        run = client.get_run(run_id)
        assert run.info.run_name.startswith(f"{identity[:6]}-") and run.data.tags["model.sha256"].startswith(identity)
    assert read_json(root / "reports/sweep.json")["model"] == identity


def test_a_points_numbers_are_those_of_generating_and_measuring_by_hand(root, swept):
    from raphael.diffusion.sampling import generate_images, sampling_of
    from raphael.encoders.image import load_clip
    from raphael.evaluate.features.references import reference_images
    from raphael.evaluate.metrics.frechet import Features
    from raphael.generate.pipeline import RaphaelPipeline

    plan = plan_of(root)
    config = config_of(plan, root / "params.yaml")
    model = Model.read(root / "models/raphael")
    prompts = [entry["prompt"] for entry in chosen_prompts(plan, model, root / "data/source/prompts.json")]
    pipeline = RaphaelPipeline.from_pretrained(root / "models/raphael")
    pipeline.turn("mask_threshold", 0.6)
    seeds = [(0, index) for index in range(NUM_IMAGES)]
    pictures = generate_images(pipeline.parts(), prompts, seeds, sampling_of(config.generate), batch_size=4)
    scorer = load_clip(root / "models/raphael/text_encoder")
    real = list(reference_images(root / "data/shards", root / "data/captions/captions.parquet", 10, 32, 32))
    ours, theirs = (np.asarray(scorer.embed_images(np.stack(side))) for side in (pictures, real))
    texts = np.asarray(scorer.embed_texts(prompts))
    row = read_json(root / "reports/sweep.json")["figures"]["alpha"]["series"][""][1]
    distance = Features(16).update(ours).distance(Features(16).update(theirs))
    assert row["x"] == 0.6 and row["distance"]["mean"] == pytest.approx(distance, abs=2e-6)
    assert row["score"]["mean"] == pytest.approx(float((ours * texts).sum(1).mean()), abs=2e-6)


def test_the_page_labels_guidance_says_what_alpha_is_not_and_why_a_figure_is_absent(root, swept):
    results = read_json(root / "reports/sweep.json")
    page = (root / "reports/sweep.html").read_text()
    assert page == render(results) and page.count("<svg") == 3
    assert ">1.5</text>" in page and ">4</text>" in page and "Not trained anew." in page
    assert page.count("Absent: needs models trained for it") == 4
    assert "://" not in page.replace("http://www.w3.org", "")


def test_models_trained_with_other_numbers_of_experts_become_a_curve_with_their_speed(
    root, swept, tmp_path, monkeypatch
):
    from tests.truth import tiny_raphael

    preset, params = tiny_raphael.small_unet(), yaml.safe_load((root / "params.yaml").read_text())
    for count, seed in ((2, 0), (2, 1), (4, 0)):
        workspace = tmp_path / "spaces" / f"{count}-{seed}"
        with monkeypatch.context() as patch:
            patch.setattr(tiny_raphael, "small_unet", lambda n=count: replace(preset, num_space_experts=n))
            tiny_raphael.write_pipeline(workspace / "models/raphael", seed)
        params["train"]["seed"] = seed
        (workspace / "params.yaml").write_text(yaml.safe_dump(params))
    for name in ("data", "models", "params.yaml"):
        (tmp_path / name).symlink_to(root / name)
    shutil.copy(root / "mlflow.db", tmp_path / "mlflow.db")
    plan = plan_of(tmp_path, workspaces="spaces", guidance_scale=[], knobs={})
    run(tmp_path, plan)
    figures = read_json(tmp_path / "reports/sweep.json")["figures"]
    ((name, rows),) = figures["space_experts"]["series"].items()
    assert name == "T_c 500, alpha 0.2, time experts 4" and [(row["x"], row["seeds"]) for row in rows] == [
        (2, 2),
        (4, 1),
    ]
    assert rows[0]["distance"]["error"] > 0 and rows[1]["distance"]["error"] is None
    assert [x for x, rate in figures["space_experts"]["steps_per_s"][name] if rate > 0] == [2, 4]
    assert "no two differ in time experts" in figures["time_experts"]["absent"]
    assert figures["guidance"]["absent"] == "the plan lists no guidance_scale"


def test_a_ddpm_is_swept_by_its_own_metrics_over_its_classes_in_turn(root, tmp_path):
    from raphael.diffusion.sampling import generate_images, sampling_of
    from raphael.evaluate.scenes.classes import shape_of
    from raphael.evaluate.scenes.reader import read_scene
    from raphael.generate.pipeline import RaphaelPipeline
    from tests.truth.class_workspace import settings as class_settings
    from tests.truth.tiny_ddpm import CLASSES, write_ddpm

    (tmp_path / "data").symlink_to(root / "data")
    write_ddpm(tmp_path / "models/raphael")
    changes = {"picture": {"sizes_px": [[32, 32]]}, "evaluate": {"max_reference_images": 10}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(class_settings(changes)))
    plan = plan_of(tmp_path, knobs={}, num_prompts=8)
    page = run(tmp_path, plan).read_text()
    results = read_json(tmp_path / "reports/sweep.json")
    figures = results["figures"]
    assert list(figures) == ["guidance"] and (results["system"], results["knobs"]) == ("ddpm", {})
    assert results["protocol"] == "ddpm-sweep/v1" and "of the system ddpm. All points" in page
    figure = figures["guidance"]
    assert (figure["distance"], figure["score"], figure["n"]) == ("fd_random64_8", "class_accuracy", 8)
    rows = figure["series"][""]
    assert [row["x"] for row in rows] == [1.5, 4.0] and rows[0]["distance"]["mean"] != rows[1]["distance"]["mean"]
    labels, config = [CLASSES[index % 6] for index in range(8)], config_of(plan, tmp_path / "params.yaml")
    how, seeds = sampling_of(replace(config.generate, guidance_scale=1.5)), [(0, index) for index in range(8)]
    parts = RaphaelPipeline.from_pretrained(tmp_path / "models/raphael").parts()
    images = generate_images(parts, labels, seeds, how, batch_size=4)
    right = [shape_of(read_scene(image)) == label for image, label in zip(images, labels, strict=True)]
    assert rows[0]["score"]["mean"] == pytest.approx(np.mean(right))


def result(n=5, **changes):
    facts = {"n": n, "n_reference": 9, "reference": "r", "networks": {"a": "b"}, "distance": f"fd_{n}", "score": "c"}
    return {**facts, "metrics": {f"fd_{n}": 1.0, "c": 0.3}, **changes}


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (result(6), "points with n 5 and 6 for one axis"),
        (result(n_reference=8), "n_reference 8 and 9"),
        (result(networks={"a": "c"}), "points with networks"),
    ],
)
def test_points_that_were_not_measured_alike_share_no_axis(other, says):
    with pytest.raises(StageError, match=says):
        sweep_results.gather({"": {1.0: [result()], 2.0: [other]}})


def test_error_bars_are_standard_errors_over_seeds():
    ones = [result(metrics={"fd_5": value, "c": 0.3}) for value in (1.0, 2.0, 4.0)]
    (row,) = sweep_results.gather({"": {1.0: ones}})["series"][""]
    assert row["distance"]["error"] == pytest.approx(np.std([1, 2, 4], ddof=1) / np.sqrt(3))
    single = sweep_results.gather({"": {1.0: ones[:1]}})["series"][""][0]
    assert single["distance"] == {"mean": 1.0, "error": None, "values": [1.0]}
    svg = trade_off([row], "c", "fd_5")
    assert svg.count("stroke-width") == 1 and trade_off([single], "c", "fd_5").count("stroke-width") == 0
    assert over_number({"a": [(1, row["distance"]), (2, row["distance"])]}, "x", "y").count("stroke-width") == 2


def test_a_points_key_follows_weights_settings_and_prompts_and_nothing_else(tmp_path):
    config = load_config(PROJECT / "params.yaml").generate
    model, alpha = Model(tmp_path, "a" * 64, {"unet": {"mask_threshold": 0.2}}, (64, 64)), {"mask_threshold": 0.2}
    key = SweepPoint(model, config, alpha).key("measure")
    moved = SweepPoint(replace(model, folder=tmp_path / "moved"), replace(config, batch_size=7), alpha)
    assert moved.key("measure") == key
    others = [
        SweepPoint(replace(model, sha256="b" * 64), config, alpha).key("measure"),
        SweepPoint(model, replace(config, guidance_scale=9.0), alpha).key("measure"),
        SweepPoint(model, replace(config, steps=99), alpha).key("measure"),
        SweepPoint(model, replace(config, seed=9), alpha).key("measure"),
        SweepPoint(model, config, {"mask_threshold": 0.3}).key("measure"),
        SweepPoint(model, config, alpha).key("other prompts"),
    ]
    assert len({key, *others}) == 7


def test_only_models_that_differ_in_one_number_are_drawn_together(tmp_path):
    model = Model(tmp_path, "a", {}, (64, 64))

    def trained(space, tc, rest="same", seed=0, alpha=0.2):
        numbers = {"space_experts": space, "time_experts": 4, "edge_max_timestep": tc, "mask_threshold": alpha}
        return Trained(model, seed, numbers, rest)

    ones = [trained(2, 500), trained(4, 500), trained(4, 500, seed=1), trained(4, 250), trained(8, 500, "longer")]
    studied = find_system("raphael").studied
    (found,) = series_over(ones, "space_experts", studied).values()
    assert {x: len(models) for x, models in found.items()} == {2: 1, 4: 2}
    assert list(series_over(ones, "edge_max_timestep", studied)) == ["alpha 0.2, space experts 4, time experts 4"]
    ones.append(trained(4, 500, alpha=0.4))
    assert list(series_over(ones, "mask_threshold", studied)) == ["T_c 500, space experts 4, time experts 4"]
    assert series_over(ones, "time_experts", studied) == {}


@pytest.mark.parametrize("name", ["alpha", "t_c", "experts"])
def test_the_plans_that_train_for_a_figure_load_and_their_arms_differ_in_what_it_is_over(name, tmp_path):
    plan = ablation_plan.load_plan(PLAN.with_name(f"train_{name}.yaml"))
    seen = set()
    for arm in plan.arms:
        unet = yaml.safe_load(ablation_plan.preset_text(plan, arm))["unet"]
        changes = settings.parse([*plan.params, *plan.arms[arm].params])
        (tmp_path / "params.yaml").write_text(settings.merged(PROJECT / "params.yaml", changes))
        config = load_config(tmp_path / "params.yaml")
        numbers = unet["mask_threshold"], unet["num_space_experts"], unet["num_time_experts"]
        seen.add((*numbers, config.training().edge_max_timestep))
    assert len(seen) == len(plan.arms) >= 4
    varied = [len({one[place] for one in seen}) > 1 for place in range(4)]
    assert varied == {"alpha": [1, 0, 0, 0], "t_c": [0, 0, 0, 1], "experts": [0, 1, 1, 0]}[name]
    trained = load_plan(PLAN.with_name("sweep_trained.yaml"))
    assert trained.workspaces == "work/spaces/ablation" and not trained.knobs and not trained.guidance_scale


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_prompts": 1}, "num_prompts: got 1"),
        ({"seeds": []}, "seeds: got none"),
        ({"guidance_scale": [3.0, 3.0]}, "guidance_scale: got .*expected different ones"),
        ({"knobs": {"mask_threshold": [0.1, 0.1]}}, "knobs.mask_threshold: got .*expected different ones"),
        ({"knobs": {"mask_threshold": ["high"]}}, "knobs.mask_threshold"),
        ({"generate": ["train.seed=1"]}, "generate: expected KEY=VALUE of params.yaml's generate"),
        ({"guidance": []}, "guidance"),
    ],
)
def test_what_a_plan_gets_wrong_is_named(tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says):
        plan_of(tmp_path, **changes)


def test_a_plan_may_name_metrics_beside_the_protocols_and_points_made_without_them_are_others(root, tmp_path):
    plan = plan_of(tmp_path, metrics=["precision_recall"])
    config, model = config_of(plan, root / "params.yaml"), Model.read(root / "models/raphael")
    prompts = chosen_prompts(plan, model, root / "data/source/prompts.json")
    plain, known, more = (
        Measure(config, root, tmp_path, model, prompts, names) for names in ((), ("clip_score",), plan.metrics)
    )
    assert plain.identity == known.identity != more.identity
    images = np.random.default_rng(1).integers(0, 256, (NUM_IMAGES, 32, 32, 3), np.uint8)
    found, without = (one(lambda: iter(images))["metrics"] for one in (more, plain))
    assert found.items() > without.items()
    assert {name.split("_")[0] for name in found.keys() - without.keys()} == {"precision", "recall"}
    with pytest.raises(ConfigError, match="metrics of the plan: got 'precision_recal', did you mean precision_recall"):
        Measure(config, root, tmp_path, model, prompts, ("precision_recal",))


def test_too_few_prompts_or_no_model_are_one_clear_line(root, tmp_path):
    model = Model.read(root / "models/raphael")
    with pytest.raises(StageError, match="got 12 prompts, expected at least 13"):
        chosen_prompts(plan_of(tmp_path, num_prompts=13), model, root / "data/source/prompts.json")
    with pytest.raises(StageError, match="no such folder; expected a pipeline folder"):
        Model.read(tmp_path / "none")


def test_a_knob_that_the_models_system_has_not_or_that_stands_too_far_is_named_with_the_nearest(tmp_path):
    raphael = Model(tmp_path, "a" * 64, {"unet": {"mask_threshold": 0.2, "space_layer": "moe"}}, (64, 64))
    ddpm = Model(tmp_path, "a" * 64, {"system": "ddpm", "unet": {}}, (32, 32))
    check_knobs(plan_of(tmp_path), raphael)
    with pytest.raises(ConfigError, match="knobs: got 'mask_treshold' for .* raphael, did you mean mask_threshold"):
        check_knobs(plan_of(tmp_path, knobs={"mask_treshold": [0.1]}), raphael)
    with pytest.raises(ConfigError, match="knobs.mask_threshold: got 1.5, expected from 0 to 1"):
        check_knobs(plan_of(tmp_path, knobs={"mask_threshold": [1.5]}), raphael)
    with pytest.raises(ConfigError, match="knobs: got 'mask_threshold' for a model of the system ddpm, expected none"):
        check_knobs(plan_of(tmp_path), ddpm)
    assert raphael.knobs == {"mask_threshold": 0.2} and ddpm.knobs == {}


def test_ticks_are_round_and_a_label_stands_away_from_its_neighbours():
    assert ticks(0.31, 0.72) == [0.4, 0.5, 0.6, 0.7] and ticks(-3, 12) == [0, 5, 10]
    (_, y, anchor), *_ = labels([(50, 50), (60, 60)])
    assert y < 50 and anchor == "end"  # the neighbour is to the lower right
    corner = labels([(0, 0), (10, 10), (20, 0)])[1]
    assert corner[1] > 10 + 10 and corner[2] == "middle"  # both neighbours are above it
