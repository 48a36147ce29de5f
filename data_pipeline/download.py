"""From links to pictures: data/selected/links.parquet -> data/shards/ (webdataset tars and a table of every row).

img2dataset downloads and resizes, in a process of its own, behind the gateway (data_pipeline/gateway.py). Finished
shards stay in the work folder, which belongs to exactly this list and these settings: a killed run goes on with the
next shard, a changed list starts afresh. A downloader that stops moving is killed and started again. Every row ends
as a picture or with a reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.schema import CAPTION, ID, SUCCESS, URL
from raphael.stage import Progress, Stage, StageError, main

if TYPE_CHECKING:
    from data_pipeline.gateway import Gateway
    from raphael.config import Config
    from raphael.config_data import DownloadConfig

LINKS = Path("data/selected/links.parquet")
SHARDS = Path("data/shards")

STARTS = 4  # of the downloader, before the stage gives up
LOOK_S = 0.2
STARTING_S = 300.0  # for the imports of three processes, on a machine that has other things to do
EARLY_ROWS = 1000  # after so many rows a hopeless list or network is given up
_NO_EFFECT = ("processes", "threads", "stall_s", "min_success_share")  # settings that do not change the result


def run(config: Config, stage: Stage) -> None:
    from data_pipeline.select import open_parquet
    from data_pipeline.serve_images import site_of

    total = open_parquet(LINKS).metadata.num_rows
    site = site_of(config)
    settings = {name: value for name, value in dataclasses.asdict(config.download).items() if name not in _NO_EFFECT}
    served = site if site and site.is_file() else config.source.fingerprint  # of a folder of photographs
    rehearsed = _rehearsed(config, site)
    work = stage.workdir(LINKS, settings, served, *([rehearsed] if rehearsed else []))
    job = _Job(config.download, work, total)
    job.clean_up()
    with stage.progress(total, "rows", initial=job.rows_packed()) as bar, _door(config.download, site) as gateway:
        if job.missing():
            job.write_slices(gateway)
        for _ in range(STARTS):
            if not job.missing():
                break
            job.download(gateway, bar)
            job.clean_up()
    if job.missing():
        raise StageError(f"{len(job.missing())} of {job.num_shards} shards failed {STARTS} times: {job.last_words()}")
    job.check_success(job.outcomes)
    dropped = dict(sorted(job.outcomes.items()))
    kept = dropped.pop(SUCCESS, 0)
    stage.timings.update(job.timings)
    stage.publish(work / "shards", SHARDS)
    facts = {"rehearsal": {"photographs": len(rehearsed)}} if rehearsed else {}
    stage.report(total, kept, dropped, shards=job.num_shards, **facts)
    shutil.rmtree(work)


def _rehearsed(config: Config, site: Path | None) -> list[tuple[str, int]]:
    """The photographs that answer in the web's place; none where the web is asked. Raises StageError."""
    if not config.download.rehearsal:
        return []
    if site is not None:
        raise StageError(
            f"download.rehearsal: got {config.download.rehearsal!r} with source.kind {config.source.kind}, whose "
            "pictures lie here already; it is for lists of links (csv, jsonl, parquet)"
        )
    from data_pipeline.serve_rehearsal import Photographs

    return Photographs(Path(config.download.rehearsal)).fingerprint()


@contextlib.contextmanager
def _door(config: DownloadConfig, site: Path | None) -> Iterator[Gateway]:
    """The gateway, and behind it the picture server where there is a site."""
    from data_pipeline.gateway import Gateway, Policy

    with contextlib.ExitStack() as stack:
        port, rehearsal = 0, {}
        if site is not None:
            from data_pipeline.serve_images import serve

            port = stack.enter_context(serve(site)).port
        if config.rehearsal:
            from data_pipeline import addresses, serve_rehearsal

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
            local_host=config.local_host if site is not None else "",
            local_port=port,
            **rehearsal,
        )
        yield stack.enter_context(Gateway(policy))


