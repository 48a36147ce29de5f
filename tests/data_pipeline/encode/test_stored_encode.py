"""`encode` with its chunks and records in a store: the records of a run without one, by their hash."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from truth.image_workspace import write_workspace
from truth.s3_server import FaultyProxy, at_random, environment

from data_pipeline.encode import stage as encode
from raphael.base.config.data import PipelineConfig
from raphael.base.config.params import load_config
from raphael.base.records import Records
from raphael.base.stage import Stage, StageError
from raphael.base.store.objects import DamagedObject, open_store
from raphael.systems.ddpm.system import OF_TEXTS

COUNT, STORAGE = 22, "s3://pictures/home"
PIXELS = {
    "picture": {"sizes_px": [[16, 16], [16, 32]], "too_small": "upscale"},
    "autoencoder": {"pretrained": "pixels"},
    "model": {
        "system": "ddpm",
        "preset": "none",
        "settings": {
            "unet": {
                "latent_channels": 3, "channels": [8], "res_blocks": 1, "attention_levels": [], "head_dim": 8,
                "norm_groups": 4,
            },
            "diffusion": {
                "num_steps": 10, "schedule": "linear", "beta_start": 1.0e-4, "beta_end": 0.02, "prediction": "eps",
                "zero_terminal_snr": False,
            },
        },
    },
    "evaluate": dict.fromkeys(OF_TEXTS, 0),
    "encode": {"fields": ["pixels", "label"], "label_pattern": r"\b(red|green|blue|white) square\b", "batch_size": 2},
}  # fmt: skip


@pytest.fixture
def root(tmp_path, project, monkeypatch):
    """Images of two shapes, as pixels and labels: no model is needed. Eleven chunks."""
    folder = write_workspace(tmp_path / "workspace", project, COUNT, shapes=((32, 40), (32, 70)), **PIXELS)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(encode, "CHUNK_BATCHES", 1)
    monkeypatch.setenv("RAPHAEL_CACHE_DIR", str(tmp_path / "cache"))
    return folder


def run(root, **pipeline):
    """(the records' hash, the report) of the stage."""
    config = dataclasses.replace(load_config(root / "params.yaml"), pipeline=PipelineConfig(**pipeline))
    encode.run(config, Stage("encode", root))
    report = json.loads((root / "reports/encode.json").read_text())
    return Records(root / "data/records").sha256, report


def batches(root):
    records = Records(root / "data/records")
    rows = np.cumsum([0, *records.bucket_counts])
    return [records.batch(range(*part)) for part in zip(rows[:-1], rows[1:], strict=True)]


def same(one, other):
    for mine, its in zip(one, other, strict=True):
        assert mine.keys() == its.keys()
        assert all(np.array_equal(mine[name], its[name]) for name in mine)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_records_and_the_report_are_those_of_a_run_without_a_store(root, s3, workers):
    alone, told = run(root)
    read, captions = batches(root), (root / "data/records/captions.json").read_bytes()
    manifest = (root / "data/records/manifest.json").read_bytes()
    with FaultyProxy(s3.port, at_random(0.1, workers)) as proxy, environment(proxy.url):
        stored, its_told = run(root, storage=STORAGE, workers=workers)
        same(batches(root), read)
    assert any(kind for _, _, kind in proxy.seen)
    assert (stored, its_told) == (alone, told)
    assert sorted(os.listdir(root / "data/records")) == ["captions.json", "manifest.json", "storage.json"]
    assert (root / "data/records/manifest.json").read_bytes() == manifest
    assert (root / "data/records/captions.json").read_bytes() == captions
    assert s3.names("home/partitions") == [], "what the chunks became is published"
    files = json.loads(manifest)["files"]
    assert len(s3.names("home/records")) == len({entry["sha256"] for entry in files.values()}) + 1
    assert not list(root.glob("work/encode/*"))


def test_a_run_that_was_cut_off_goes_on_from_the_store_and_gives_the_same_records(root, s3, monkeypatch):
    alone, told = run(root)
    refuse = lambda n, method, path: "denied" if method == "PUT" and "chunk_000000012" in path else ""  # noqa: E731
    with FaultyProxy(s3.port, refuse) as proxy, environment(proxy.url):
        with pytest.raises(StageError, match="access denied for 'partitions/encode/.*chunk_000000012"):
            run(root, storage=STORAGE)
    done = len([name for name in s3.names("home/partitions") if "chunk" in name])
    assert done == 6 and s3.names("home/records") == []
    shutil.rmtree(root / "work/encode")  # as on another disk
    refuse = lambda n, method, path: "denied" if method == "PUT" and "/manifests/" in path else ""  # noqa: E731
    with FaultyProxy(s3.port, refuse) as proxy, environment(proxy.url):
        with pytest.raises(StageError, match="access denied for 'manifests/"):
            run(root, storage=STORAGE)
        assert sum("chunk" in path and method == "PUT" for method, path, _ in proxy.seen) == 11 - done
    assert not (root / "data/records/storage.json").exists(), "without its manifest it is not published"
    assert run(root, storage=STORAGE) == (alone, told)


def test_a_damaged_chunk_is_named_and_the_same_command_makes_it_again(root, s3):
    alone, _ = run(root)
    refuse = lambda n, method, path: "denied" if "/objects/" in path else ""  # noqa: E731
    with FaultyProxy(s3.port, refuse) as proxy, environment(proxy.url), pytest.raises(StageError, match="denied"):
        run(root, storage=STORAGE)
    (name,) = [name for name in s3.names("home/partitions") if "chunk_000000004" in name]
    s3.change(name, bytes(len(s3.value(name))))
    with pytest.raises(DamagedObject, match="chunk_000000004.npz.* damaged: got xxh3"):
        run(root, storage=STORAGE)
    assert run(root, storage=STORAGE)[0] == alone


def test_records_go_back_from_a_store_to_the_folder_and_the_other_way(root, s3):
    alone, _ = run(root)
    read = batches(root)
    for storage in (STORAGE, "", STORAGE):
        assert run(root, storage=storage)[0] == alone
        assert (root / "data/records/storage.json").exists() == bool(storage)
        same(batches(root), read)
    open_store(f"{STORAGE}/records").expect()
