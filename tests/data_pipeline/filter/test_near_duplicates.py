"""Hashes are imagehash's; the search finds exactly the pairs that comparing all with all finds."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.common.hashes import phash
from data_pipeline.common.hashes.phash import near_any, phashes
from data_pipeline.common.places import SHARDS
from data_pipeline.download.shards import table_schema
from data_pipeline.filter import bands as bands_module
from data_pipeline.filter import near_duplicates
from data_pipeline.filter import stage as filter_stage
from data_pipeline.filter.bands import WIDEST, HashBands, bands_of_key
from data_pipeline.select.stage import LINKS, link_schema
from raphael.base.config.data import PipelineConfig
from raphael.base.config.params import load_config
from raphael.base.stage import Stage, StageError


def photograph(seed: int, side: int = 96) -> Image.Image:
    """Smooth noise: its low frequencies are well apart from their median, as a photograph's are."""
    small = np.random.default_rng(seed).integers(0, 255, (9, 9, 3), np.uint8)
    return Image.fromarray(small).resize((side, side + 16), Image.Resampling.BICUBIC)


def naive(hashes: list[int], radius: int) -> list[int]:
    """The rows that go: alike to an earlier one that stays."""
    stay: list[int] = []
    gone = []
    for row, value in enumerate(hashes):
        alike = any((value ^ hashes[other]).bit_count() <= radius for other in stay)
        gone.append(row) if alike else stay.append(row)
    return gone


def crowd(count: int, seed: int) -> list[int]:
    """64-bit hashes in families: members differ from a random founder, or from a member, in a few bits."""
    rng = np.random.default_rng(seed)
    hashes: list[int] = []
    for _ in range(count):
        value = int(rng.integers(0, 2**63)) * 2 + int(rng.integers(0, 2))
        if hashes and rng.random() < 0.7:
            value = hashes[rng.integers(len(hashes))]
            for bit in rng.choice(64, rng.integers(0, 8), replace=False):
                value ^= 1 << int(bit)
        hashes.append(value)
    return hashes


def test_hashes_are_those_of_imagehash():
    images = [photograph(seed, 40 + 7 * seed) for seed in range(12)]
    images += [Image.fromarray(np.random.default_rng(9).integers(0, 255, (50, 70, 3), np.uint8))]
    expected = [int(str(imagehash.phash(image)), 16) for image in images]
    assert phashes(images).tolist() == expected
    assert phashes([]).shape == (0,)


def dropped(folder, hashes, radius, batch=500):
    search = HashBands(folder, radius, len(hashes))
    for start in range(0, len(hashes), batch):
        search.add(np.array(hashes[start : start + batch], np.uint64))
    rows = search.drop()
    assert not list(folder.iterdir())
    return rows


@pytest.mark.parametrize(("radius", "wide"), [(1, 1), (1, 4), (2, 3), (4, 1), (4, 2), (4, 3), (7, 2), (15, 1), (15, 2)])
@pytest.mark.parametrize(("rows_a_partition", "batch"), [(1_000_000, 500), (100, 33)])
def test_the_search_finds_what_comparing_all_finds(tmp_path, monkeypatch, radius, wide, rows_a_partition, batch):
    monkeypatch.setattr(bands_module, "ROWS_A_PARTITION", rows_a_partition)
    monkeypatch.setattr(bands_module, "PAIRS_AT_A_TIME", 5)
    monkeypatch.setattr(bands_module, "bands_of_key", lambda *_: wide)
    hashes = crowd(500, radius)
    expected = naive(hashes, radius)
    assert dropped(tmp_path / "bands", hashes, radius, batch) == expected and len(expected) > 50


@pytest.mark.parametrize("wide", [1, 2, 3])
def test_a_pair_is_found_once_wherever_its_bits_differ(tmp_path, monkeypatch, wide):
    """Each pair is counted under one key alone, so that nothing is done twice."""
    monkeypatch.setattr(bands_module, "bands_of_key", lambda *_: wide)
    found, radius, rng = [], 3, np.random.default_rng(wide)
    monkeypatch.setattr(HashBands, "_found", lambda self, a, b: found.extend(zip(a.tolist(), b.tolist(), strict=True)))
    value = int(rng.integers(0, 2**63))
    hashes = [value]
    for count in (1, 2, 3, 3, 3, 4, 5):
        bits = rng.choice(64, count, replace=False)
        hashes.append(value ^ int(sum(1 << int(bit) for bit in bits)))
    dropped(tmp_path / "bands", hashes, radius)
    expected = {(a, b) for b in range(len(hashes)) for a in range(b) if (hashes[a] ^ hashes[b]).bit_count() <= radius}
    assert len(found) == len(expected) >= 5 and {tuple(sorted(pair)) for pair in found} == expected


def test_hashes_that_are_all_alike_and_none_at_all_are_no_special_case(tmp_path):
    assert dropped(tmp_path / "none", [], 4) == [] and dropped(tmp_path / "one", [7], 4) == []
    assert dropped(tmp_path / "same", [7] * 40, 4) == list(range(1, 40))
    few = [number for number in range(64)]  # 6 bits: of radius 4 most are alike
    assert dropped(tmp_path / "few", few, 4) == naive(few, 4)