class _Job:
    """The work folder: raw/ is img2dataset's, slices/ the links of each shard, shards/ what will be published."""

    def __init__(self, config: DownloadConfig, work: Path, total: int):
        self.config = config
        self.total = total
        self.num_shards = math.ceil(total / config.shard_rows)
        self.raw, self.slices, self.packed = (work / name for name in ("raw", "slices", "shards"))
        self.rows, self.log = work / "rows.parquet", work / "img2dataset.log"
        for folder in (self.raw, self.slices, self.packed):
            folder.mkdir(exist_ok=True)
        self.outcomes: Counter[str] = Counter()
        self.timings: dict[str, float] = {"starting_s": 0.0, "packing_s": 0.0}
        self.broken = ""

    def missing(self) -> list[int]:
        from data_pipeline.shards import shard_name

        names = [shard_name(shard) for shard in range(self.num_shards)]
        return [shard for shard, name in enumerate(names) if not (self.packed / f"{name}.parquet").exists()]

    def rows_packed(self) -> int:
        last = self.num_shards - 1
        missing = self.missing()
        rows = (self.num_shards - len(missing)) * self.config.shard_rows
        return rows if last in missing else rows - (self.num_shards * self.config.shard_rows - self.total)

    def clean_up(self) -> None:
        """Remove what a killed run left half done; count what it finished."""
        import pyarrow.parquet as pq

        from data_pipeline.shards import outcomes, shard_name

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
        for shard in range(self.num_shards):
            table = self.packed / f"{shard_name(shard)}.parquet"
            if table.exists():
                self.outcomes += outcomes(pq.read_table(table, columns=["reason"]))

    def write_slices(self, gateway: Gateway) -> None:
        """rows.parquet for img2dataset, its urls signed for this run; slices/ with the original urls and captions."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from data_pipeline.shards import shard_name

        signed = pa.schema([(ID, pa.int64()), (URL, pa.string())])
        links = pq.ParquetFile(LINKS)
        waiting: list[pa.RecordBatch] = []
        shard, have = 0, 0
        with pq.ParquetWriter(self.rows, signed) as writer:

            def write(table: pa.Table) -> None:
                ids, urls = table[ID].to_pylist(), table[URL].to_pylist()
                addresses = [gateway.sign(row, url) for row, url in zip(ids, urls, strict=True)]
                writer.write_table(pa.table({ID: ids, URL: addresses}, schema=signed))
                pq.write_table(table, self.slices / f"{shard_name(shard)}.parquet")

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
        from data_pipeline import run_img2dataset

        rows, folder = str(self.rows.resolve()), str(self.raw.resolve())
        arguments = json.dumps(run_img2dataset.arguments(self.config, rows, folder))
        home = str(Path(__file__).resolve().parents[1])
        environment = run_img2dataset.environment()
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [home, environment.get("PYTHONPATH")]))
        before, shown = gateway.answered, bar.bar.n
        started_s = moved_s = time.monotonic()
        seen = before
        with open(self.log, "wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "data_pipeline.run_img2dataset", arguments, str(os.getpid())],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
            try:
                while child.poll() is None:
                    time.sleep(LOOK_S)
                    answered = gateway.answered
                    finished = self.pack_finished()
                    if answered > seen or finished:
                        if seen == before:
                            self.timings["starting_s"] += round(time.monotonic() - started_s, 3)
                        seen, moved_s = answered, time.monotonic()
                        done = min(shown + answered - before, self.total)
                        bar.update(max(done - bar.bar.n, 0))
                    patience_s = self.config.stall_s if seen > before else max(self.config.stall_s, STARTING_S)
                    if time.monotonic() - moved_s > patience_s:
                        print(f"download: no row moved for {patience_s:g} s: starting again", file=sys.stderr)
                        return
            finally:
                end_tree(child)
        bar.update(max(min(self.rows_packed(), self.total) - bar.bar.n, 0))

    def pack_finished(self) -> int:
        """Pack the shards that img2dataset has finished since the last look. Returns how many."""
        from data_pipeline.shards import BrokenShard, pack, shard_name

        count = 0
        for stats in sorted(self.raw.glob("*_stats.json")):
            shard = int(stats.name.split("_")[0])
            name = shard_name(shard)
            if not (self.raw / f"{name}.tar").exists():
                continue
            started_s = time.monotonic()
            try:
                if not (self.packed / f"{name}.parquet").exists():
                    self.outcomes += pack(self.raw, self.slices / f"{name}.parquet", self.packed, shard)
            except BrokenShard as error:
                self.broken = str(error)
                for path in self.raw.glob(f"{name}*"):
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
        """Raise StageError, with advice, where too few rows became pictures; the next run then asks again."""
        rows, share = outcomes.total(), outcomes[SUCCESS] / max(outcomes.total(), 1)
        if share >= self.config.min_success_share and outcomes[SUCCESS]:
            return
        reasons = [(count, reason) for reason, count in outcomes.items() if reason != SUCCESS]
        worst = ", ".join(f"{count:,} {reason}" for count, reason in sorted(reasons, reverse=True)[:4])
        for folder in (self.packed, self.raw):
            shutil.rmtree(folder, ignore_errors=True)
        raise StageError(
            f"{share:.1%} of the first {rows:,} rows became pictures, expected at least "
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
    if reason == "private address":
        return "the links lead into a private network, which is never followed (download.local_host may name one host)"
    if reason.startswith("http "):
        return "the list is old, or the host turns this client away; take a newer release"
    return "look at the reasons, and lower download.min_success_share if this is what you expect"


if __name__ == "__main__":
    raise SystemExit(main("download", run, __doc__))
