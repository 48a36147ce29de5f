"""`raphael data status`: how far each data stage is, from files of the workspace, while it runs or after; no server.

| what | from |
| --- | --- |
| running, by whom, since when | work/locks/<stage>, and the kernel's list of who holds a lock |
| partitions done | work/<stage>/*/pieces.jsonl, which a piece enters when it is whole on disk |
| partitions in all | the shards, or the rows, that the stage reads |
| rows, while it runs | work/progress/<stage>.json |
| rows a second, seconds | while it runs: rows since it began, without those of an earlier run; after: work/timings/ |
| failures by reason | reports/<stage>.json; of a download that runs, the tables of its newest shards |
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.common.places import CAPTIONS, FILTERED, LINKS, SHARDS
from raphael.base.config.params import Config, load_config
from raphael.base.integrity.pieces import NAME as PIECES
from raphael.base.stage import StageError, one_clear_line, read_json

STAGES = ("source", "select", "download", "score", "filter", "captions", "autoencoder", "clip", "encode")
RUNNING, STOPPED, DONE, NOT_RUN = "running", "part-way", "done", "not run"
NEWEST_SHARDS = 200  # whose rows that failed are counted while a download runs


@dataclass
class Status:
    """Of a stage. rows, seconds, rows_per_s: None where no file says them. engine: of its last run that ended."""

    stage: str
    state: str = NOT_RUN
    holder: str = ""
    partitions: int | None = None
    partitions_total: int | None = None
    rows: int | None = None
    rows_total: int | None = None
    unit: str = "rows"
    seconds: float | None = None
    rows_per_s: float | None = None
    failures: dict[str, int] = field(default_factory=dict)
    failures_of: str = ""  # "" : all rows
    engine: dict[str, Any] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Partitions:
    """ending: of a partition's file; total: how many there are, None where nothing says so yet; rows: of the bar, in
    each."""

    ending: str
    total: Callable[[Path, Config], int | None]
    rows: Callable[[Config], int]


def _parquet_rows(path: Path) -> int | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path).metadata.num_rows
    except (OSError, pa.ArrowException):
        return None


def _pieces(rows: int | None, size: int) -> int | None:
    return None if rows is None else -(-rows // size)


def _shards(root: Path, _: Config) -> int | None:
    folder = root / SHARDS
    return sum(1 for entry in os.scandir(folder) if entry.name.endswith(".parquet")) if folder.is_dir() else None


def _downloaded(root: Path, config: Config) -> int | None:
    return _pieces(_parquet_rows(root / LINKS), config.download.shard_rows)


def _chunk_rows(config: Config) -> int:
    from data_pipeline.encode.stage import CHUNK_BATCHES

    return config.encode.batch_size * CHUNK_BATCHES


def _chunks(root: Path, config: Config) -> int | None:
    return _pieces(_parquet_rows(root / CAPTIONS), _chunk_rows(config))


def _part_rows(_: Config) -> int:
    from data_pipeline.captions.part import PART_ROWS

    return PART_ROWS


def _parts(root: Path, config: Config) -> int | None:
    return _pieces(_parquet_rows(root / FILTERED), _part_rows(config))


def _shard_rows(config: Config) -> int:
    return config.download.shard_rows


PARTITIONS = {
    "download": Partitions(".parquet", _downloaded, _shard_rows),
    "score": Partitions(".parquet", _shards, lambda config: 1),  # its bar counts shards
    "filter": Partitions(".npy", _shards, _shard_rows),
    "captions": Partitions(".arrow", _parts, _part_rows),
    "encode": Partitions(".npz", _chunks, _chunk_rows),
}


def look(root: Path, config: Config, now_s: float | None = None) -> list[Status]:
    """Of every stage, in the order of the pipeline. Nothing is written, and no lock is taken."""
    return [_look(stage, root, config, time.time() if now_s is None else now_s) for stage in STAGES]


def _look(stage: str, root: Path, config: Config, now_s: float) -> Status:
    found = Status(stage)
    report, timings, progress = (
        _read(root / folder / f"{stage}.json", found) for folder in ("reports", "work/timings", "work/progress")
    )
    reported_s = _changed_s(root / f"reports/{stage}.json")
    pieces, folder = _finished(stage, root)
    since_s = _since(root / "work/locks" / stage, found)
    is_newer = folder is not None and _changed_s(folder / PIECES) > reported_s
    if found.holder:
        found.state = RUNNING
    elif progress or (pieces and (not report or is_newer)):
        found.state = STOPPED
    elif report:
        found.state = DONE
    if stage in PARTITIONS and found.state != NOT_RUN:
        found.partitions_total = PARTITIONS[stage].total(root, config)
        found.partitions = found.partitions_total if found.state == DONE else len(pieces)
        if found.state == DONE and not timings.get("engine") and stage != "download":
            found.partitions = found.partitions_total = None  # it had none: no scores, no search for what looks alike
    if found.state == DONE:
        _from_report(found, report, timings)
    elif found.state != NOT_RUN:
        _from_progress(found, progress, pieces, since_s, config, now_s)
        if stage == "download" and folder is not None:
            _failures_so_far(found, pieces)
    return found


def _from_report(found: Status, report: dict[str, Any], timings: dict[str, Any]) -> None:
    found.rows = found.rows_total = report.get("total")
    found.failures = dict(report.get("dropped", {}))
    found.seconds, found.rows_per_s = timings.get("seconds"), timings.get("items_per_s")
    found.engine = {**timings.get("engine", {}), **({"engine": report["engine"]} if "engine" in report else {})}


def _from_progress(
    found: Status,
    progress: dict[str, Any],
    pieces: list[Path],
    since_s: float | None,
    config: Config,
    now_s: float,
) -> None:
    found.rows, found.rows_total = progress.get("done"), progress.get("total")
    found.unit = progress.get("unit", found.unit)
    if since_s is None or found.state != RUNNING:
        return
    found.seconds = max(now_s - since_s, 0.0)
    of_before = 0
    if found.stage in PARTITIONS:
        each = PARTITIONS[found.stage].rows(config)
        of_before = each * sum(1 for path in pieces if _changed_s(path) < since_s)
    if found.rows is not None and found.seconds > 0:
        found.rows_per_s = max(found.rows - of_before, 0) / found.seconds


def _failures_so_far(found: Status, pieces: list[Path]) -> None:
    """Of the newest shards' rows by reason: a table of each says how it ended."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_pipeline.common.schema import REASON

    newest = sorted(pieces, key=lambda path: (len(path.name), path.name))[-NEWEST_SHARDS:]
    counts: Counter[str] = Counter()
    for path in newest:
        try:
            counts.update(reason for reason in pq.read_table(path, columns=[REASON])[REASON].to_pylist() if reason)
        except (OSError, pa.ArrowException):
            found.unreadable.append(str(path))
    found.failures = dict(sorted(counts.items()))
    found.failures_of = "" if len(newest) == len(pieces) else f"of the last {len(newest)} shards"


