"""`raphael plan`: the numbers are those of arithmetic done by hand, and what nobody measured is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.tools.scale import rates as table
from data_pipeline.tools.scale.plan import as_json, asked_of, main, written_again
from data_pipeline.tools.scale.rates import read_rates

PROJECT = Path(__file__).resolve().parents[3]
ROUND = {  # a rate for each name, round enough to divide by in one's head
    "source.rows": 1e6, "select.rows": 5e5, "download.gateway": 1000, "download.worker": 100, "download.pack": 500,
    "score.cpu": 2, "score.gpu": 1000, "filter.rows": 1e5, "filter.memory": 100, "filter.hash": 200,
    "filter.near": 250_000, "captions.rows": 5e4, "captions.join": 1e6,
    "encode.picture": 200, "encode.cpu": 0.02, "encode.gpu": 50,
    "encode.join": 5e8, "dvc.md5": 5e8,
}  # fmt: skip


def options(*told):
    import argparse

    from data_pipeline.tools.scale.plan import add_options

    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args([str(word) for word in told])


def planned(*told, rates=ROUND):
    given = [word for name, value in rates.items() for word in ("--rate", f"{name}={value}")]
    whole = as_json(*asked_of(options(*told, *given)))
    return whole, {stage["stage"]: stage for stage in whole["stages"]}


def test_hours_and_dollars_are_those_of_naive_arithmetic():
    """1e8 links, 4 machines of 10 cores with 2 GPUs each, 2 workspaces, half alive, a tenth filtered out."""
    whole, stages = planned(
        "--rows", "1e8", "--machines", 4, "--workspaces", 2, "--cores", 10, "--gpus", 2, "--alive", 0.5,
        "--filtered", 0.9, "--links-per-s", 2000, "--network-gbit", 8, "--image-kb", 100, "--size", "512x256",
        "--score", "--near-duplicates", "--machine-usd", 1, "--gpu-usd", 3, "--storage-usd", 0.02, "--months", 3,
    )  # fmt: skip
    rows, images, kept = 1e8, 5e7, 4.5e7
    alone = {"source": rows / 1e6 / 2, "select": rows / 5e5 / 2}
    for stage, seconds in alone.items():
        assert stages[stage]["seconds"] == pytest.approx(seconds)
        assert stages[stage]["usd"] == pytest.approx(seconds / 3600 * 2 * 1)
    download = {
        "gateway and packing, one process": (rows / 1000 + images / 500) / 2,
        "decoding and resizing": images / 100 / (10 * 2),
        "resolver and the web": rows / 2000 / 2,
        "the line (images as stored; originals are larger)": images * 100e3 / 1e9 / 2,
    }
    (phase,) = stages["download"]["phases"]
    assert {part["part"]: part["seconds"] for part in phase} == pytest.approx(download)
    assert stages["download"]["seconds"] == max(download.values()) == 100_000
    assert stages["download"]["first_bottleneck"]["part"] == "gateway and packing, one process"
    assert stages["score"]["seconds"] == pytest.approx(images / 1000 / 8)
    assert stages["score"]["usd"] == pytest.approx(images / 1000 / 8 / 3600 * (4 * 1 + 8 * 3))
    assert stages["filter"]["seconds"] == pytest.approx(rows / 1e5 / 2 + images / 200 / 40 + images / 250_000 / 2)
    assert stages["captions"]["seconds"] == pytest.approx(kept / 5e4 / 40 + kept / 1e6 / 2)
    record = 512 * 256 / 64 * (2 * 4 * 2 + 1) + 77 * 4  # moments of 4 channels in float16, edges, token ids
    pixels = max(kept / 200 / 40, kept * 512 * 256 / 1e6 / 50 / 8)
    joined = kept * record / 5e8 / 2
    assert stages["encode"]["seconds"] == pytest.approx(pixels + joined)
    assert stages["encode"]["usd"] == pytest.approx(pixels / 3600 * (4 + 8 * 3) + joined / 3600 * 2)
    assert stages["dvc"]["seconds"] == pytest.approx((images * 100e3 + kept * record) / 5e8 / 2)
    total = whole["total"]
    assert total["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages.values()))
    assert total["bytes"]["shards"] == pytest.approx(images * 100e3)
    assert total["bytes"]["records"] == pytest.approx(kept * record)
    stored = (images * 100e3 + kept * record) / 1e9 * 0.02 * 3
    assert total["usd"]["storage"] == pytest.approx(stored)
    assert total["usd"]["sum"] == pytest.approx(stored + sum(stage["usd"] for stage in stages.values()))
    assert total["first_bottleneck"]["stage"] == "download" and total["not_measured"] == []


def test_without_gpus_the_cores_do_both_parts_of_encoding_one_after_the_other():
    _, stages = planned("--rows", "1e6", "--machines", 1, "--cores", 4, "--alive", 1, "--size", "256x256")
    pixels = (1e6 / 200 + 1e6 * 256 * 256 / 1e6 / 0.02) / 4
    assert stages["encode"]["phases"][0][0]["seconds"] == pytest.approx(pixels)


def test_twice_the_workspaces_halve_what_is_one_process_and_twice_the_machines_what_is_spread():
    _, one = planned("--rows", "1e8", "--machines", 4, "--workspaces", 1)
    _, two = planned("--rows", "1e8", "--machines", 4, "--workspaces", 2)
    _, more = planned("--rows", "1e8", "--machines", 8, "--workspaces", 1)
    for stage in ("source", "select", "download", "dvc"):
        assert two[stage]["seconds"] == pytest.approx(one[stage]["seconds"] / 2)
        assert more[stage]["seconds"] == pytest.approx(one[stage]["seconds"])
    spread = {name: stages["encode"]["phases"][0][0]["seconds"] for name, stages in (("one", one), ("more", more))}
    assert spread["more"] == pytest.approx(spread["one"] / 2)


def test_what_was_not_measured_is_named_and_left_out_of_the_sums(monkeypatch, tmp_path, capsys):
    entries = {
        name: {"value": ROUND[name] if name != "encode.gpu" else None, "unit": rate.unit, "how": rate.how}
        for name, rate in read_rates().by_name.items()
    }
    file = tmp_path / "rates.json"
    machine = {"processor": "a processor", "measured": "a day"}
    file.write_text(json.dumps({"machine": machine, "rates": entries}))
    monkeypatch.setattr("data_pipeline.tools.scale.plan.read_rates", lambda: read_rates(file))
    whole = as_json(*asked_of(options("--rows", "1e8", "--machines", 2, "--gpus", 8)))
    assert whole["total"]["not_measured"] == ["encode.gpu"]
    encode = whole["stages"][-2]
    assert encode["stage"] == "encode" and encode["not_measured"] == ["encode.gpu"] and encode["seconds"] > 0
    assert main(["--rows", "1e8", "--machines", "2", "--gpus", "8"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("and more |") == 2 and "not in it: encode.gpu" in shown
    assert "not measured on this kind of machine, and left out of the sums: encode.gpu" in shown
    assert "measured by benchmarks/rates.py (a processor, a day)" in shown


def test_a_memory_that_is_too_small_is_one_sentence_with_the_number_of_workspaces_that_fit():
    whole, _ = planned("--rows", "2e9", "--alive", 0.5, "--memory-gb", 40)
    (sentence,) = whole["does_not_fit"]
    assert "100 GB of hashes" in sentence and "at least 3 workspaces" in sentence
    whole, _ = planned("--rows", "2e9", "--alive", 0.5, "--memory-gb", 40, "--machines", 3, "--workspaces", 3)
    assert whole["does_not_fit"] == []


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (["--rows", "0"], "expected a whole number from 1"),
        (["--rows", "nan"], "expected a whole number from 1"),
        (["--rows", "2.5"], "expected a whole number"),
        (["--rows", "many"], "got 'many'"),
        (["--rows", "1e6", "--machines", "0"], "--machines: got '0'"),
        (["--rows", "1e6", "--alive", "1.5"], "expected a number from 1e-06 to 1"),
        (["--rows", "1e6", "--machine-usd", "-1"], "--machine-usd"),
        (["--rows", "1e6", "--size", "256"], "expected HEIGHTxWIDTH"),
        (["--machines", "2"], "--rows"),
        (["--rows", "1e6", "--rate", "encode.gpu"], "--rate: got 'encode.gpu', expected NAME=VALUE"),
        (["--rows", "1e6", "--rate", "encode=3"], "the name one of source.rows"),
        (["--rows", "1e6", "--rate", "dvc.md5=-3"], "a number above 0"),
        (["--rows", "1e6", "--rate", "dvc.md5=inf"], "a number above 0"),
        (["--rows", "1e6", "--workspaces", "17"], "at most a core each, 16"),
        (["--rows", "3", "--workspaces", "4"], "expected a row each"),
    ],
)
def test_bad_input_is_one_line(told, words, capsys):
    try:
        status = main(told)
    except SystemExit as end:  # argparse's
        status = end.code
    assert status in (1, 2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error, error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ('{"rates": {}}', "without 'machine'"),
        ('{"machine": {}, "rates": {"dvc.md5": {"value": 0, "unit": "", "how": ""}}}', "dvc.md5: got 0"),
        ('{"machine": {}, "rates": {"dvc.md5": {"unit": "", "how": ""}}}', "without 'value'"),
    ],
)
def test_a_damaged_table_of_rates_is_one_line(tmp_path, content, words):
    file = tmp_path / "rates.json"
    file.write_text(content)
    with pytest.raises(Exception, match=words):
        read_rates(file)


def test_units_of_items_and_rates_agree():
    """A part that divides links by a rate of images would be wrong in silence."""
    from data_pipeline.tools.scale.arithmetic import Asked, plan

    for gpus in (0, 1):
        asked = Asked(1e6, gpus=gpus, score=True, near_duplicates=True)
        for stage in plan(asked, read_rates()):
            for phase in stage.phases:
                for part in phase:
                    for _, what, rate in part.terms:
                        assert rate.unit == f"{what}/s", (stage.name, part.name, rate)


def test_the_table_is_what_the_benchmark_measured_last():
    results = sorted((PROJECT / "benchmarks/results").glob("rates-*.json"))
    newest = max((json.loads(file.read_text()) for file in results), key=lambda result: result["measured"])
    measured = {row["rate"]: row["value"] for row in newest["results"]}
    rates = read_rates().by_name
    assert {name: rate.value for name, rate in rates.items() if rate.value is not None} == measured
    assert read_rates().machine["measured"] == newest["measured"]
    assert not any(rate.value for name, rate in rates.items() if name.endswith(".gpu")), "nobody had a GPU"


def test_the_page_holds_what_the_command_prints():
    page = (PROJECT / "docs/scale.md").read_text(encoding="utf-8")
    assert page.count("<!-- begin: raphael plan") >= 3
    assert written_again(page) == page, "python -m data_pipeline.tools.scale.plan --write docs/scale.md"


def test_a_page_without_an_end_is_an_error():
    with pytest.raises(Exception, match="a plan without its end"):
        written_again("<!-- begin: raphael plan --rows 100 -->\n")


def test_the_command_is_one_of_raphaels_and_prints_json(capsys):
    command = [sys.executable, "-m", "raphael.cli", "plan", "--rows", "1e6", "--machines", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]["links"] == 1e6
    assert table.FILE.is_file()


def test_every_action_of_raphael_data_leads_to_a_program():
    import importlib.util

    from data_pipeline.commands import MODULES, PLAN

    assert all(importlib.util.find_spec(module) for module in [*MODULES.values(), PLAN])
    command = [sys.executable, "-m", "raphael.cli", "data", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT).stdout
    assert all(f"    {name} " in said for name in MODULES)
