"""Forget images on their owner's request: `raphael data forget --url URL --domain HOST --list FILE`.

The entries go to the opt-out list, so that no later run takes the images again; then every row, sample and record of
them leaves every file under data/; then every file is read again to prove it, and reports/forget-<date>.json says what
left where. A plan in work/forget/ is written first: a killed run resumes from it and ends with the same files.
What has been trained has seen the images: those stages are out of date afterwards, and `dvc repro` trains anew.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.opt_out import OptOut
from data_pipeline.common.places import DROPPED
from data_pipeline.common.schema import ID, KEY, SHA256, SOURCE_SHA256, URL, find_columns
from data_pipeline.tools import forget_files
from data_pipeline.tools.forget_dvc import commit, stale_stages, touched_stages
from data_pipeline.tools.forget_matches import METADATA, Gone, data_files, scan
from raphael.base.config.params import load_config
from raphael.base.files import written_whole
from raphael.base.stage import StageError, one_clear_line, only_run, read_json, write_json

if TYPE_CHECKING:
    from raphael.base.config.params import Config

DATA, WORK, REPORTS = Path("data"), Path("work/forget"), Path("reports")
PLAN = "plan.json"
# Unfinished work of these stages may hold images, captions and addresses.
WORK_OF = ("source", "select", "download", "score", "filter", "captions", "autoencoder", "clip", "encode", "spaces")
LOCKED = (*WORK_OF[:-1], "train", "evaluate", "report")
EXAMPLES = REPORTS / "captions.json"  # shows a few captions with their keys
CARD = (REPORTS / "data_card.html", REPORTS / "data_card.json")  # shows images; `raphael data card` makes it anew


def run(config: Config, lines: list[str]) -> list[dict[str, Any]]:
    """Forget `lines`, entries as in the opt-out list, in the current folder; first what killed runs left undone.

    Returns what the report says of each request. Raises StageError.
    """
    if not config.filter.opt_out:
        raise StageError(
            f'filter.opt_out: got "" in {config.file}, expected the file where owners who said no are kept; '
            "set it, for example to opt_out.txt"
        )
    asked = OptOut.parse("\n".join(lines), "the request")
    if not asked and not list(WORK.glob(f"*/{PLAN}")):
        raise StageError("got no url, domain or list entry, expected at least one: --url, --domain or --list")
    if asked:
        work = WORK / hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]
        if not (work / PLAN).is_file():
            extend_list(Path(config.filter.opt_out), lines, asked)
            work.mkdir(parents=True, exist_ok=True)
            write_json(work / PLAN, make_plan(config, lines))
    return [carry_out(config, plan.parent) for plan in sorted(WORK.glob(f"*/{PLAN}"))]


def extend_list(path: Path, lines: list[str], asked: OptOut) -> None:
    """Add the entries that the opt-out list does not have yet; the list is written atomically."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    known = OptOut.parse(text, str(path))
    if all(getattr(asked, kind) <= getattr(known, kind) for kind in ("urls", "domains", "md5", "sha256")):
        return
    have = {line.strip() for line in text.splitlines()}
    text += "\n" if text and not text.endswith("\n") else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(text + "".join(f"{line}\n" for line in lines if line not in have), encoding="utf-8")


def make_plan(config: Config, lines: list[str]) -> dict[str, Any]:
    """What is to be done, known before the first file changes: samples found, traces by file, stages out of date."""
    asked = OptOut.parse("\n".join(lines), "the request")
    ids, keys, elsewhere = samples(Gone(asked, host=config.download.local_host))
    gone = Gone(asked, frozenset(ids), frozenset(keys), config.download.local_host)
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "lines": lines,
        "ids": sorted(ids),
        "keys": sorted(keys),
        "same_bytes_elsewhere": elsewhere,
        "found": scan(DATA, gone),
        "stale": stale_stages(Path.cwd()),
    }


def samples(gone: Gone) -> tuple[set[int], set[str], int]:
    """(ids, keys) of what is asked for, by the list, the links and the shards' tables; and how many other images have
    the same bytes."""
    import pyarrow.parquet as pq

    ids: set[int] = set()
    keys: set[str] = set()
    metadata = DATA / METADATA
    if metadata.is_file():
        first = 0
        file = pq.ParquetFile(metadata)
        find_columns(file.schema_arrow.names)  # a list without addresses could not be searched: that is an error
        for batch in file.iter_batches():
            ids.update(first + row for row in gone.rows(batch).nonzero()[0].tolist())
            first += len(batch)
    digests: list[tuple[str, str | None]] = []
    tables = [path for path in data_files(DATA) if path.suffix == ".parquet" and path != metadata]
    for path in tables:
        names = pq.ParquetFile(path).schema_arrow.names
        if ID not in names or URL not in names:
            continue
        columns = [name for name in (ID, KEY, URL, SHA256, SOURCE_SHA256) if name in names]
        table = pq.read_table(path, columns=columns)
        marked = Gone(gone.asked, frozenset(ids), host=gone.host).rows(table)
        for row, hit in zip(table.to_pylist(), marked, strict=True):
            if hit:
                ids.add(row[ID])
                keys.update([row[KEY]] if row.get(KEY) else [])
            if path.parent.name == "shards" and row[SHA256]:
                digests.append((row[SHA256], row[KEY]))
    lost = {digest for digest, key in digests if key in keys}
    return ids, keys, sum(digest in lost and key not in keys for digest, key in digests)