@pytest.mark.parametrize("radius", [1, 4, 15])
def test_more_rows_make_wider_keys_and_the_cost_follows_the_rows(radius):
    rows = [10**power for power in range(1, 11)]
    wide = [bands_of_key(radius, count) for count in rows]
    assert wide == sorted(wide) and wide[0] == 1 and wide[-1] <= WIDEST
    assert bands_of_key(4, 10_000_000) == 2 and bands_of_key(4, 1_000_000_000) == 3


def test_closeness_to_a_set_is_the_smallest_distance_to_it(monkeypatch):
    monkeypatch.setattr(phash, "BLOCK", 16)
    mine, others = crowd(100, 1), crowd(100, 1)[::3]
    expected = [min((value ^ other).bit_count() for other in others) <= 3 for value in mine]
    got = near_any(np.array(mine, np.uint64), np.array(others, np.uint64), 3).tolist()
    assert got == expected and 0 < sum(expected) < 100


@pytest.fixture
def workspace(tmp_path, monkeypatch, project):
    """Two shards of four images; 2 and 5 are 0 and 4 brought down in size, 7 is an image of the evaluation."""
    monkeypatch.chdir(tmp_path)
    LINKS.parent.mkdir(parents=True)
    SHARDS.mkdir(parents=True)
    images = [photograph(seed) for seed in range(8)]
    images[2], images[5] = images[0].resize((70, 82)), images[4].resize((64, 75))
    (tmp_path / "held").mkdir()
    images[7].resize((80, 93)).save(tmp_path / "held" / "one.png")
    rows = []
    for number in range(8):
        link = {"id": number, "url": f"http://a.example/{number}", "caption": f"caption {number}"}
        scores = {"similarity": 0.3, "unsafe": 0.1, "watermark": 0.1, "aesthetic": 5.5}
        rows.append({**link, **scores, "width": 96, "height": 112})
    pq.write_table(pa.Table.from_pylist(rows, link_schema()), LINKS)
    for shard in range(2):
        stored = []
        with tarfile.open(SHARDS / f"{shard:05d}.tar", "w") as tar:
            for row in rows[4 * shard : 4 * shard + 4]:
                body = io.BytesIO()
                images[row["id"]].save(body, "png")
                info = tarfile.TarInfo(f"{row['id']:09d}.png")
                info.size = len(body.getvalue())
                tar.addfile(info, io.BytesIO(body.getvalue()))
                names = ("id", "url", "caption", "width", "height")
                facts = {
                    "key": f"{row['id']:09d}",
                    "status": "success",
                    "sha256": hashlib.sha256(body.getvalue()).hexdigest(),
                }
                stored.append({**{name: row[name] for name in names}, **facts})
        pq.write_table(pa.Table.from_pylist(stored, table_schema()), SHARDS / f"{shard:05d}.parquet")
    config = load_config(project / "params.yaml")

    def run(pipeline=None, **changes):
        changed = dataclasses.replace(config, filter=dataclasses.replace(config.filter, **changes))
        changed = dataclasses.replace(changed, pipeline=PipelineConfig(**(pipeline or {})))
        filter_stage.run(changed, Stage("filter", tmp_path))
        kept = pq.read_table(filter_stage.FILTERED)["id"].to_pylist()
        return kept, json.loads((tmp_path / "reports/filter.json").read_text())["dropped"]

    return run


def test_the_filter_drops_what_looks_alike_across_shards_each_by_its_own_reason(workspace, tmp_path):
    assert workspace() == (list(range(8)), {})
    assert workspace(near_duplicate_bits=4) == ([0, 1, 3, 4, 6, 7], {"near duplicate": 2})
    held = str(tmp_path / "held")
    expected = {"like an evaluation picture": 1, "near duplicate": 2}
    assert workspace(near_duplicate_bits=4, evaluation_pictures=held) == ([0, 1, 3, 4, 6], expected)
    kept, dropped = workspace(evaluation_pictures=held)
    assert set(dropped) <= {"like an evaluation picture"} and {0, 2, 4, 5} <= set(kept)


def test_hashes_of_a_run_that_was_killed_are_kept_and_those_of_other_images_are_not(workspace, tmp_path, monkeypatch):
    hashed = []
    hash_shard = near_duplicates.hash_shard
    monkeypatch.setattr(near_duplicates, "hash_shard", lambda task: hashed.append(task.tar.stem) or hash_shard(task))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(near_duplicates.NearDuplicates, "take_out", killed)
        workspace(near_duplicate_bits=4)
    assert hashed == ["00000", "00001"]
    table = pq.read_table(SHARDS / "00001.parquet")
    pq.write_table(
        table.set_column(2, "url", pa.array([f"http://b.example/{row}" for row in range(4)])), SHARDS / "00001.parquet"
    )
    assert workspace(near_duplicate_bits=4)[0] == [0, 1, 3, 4, 6, 7]
    assert hashed == ["00000", "00001", "00001"]


def test_several_processes_hash_the_same(workspace, tmp_path, project):
    alone = workspace(near_duplicate_bits=4)
    report = json.loads((tmp_path / "reports/filter.json").read_text())
    table = filter_stage.FILTERED.read_bytes()
    assert workspace({"workers": 2}, near_duplicate_bits=4) == alone and filter_stage.FILTERED.read_bytes() == table
    assert json.loads((tmp_path / "reports/filter.json").read_text()) == report and report["engine"] == "local"


def test_an_empty_evaluation_folder_is_one_clear_line(workspace, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(StageError, match="filter.evaluation_pictures: .*empty: got no image there"):
        workspace(evaluation_pictures=str(tmp_path / "empty"))