def _finished(stage: str, root: Path) -> tuple[list[Path], Path | None]:
    """The partitions that are listed and there, in the work folder that was touched last; and that folder."""
    lists = sorted((root / "work" / stage).glob(f"*/{PIECES}"), key=_changed_s)
    if not lists or stage not in PARTITIONS:
        return [], None
    folder, names = lists[-1].parent, {}
    for line in lists[-1].read_bytes().splitlines():
        try:
            names[json.loads(line)[0]] = None
        except (ValueError, LookupError, TypeError):  # being written, or cut by a kill
            continue
    ending = PARTITIONS[stage].ending
    paths = [folder / name for name in names if isinstance(name, str) and name.endswith(ending)]
    return [path for path in paths if path.exists()], folder


def _since(lock: Path, found: Status) -> float | None:
    """When the run that holds the lock began, seconds since 1970; found.holder says who it is. None: nobody does."""
    try:
        status, said = lock.stat(), json.loads(lock.read_text(encoding="utf-8") or "{}")
        began_s = time.mktime(time.strptime(said["since"], "%Y-%m-%d %H:%M:%S"))
        pid, host = int(said["pid"]), str(said["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not _is_held(status.st_ino):
        return None
    found.holder = f"process {pid} on {host}"
    return began_s


def _is_held(inode: int) -> bool:
    """Whether somebody on this machine holds a lock of the file. Asking by taking it could make a stage that starts
    just then believe that another runs."""
    try:
        lines = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return False
    held = (line.split() for line in lines if " FLOCK " in line and "->" not in line)
    return any(fields[5].rpartition(":")[2] == str(inode) for fields in held if len(fields) > 5)


def _read(path: Path, found: Status) -> dict[str, Any]:
    """{} where the file is absent; where it is damaged, its name is told."""
    if not path.exists():
        return {}
    try:
        said = read_json(path)
    except StageError:
        said = None
    if isinstance(said, dict):
        return said
    if path.exists():  # not one that its stage took away meanwhile
        found.unreadable.append(path.name if path.parent.name == "reports" else f"{path.parent.name}/{path.name}")
    return {}


def _changed_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def as_text(found: list[Status]) -> str:
    rows = [("stage", "state", "partitions", "rows", "rows/s", "seconds", "failures")]
    for one in found:
        reasons = sorted(one.failures.items(), key=lambda pair: (-pair[1], pair[0]))
        failures = ", ".join(f"{count:,} {reason}" for reason, count in reasons[:4])
        failures += f", {len(reasons) - 4} more reasons" if len(reasons) > 4 else ""
        failures += f" ({one.failures_of})" if one.failures_of and failures else ""
        state = f"{one.state} ({one.holder})" if one.holder else one.state
        parts = (one.partitions, one.partitions_total)
        number = "" if one.rows_per_s is None else f"{one.rows_per_s:,.1f}"
        seconds = "" if one.seconds is None else f"{one.seconds:,.0f}"
        counted = _of(one.rows, one.rows_total) + (
            f" {one.unit}" if one.unit != "rows" and one.rows is not None else ""
        )
        rows.append((one.stage, state, _of(*parts), counted, number, seconds, failures))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines += [f"{one.stage}: {name}: not readable" for one in found for name in one.unreadable]
    return "\n".join(lines)


def _of(done: int | None, total: int | None) -> str:
    if done is None and total is None:
        return ""
    return " / ".join("?" if number is None else f"{number:,}" for number in (done, total))


def main(argv: list[str] | None = None) -> int:
    about = "How far each data stage of a workspace is, from its files."
    parser = argparse.ArgumentParser(prog="raphael data status", description=about)
    parser.add_argument("--params", default="params.yaml", help="its folder is the workspace (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    with one_clear_line("raphael data status") as outcome:
        config = load_config(arguments.params)
        found = look(Path(arguments.params).resolve().parent, config)
        print(json.dumps([asdict(one) for one in found], indent=2) if arguments.json else as_text(found))
    return outcome.status


if __name__ == "__main__":
    raise SystemExit(main())
