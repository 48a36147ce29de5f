"""Links become shards through img2dataset and the gateway, and every row ends as an image or with a reason.

A small scenes corpus goes from its source to clean captions; its truth table says what had to happen to each row.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import types
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from data_pipeline.download import run_img2dataset, shards
from data_pipeline.download import stage as download
from data_pipeline.download.run_img2dataset import arguments
from raphael.base.config.params import load_config
from raphael.base.stage import Stage, StageError

ROWS = 300
DATA_STAGES = ("source", "select", "download", "filter", "captions")


def write_params(project: Path, folder: Path, **download_settings) -> Path:
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["source"]["scenes"].update(num_rows=ROWS, bad_share=0.5, num_heldout_prompts=2)
    settings = {"shard_rows": 100, "timeout_s": 1.0, "deadline_s": 20.0, "retries": 1, "stall_s": 120.0}
    params["download"].update(settings | download_settings)
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    return path


def stage_command(project: Path, stage: str, params: Path) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    return {"args": [sys.executable, "-m", f"data_pipeline.{stage}", "--params", str(params)], "env": environment}


@pytest.fixture(scope="module")
def corpus(project, tmp_path_factory) -> Path:
    """A workspace in which the data stages ran; those that start processes as a user runs them."""
    folder = tmp_path_factory.mktemp("corpus")
    params = write_params(project, folder)
    config = load_config(params)
    for stage in DATA_STAGES:
        if stage in ("source", "download"):
            done = subprocess.run(**stage_command(project, stage, params), capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
        else:
            with contextlib.chdir(folder):
                importlib.import_module(f"data_pipeline.{stage}.stage").run(config, Stage(stage, folder))
    return folder


def report(corpus: Path, stage: str) -> dict:
    return json.loads((corpus / f"reports/{stage}.json").read_text())


def outcome_of_rows(corpus: Path) -> dict[int, str]:
    """What happened to each row of the list: the stage and reason that dropped it, or "kept". From the tables alone."""
    links = pq.read_table(corpus / download.LINKS)["id"].to_pylist()
    tables = sorted((corpus / "data/shards").glob("*.parquet"))
    packed = [row for path in tables for row in pq.read_table(path).to_pylist()]
    pictures = pq.read_table(corpus / "data/filtered/pictures.parquet").to_pylist()
    captions = set(pq.read_table(corpus / "data/captions/captions.parquet")["key"].to_pylist())
    assert [row["id"] for row in packed] == links
    outcome = dict.fromkeys(range(ROWS), "select")
    outcome |= {row["id"]: "filter" if row["status"] == "success" else f"download: {row['reason']}" for row in packed}
    outcome |= {row["id"]: "kept" if row["key"] in captions else "captions" for row in pictures}
    return outcome


EXPECTED = {
    "": {"kept"},
    "missing": {"download: http 404"},
    "stall": {"download: timeout"},
    "cut": {"download: truncated"},
    "truncated": {"download: truncated"},
    "not_an_image": {"download: not a picture"},
    "file_name_caption": {"captions"},
    "empty_caption": {"select"},
    "html_caption": {"kept"},
    "entity_caption": {"kept"},
    "url_caption": {"kept"},
    "email_caption": {"kept"},
    "no_score": {"filter"},
    "watermark": {"filter"},
    "low_score": {"filter"},
    "unsafe": {"filter"},
    "same_url": {"select"},
    "same_picture": {"filter"},
    "tiny": {"filter"},
    "banner": {"filter"},
}


def test_what_happened_to_each_row_is_what_its_truth_says(corpus):
    faults = pq.read_table(corpus / "data/source/truth.parquet")["fault"].to_pylist()
    outcome = outcome_of_rows(corpus)
    assert not [(row, fault, outcome[row]) for row, fault in enumerate(faults) if outcome[row] not in EXPECTED[fault]]


def test_the_counts_of_the_stages_add_up_from_the_list_to_the_captions(corpus):
    reports = [report(corpus, stage) for stage in DATA_STAGES]
    for before, after in zip(reports, reports[1:], strict=False):
        assert after["total"] == before["kept"]
    for each in reports:
        assert each["total"] == each["kept"] + sum(each["dropped"].values())
    lost = Counter(outcome.partition(":")[0] for outcome in outcome_of_rows(corpus).values())
    assert {stage: sum(report(corpus, stage)["dropped"].values()) for stage in DATA_STAGES[1:]} == {
        stage: lost[stage] for stage in DATA_STAGES[1:]
    }


def test_the_dropped_counts_are_the_corpus_faults(corpus):
    faults = Counter(pq.read_table(corpus / "data/source/truth.parquet")["fault"].to_pylist())
    dropped = {stage: report(corpus, stage)["dropped"] for stage in DATA_STAGES}
    assert dropped["download"]["http 404"] == faults["missing"]
    assert dropped["download"]["not a picture"] == faults["not_an_image"]
    assert dropped["download"]["truncated"] == faults["cut"] + faults["truncated"]
    same_url = sum(dropped["select"].get(reason, 0) for reason in ("duplicate url", "another caption of a kept url"))
    assert same_url == faults["same_url"]
    assert dropped["filter"]["aesthetic too low"] == faults["low_score"]
    assert dropped["filter"]["watermarked"] == faults["watermark"]
    assert dropped["filter"]["unsafe"] == faults["unsafe"]
    assert dropped["filter"]["too small"] == faults["tiny"]
    assert dropped["filter"]["too long and narrow"] == faults["banner"]
    assert dropped["filter"]["duplicate picture"] == faults["same_picture"]
    assert dropped["captions"]["only a file name"] == faults["file_name_caption"]


def test_clean_captions_are_the_captions_before_they_were_spoilt(corpus):
    truth = {row["id"]: row for row in pq.read_table(corpus / "data/source/truth.parquet").to_pylist()}
    ids = {row["key"]: row["id"] for row in pq.read_table(corpus / "data/filtered/pictures.parquet").to_pylist()}
    for row in pq.read_table(corpus / "data/captions/captions.parquet").to_pylist():
        intended = truth[ids[row["key"]]]
        if intended["fault"] != "entity_caption":  # "... &amp; more" leaves words that nobody can know for noise
            assert row["caption"] == intended["caption"]


def test_shards_are_plain_undated_webdatasets_in_the_order_of_the_keys(corpus):
    for path in sorted((corpus / "data/shards").glob("*.tar")):
        rows = {row["key"]: row for row in pq.read_table(path.with_suffix(".parquet")).to_pylist() if row["key"]}
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            names = [member.name for member in members]
            assert all(member.mtime == member.uid == 0 and member.isfile() for member in members)
            pictures = [name for name in names if name.endswith(".png")]
            assert pictures == sorted(f"{key}.png" for key, row in rows.items() if row["status"] == "success")
            for name in pictures[:20]:
                body, row = tar.extractfile(name).read(), rows[name[:9]]
                assert hashlib.sha256(body).hexdigest() == row["sha256"]
                assert Image.open(io.BytesIO(body)).size == (row["width"], row["height"])
                facts = json.load(tar.extractfile(f"{name[:9]}.json"))
                assert facts["url"] == row["url"] and facts["url"].startswith("http://scenes.invalid/")
    assert not list((corpus / "data/shards").glob("*.json"))


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_a_killed_download_resumes_and_ends_in_the_same_bytes(corpus, project, tmp_path):
    params = write_params(project, tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("source", "selected"):
        (tmp_path / "data" / name).symlink_to(corpus / "data" / name)
    command = stage_command(project, "download", params)
    with subprocess.Popen(**command, stderr=subprocess.DEVNULL, start_new_session=True) as running:
        kept = wait_for(lambda: list(tmp_path.glob("work/download/*/shards/00000.parquet")), running)
        family = psutil.Process(running.pid).children(recursive=True)
        assert family, "img2dataset runs in processes of its own"
        running.kill()  # the stage alone: its children have to notice by themselves
    gone, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    before = kept[0].stat().st_ino
    done = subprocess.run(**command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "data/shards") == content(corpus / "data/shards")
    assert (tmp_path / "data/shards/00000.parquet").stat().st_ino == before  # kept, not downloaded again
    assert report(tmp_path, "download") == report(corpus, "download")
    assert not list((tmp_path / "work/download").rglob("*.*"))


def wait_for(found, running: subprocess.Popen):
    for _ in range(3000):
        result = found()
        if result:
            return result
        assert running.poll() is None, "the stage ended before it could be killed"
        time.sleep(0.02)
    raise AssertionError("nothing happened for a minute")


def test_a_downloader_that_never_ends_is_not_waited_for_once_every_shard_is_packed(tmp_path, project, monkeypatch):
    """img2dataset ends its pool, and now and then a process of it holds a lock for ever: that cost stall_s."""
    config = load_config(write_params(project, tmp_path)).download
    downloads = download._Downloads(config, tmp_path, total=100)
    monkeypatch.setattr(run_img2dataset, "command", lambda *_: [sys.executable, "-c", "import time; time.sleep(600)"])

    def pack() -> int:
        for path in downloads.files(0):
            path.touch()
        downloads.pieces.add(*downloads.files(0))
        return 1

    downloads.pack_finished = pack
    gateway, bar = types.SimpleNamespace(answered=100), types.SimpleNamespace(n=0, bar=types.SimpleNamespace(n=0))
    bar.update = lambda rows: setattr(bar, "n", bar.n + rows)
    before = set(psutil.Process().children(recursive=True))  # such as the resource tracker of another test's pool
    started_s = time.monotonic()
    downloads.download(gateway, bar)
    assert time.monotonic() - started_s < 10 < config.stall_s and bar.n == 100
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_says_so_in_a_line(corpus, project, tmp_path):
    params = write_params(project, tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("source", "selected"):
        (tmp_path / "data" / name).symlink_to(corpus / "data" / name)
    command = stage_command(project, "download", params)
    command["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells ignore it for background jobs
    with subprocess.Popen(**command, stderr=subprocess.PIPE, text=True, start_new_session=True) as running:
        wait_for(lambda: len(psutil.Process(running.pid).children(recursive=True)) >= 2, running)
        family = psutil.Process(running.pid).children(recursive=True)
        os.killpg(running.pid, signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and "interrupted; the same command resumes" in errors
    assert not psutil.wait_procs(family, timeout=20)[1]
    assert not (tmp_path / "data/shards").exists()


def test_a_hopeless_download_stops_with_advice_and_publishes_nothing(corpus, project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(project / "params.yaml")
    downloads = download._Downloads(dataclasses.replace(config.download, min_success_share=0.9), tmp_path, ROWS)
    with pytest.raises(StageError, match=r"75.0% of the first 400 rows .* 100 timeout; check the network"):
        downloads.check_success(Counter({"success": 300, "timeout": 100}))
    downloads.check_success(Counter({"success": 999, "timeout": 1}))


def test_a_missing_list_or_site_is_one_clear_line(project, tmp_path, monkeypatch, corpus):
    monkeypatch.chdir(tmp_path)
    config = load_config(project / "params.yaml")
    with pytest.raises(StageError, match="links.parquet: no such file; run the stage"):
        download.run(config, Stage("download", tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/selected").symlink_to(corpus / "data/selected")
    with pytest.raises(StageError, match="site.zip: no such file"):
        download.run(config, Stage("download", tmp_path))


def test_a_truncated_shard_is_downloaded_again(tmp_path, project):
    config = load_config(project / "params.yaml").download
    downloads = download._Downloads(dataclasses.replace(config, shard_rows=10), tmp_path, 10)
    for name, body in {"00000.tar": b"x" * 700, "00000.parquet": b"PAR1", "00000_stats.json": b"{"}.items():
        (downloads.raw / name).write_bytes(body)
    downloads.clean_up()
    assert downloads.missing() == [0] and not list(downloads.raw.iterdir()) and "shard 00000" in downloads.last_words()


def test_shards_beyond_five_digits_are_found_in_the_order_of_their_numbers_and_broken_ones_alone_go(
    tmp_path, project, monkeypatch
):
    config = dataclasses.replace(load_config(project / "params.yaml").download, shard_rows=1)
    downloads = download._Downloads(config, tmp_path, 100_010)
    done, half = (10_000, 7, 100_001, 99_999), 100_002
    for number in (*done, half):
        (downloads.raw / f"{number:05d}_stats.json").write_text("{}")
    for number in done:
        (downloads.raw / f"{number:05d}.tar").write_bytes(b"")
    assert downloads.finished() == [7, 10_000, 99_999, 100_001]
    packed = []

    def pack(raw, links, out, shard):
        packed.append(shard)
        if shard == 10_000:
            raise shards.BrokenShard("shard 10000")
        for suffix in (".tar", ".parquet"):
            (out / f"{shard:05d}{suffix}").touch()
        return Counter({"success": 1})

    monkeypatch.setattr(shards, "pack", pack)
    assert downloads.pack_finished() == 3 and packed == [7, 10_000, 99_999, 100_001]
    left = {path.name for path in downloads.raw.iterdir()}
    assert left == {f"{number:05d}_stats.json" for number in (7, 99_999, 100_001, half)}
    assert len(downloads.missing()) == 100_010 - 3 and 100_001 not in downloads.missing()


def test_reasons_come_out_in_plain_words():
    assert shards.reason_of("failed_to_download", "HTTP Error 502: private address") == "private address"
    assert shards.reason_of("failed_to_download", shards.ROBOTS_MESSAGE) == "opted out by X-Robots-Tag"
    assert shards.reason_of("failed_to_resize", "Image decoding error") == "undecodable"
    assert shards.reason_of("failed_to_resize", "decoder killed: too much memory") == "decoder killed"
    assert shards.reason_of("failed_to_resize", "... pixels <= CV_IO_MAX_IMAGE_PIXELS") == "too many pixels"
    assert shards.reason_of("failed_to_download", "<urlopen error [Errno 111]>") == "downloader error"


def test_every_argument_of_img2dataset_is_spelt_out(project):
    (folder,) = importlib.util.find_spec("img2dataset").submodule_search_locations
    tree = ast.parse((Path(folder) / "main.py").read_text())
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "download"]
    config = load_config(project / "params.yaml").download
    assert set(arguments(config, "rows", "folder")) == {argument.arg for argument in function.args.args}
