"""Images that lie here become shards without a web: the same decoder with the same limits, the same tars and tables as
of links, to the byte, and a reason for every row that is no image.

Bytes come from the collection (data_pipeline/local_images) by the names in the list, are judged by their header as the
gateway judges an answer, and decoded in a child that may die (data_pipeline/download/decoder.py).
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.places import LINKS
from data_pipeline.common.schema import (
    CAPTION,
    FAILED,
    HEIGHT,
    ID,
    KEY,
    REASON,
    SOURCE_SHA256,
    STATUS,
    SUCCESS,
    URL,
    WIDTH,
)  # fmt: skip
from data_pipeline.common.tables import open_parquet
from data_pipeline.download.decoder import Guard, Limits
from data_pipeline.download.refused import Refused
from data_pipeline.download.run_img2dataset import arguments
from data_pipeline.download.shards import outcomes, reason_of, settings_of, shard_files, write_shard
from data_pipeline.gateway.bodies import BodyLimits
from data_pipeline.local_images.collection import NOT_HERE, Collection, name_of
from data_pipeline.local_images.kinds import open_collection
from raphael.base.integrity.pieces import Pieces
from raphael.base.stage import Stage, StageError

if TYPE_CHECKING:
    from raphael.base.config.data import DownloadConfig
    from raphael.base.config.params import Config

AT_A_TIME = 16  # bodies held by each decoder


def pack(config: Config, stage: Stage, refused: Refused) -> tuple[Path, Counter[str], int, dict[str, Any]]:
    """(work folder, rows by outcome, shards, facts). Shards that an earlier run finished stay. Raises StageError."""
    total, size = open_parquet(LINKS).metadata.num_rows, config.download.shard_rows
    source = config.source
    place = [source.kind, str(source.path), source.fingerprint]
    work = stage.workdir(LINKS, settings_of(config.download), place, *filter(None, [refused.fingerprint]))
    out, num_shards = work / "shards", math.ceil(total / size)
    out.mkdir(exist_ok=True)
    for partial in out.glob(".*"):
        partial.unlink()
    pieces = Pieces(work, stage.name)
    done = {shard for shard in range(num_shards) if pieces.has(*shard_files(out, shard))}
    counts: Counter[str] = Counter()
    for shard in done:
        counts += outcomes(open_parquet(shard_files(out, shard)[1]).read(columns=[REASON]))
    collection, judge = open_collection(source), Judge(config.download, refused)
    with stage.progress(total, "images", initial=counts.total()) as bar, judge:
        for shard, links in enumerate(_slices(size)):
            if shard not in done:
                rows = judge.rows(links, _first_key(shard, size), collection)
                counts += write_shard(out, shard, _told(rows, bar))
                pieces.add(*shard_files(out, shard))
    collection.close()
    if not counts[SUCCESS]:
        worst = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common(4))
        raise StageError(f"{source.path}: none of {total:,} images can be used: {worst}")
    return work, counts, num_shards, {}


def _slices(size: int) -> Iterator[list[dict]]:
    """The links, `size` of them at a time: row groups end elsewhere."""
    batches = open_parquet(LINKS).iter_batches(batch_size=size, columns=[ID, URL, CAPTION])
    rows = (row for batch in batches for row in batch.to_pylist())
    while piece := list(islice(rows, size)):
        yield piece


def _first_key(shard: int, size: int) -> int:
    """img2dataset's key of a shard's first row: keys of a shard have as many digits of their own as its rows need."""
    return shard * 10 ** math.ceil(math.log10(size))


def _told(rows: Iterator[tuple[dict, str, bytes]], bar: Any) -> Iterator[tuple[dict, str, bytes]]:
    for row in rows:
        bar.update()
        yield row


class Judge:
    """From a link to a row of a shard's table and the image that is stored. `with` ends its decoders."""

    def __init__(self, config: DownloadConfig, refused: Refused):
        self.config, self.refused = config, refused
        self.limits = BodyLimits(config.max_bytes, config.max_pixels, config.max_decoded_bytes)
        lists = tuple(str(Path(path).resolve()) for path in config.hash_lists)
        told = (config.max_pixels, config.max_decoder_bytes, config.max_decoder_s, lists, config.hash_list_bits)
        self.decoder = Limits(*told), resizer_settings(config)
        self.guards: list[Guard] = []
        self.mine = threading.local()

    def __enter__(self) -> Judge:
        self.pool = ThreadPoolExecutor(self.config.processes)
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        for guard in self.guards:
            guard.close()

    def rows(self, links: list[dict], first_key: int, collection: Collection) -> Iterator[tuple[dict, str, bytes]]:
        """(row of the table, suffix, image) of each link in order; bodies are read by this thread alone."""
        numbered = enumerate(links, first_key)
        while piece := list(islice(numbered, AT_A_TIME * self.config.processes)):
            keys = [f"{key:09d}" for key, _ in piece]
            bodies = [collection.body(name_of(link[URL])) for _, link in piece]
            judged = self.pool.map(self._row, keys, [link for _, link in piece], bodies)
            for row, image in judged:
                yield row, self.config.encode_format, image

    def _row(self, key: str, link: dict, body: bytes | None) -> tuple[dict, bytes]:
        row = {**{name: link[name] for name in (ID, URL, CAPTION)}, STATUS: SUCCESS, REASON: None, KEY: key}
        reason = NOT_HERE if body is None else self.limits.refuses(body) if body else "empty file"
        if reason or (reason := self.refused.why_not(body)):
            return {**row, STATUS: FAILED, REASON: reason}, b""
        image, *sizes, error = self._guard().decode(body)
        if image is None:
            return {**row, STATUS: FAILED, REASON: reason_of("failed_to_resize", error)}, b""
        facts = dict(zip((WIDTH, HEIGHT, "original_width", "original_height"), sizes, strict=True))
        return {**row, **facts, SOURCE_SHA256: hashlib.sha256(body).hexdigest()}, image

    def _guard(self) -> Guard:
        """This thread's own decoder."""
        if not hasattr(self.mine, "guard"):
            self.mine.guard = Guard(*self.decoder)
            self.guards.append(self.mine.guard)
        return self.mine.guard


def resizer_settings(config: DownloadConfig) -> dict[str, Any]:
    """What img2dataset tells its resizer of the arguments that it is given."""
    names = ("image_size", "resize_mode", "resize_only_if_bigger", "upscale_interpolation", "downscale_interpolation",
             "encode_quality", "encode_format", "skip_reencode", "disable_all_reencoding", "min_image_size",
             "max_image_area", "max_aspect_ratio")  # fmt: skip
    told = arguments(config, "", "")
    return {**{name: told[name] for name in names}, "blurrer": None}
