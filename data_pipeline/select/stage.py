"""From a release's metadata to the links worth a request: data/source/metadata.parquet ->
data/selected/links.parquet.

The rows are streamed in batches (data_pipeline/common/tables.py); the search for duplicates spills to disk
(data_pipeline/select/duplicates.py). Texts are decoded only where the footer leaves a row group some hope, and looked
at only where the numbers let a row pass. A row is dropped by the first rule that marks it, so the counts by reason are
exclusive and add up.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.common.opt_out import OptOut
from data_pipeline.common.places import LINKS, METADATA
from data_pipeline.common.rules import OPTED_OUT, Rule, apply, hopeless, limits, needed, score_rules
from data_pipeline.common.schema import (
    AESTHETIC,
    CAPTION,
    HEIGHT,
    ID,
    LANGUAGE,
    LINK_COLUMNS,
    MD5,
    SCORES,
    UNSAFE,
    URL,
    WIDTH,
    Columns,
    find_columns,
)
from data_pipeline.common.tables import Behind, GroupWriter, Statistics, ahead, batches, keep_freed_memory, open_parquet
from data_pipeline.select.duplicates import UrlPartitions
from data_pipeline.select.texts import are_urls, char_counts, may_have_space
from raphael.base.stage import Progress, Stage, StageError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from raphael.base.config.params import Config


MAX_URL_CHARS = 8000


def run(config: Config, stage: Stage) -> None:
    keep_freed_memory()
    file = open_parquet(METADATA)
    try:
        columns = find_columns(file.schema_arrow.names)
    except ValueError as error:
        raise StageError(f"{METADATA}: {error}; add the release's spelling to data_pipeline/common/schema.py") from None
    _refuse_useless_columns(config, columns)
    statistics = Statistics(file.metadata)
    _refuse_useless_scores(config, columns, *_said(statistics, columns))
    opt_out = OptOut.read(config.filter.opt_out)
    work = stage.workdir(METADATA, repr(config.select), repr(config.filter), repr(config.score), opt_out.fingerprint)
    stream = _Stream(config, columns, opt_out)
    with stage.progress(file.metadata.num_rows, "rows") as bar:
        kept = _stream_rows(file, statistics, stream, work, bar)
    _refuse_useless_scores(config, columns, stream.low, stream.all_null())
    if not kept:
        raise StageError(f"no row of {stream.total:,} is left ({stream.dropped}); loosen select in {config.file}")
    stage.publish(work / "links.parquet", LINKS)
    shutil.rmtree(work)
    score_ranges = {score: [stream.low[score], stream.high[score]] for score in SCORES if score in stream.low}
    stage.report(
        stream.total,
        kept,
        stream.dropped,
        columns=columns.found,
        missing_columns=list(columns.missing),
        score_ranges=score_ranges,
        null_scores=stream.nulls,
        opt_out=opt_out.summary(),
    )


def _stream_rows(file, statistics: Statistics, stream: _Stream, work: Path, bar: Progress) -> int:
    """All rows through the rules, and where wanted the search for duplicates, into work/links.parquet: reading, judging
    and writing beside each other. Returns the rows kept."""
    config, columns = stream.config, stream.columns
    few, wanted = stream.columns_read()
    shutil.rmtree(work / "urls", ignore_errors=True)  # of a killed run
    rows = config.select.chunk_rows
    read = ahead(batches(file, rows, wanted, few, lambda group: _is_hopeless(config, columns, statistics, group)))
    if not config.select.unique_urls:
        with link_writer(work / "links.parquet") as writer, Behind(writer.write) as later:
            _judge_all(read, stream, later, bar)
        return stream.kept
    partitions = UrlPartitions(work / "urls", file.metadata.num_rows)
    with _candidates(work / "candidates") as writer:

        def spill(links: pa.Table) -> None:
            partitions.add(links)
            writer.write_table(links)

        with Behind(spill) as later:
            _judge_all(read, stream, later, bar)
    return _without_duplicates(work, partitions, stream)


def _judge_all(read: Iterable[pa.RecordBatch], stream: _Stream, later: Behind, bar: Progress) -> None:
    for batch in read:
        links = stream.judge(batch)
        if len(links):
            later(links)
        bar.update(len(batch), kept=stream.kept)


def link_writer(path: Path) -> GroupWriter:
    return GroupWriter(path, link_schema(), integers=[ID, WIDTH, HEIGHT])


def _candidates(path: Path):
    """Rows between two passes: Arrow's own format, which costs a tenth of parquet's."""
    import pyarrow as pa

    return pa.ipc.new_file(str(path), link_schema(), options=pa.ipc.IpcWriteOptions(compression="lz4"))


def link_schema() -> pa.Schema:
    import pyarrow as pa

    types = {ID: pa.int64(), URL: pa.string(), CAPTION: pa.string(), WIDTH: pa.int32(), HEIGHT: pa.int32()}
    always = (ID, URL, CAPTION)
    return pa.schema([pa.field(name, types.get(name, pa.float64()), name not in always) for name in LINK_COLUMNS])


class _Stream:
    """What is carried from batch to batch: counts and ranges of scores."""

    def __init__(self, config: Config, columns: Columns, opt_out: OptOut):
        self.config = config
        self.opt_out = opt_out
        self.columns = columns
        self.number_rules = score_rules(config.filter, config.score.computed) if config.select.score_rules else []
        self.total = 0
        self.kept = 0
        self.dropped: dict[str, int] = {}
        self.low: dict[str, float] = {}
        self.high: dict[str, float] = {}
        self.nulls = dict.fromkeys(SCORES, 0)

    def columns_read(self) -> tuple[list[str], list[str]]:
        """(the columns of numbers, all columns that some rule or links.parquet needs), in the release's spelling."""
        numbers = [self.columns[part] for part in (WIDTH, HEIGHT, *SCORES) if part in self.columns]
        texts = [URL, CAPTION]
        texts += [LANGUAGE] if self.config.select.languages else []
        texts += [MD5] if self.opt_out.md5 and MD5 in self.columns else []
        return numbers, list(dict.fromkeys([*numbers, *(self.columns[part] for part in texts)]))

    def all_null(self) -> list[str]:
        return [score for score in SCORES if self.total and self.nulls[score] == self.total]

    def judge(self, batch: pa.RecordBatch) -> pa.Table:
        """The batch's surviving rows as links. Numbers first: texts are looked at where they alone still decide."""
        import numpy as np
        import pyarrow as pa

        rows = len(batch)
        numbers = {part: self._number(batch, part) for part in (WIDTH, HEIGHT, *SCORES)}
        self._observe(numbers)
        judged = numbers
        if self.config.score.replace:  # the list's own will not count
            judged = numbers | {score: np.full(rows, np.nan) for score in self.config.score.computed}
        alive = apply(self.number_rules, judged, np.ones(rows, bool), self.dropped)
        chosen = np.flatnonzero(alive)
        if len(chosen) and self.columns[URL] not in batch.schema.names:
            raise StageError(
                f"{METADATA}: the footer's lowest and highest scores are not those of its rows; write it anew"
            )
        texts = {part: self._text(batch, part, chosen) for part in (URL, CAPTION, LANGUAGE, MD5)}
        arrays = {
            ID: pa.array(chosen + self.total),
            URL: texts[URL],
            CAPTION: texts[CAPTION],
            **{part: _nulls_for_nan(values.take(chosen, mode="clip")) for part, values in numbers.items()},
        }
        self.total += rows
        alive = apply(self._link_rules(texts), numbers, np.ones(len(chosen), bool), self.dropped)
        table = pa.table([arrays[name] for name in LINK_COLUMNS], names=list(LINK_COLUMNS))
        if not alive.all():
            table = table.filter(pa.array(alive))
        self.kept += len(table)
        return table.cast(link_schema(), safe=False)

    def _text(self, batch: pa.RecordBatch, part: str, chosen: np.ndarray) -> pa.Array:
        import pyarrow as pa
        import pyarrow.compute as pc

        if part not in self.columns or self.columns[part] not in batch.schema.names:  # nobody asks, or no row is left
            return pa.nulls(len(chosen), pa.string())
        values = batch.column(batch.schema.get_field_index(self.columns[part]))
        values = values if len(chosen) == len(batch) else pc.take(values, pa.array(chosen), boundscheck=False)
        try:
            values = pc.cast(values, pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise StageError(f"{METADATA}: column {self.columns[part]}: got {values.type}, expected text") from None
        return pc.utf8_trim_whitespace(values) if part == URL and may_have_space(values).any() else values

    def _number(self, batch: pa.RecordBatch, part: str) -> np.ndarray:
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        if part not in self.columns:
            return np.full(len(batch), np.nan)
        values = batch.column(batch.schema.get_field_index(self.columns[part]))
        try:
            numbers = pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise StageError(f"{METADATA}: column {self.columns[part]}: got {values.type}, expected numbers") from None
        if part in (WIDTH, HEIGHT):  # a declared size out of int32, or none at all, is no size
            sane = (numbers >= 1) & (numbers < 2**31)
            numbers = numbers if sane.all() else np.where(sane, numbers, np.nan)
        return numbers

    def _observe(self, numbers: dict[str, np.ndarray]) -> None:
        import numpy as np

        for score in SCORES:
            values = numbers[score]
            if _has_nan(values):
                values = values[~np.isnan(values)]
                self.nulls[score] += len(numbers[score]) - len(values)
            if len(values):
                self.low[score] = min(self.low.get(score, float("inf")), float(values.min()))
                self.high[score] = max(self.high.get(score, float("-inf")), float(values.max()))

    def _link_rules(self, texts: dict[str, pa.Array]) -> list[Rule]:
        import pyarrow.compute as pc

        select, url = self.config.select, texts[URL]
        chars = char_counts(texts[CAPTION], select.min_caption_chars, select.max_caption_chars)
        url_chars = char_counts(url, 1, MAX_URL_CHARS)

        def rule(reason: str, drop: np.ndarray) -> Rule:
            return reason, lambda _: drop

        rules = [
            rule("no url", url_chars == 0),
            rule("bad url", ~are_urls(url) | (url_chars > MAX_URL_CHARS)),
            rule("no caption", chars == 0),
            rule("caption too short", chars < select.min_caption_chars),
            rule("caption too long", chars > select.max_caption_chars),
        ]
        if select.languages:
            import pyarrow as pa

            spoken = pc.is_in(texts[LANGUAGE], value_set=pa.array(select.languages, pa.string()))
            rules.append(rule("other language", ~spoken.to_numpy(zero_copy_only=False)))
        if self.opt_out:
            rules.append(rule(OPTED_OUT, self.opt_out.marks(url.to_pylist(), texts[MD5].to_pylist())))
        return rules


def _has_nan(values: np.ndarray) -> bool:
    return bool(len(values)) and bool(values.min() != values.min())  # of a NaN and anything the least is NaN


def _nulls_for_nan(values: np.ndarray) -> pa.Array:
    import pyarrow as pa

    return pa.array(values, from_pandas=_has_nan(values))


def _without_duplicates(work: Path, partitions: UrlPartitions, stream: _Stream) -> int:
    """Keep the first row of each url among those that passed everything else (a duplicate of a dropped row is none).

    Returns the rows kept.
    """
    import pyarrow as pa

    masks, counts = partitions.drop()
    stream.dropped |= counts

    def pieces() -> Iterator[pa.Table]:
        with pa.OSFile(str(work / "candidates")) as source:
            reader = pa.ipc.open_file(source)
            for number in range(reader.num_record_batches):
                yield pa.Table.from_batches([reader.get_batch(number)])

    kept = 0
    with link_writer(work / "links.parquet") as writer, Behind(writer.write) as later:
        for table in ahead(pieces()):
            keep = masks.next(len(table))
            later(table.filter(pa.array(keep)))
            kept += int(keep.sum())
    return kept


def _is_hopeless(config: Config, columns: Columns, statistics: Statistics, group: int) -> bool:
    """Whether the footer proves that no row of a row group passes the scores: its texts are then never decoded."""
    if not config.select.score_rules:
        return False

    def low_high(score: str) -> tuple[float, float] | None:
        return statistics.low_high(group, columns[score]) if score in columns else None

    return hopeless(config.filter, low_high, config.score.computed)


def _refuse_useless_columns(config: Config, columns: Columns) -> None:
    if columns.aesthetic_v1 and AESTHETIC not in config.score.computed:
        raise StageError(
            f"{METADATA}: column {columns.aesthetic_v1} holds LAION's V1 score, another scale than filter.min_aesthetic"
            " (V2): the filter would mean nothing; use a release with AESTHETIC_SCORE (aesthetics_v2_*), or drop the "
            "column and set filter.missing_score: keep, or name a head in score.aesthetic"
        )
    if config.select.languages and LANGUAGE not in columns:
        raise StageError(f"{METADATA}: no column for the language but select.languages is set; set it to []")


def _said(statistics: Statistics, columns: Columns) -> tuple[dict[str, float], list[str]]:
    """(the lowest value of each score, the scores that are null throughout), as far as the footer says."""
    lows = {score: statistics.lowest(columns[score]) for score in SCORES if score in columns}
    empty = [score for score in SCORES if score not in columns or statistics.is_null(columns[score])]
    return {score: low for score, low in lows.items() if low is not None}, empty


def _refuse_useless_scores(config: Config, columns: Columns, lows: dict[str, float], empty: list[str]) -> None:
    """Asked of the footer before a row is read, and of the rows themselves, since a footer need not say."""
    low, limit = lows.get(AESTHETIC), limits(config.filter)[AESTHETIC]
    own = config.score.replace and AESTHETIC in config.score.computed
    if low is not None and low > limit.value and not own:
        raise StageError(
            f"{METADATA}: the lowest {columns[AESTHETIC]} is {low:g}, above {limit.setting} "
            f"{limit.value:g}: the filter would drop nothing, as with a V1 score or a list that was "
            f"filtered before; set {limit.setting} to at least that"
        )
    if empty := [score for score in empty if score in needed(config.filter, config.score.computed)]:
        setting = "filter.missing_unsafe" if empty[0] == UNSAFE else "filter.missing_score"
        harmless = ", if you know that every image of the list is harmless" if empty[0] == UNSAFE else ""
        raise StageError(
            f"{METADATA}: no row has a {empty[0]} score and {setting} is drop: nothing would be kept; use a release "
            f"that has the score, or compute it (score), or set {setting}: keep{harmless}"
        )
