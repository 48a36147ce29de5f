"""generate, evaluate and report, one after another, in a workspace of the smallest size."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from truth.generating_workspace import write_generating_workspace
from truth.tiny_raphael import ROOT

from raphael.base.config.params import load_config
from raphael.base.stage import Stage, StageError, main
from raphael.base.strict import ConfigError


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    torch.set_num_threads(1)
    return write_generating_workspace(tmp_path_factory.mktemp("workspace"))


def run_stage(name, workspace, monkeypatch):
    from importlib import import_module

    module = import_module({"report": "raphael.evaluate.report.page"}.get(name, f"raphael.{name}.stage"))
    monkeypatch.chdir(workspace)
    return main(name, module.run, "", ["--params", str(workspace / "params.yaml")])


@pytest.fixture
def generated(workspace, monkeypatch):
    if not (workspace / "data/generated").is_dir():
        assert run_stage("generate", workspace, monkeypatch) == 0
    return workspace / "data/generated"


@pytest.fixture
def evaluated(generated, workspace, monkeypatch):
    if not (workspace / "reports/evaluate.json").is_file():
        assert run_stage("evaluate", workspace, monkeypatch) == 0
    return json.loads((workspace / "reports/evaluate.json").read_text())


def test_every_prompt_gets_its_image(generated):
    images = json.loads((generated / "images.json").read_text())["images"]
    assert [entry["file"] for entry in images] == [f"{i:05d}.png" for i in range(12)]
    assert {path.name for path in generated.iterdir()} == {entry["file"] for entry in images} | {"images.json"}


def test_a_killed_run_taken_up_again_ends_in_the_same_bytes(generated, workspace, monkeypatch):
    from raphael.base.strict import to_dict
    from raphael.generate.pipeline import RaphaelPipeline
    from raphael.generate.stage import MODEL, PROMPTS, generate_block, image_entries

    truth = {path.name: path.read_bytes() for path in generated.iterdir()}
    shutil.rmtree(generated)
    monkeypatch.chdir(workspace)
    config = load_config("params.yaml")
    jobs = image_entries(json.loads(PROMPTS.read_text()), 1)
    folder = Stage("generate", workspace).workdir(MODEL, PROMPTS, to_dict(config.generate)) / "generated"
    folder.mkdir()
    pipeline = RaphaelPipeline.from_pretrained(MODEL)
    generate_block(pipeline, jobs[:5], config, folder)
    generate_block(pipeline, jobs[5:10], config, folder)
    (folder / jobs[7]["file"]).unlink()
    (folder / f".{jobs[7]['file']}.4321.png").write_bytes(b"half a picture")
    assert run_stage("generate", workspace, monkeypatch) == 0
    assert {path.name: path.read_bytes() for path in generated.iterdir()} == truth


def test_the_numbers_have_the_names_and_the_intervals_that_are_promised(evaluated):
    for name in ("background_colour", "shape_colour", "shape", "relation", "count", "text", "style"):
        value, n, low, high = (evaluated[f"{name}_accuracy{end}"] for end in ("", "_n", "_low", "_high"))
        assert n >= 3 and 0 <= low <= value <= high <= 1
    assert evaluated["shape_accuracy_n"] == evaluated["relation_accuracy_n"] == 3
    assert set(evaluated["by_suite"]) == {"single", "relation", "count", "text"}
    assert evaluated["fd_clip_self_12"] > 0 and evaluated["fd_clip_self_12_reference"] == "10 training pictures"
    assert not any(key.startswith("fid") for key in evaluated)
    assert -1 <= evaluated["clip_score_self"] <= 1 and "clip_score" not in evaluated


def test_the_instruments_stand_beside_the_numbers_and_in_mlflow(evaluated):
    from raphael.evaluate.findings import tracked_numbers

    assert evaluated["probe"]["version"] == "probe/v1" and len(evaluated["probe"]["facts"]) == 9
    assert all(row["win_share_n"] == 2 for row in evaluated["probe"]["facts"].values())
    parts = {row["part"] for row in evaluated["knockouts"]["parts"] if row["block"] is None}
    assert len(parts) == 7 and evaluated["knockouts"]["n"] == 4
    assert evaluated["swap"]["n"] == 2 and evaluated["swap"]["pooled_text"] is True
    assert evaluated["relation_parts"]["two_objects_n"] == 3 == evaluated["ceiling"]["drawn"]["relation_accuracy_n"]
    assert sum(sum(reads.values()) for reads in evaluated["asked_and_read"]["style"].values()) == 12
    tracked = tracked_numbers(evaluated)
    for key in ("probe/side", "knockouts/time_moe_removed", "swap/colour_attention", "relation_parts/both_pairs"):
        assert f"evaluate/{key}" in tracked
    assert "evaluate/ceiling/decoded/style_accuracy" in tracked
    assert all(isinstance(value, (int, float)) for value in tracked.values())


def test_two_processes_measure_the_bytes_of_one_and_one_that_dies_is_started_again(
    evaluated, workspace, project, tmp_path, monkeypatch, capfd
):
    from truth.killed_worker import DiesOnce

    from raphael.evaluate import stage
    from raphael.evaluate.protocols import dealt

    monkeypatch.syspath_prepend(project / "tests")
    monkeypatch.setattr(stage, "log_evaluation", lambda *_: None)
    monkeypatch.setattr(dealt, "available", lambda: 2)
    monkeypatch.setattr(dealt, "PIECES_A_PROCESS", 1)
    run = dealt.run_processes
    monkeypatch.setattr(dealt, "run_processes", lambda task, *rest: run(DiesOnce(task, tmp_path), *rest))
    one = (workspace / "reports/evaluate.json").read_bytes()
    (workspace / "reports/evaluate.json").unlink()
    assert run_stage("evaluate", workspace, monkeypatch) == 0
    assert (workspace / "reports/evaluate.json").read_bytes() == one
    assert "worker 0 of 2 died (exit code -9); what it finished stays" in capfd.readouterr().err
    assert not list((workspace / "work/evaluate").iterdir()), "finished pieces are nobody's any more"


def test_every_number_carries_the_protocol_that_it_was_measured_by(evaluated, generated, workspace):
    from raphael.evaluate.catalogue import metric_of
    from raphael.evaluate.protocols.protocol import system_protocol

    told, listing = evaluated["protocol"], json.loads((generated / "images.json").read_text())
    assert told["identity"] == "raphael/v1" and told["prompts"] == evaluated["prompts"]
    assert (told["n"], told["n_reference"], told["model"]) == (12, 10, listing["model"])
    settings = listing["settings"]
    assert told["sampling"]["steps"] == settings["steps"] == 2 and told["sampling"]["sampler"] == settings["sampler"]
    assert told["networks"]["fd_clip_self"].startswith(evaluated["scorer"])
    assert told["readers"] == {"scene_reader": "v1"} and told["absent"] == {}
    assert set(told["metrics"]) == set(system_protocol("raphael").metrics)
    for metric, names in told["metrics"].items():
        for name in names:
            assert name in evaluated and (metric_of(name) is None or metric_of(name).name == metric)


def test_metrics_of_the_settings_are_measured_beside_the_systems_own(generated, workspace, monkeypatch):
    from dataclasses import replace

    from raphael.evaluate import stage

    monkeypatch.chdir(workspace)
    config = load_config(workspace / "params.yaml")
    none = dict.fromkeys(("num_probe", "num_knockout_images", "num_swaps"), 0)
    told = {}
    monkeypatch.setattr(stage, "log_evaluation", lambda config, stage, facts, entries, images: told.update(facts))
    asked = replace(config.evaluate, metrics=("precision_recall", "aesthetic"), **none)
    stage.run(replace(config, evaluate=asked), Stage("other", workspace))
    assert 0 <= told["recall_clip_self"] <= 1 and told["protocol"]["metrics"]["precision_recall"]
    assert "evaluate.aesthetic_head" in told["protocol"]["absent"]["aesthetic"]
    wrong = replace(config, evaluate=replace(config.evaluate, metrics=("precision",)))
    with pytest.raises(ConfigError, match="evaluate.metrics: got 'precision', did you mean precision_recall"):
        stage.run(wrong, Stage("other", workspace))


def test_without_drawn_scenes_the_instruments_say_why_they_are_absent(workspace, tmp_path, monkeypatch):
    from dataclasses import replace

    from raphael.evaluate import stage
    from raphael.evaluate.catalogue import metrics_named
    from raphael.evaluate.instruments.measured import INSTRUMENTS
    from raphael.evaluate.metric import measure
    from raphael.evaluate.protocols.workspace import Workspace

    monkeypatch.chdir(tmp_path)
    config, model = load_config(ROOT / "params.yaml"), workspace / "models/raphael"

    def told(config):
        subject = Workspace(config, Stage("evaluate", tmp_path), stage.protocol_of(config, model), [], [], model)
        return stage.told(measure(metrics_named(INSTRUMENTS), subject), subject)

    found = told(config)
    assert found["probe"] is None and "data/source/probe.npz is not there" in found["instruments_absent_because"]
    none = replace(config.evaluate, num_probe=0, num_knockout_images=0, num_swaps=0)
    (tmp_path / "data/source").mkdir(parents=True)
    shutil.copy(workspace / "data/source/probe.npz", tmp_path / "data/source")
    found = told(replace(config, evaluate=none))
    assert found["swap"] is None and "evaluate.num_swaps is 0" in found["instruments_absent_because"]


def test_a_second_evaluation_writes_the_same_bytes_a_run_of_its_own_and_a_point_of_the_models(
    evaluated, workspace, monkeypatch
):
    before = (workspace / "reports/evaluate.json").read_bytes()
    assert run_stage("evaluate", workspace, monkeypatch) == 0
    assert (workspace / "reports/evaluate.json").read_bytes() == before
    from mlflow import MlflowClient

    from raphael.base.tracking.tracker import resolve_uri

    client = MlflowClient(resolve_uri(load_config(workspace / "params.yaml"), workspace))
    (experiment,) = [item for item in client.search_experiments() if item.name == "raphael"]
    runs = client.search_runs([experiment.experiment_id])
    (run,) = [run for run in runs if run.info.run_name.startswith("model-")]
    own = [run for run in runs if run.info.run_name.startswith("evaluation-")]
    assert len(own) == len(runs) - 1 == 2
    assert all(one.data.tags["mlflow.parentRunId"] == run.info.run_id for one in own)
    assert all(one.data.metrics == run.data.metrics for one in own)
    assert run.data.metrics["evaluate/shape_accuracy"] == json.loads(before)["shape_accuracy"]
    (model,) = client.search_logged_models([experiment.experiment_id])
    on_the_board = {metric.key: metric.value for metric in model.metrics}
    assert on_the_board == run.data.metrics, "the leaderboard has every number of the evaluation"
    assert "evaluate_pictures.json" in [item.path for item in client.list_artifacts(run.info.run_id)]


def test_the_evaluation_names_its_protocol_and_failures_worth_looking_at(evaluated, generated):
    listed = json.loads((generated / "images.json").read_text())["images"]
    assert len(evaluated["prompts"]) == 64 and len(evaluated["failures"]["lowest_clip_score"]) == 10
    low, high = evaluated["clip_score_self_interval"]
    assert low < evaluated["clip_score_self"] < high
    values = [row["value"] for row in evaluated["failures"]["lowest_clip_score"]]
    rest = len(listed) * evaluated["clip_score_self"] - sum(values)  # of the images that scored higher
    assert values == sorted(values) and len(listed) == 12 and rest >= 2 * values[-1]
    assert {row["file"] for row in evaluated["failures"]["most_wrong"]} <= {entry["file"] for entry in listed}
    assert set(evaluated["clip_score_self_by_suite"]) == set(evaluated["by_suite"])


def test_the_page_is_one_file_that_asks_nobody_for_anything_and_is_the_same_again(evaluated, workspace, monkeypatch):
    assert run_stage("report", workspace, monkeypatch) == 0
    page = (workspace / "reports/index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert all(part.startswith("data:image/") for part in page.split('src="')[1:])
    assert "Does it paint what it is told?" in page and "No curves were logged" in page
    assert "Failures worth looking at" in page and "n = 12; raphael/v1, prompts " in page
    assert "What it knows, and by what" in page and "binding of colours" in page and "decoded truth" in page
    parts = [row for row in evaluated["knockouts"]["parts"] if row["block"] is None]
    inert = [row["part"].replace("_", " ") for row in parts if row["inert"]]
    assert (f"<b>Inert: {', '.join(inert)}.</b>" in page) == bool(inert)
    assert len(page) < 6 << 20
    sizes = re.findall(r"<b>(\d+ × \d+)</b><span>(\d+)<small> ([\d.]+) %", page)
    assert sizes == [("64 × 64", "9", "81.8"), ("48 × 96", "2", "18.2"), ("96 × 48", "0", "0.0")]
    assert run_stage("report", workspace, monkeypatch) == 0
    assert (workspace / "reports/index.html").read_text() == page


def test_the_page_opens_with_the_best_and_the_worst_and_shows_how_the_model_grew(evaluated, workspace, monkeypatch):
    from PIL import Image

    from raphael.base.images.grid import image_grid
    from raphael.base.images.growth import fixed_prompts

    entries = json.loads((workspace / "data/generated/images.json").read_text())["images"]
    train = load_config(workspace / "params.yaml").train
    prompts = fixed_prompts(train.sample_prompts, train.num_sample_prompts, entries)
    model = workspace / "models/raphael"
    (model / "samples").mkdir()
    for images in (0, 320):
        tiles = [Image.new("RGB", (32, 32), (images % 255, index, 0)) for index in range(len(prompts))]
        image_grid(tiles, 4, prompts).save(model / f"samples/{images:06d}.png")
    points = [{"images": images, "heldout/ema/probe/side": 0.5} for images in (0, 320)]
    (model / "heldout.json").write_text(json.dumps(points))
    assert run_stage("report", workspace, monkeypatch) == 0
    page = (workspace / "reports/index.html").read_text()
    shutil.rmtree(model / "samples"), (model / "heldout.json").unlink()
    header = page[: page.index("</header>")]
    worst = evaluated["failures"]["most_wrong"][0]
    assert "<h3>Worst</h3>" in header and worst["prompt"] in header and 'class="wrong"' in header
    assert ("<h3>Best</h3>" in header) == bool(evaluated["failures"]["best"])
    assert '<table class="growth">' in page and page.count(f"<td>{prompts[0]}</td>") == 1
    assert "What it knew, as training went on" in page and "side of a relation <b>50 %</b>" in page


def test_the_page_takes_in_the_paths_of_its_own_model_and_of_no_other(generated, workspace, monkeypatch, capsys):
    folder = workspace / "reports" / "paths"
    folder.mkdir()
    for name in ("words", "times", *(f"confusion-{kind}" for kind in ("adjectives", "nouns", "verbs"))):
        Image.new("RGB", (2, 2)).save(folder / f"{name}.png")
    (folder / "section.html").write_text("<section id='paths'><script>stolen()</script></section>")  # nobody reads it
    model = json.loads((generated / "images.json").read_text())["model"]
    of_one = {"chance": 0.1, "words": "<script>stolen()</script>", "untrained": [{"accuracy": 0.2}, {"accuracy": 0.3}]}
    of_one |= {"trained": {"accuracy": 0.5}, "difference": {"mean": 1.0, "low": 0.0, "high": 2.0}}
    found = {"blocks": "<b>4</b>", "experts": 2, "kinds": dict.fromkeys(("adjectives", "nouns", "verbs"), of_one)}
    for name, shown in (("another", False), (model, True)):
        (folder / "paths.json").write_text(json.dumps({"model": name, **found}))
        assert run_stage("report", workspace, monkeypatch) == 0
        page = (workspace / "reports/index.html").read_text()
        assert ("<h2>Ways of words</h2>" in page) == ('href="#paths"' in page) == shown
        assert "stolen()</script>" not in page and ("&lt;b&gt;4&lt;/b&gt;" in page) == shown
    for broken in ({}, {**found, "kinds": 3}, {**found, "kinds": {"nouns": {**of_one, "chance": "<script>"}}}):
        (folder / "paths.json").write_text(json.dumps({"model": model, **broken}))
        capsys.readouterr()
        assert run_stage("report", workspace, monkeypatch) == 1
        assert "paths.json: not what raphael paths writes" in capsys.readouterr().err
    shutil.rmtree(folder)


def test_a_broken_or_missing_image_is_an_error_that_names_it(tmp_path):
    from raphael.base.images.fit import read_image

    with pytest.raises(StageError, match="no such image"):
        read_image(tmp_path / "00000.png")
    (tmp_path / "00001.png").write_bytes(b"\x89PNG\r\n\x1a\n half")
    with pytest.raises(StageError, match="00001.png: not a whole image"):
        read_image(tmp_path / "00001.png")


def test_a_missing_inception_file_is_an_error_that_says_which_file_is_expected():
    from raphael.evaluate.features.extract import inception_space

    with pytest.raises(StageError, match="weights-inception"):
        inception_space("/nowhere/weights.pth")


def test_a_corrupt_shard_is_an_error_that_names_it(workspace, tmp_path):
    from raphael.evaluate.features.references import reference_images

    (tmp_path / "00000.tar").write_bytes(b"no tar")
    with pytest.raises(StageError, match="00000.tar: a corrupt shard"):
        list(reference_images(tmp_path, workspace / "data/captions/captions.parquet", 5, 32, 32))
