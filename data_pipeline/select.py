"""From a release's metadata to the links worth a request: data/source/metadata.parquet ->
data/selected/links.parquet.

The rows are streamed in batches; the search for duplicates spills to disk (data_pipeline/duplicates.py). A row is
dropped by the first rule that marks it, so the counts by reason are exclusive and add up.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.duplicates import Keep, UrlPartitions
from data_pipeline.opt_out import OptOut
from data_pipeline.rules import Rule, apply, score_rules
from data_pipeline.schema import (
    AESTHETIC,
    CAPTION,
    HEIGHT,
    ID,
    LANGUAGE,
    LINK_COLUMNS,
    MD5,
    SCORES,
    URL,
    WIDTH,
    Columns,
    find_columns,
)
from raphael.stage import Stage, StageError, main

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from raphael.config import Config

METADATA = Path("data/source/metadata.parquet")
LINKS = Path("data/selected/links.parquet")

MAX_URL_CHARS = 8000
# Scheme and host only; the gateway judges the rest when it knows where the name leads.
URL_PATTERN = r"(?i)^https?://[^\s/?#\\@]+([/?#]|$)"


def run(config: Config, stage: Stage) -> None:
    import pyarrow.parquet as pq

    file = open_parquet(METADATA)
    try:
        columns = find_columns(file.schema_arrow.names)
    except ValueError as error:
        raise StageError(f"{METADATA}: {error}; add the release's spelling to data_pipeline/schema.py") from None
    _refuse_useless_columns(config, columns)
    opt_out = OptOut.read(config.filter.opt_out)
    work = stage.workdir(METADATA, repr(config.select), repr(config.filter), repr(config.score), opt_out.fingerprint)
    stream = _Stream(config, columns, opt_out)
    shutil.rmtree(work / "urls", ignore_errors=True)  # of a killed run
    partitions = UrlPartitions(work / "urls", file.metadata.num_rows)
    wanted = sorted(set(columns.found.values()), key=file.schema_arrow.names.index)
    writer = pq.ParquetWriter(work / "candidates", link_schema())
    with stage.progress(file.metadata.num_rows, "rows") as bar, writer:
        for batch in file.iter_batches(batch_size=config.select.chunk_rows, columns=wanted):
            links = stream.judge(batch)
            partitions.add(links)
            writer.write_table(links)
            bar.update(len(batch), kept=stream.kept)
    _refuse_useless_scores(config, columns, stream)
    kept = _without_duplicates(work / "candidates", work / "links.parquet", partitions, stream)
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


def open_parquet(path: Path):
    """A pyarrow ParquetFile. Raises StageError, one line, where the file is missing or no parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; run the stage that makes it (dvc repro)") from None
    except (pa.ArrowInvalid, OSError) as error:
        detail = " ".join(str(error).split())
        raise StageError(f"{path}: not a readable parquet file ({detail}); make it again") from None


def link_schema() -> pa.Schema:
    import pyarrow as pa

    types = {ID: pa.int64(), URL: pa.string(), CAPTION: pa.string(), WIDTH: pa.int32(), HEIGHT: pa.int32()}
    return pa.schema([(name, types.get(name, pa.float64())) for name in LINK_COLUMNS])