def carry_out(config: Config, work: Path) -> dict[str, Any]:
    """Remove, prove, tell DVC, report; every step may be done twice."""
    plan = read_json(work / PLAN)
    asked = OptOut.parse("\n".join(plan["lines"]), "the request")
    gone = Gone(asked, frozenset(plan["ids"]), frozenset(plan["keys"]), config.download.local_host)
    forget_files.remove(DATA, gone, work, data_files(DATA))
    removed_work = [name for name in WORK_OF if (Path("work") / name).is_dir()]
    for name in removed_work:
        shutil.rmtree(Path("work") / name)
    changed = [*plan["found"], *_without_examples(gone), *_without_images(gone)]
    left = scan(DATA, gone)
    if left:
        raise StageError(f"data: traces are left in {', '.join(left)}; is a stage running? end it and run this again")
    committed, stale = commit(Path.cwd(), touched_stages(Path.cwd(), changed), plan["stale"])
    entry = {
        "request": work.name,
        "asked": asked.summary(),
        "samples": len(plan["keys"]),
        "rows": len(plan["ids"]),
        "removed": plan["found"],
        "same_bytes_elsewhere": plan["same_bytes_elsewhere"],
        "files_read_for_the_proof": len(data_files(DATA)),
        "traces_left": sum(left.values()),
        "committed_to_dvc": committed,
        "left_out_of_date": stale,
    }
    _report(REPORTS / f"forget-{plan['date']}.json", entry)
    shutil.rmtree(work)
    return {**entry, "date": plan["date"]}


def _without_examples(gone: Gone) -> list[str]:
    """The captions' report shows some captions: those of forgotten images leave it. Returns what has changed."""
    if not EXAMPLES.is_file():
        return []
    report = read_json(EXAMPLES)
    fewer = [example for example in report.get("examples", []) if example["key"] not in gone.keys]
    if len(fewer) == len(report.get("examples", [])):
        return []
    write_json(EXAMPLES, {**report, "examples": fewer})
    return [EXAMPLES.as_posix()]


def _without_images(gone: Gone) -> list[str]:
    """The report's images of what was dropped, without the forgotten ones; the data card's page goes as a whole.
    Returns which of DVC's files have changed."""
    for page in CARD:
        page.unlink(missing_ok=True)
    if not DROPPED.is_file():
        return []
    shown = read_json(DROPPED)
    fewer = {
        stage: {reason: [card for card in cards if card["key"] not in gone.keys] for reason, cards in by.items()}
        for stage, by in shown.items()
    }
    if fewer == shown:
        return []
    write_json(
        DROPPED, {stage: {reason: cards for reason, cards in by.items() if cards} for stage, by in fewer.items()}
    )
    return [DROPPED.as_posix()]


def _report(path: Path, entry: dict[str, Any]) -> None:
    """One file a day; a request that was reported before takes its own place."""
    before = read_json(path)["requests"] if path.is_file() else []
    others = [other for other in before if other["request"] != entry["request"]]
    write_json(path, {"stage": "forget", "requests": [*others, entry]})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="forget", description=__doc__.split("\n\n")[0])
    parser.add_argument("--params", default="params.yaml", help="its folder is the workspace (default: %(default)s)")
    parser.add_argument("--url", action="append", default=[], help="an address; repeatable")
    parser.add_argument("--domain", action="append", default=[], help="every host of it; repeatable")
    parser.add_argument("--list", type=Path, help="a file of entries as in filter.opt_out, hashes too")
    arguments = parser.parse_args(argv)
    with one_clear_line("forget") as outcome:
        lines = _lines(arguments)
        config = load_config(arguments.params)
        os.chdir(Path(arguments.params).resolve().parent)
        with contextlib.ExitStack() as locks:
            for stage in LOCKED:  # they read or write what is about to change
                locks.enter_context(only_run(stage, Path.cwd()))
            done = run(config, lines)
        for entry in done:
            _tell(entry)
    return outcome.status


def _lines(arguments: argparse.Namespace) -> list[str]:
    for url in arguments.url:
        if "://" not in url:
            raise StageError(f"--url: got {url!r}, expected an address such as https://a.example/picture.jpg")
    lines = [*arguments.url, *arguments.domain]
    if arguments.list:
        OptOut.read(str(arguments.list))  # its errors name file and line
        lines += arguments.list.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _tell(done: dict[str, Any]) -> None:
    print(f"forget: {done['samples']:,} images of {done['rows']:,} rows; nothing of them is left under data/")
    for name, count in done["removed"].items():
        print(f"  {name}: {count:,}")
    if done["same_bytes_elsewhere"]:
        print(f"  {done['same_bytes_elsewhere']:,} other images have the same bytes: add their sha256 to forget them")
    if done["committed_to_dvc"]:
        print(f"dvc: the new content of {', '.join(done['committed_to_dvc'])} is recorded")
    if done["left_out_of_date"]:
        names = " ".join(done["left_out_of_date"])
        print(f"dvc: out of date before this, so not recorded: {names}; look at them, then dvc repro or dvc commit")
    print("what was trained has seen these images: dvc repro trains it anew")
    print("old versions stay in DVC's cache until: dvc gc --workspace --force (and --cloud for remotes)")
    print(f"report: reports/forget-{done['date']}.json")


if __name__ == "__main__":
    raise SystemExit(main())
