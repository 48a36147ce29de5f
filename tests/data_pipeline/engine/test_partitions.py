"""Tasks whose files lie in a store: the same files whoever makes them, each once, whatever the network does."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from truth.engine_toy import Squarer, Squares
from truth.ray_nodes import ROOT
from truth.s3_server import FaultyProxy, at_random, environment

from data_pipeline.engine.partitions import partitions
from data_pipeline.engine.run import finish
from data_pipeline.engine.work import Work
from raphael.base.config.data import PipelineConfig
from raphael.base.stage import Stage, StageError
from raphael.base.store.claims import claimed
from raphael.base.store.objects import StoreError, open_store

TASKS, STORAGE, PLACE = 9, "s3://pictures/home", "home/partitions/squares/work/"
TRUTH = {f"{number:03d}.txt": "\n".join(str(n**2) for n in range(number, number + 3)) for number in range(TASKS)}


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "settings.json").write_text('{"power": 2}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def squares(root, faults=None):
    for number in range(TASKS):
        task = Squares(root / f"work/{number:03d}.txt", tuple(range(number, number + 3)))
        yield replace(task, **(faults or {}).get(number, {}))


def done(root, faults=None, stream=True, **pipeline):
    """(what was read in the tasks' order, how many tasks were done) of a run that ends well."""
    stage, config = Stage("squares", root), PipelineConfig(storage=STORAGE, **pipeline)
    toy, paths = Work("squares", root, Squarer), [root / "work" / name for name in TRUTH]
    with partitions(config, root / "work", stage, stream) as pieces, stage.progress(None, "numbers") as bar:
        assert finish(config, toy, squares(root, faults), pieces, stage, bar) == {"engine": config.engine}
        read = [path.read_text() for path in (pieces.each(paths) if stream else paths)]
    return dict(zip(TRUTH, read, strict=True)), stage.timings["engine"]["partitions"]


def here(root):
    return sorted(path.name for path in (root / "work").glob("[0-9]*.txt"))


def test_a_stage_that_works_alone_leaves_one_object_a_task_and_nothing_here(root, s3):
    assert done(root) == (TRUTH, TASKS) and here(root) == []
    names = [name.removeprefix(PLACE) for name in s3.names(PLACE)]
    assert [name.rsplit(".", 2)[0] for name in names if "claims" not in name] == list(TRUTH)
    for name in names:
        stem, size, digest = name.rsplit(".", 2)
        assert (s3.value(PLACE + name).decode(), int(size), len(digest)) == (TRUTH[stem], len(TRUTH[stem]), 32)


def test_another_machine_goes_on_from_what_is_there_and_does_no_task_twice(root, s3):
    done(root)
    lost = s3.names(f"{PLACE}004") + s3.names(f"{PLACE}007")
    for name in lost:
        open_store(STORAGE).remove(name.removeprefix("home/"))
    shutil.rmtree(root / "work")  # a fresh disk
    (root / "work").mkdir()
    assert done(root) == (TRUTH, 2)
    assert done(root, stream=False) == (TRUTH, 0) and here(root) == list(TRUTH), "brought to where the stage looks"
    assert set(lost) <= set(s3.names(PLACE)) and len(s3.names(PLACE)) == TASKS


@pytest.mark.parametrize("stream", [True, False])
def test_processes_that_die_and_a_network_that_fails_change_nothing(root, s3, stream, capfd):
    with FaultyProxy(s3.port, at_random(0.1, 5)) as proxy, environment(proxy.url):
        read, count = done(root, {0: {"dies": 1}, 5: {"dies": 2}}, stream, workers=2)
        assert (read, count) == (TRUTH, TASKS)
    assert [name for name in s3.names(PLACE) if "claims" not in name] == s3.names(f"{PLACE}0")
    assert len(s3.names(f"{PLACE}0")) == TASKS and any(kind for _, _, kind in proxy.seen)
    assert capfd.readouterr().err.count("a worker died (exit code -9)") == 2


def test_a_partition_whose_hash_differs_is_one_sentence_and_is_made_again(root, s3):
    done(root)
    (name,) = s3.names(f"{PLACE}003")
    s3.change(name, b"1" + s3.value(name)[1:])
    with pytest.raises(StoreError, match=rf"^{STORAGE}/{name.removeprefix('home/')}: damaged: got xxh3 .* expected"):
        done(root)
    assert done(root) == (TRUTH, 1), "what was damaged is removed"
    s3.change(name, b"2" + s3.value(name)[1:])
    assert done(root, stream=False) == (TRUTH, 1), "where it is looked at before tasks are dealt out, it is done again"
    s3.change(name, s3.value(name)[:-1])
    assert done(root) == (TRUTH, 1), "a size that differs is seen in the listing"


def test_two_workspaces_do_not_write_one_output_and_bad_storage_is_one_sentence(root, s3):
    with claimed(open_store(STORAGE), "partitions/squares/work", "squares", Path("/another")):
        with pytest.raises(
            StoreError, match="^another run of squares writes to s3://pictures/home/partitions/squares/wo"
        ):
            done(root)
    assert here(root) == [] and s3.names() == []
    with pytest.raises(StoreError, match="no such bucket: nobodys"):
        with partitions(PipelineConfig(storage="s3://nobodys/x"), root / "work", Stage("squares", root)):
            pytest.fail("there is no bucket")
    with FaultyProxy(s3.port, lambda n, method, path: "denied") as proxy, environment(proxy.url):
        with pytest.raises(StoreError, match="access denied"):
            done(root)
    with pytest.raises(ValueError, match="^storage: got 'pictures/home', expected s3://bucket/prefix"):
        PipelineConfig(storage="pictures/home")


def test_what_a_worker_cannot_send_ends_the_stage_in_one_line_and_what_is_sent_stays(root, s3):
    refuse = lambda n, method, path: "denied" if method == "PUT" and "/005.txt" in path else ""  # noqa: E731
    with FaultyProxy(s3.port, refuse) as proxy, environment(proxy.url):
        with pytest.raises(StageError, match=r"access denied for 'partitions/squares/work/005.txt"):
            done(root, workers=2)
    sent = len(s3.names(f"{PLACE}0"))
    assert 3 <= sent < TASKS
    assert done(root) == (TRUTH, TASKS - sent)


@pytest.mark.slow
def test_rays_actors_leave_the_same_objects(root, s3, monkeypatch):
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    try:
        assert done(root, {0: {"dies": 1}}, engine="ray", workers=2) == (TRUTH, TASKS)
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert len(s3.names(f"{PLACE}0")) == TASKS and here(root) == []