class _Stream:
    """What is carried from batch to batch: counts and ranges of scores."""

    def __init__(self, config: Config, columns: Columns, opt_out: OptOut):
        self.config = config
        self.opt_out = opt_out
        self.columns = columns
        self.total = 0
        self.kept = 0
        self.dropped: dict[str, int] = {}
        self.low: dict[str, float] = {}
        self.high: dict[str, float] = {}
        self.nulls = dict.fromkeys(SCORES, 0)

    def judge(self, batch: pa.RecordBatch) -> pa.Table:
        """The batch's surviving rows as links."""
        import numpy as np
        import pyarrow as pa

        rows = len(batch)
        texts = {part: self._text(batch, part) for part in (URL, CAPTION, LANGUAGE, MD5)}
        numbers = {part: self._number(batch, part) for part in (WIDTH, HEIGHT, *SCORES)}
        self._observe(numbers)
        rules = self._link_rules(texts)
        if self.config.select.score_rules:
            rules += score_rules(self.config.filter, self.config.score.computed)
        judged = numbers
        if self.config.score.replace:  # the list's own will not count
            judged = numbers | {score: np.full(rows, np.nan) for score in self.config.score.computed}
        alive = apply(rules, judged, np.ones(rows, bool), self.dropped)
        arrays = {
            ID: pa.array(np.arange(self.total, self.total + rows, dtype=np.int64)),
            URL: texts[URL],
            CAPTION: texts[CAPTION],
            **{part: pa.array(values, from_pandas=True) for part, values in numbers.items()},
        }
        self.total += rows
        self.kept += int(alive.sum())
        table = pa.table([arrays[name] for name in LINK_COLUMNS], names=list(LINK_COLUMNS)).filter(pa.array(alive))
        return table.cast(link_schema(), safe=False)

    def _text(self, batch: pa.RecordBatch, part: str) -> pa.Array:
        import pyarrow as pa
        import pyarrow.compute as pc

        if part not in self.columns:
            return pa.nulls(len(batch), pa.string())
        values = batch.column(batch.schema.get_field_index(self.columns[part]))
        try:
            values = pc.cast(values, pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise StageError(f"{METADATA}: column {self.columns[part]}: got {values.type}, expected text") from None
        return pc.utf8_trim_whitespace(values) if part == URL else values

    def _number(self, batch: pa.RecordBatch, part: str) -> np.ndarray:
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        if part not in self.columns:
            return np.full(len(batch), np.nan)
        values = batch.column(batch.schema.get_field_index(self.columns[part]))
        try:
            numbers = pc.cast(values, pa.float64()).to_numpy(zero_copy_only=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise StageError(f"{METADATA}: column {self.columns[part]}: got {values.type}, expected numbers") from None
        if part in (WIDTH, HEIGHT):  # a declared size out of int32, or none at all, is no size
            numbers = np.where((numbers >= 1) & (numbers < 2**31), numbers, np.nan)
        return numbers

    def _observe(self, numbers: dict[str, np.ndarray]) -> None:
        import numpy as np

        for score in SCORES:
            values = numbers[score][~np.isnan(numbers[score])]
            self.nulls[score] += len(numbers[score]) - len(values)
            if len(values):
                self.low[score] = min(self.low.get(score, float("inf")), float(values.min()))
                self.high[score] = max(self.high.get(score, float("-inf")), float(values.max()))

    def _link_rules(self, texts: dict[str, pa.Array]) -> list[Rule]:
        import pyarrow.compute as pc

        select, url, caption = self.config.select, texts[URL], texts[CAPTION]
        chars = pc.utf8_length(pc.utf8_trim_whitespace(caption))

        def rule(reason: str, drop: pa.Array) -> Rule:
            mask = drop.fill_null(False).to_numpy(zero_copy_only=False)
            return reason, lambda _: mask

        in_bounds = pc.less_equal(pc.utf8_length(url), MAX_URL_CHARS)
        good_url = pc.and_(pc.match_substring_regex(url, URL_PATTERN), in_bounds)
        rules = [
            rule("no url", pc.or_kleene(pc.is_null(url), pc.equal(url, ""))),
            rule("bad url", pc.invert(good_url)),
            rule("no caption", pc.or_kleene(pc.is_null(caption), pc.equal(chars, 0))),
            rule("caption too short", pc.less(chars, select.min_caption_chars)),
            rule("caption too long", pc.greater(chars, select.max_caption_chars)),
        ]
        if select.languages:
            import pyarrow as pa

            spoken = pc.is_in(texts[LANGUAGE], value_set=pa.array(select.languages, pa.string()))
            rules.append(rule("other language", pc.invert(spoken)))
        if self.opt_out:
            marks = self.opt_out.marks(texts[URL].to_pylist(), texts[MD5].to_pylist())
            rules.append(("opted out", lambda _: marks))
        return rules


def _without_duplicates(candidates: Path, out: Path, partitions: UrlPartitions, stream: _Stream) -> int:
    """Keep the first row of each url among those that passed everything else (a duplicate of a dropped row is none).

    Returns the rows kept.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    drop, counts = partitions.drop()
    stream.dropped |= counts
    file, rows = pq.ParquetFile(candidates), stream.config.select.chunk_rows
    kept, masks = 0, Keep(drop)
    with pq.ParquetWriter(out, link_schema(), compression="zstd") as writer:
        for batch in file.iter_batches(batch_size=rows):
            keep = masks.next(len(batch))
            writer.write_table(pa.Table.from_batches([batch]).filter(pa.array(keep)))
            kept += int(keep.sum())
    return kept


def _refuse_useless_columns(config: Config, columns: Columns) -> None:
    if columns.aesthetic_v1 and AESTHETIC not in config.score.computed:
        raise StageError(
            f"{METADATA}: column {columns.aesthetic_v1} holds LAION's V1 score, another scale than filter.min_aesthetic"
            " (V2): the filter would mean nothing; use a release with AESTHETIC_SCORE (aesthetics_v2_*), or drop the "
            "column and set filter.missing_score: keep, or name a head in score.aesthetic"
        )
    if config.select.languages and LANGUAGE not in columns:
        raise StageError(f"{METADATA}: no column for the language but select.languages is set; set it to []")


def _refuse_useless_scores(config: Config, columns: Columns, stream: _Stream) -> None:
    low = stream.low.get(AESTHETIC)
    own = config.score.replace and AESTHETIC in config.score.computed
    if low is not None and low > config.filter.min_aesthetic and not own:
        raise StageError(
            f"{METADATA}: the lowest {columns[AESTHETIC]} is {low:g}, above filter.min_aesthetic "
            f"{config.filter.min_aesthetic:g}: the filter would drop nothing, as with a V1 score or a list that was "
            "filtered before; set filter.min_aesthetic to at least that"
        )
    if config.filter.missing_score == "drop":
        for score in SCORES:
            if stream.total and stream.nulls[score] == stream.total and score not in config.score.computed:
                raise StageError(
                    f"{METADATA}: no row has a {score} score and filter.missing_score is drop: nothing would be kept; "
                    "set filter.missing_score: keep, use a release that has the score, or compute it (score)"
                )


if __name__ == "__main__":
    raise SystemExit(main("select", run, __doc__))
