"""From links to images: data/selected/links.parquet -> data/shards/ (webdataset tars and a table of every row).

Images that lie here are packed from where they lie (data_pipeline/download/local.py). Links are
img2dataset's, which downloads and resizes in a process of its own, behind the gateway (data_pipeline/gateway/proxy.py).
Finished shards stay in the work folder, which belongs to exactly this list and these settings: a killed run resumes
with the next shard, a changed list starts afresh. A downloader that stops moving is killed and started again. Every row
ends as an image or with a reason.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.places import LINKS, SHARDS
from data_pipeline.common.schema import CAPTION, ID, KEY, REASON, SUCCESS, URL
from data_pipeline.download.decoder import KILLED
from data_pipeline.download.refused import Refused
from data_pipeline.download.shards import settings_of, shard_files
from raphael.base.integrity.pieces import Pieces
from raphael.base.stage import Progress, Stage, StageError

if TYPE_CHECKING:
    from data_pipeline.gateway.proxy import Gateway
    from raphael.base.config.data import DownloadConfig
    from raphael.base.config.params import Config


STARTS = 4  # of the downloader, before the stage gives up
LOOK_S = 0.2
STARTING_S = 300.0  # for the imports of three processes, on a machine that has other things to do
MAX_NAMED = 100  # rows whose images ended their decoder that are named in the report
EARLY_ROWS = 1000  # after so many rows a hopeless list or network is given up


def run(config: Config, stage: Stage) -> None:
    """Raises StageError, one line, where too few rows become images."""
    _refuse_rehearsal(config)
    refused = Refused.of(config)
    if config.source.is_local:
        from data_pipeline.download import local

        finished, outcomes, num_shards, facts = local.pack(config, stage, refused)
    else:
        finished, outcomes, num_shards, facts = _download(config, stage, refused)
    dropped = dict(sorted(outcomes.items()))
    kept = dropped.pop(SUCCESS, 0)
    packed = finished / "shards"
    stage.publish(packed, SHARDS, Pieces(finished, stage.name).hashes(packed))
    if refused.fingerprint:
        facts["hash_lists"] = refused.summary()
    if dropped.get(KILLED):
        facts["decoder_killed"] = _name_killed(SHARDS)
    stage.report(outcomes.total(), kept, dropped, shards=num_shards, **facts)
    shutil.rmtree(finished)


def _download(config: Config, stage: Stage, refused: Refused) -> tuple[Path, Counter[str], int, dict[str, Any]]:
    """(work folder, rows by outcome, shards, facts) of a list of links."""
    from data_pipeline.common.tables import open_parquet
    from data_pipeline.download.serve_images import site_of

    total = open_parquet(LINKS).metadata.num_rows
    site = site_of(config)
    served = site if site and site.is_file() else config.source.fingerprint
    rehearsed = _rehearsed(config)
    work = stage.workdir(LINKS, settings_of(config.download), served, *filter(None, [rehearsed, refused.fingerprint]))
    downloads = _Downloads(config.download, work, total)
    downloads.clean_up()
    with (
        stage.progress(total, "rows", initial=downloads.rows_packed()) as bar,
        _door(config.download, site, refused) as gateway,
    ):
        if downloads.missing():
            downloads.write_slices(gateway)
        for _ in range(STARTS):
            if not downloads.missing():
                break
            downloads.download(gateway, bar)
            downloads.clean_up()
    if failed := downloads.missing():
        words = downloads.last_words()
        raise StageError(f"{len(failed)} of {downloads.num_shards} shards failed {STARTS} times: {words}")
    downloads.check_success(downloads.outcomes)
    stage.timings.update(downloads.timings)
    facts: dict[str, Any] = {"rehearsal": {"photographs": len(rehearsed)}} if rehearsed else {}
    return work, downloads.outcomes, downloads.num_shards, facts


def _name_killed(shards: Path) -> list[str]:
    """Say on standard error which rows' images ended their decoder. Returns the keys of the first MAX_NAMED.

    The report has keys alone: it stays when an address is forgotten.
    """
    import pyarrow.compute as pc

    from data_pipeline.common.tables import open_parquet

    keys: list[str] = []
    for path in sorted(shards.glob("*.parquet")):
        table = open_parquet(path).read(columns=[KEY, URL, REASON])
        for row in table.filter(pc.equal(table[REASON], KILLED)).to_pylist():
            if len(keys) == MAX_NAMED:
                return keys
            keys.append(row[KEY])
            print(f"download: {KILLED}: row {row[KEY]} of {path.name}, {row[URL]!a}", file=sys.stderr)
    return keys


def _refuse_rehearsal(config: Config) -> None:
    """Raises StageError where a rehearsal is asked for of images that need no web."""
    if config.download.rehearsal and (config.source.is_local or config.source.kind == "scenes"):
        raise StageError(
            f"download.rehearsal: got {config.download.rehearsal!r} with source.kind {config.source.kind}, whose "
            "images lie here already; it is for lists of links (csv, jsonl, parquet)"
        )


def _rehearsed(config: Config) -> list[tuple[str, int]]:
    """The photographs that answer in the web's place; none where the web is asked."""
    if not config.download.rehearsal:
        return []
    from data_pipeline.download.serve_rehearsal import Photographs

    return Photographs(Path(config.download.rehearsal)).fingerprint()


