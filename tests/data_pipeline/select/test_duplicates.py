"""The first row of each url is kept, exactly, whatever the partitions and batches; the truth is a dict in memory."""

import random

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.select import duplicates
from data_pipeline.select.duplicates import DUPLICATE, OTHER_CAPTION, UrlPartitions, text_hashes


def naive(rows: list[tuple[str, str]]) -> tuple[list[bool], dict[str, int]]:
    first: dict[str, str] = {}
    keep, counts = [], {DUPLICATE: 0, OTHER_CAPTION: 0}
    for url, caption in rows:
        keep.append(url not in first)
        if url in first:
            counts[DUPLICATE if first[url] == caption else OTHER_CAPTION] += 1
        first.setdefault(url, caption)
    return keep, counts


@pytest.mark.parametrize(("rows_a_partition", "batch"), [(500_000, 1000), (50, 77), (3, 5)])
def test_what_is_kept_is_what_a_dict_keeps(tmp_path, monkeypatch, rows_a_partition, batch):
    monkeypatch.setattr(duplicates, "ROWS_A_PARTITION", rows_a_partition)
    monkeypatch.setattr(duplicates, "READ_AHEAD", 4)
    monkeypatch.setattr(duplicates, "PIECE_ROWS", 100)
    rng = random.Random(0)
    rows = [(f"http://ä.example/{rng.randrange(400)}", rng.choice(("a cat", "a dog"))) for _ in range(1000)]
    partitions = UrlPartitions(tmp_path / "urls", len(rows))
    for start in range(0, len(rows), batch):
        urls, captions = zip(*rows[start : start + batch], strict=True)
        partitions.add(pa.table({"url": urls, "caption": captions}))
    masks, counts = partitions.drop()
    kept = [value for start in range(0, len(rows), 13) for value in masks.next(min(13, len(rows) - start)).tolist()]
    assert (kept, counts) == naive(rows)
    assert not list((tmp_path / "urls").glob("*.arrow"))


def test_urls_whose_hashes_collide_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "ROWS_A_PARTITION", 1)
    real = duplicates.text_hashes
    monkeypatch.setattr(duplicates, "text_hashes", lambda texts: real(texts) * np.uint64(0) + np.uint64(7))
    partitions = UrlPartitions(tmp_path / "urls", 4)
    partitions.add(pa.table({"url": ["a", "b", "a", "c"], "caption": ["x"] * 4}))
    keep, counts = partitions.drop()
    assert keep.next(4).tolist() == [True, True, False, True] and counts == {DUPLICATE: 1, OTHER_CAPTION: 0}


def test_an_empty_list_drops_nothing(tmp_path):
    partitions = UrlPartitions(tmp_path / "urls", 0)
    partitions.add(pa.table({"url": pa.array([], pa.string()), "caption": pa.array([], pa.string())}))
    keep, counts = partitions.drop()
    assert keep.next(0).tolist() == [] and counts == {DUPLICATE: 0, OTHER_CAPTION: 0}


def test_equal_texts_have_equal_hashes_and_others_do_not_whatever_their_place_and_length():
    rng = random.Random(1)
    texts = [
        "",
        "a",
        "b",
        "é" * 3,
        "x" * 8,
        "x" * 9,
        *("".join(rng.choices("ab", k=rng.randrange(40))) for _ in range(3000)),
    ]
    hashes = text_hashes(pa.array(["padding", *texts, "z"]).slice(1, len(texts)))
    by_text = {}
    for text, value in zip(texts, hashes.tolist(), strict=True):
        assert by_text.setdefault(text, value) == value
        assert text_hashes(pa.array([text])).tolist() == [value]
    assert len(set(by_text.values())) == len(by_text)
