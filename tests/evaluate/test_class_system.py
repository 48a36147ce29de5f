"""The stage evaluate of a class-conditional model in pixels: labels in, class read, features of its own, no text."""

import io
import json
import tarfile

import pytest
import yaml
from PIL import Image
from truth.tiny_raphael import ROOT

from raphael.base.config.params import load_config
from raphael.base.config.systems import system_of
from raphael.base.stage import Stage, read_json, write_json
from raphael.base.strict import ConfigError, load, to_dict
from raphael.evaluate import stage
from raphael.evaluate.findings import judgement_of, tracked_numbers
from raphael.evaluate.protocols.protocol import Protocol, meta_of
from raphael.evaluate.report import page
from raphael.evaluate.report.findings import opening
from raphael.evaluate.report.sections import accuracies, measures
from raphael.evaluate.scenes.classes import area_downsampled, label_prompts
from raphael.evaluate.subject import MODEL, TEXT_MODEL

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
PROTOCOL = {
    "name": "shapes", "version": "v1", "about": "a class-conditional model of drawn shapes",
    "captions": {"kind": "any", "rule": "labels with their seeds"},
    "pictures": {"crop": "none", "size_px": 0}, "seeds": {"rule": "column"},
    "min_images": 1, "min_reference": 1, "reference": "training images",
    "networks": ["random"], "settings_required": True,
    "metrics": ["class_accuracy", "class_ceiling", "frechet", "precision_recall"],
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """24 drawn shapes at 32 px as the images of 24 labels, four of which are exchanged; -> (workspace, report)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_pipeline.source.scene_probe import probe_set

    root, probe = tmp_path_factory.mktemp("shapes"), probe_set(0, 60, 64, 0.12, ())
    rows = [row for row, suite in enumerate(probe.suites) if suite == "single"]
    shown = {shape: [r for r in rows if probe.truths[r]["objects"][0]["shape"] == shape] for shape in SHAPES}
    drawn = [area_downsampled(probe.images[shown[shape][turn]], 32) for turn in range(4) for shape in SHAPES]
    entries = [{"file": f"{i:05d}.png", "index": i, **e} for i, e in enumerate(label_prompts(SHAPES, range(4)))]
    drawn[0], drawn[1], drawn[8], drawn[9] = drawn[1], drawn[0], drawn[9], drawn[8]
    for folder in ("data/generated", "data/source", "data/shards", "data/captions", "models/raphael"):
        (root / folder).mkdir(parents=True)
    for entry, image in zip(entries, drawn, strict=True):
        Image.fromarray(image).save(root / "data/generated" / entry["file"])
    settings = {"seed": 0, "sampler": "ddpm", "steps": 50, "guidance_scale": 2.0, "variance": "beta", "batch_size": 9}
    write_json(root / "data/generated/images.json", {"model": "abc", "settings": settings, "images": entries})
    write_json(root / "models/raphael/meta.json", {"system": "shapes"})
    probe.write(root / "data/source/probe.npz")
    keys = [f"{key:09d}" for key in range(30)]
    with tarfile.open(root / "data/shards/00000.tar", "w") as tar:
        for key, row in zip(keys, rows[30:], strict=True):
            buffer = io.BytesIO()
            Image.fromarray(probe.images[row]).save(buffer, "PNG")
            member = tarfile.TarInfo(f"{key}.png")
            member.size = buffer.tell()
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    pq.write_table(pa.table({"key": keys, "shard": ["00000.tar"] * 30}), root / "data/captions/captions.parquet")
    (root / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(stage, "system_protocol", lambda system: load(Protocol, PROTOCOL, f"{system}/evaluate.yaml"))
        patch.setattr(stage, "log_evaluation", lambda *arguments: None)
        stage.run(load_config(root / "params.yaml"), Stage("evaluate", root))
    return root, json.loads((root / "reports/evaluate.json").read_text())


def test_the_class_is_read_beside_its_ceiling_and_chance(measured):
    report = measured[1]
    assert report["class_accuracy"] == round(20 / 24, 6) and report["class_accuracy_n"] == 24
    assert report["class_accuracy_ceiling"] >= 0.98 and report["class_accuracy_ceiling_n"] == 60
    assert report["chance"]["class_accuracy"] == round((24 * 4 - 20) / (24 * 23), 6), "four of each are asked and read"
    assert {name: row["value"] for name, row in report["class_accuracy_by_label"].items() if row["value"] < 1} == {
        "circle": 0.75, "square": 0.75, "triangle": 0.75, "star": 0.75,
    }  # fmt: skip


def test_distance_and_recall_are_in_the_networks_own_name_and_nothing_asks_for_a_text(measured):
    report = measured[1]
    assert report["fd_random64_24"] > 0 and report["fd_random64_24_reference"] == "30 training pictures"
    assert 0 <= report["recall_random64"] <= 1 and 0 <= report["precision_random64"] <= 1
    assert not any("clip" in key or "instruments" in key for key in report), sorted(report)
    told = report["protocol"]
    assert told["identity"] == "shapes/v1" and told["absent"] == {} and told["n_reference"] == 30
    assert set(told["networks"]) == {"fd_random64"} and told["readers"] == {"scene_reader": "v1"}
    assert told["sampling"] == {"sampler": "ddpm", "steps": 50, "guidance_scale": 2.0, "variance": "beta", "seed": 0}


def test_instruments_that_ask_texts_of_a_model_are_absent_of_a_system_that_reads_none(measured, tmp_path, monkeypatch):
    from raphael.evaluate.catalogue import metrics_named
    from raphael.evaluate.instruments.measured import INSTRUMENTS
    from raphael.evaluate.metric import measure
    from raphael.evaluate.protocols.workspace import Workspace

    monkeypatch.chdir(measured[0])
    for name, meta in (("ddpm", {"system": "ddpm"}), ("raphael", {})):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "meta.json", meta)
    config, protocol = load_config("params.yaml"), load(Protocol, PROTOCOL, "evaluate.yaml")

    def subject(model):
        return Workspace(config, Stage("evaluate", tmp_path), protocol, [], [], tmp_path / model)

    found = measure(metrics_named(INSTRUMENTS), subject("ddpm"))
    assert set(found.absent) == set(INSTRUMENTS) and not found.facts
    reasons = ("of the system ddpm, which has no text encoder", "of the system ddpm, which is told no captions")
    assert all(any(reason in why for reason in reasons) for why in found.absent.values())
    assert subject("raphael").missing(TEXT_MODEL) == "" == subject("ddpm").missing(MODEL)
    assert "no model beside the images" in subject("nothing").missing(TEXT_MODEL)


def test_the_class_judges_which_model_is_best_and_goes_to_mlflow(measured):
    report = measured[1]
    judged = judgement_of(report)
    assert (judged.metric, judged.value) == ("class_accuracy", report["class_accuracy"])
    assert tracked_numbers(report)["evaluate/chance/class_accuracy"] == report["chance"]["class_accuracy"]


def test_the_report_shows_classes_as_it_shows_attributes(measured):
    root, report = measured
    found = accuracies(report)
    assert [row["label"] for row in found["headline"]] == ["class"] and found["rows"][0]["n"] == 24
    labels = {row["key"]: row["label"] for row in measures(report)}
    assert labels["class_accuracy_ceiling"] == "class of drawn truth" and labels["fd_random64_24"] == "Fréchet distance"
    entries = json.loads((root / "data/generated/images.json").read_text())["images"]
    shown = opening(report, root / "data/generated", entries)
    assert [card["prompt"] for card in shown["worst"]] == ["circle", "square", "triangle", "star"]
    assert shown["worst"][0]["checks"] == [{"name": "class", "right": False, "read": "square"}]
    assert all(check["right"] for card in shown["best"] for check in card["checks"]) and len(shown["best"]) == 6


def test_the_page_of_a_class_conditional_model_is_made_without_a_look_into_raphaels_parts(measured, monkeypatch):
    root, report = measured
    monkeypatch.chdir(root)
    kept = read_json(root / "data/generated/images.json")
    settings = {**to_dict(load_config("params.yaml").generate), **kept["settings"]}
    write_json(root / "data/generated/images.json", {**kept, "settings": settings})
    page.run(load_config("params.yaml"), Stage("report", root))
    html = (root / "reports/index.html").read_text()
    assert "<summary>By class</summary>" in html and "<td>heart</td>" in html and "shapes/v1, prompts" in html
    assert html.index("<h3>Worst</h3>") < html.index("</header>") and "<title>SHAPES: report</title>" in html
    for raphaels in ("The model is not at hand", 'href="#attention"', 'href="#experts"', 'id="attention"', "Routes"):
        assert raphaels not in html
    monkeypatch.setattr(page, "sections_of", lambda system: ("inside",))
    monkeypatch.setitem(page.LOOKING_INSIDE, "inside", lambda *given: {})
    page.run(load_config("params.yaml"), Stage("report", root))
    html = (root / "reports/index.html").read_text()
    write_json(root / "data/generated/images.json", kept)
    assert "The model is not at hand" in html and 'href="#attention"' in html and 'id="experts"' in html


def test_a_system_without_sections_of_its_own_has_none_and_an_unknown_one_is_named(measured, tmp_path):
    assert system_of(meta_of(measured[0] / "models/raphael")) == "shapes" and system_of(meta_of(tmp_path)) == "raphael"
    assert page.sections_of("shapes", tmp_path) == () and page.sections_of("raphael") == ("inside",)
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes/report.yaml").write_text(yaml.safe_dump({"sections": ["insides"]}))
    with pytest.raises(ConfigError, match="shapes/report.yaml: sections: got 'insides', did you mean inside"):
        page.sections_of("shapes", tmp_path)