@contextlib.contextmanager
def _door(config: DownloadConfig, site: Path | None, refused: Refused) -> Iterator[Gateway]:
    """The gateway, and behind it the image server where there is a site."""
    from data_pipeline.gateway.proxy import Gateway, Policy

    with contextlib.ExitStack() as stack:
        port, rehearsal = 0, {}
        if site is not None:
            from data_pipeline.download.serve_images import serve

            port = stack.enter_context(serve(site)).port
        if config.rehearsal:
            from data_pipeline.download import serve_rehearsal
            from data_pipeline.gateway import addresses

            web = stack.enter_context(serve_rehearsal.serve(config.rehearsal))
            rehearsal = {"rehearsal_port": web.port, "resolver": addresses.Resolver(web.resolve)}
        policy = Policy(
            timeout_s=config.timeout_s,
            deadline_s=config.deadline_s,
            max_bytes=config.max_bytes,
            max_pixels=config.max_pixels,
            max_decoded_bytes=config.max_decoded_bytes,
            retries=config.retries,
            per_host=config.per_host,
            user_agent=config.user_agent,
            refused_networks=config.refused_networks,
            why_not=refused.why_not,
            local_host=config.local_host if site is not None else "",
            local_port=port,
            **rehearsal,
        )
        yield stack.enter_context(Gateway(policy))


