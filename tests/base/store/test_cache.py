"""The cache stays within its bound, drops what was used least recently, and never gives a damaged file."""

from __future__ import annotations

import os
import random
import threading
from collections import OrderedDict

import pytest
import xxhash

from raphael.base.store import cache as caches
from raphael.base.store.cache import CacheError, ShardCache, machine_cache

SIZE = 100


def content(name: str, size: int = SIZE) -> bytes:
    return random.Random(name).randbytes(size)


class Source:
    """Files by name, and how often each was fetched; watches the folder's bytes while it writes."""

    def __init__(self, cache: ShardCache):
        self.cache, self.fetched, self.most = cache, [], 0

    def take(self, name: str, size: int = SIZE):
        def fetch(path):
            with open(path, "r+b") as file:
                file.write(content(name, size))
            self.most = max(self.most, self.cache.bytes())
            self.fetched.append(name)

        return self.cache.take(name, size, xxhash.xxh3_128_hexdigest(content(name, size)), fetch)


def test_it_fetches_what_a_naive_list_of_the_last_used_would(tmp_path):
    cache = ShardCache(tmp_path, 5 * SIZE)
    source, naive, expected = Source(cache), OrderedDict(), []
    draw = random.Random(0)
    for _ in range(300):
        name = f"{int(draw.triangular(0, 12, 2)):02d}"
        if name in naive:
            naive.move_to_end(name)
        else:
            expected.append(name)
            if len(naive) == 5:
                naive.popitem(last=False)
            naive[name] = None
        assert source.take(name).read_bytes() == content(name)
        assert cache.bytes() <= cache.most_bytes
    assert source.fetched == expected and source.most <= cache.most_bytes
    assert {path.name for path in tmp_path.iterdir()} == {*naive, ".lock"}


def test_what_leaves_is_told_and_room_is_made_for_files_of_any_size(tmp_path):
    cache = ShardCache(tmp_path, 5 * SIZE)
    source = Source(cache)
    for name in "abcde":
        source.take(name)
    cache.use("a")
    source.take("large", 3 * SIZE)
    assert list(cache.dropped) == ["b", "c", "d"] and source.most <= cache.most_bytes
    with pytest.raises(CacheError, match=r"got 6e-07 GB to hold at once, expected less than RAPHAEL_CACHE_GB = 5e-07"):
        source.take("larger", 6 * SIZE)


def test_a_file_that_an_earlier_process_left_is_compared_once_and_replaced_where_it_is_damaged(tmp_path):
    first = Source(ShardCache(tmp_path, 5 * SIZE))
    first.take("good"), first.take("bad"), first.take("short")
    (tmp_path / "bad").write_bytes(content("other"))
    (tmp_path / "short").write_bytes(b"short")
    again = Source(ShardCache(tmp_path, 5 * SIZE))
    for name in ("good", "bad", "short"):
        assert again.take(name).read_bytes() == content(name)
    assert again.fetched == ["bad", "short"]


def test_a_file_that_could_not_be_fetched_leaves_nothing(tmp_path):
    cache = ShardCache(tmp_path, 5 * SIZE)

    def fails(path):
        path.write_bytes(b"half")
        raise OSError("cut off")

    with pytest.raises(OSError, match="cut off"):
        cache.take("a", SIZE, "", fails)
    assert os.listdir(tmp_path) == [".lock"]
    assert Source(cache).take("a").read_bytes() == content("a")


def test_threads_and_caches_that_share_a_folder_share_its_bound(tmp_path):
    sources = [Source(ShardCache(tmp_path, 8 * SIZE)) for _ in range(2)]
    wrong: list[str] = []

    def work(source: Source, seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(60):
            name = f"{draw.randrange(14):02d}"
            try:
                if source.take(name).read_bytes() != content(name):
                    wrong.append(name)
            except FileNotFoundError:
                pass  # the other made room: whoever reads takes it again

    threads = [threading.Thread(target=work, args=(sources[n % 2], n)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and max(source.most for source in sources) <= 8 * SIZE
    assert sources[0].cache.bytes() <= 8 * SIZE


def test_what_a_process_that_died_left_is_removed_in_time(tmp_path, monkeypatch):
    cache = ShardCache(tmp_path, 2 * SIZE)
    (tmp_path / ".1-2-3").write_bytes(b"x" * SIZE)
    Source(cache).take("a")
    assert (tmp_path / ".1-2-3").exists(), "it may be being fetched"
    os.utime(tmp_path / ".1-2-3", (0, 0))
    Source(cache).take("b")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", ".lock"}
    monkeypatch.setattr(caches, "FETCHED_S", 0.1)
    (tmp_path / ".4-5-6").write_bytes(b"x" * 2 * SIZE)
    with pytest.raises(CacheError, match="no room for 0 MB within RAPHAEL_CACHE_GB = 2e-07 beside what other"):
        Source(cache).take("c")


def test_the_environment_says_where_and_how_much(tmp_path, monkeypatch):
    monkeypatch.setenv("RAPHAEL_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("RAPHAEL_CACHE_GB", "0.5")
    assert (machine_cache().folder, machine_cache().most_bytes) == (tmp_path / "shards", 500_000_000)
    for said in ("much", "0", "-1", "nan"):
        monkeypatch.setenv("RAPHAEL_CACHE_GB", said)
        with pytest.raises(CacheError, match=f"RAPHAEL_CACHE_GB: got '{said}', expected a number of GB above 0"):
            machine_cache()