class _Downloads:
    """The work folder: raw/ is img2dataset's, slices/ the links of each shard, shards/ what will be published."""

    def __init__(self, config: DownloadConfig, work: Path, total: int):
        self.config, self.pieces = config, Pieces(work, "download")
        self.total = total
        self.num_shards = math.ceil(total / config.shard_rows)
        self.raw, self.slices, self.packed = (work / name for name in ("raw", "slices", "shards"))
        self.rows, self.log = work / "rows.parquet", work / "img2dataset.log"
        for folder in (self.raw, self.slices, self.packed):
            folder.mkdir(exist_ok=True)
        self.outcomes: Counter[str] = Counter()
        self.timings: dict[str, float] = {"starting_s": 0.0, "packing_s": 0.0}
        self.broken = ""
        self.looked_s = 0.0  # how long the last look at raw/ took

    def files(self, shard: int) -> tuple[Path, Path]:
        return shard_files(self.packed, shard)

    def missing(self) -> list[int]:
        return [shard for shard in range(self.num_shards) if not self.pieces.has(*self.files(shard))]

    def rows_packed(self) -> int:
        last = self.num_shards - 1
        missing = self.missing()
        rows = (self.num_shards - len(missing)) * self.config.shard_rows
        return rows if last in missing else rows - (self.num_shards * self.config.shard_rows - self.total)

    def clean_up(self) -> None:
        """Remove what a killed run left half done; count what it finished."""
        from data_pipeline.common.tables import open_parquet
        from data_pipeline.download.shards import outcomes, shard_name

        shutil.rmtree(self.raw / "_tmp", ignore_errors=True)
        for path in self.packed.glob(".*"):
            path.unlink()
        missing = set(self.missing())
        for shard in missing:
            stats = self.raw / f"{shard_name(shard)}_stats.json"
            if stats.exists() and not (self.raw / f"{shard_name(shard)}.tar").exists():
                stats.unlink()
        self.pack_finished()
        self.outcomes = Counter()
        for shard in sorted(set(range(self.num_shards)) - set(self.missing())):
            self.outcomes += outcomes(open_parquet(self.files(shard)[1]).read(columns=[REASON]))

    def write_slices(self, gateway: Gateway) -> None:
        """rows.parquet for img2dataset, its urls signed for this run; slices/ with the original urls and captions."""
        import pyarrow as pa

        from data_pipeline.common.tables import open_parquet, table_writer, write_table
        from data_pipeline.download.shards import shard_name

        signed = pa.schema([(ID, pa.int64()), (URL, pa.string())])
        links = open_parquet(LINKS)
        waiting: list[pa.RecordBatch] = []
        shard, have = 0, 0
        with table_writer(self.rows, signed) as writer:

            def write(table: pa.Table) -> None:
                ids, urls = table[ID].to_pylist(), table[URL].to_pylist()
                addresses = [gateway.sign(row, url) for row, url in zip(ids, urls, strict=True)]
                writer.write_table(pa.table({ID: ids, URL: addresses}, schema=signed))
                write_table(table, self.slices / f"{shard_name(shard)}.parquet")

            for batch in links.iter_batches(batch_size=self.config.shard_rows, columns=[ID, URL, CAPTION]):
                waiting.append(batch)
                have += len(batch)
                while have >= self.config.shard_rows:  # batches end where row groups end, shards do not
                    table = pa.Table.from_batches(waiting)
                    write(table.slice(0, self.config.shard_rows))
                    waiting = table.slice(self.config.shard_rows).to_batches()
                    shard, have = shard + 1, have - self.config.shard_rows
            if have:
                write(pa.Table.from_batches(waiting))

    def download(self, gateway: Gateway, bar: Progress) -> None:
        """One run of img2dataset over the missing shards: until it ends, or has not moved for stall_s."""
        from data_pipeline.download import run_img2dataset

        rows, folder = str(self.rows.resolve()), str(self.raw.resolve())
        home = str(Path(__file__).resolve().parents[2])
        environment = run_img2dataset.environment()
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [home, environment.get("PYTHONPATH")]))
        before, shown = gateway.answered, bar.bar.n
        started_s = moved_s = time.monotonic()
        seen = before
        with open(self.log, "wb") as log:
            child = subprocess.Popen(
                run_img2dataset.command(self.config, rows, folder),
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
            try:
                while child.poll() is None:
                    time.sleep(max(LOOK_S, 20 * self.looked_s))  # of a folder of 100,000 shards a look takes 0.1 s
                    answered = gateway.answered
                    finished = self.pack_finished()
                    if answered > seen or finished:
                        if seen == before:
                            self.timings["starting_s"] += round(time.monotonic() - started_s, 3)
                        seen, moved_s = answered, time.monotonic()
                        done = min(shown + answered - before, self.total)
                        bar.update(max(done - bar.bar.n, 0))
                    if finished and not self.missing():
                        break  # not when it has ended: its pool, told to end, may wait for a lock for ever
                    patience_s = self.config.stall_s if seen > before else max(self.config.stall_s, STARTING_S)
                    if time.monotonic() - moved_s > patience_s:
                        print(f"download: no row moved for {patience_s:g} s: starting again", file=sys.stderr)
                        return
            finally:
                end_tree(child)
        bar.update(max(min(self.rows_packed(), self.total) - bar.bar.n, 0))

    def finished(self) -> list[int]:
        """The numbers of the shards that img2dataset has finished and that are not packed. It leaves a _stats.json of
        each for ever, so a tar is what makes one new: one look at the folder, whatever its size."""
        began_s = time.monotonic()
        with os.scandir(self.raw) as entries:
            names = {entry.name for entry in entries}
        self.looked_s = time.monotonic() - began_s
        tars = (name.removesuffix(".tar") for name in names if name.endswith(".tar"))
        return sorted(int(shard) for shard in tars if shard.isdigit() and f"{shard}_stats.json" in names)

    def pack_finished(self) -> int:
        """Pack the shards that img2dataset has finished since the last look. Returns how many."""
        from data_pipeline.download.shards import BrokenShard, pack, shard_name

        count = 0
        for shard in self.finished():
            name = shard_name(shard)
            started_s = time.monotonic()
            try:
                if not self.pieces.has(*self.files(shard)):
                    self.outcomes += pack(self.raw, self.slices / f"{name}.parquet", self.packed, shard)
                    self.pieces.add(*self.files(shard))
            except BrokenShard as error:
                self.broken = str(error)
                for path in self.raw.glob(f"{name}[._]*"):  # not 100001 with 10000
                    path.unlink()
                continue
            for suffix in (".tar", ".parquet"):  # the _stats.json stays: it tells img2dataset that the shard is done
                (self.raw / f"{name}{suffix}").unlink(missing_ok=True)
            self.timings["packing_s"] = round(self.timings["packing_s"] + time.monotonic() - started_s, 3)
            count += 1
            if self.outcomes.total() >= EARLY_ROWS:
                self.check_success(self.outcomes)
        return count

    def check_success(self, outcomes: Counter[str]) -> None:
        """Raise StageError, with advice, where too few rows became images; the next run then asks again."""
        rows, share = outcomes.total(), outcomes[SUCCESS] / max(outcomes.total(), 1)
        if share >= self.config.min_success_share and outcomes[SUCCESS]:
            return
        reasons = [(count, reason) for reason, count in outcomes.items() if reason != SUCCESS]
        worst = ", ".join(f"{count:,} {reason}" for count, reason in sorted(reasons, reverse=True)[:4])
        for folder in (self.packed, self.raw):
            shutil.rmtree(folder, ignore_errors=True)
        raise StageError(
            f"{share:.1%} of the first {rows:,} rows became images, expected at least "
            f"{self.config.min_success_share:.0%} (download.min_success_share): {worst}; "
            f"{_advice(max(reasons)[1] if reasons else '')}"
        )

    def last_words(self) -> str:
        """Why, in one line: what the disk, the shard or the downloader's log say."""
        free = shutil.disk_usage(self.raw).free
        if free < 64 << 20:
            return f"the disk is full ({free >> 20} MB left); make room and run the same command again"
        if self.broken:
            return self.broken
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return f"{lines[-1].strip() if lines else 'it wrote nothing'} (whole log: {os.path.relpath(self.log)})"


def end_tree(child: subprocess.Popen) -> None:
    """Kill the downloader and the processes that it started, and wait for it."""
    import psutil

    try:
        family = psutil.Process(child.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []  # it ended by itself; its pool ends with it
    if child.poll() is None:
        child.kill()
    child.wait()
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _advice(reason: str) -> str:
    if reason in ("name not found", "no connection", "timeout", "too slow"):
        return "check the network and the name server; a local resolver, fewer download.threads and more retries help"
    if reason == KILLED:
        return "download.max_decoder_bytes or download.max_decoder_s is too little for the images of this list"
    if reason == "private address":
        return "the links lead into a private network, which is never followed (download.local_host may name one host)"
    if reason in ("own address", "refused network"):
        return "the links lead to this machine, or into a network of download.refused_networks; neither is followed"
    if reason.startswith("http "):
        return "the list is old, or the host turns this client away; take a newer release"
    return "look at the reasons, and lower download.min_success_share if this is what you expect"
