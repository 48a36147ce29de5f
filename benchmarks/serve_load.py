"""Images a second of `raphael serve` beside a bare loop over the same pipeline, and what becomes of it under load.

16 clients     each asks again when it is answered; ours / peer is served / bare images a second, to be at least 0.95.
               The bare loop is `pipeline(prompt, seed=i)`: no HTTP, no PNG, no queue. The two take turns, each in a
               process of its own, best of the turns; server and clients share the cores that the loop has for itself.
1 client       the answer to one warm request, to be within 0.5 s.
memory         resident bytes of the server over 2,000 requests, from the 500th on: what it grows by.
200 clients    at one time: each gets its image or 429, none waits for longer than the queue lasts.

The shipped model at its own size and steps (64 x 64 px, 15); the 2,000 requests are of one step. Writes
results/serve_load-<device>-<yyyymm>.json, unless --quick.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
from _apart import apart
from _machine import judged, keep, within

PROMPT = "a red circle left of a blue square"
CLIENTS, MANY = 16, 200
QUEUE = 32  # raphael serve's own


def bare(checkpoint: str, steps: int | None, count: int) -> dict[str, Any]:
    """Images a second of a loop."""
    from raphael import RaphaelPipeline
    from raphael.base.cores.threads import wait_passively

    wait_passively()
    pipeline = RaphaelPipeline.from_pretrained(checkpoint)
    pipeline.precision = "fp32"
    pipeline(PROMPT, num_inference_steps=steps, seed=0)
    started_s = time.perf_counter()
    for seed in range(count):
        pipeline(PROMPT, num_inference_steps=steps, seed=seed)
    return {"images_per_s": count / (time.perf_counter() - started_s)}


@contextmanager
def serving(checkpoint: str) -> Iterator[tuple[str, psutil.Process, float]]:
    """(address, process, seconds until it was ready)."""
    command = [
        sys.executable,
        "-m",
        "raphael.cli",
        "serve",
        "--port",
        "0",
        "--device",
        "cpu",
        "--checkpoint",
        checkpoint,
    ]
    started_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        found = re.search(r"(http://127\.0\.0\.1:\d+)/", line)
        if not found:
            raise SystemExit(f"the server did not start: {line!r}")
        yield found[1], psutil.Process(process.pid), time.perf_counter() - started_s
    finally:
        process.terminate()
        process.wait(20)


async def ask(client: httpx.AsyncClient, steps: int | None, seed: int) -> tuple[int, float]:
    """(status, seconds)."""
    body = {"prompt": PROMPT, "seed": seed} | ({"num_inference_steps": steps} if steps else {})
    started_s = time.perf_counter()
    answer = await client.post("/v1/images", json=body)
    return answer.status_code, time.perf_counter() - started_s


async def load(
    url: str, clients: int, count: int, steps: int | None, every: int = 0, look: Any = None
) -> dict[str, Any]:
    """`count` requests by so many clients, one after the other each. look: called after every `every` answers."""
    seeds, answers = iter(range(count)), []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as client:

        async def one() -> None:
            for seed in seeds:
                answers.append(await ask(client, steps, seed))
                if every and len(answers) % every == 0:
                    look(len(answers))

        started_s = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        taken_s = time.perf_counter() - started_s
    seconds = sorted(seconds for status, seconds in answers if status == 200)
    return {
        "clients": clients,
        "requests": count,
        "statuses": {str(code): sum(status == code for status, _ in answers) for code in {s for s, _ in answers}},
        "images_per_s": len(seconds) / taken_s,
        "p50_s": seconds[len(seconds) // 2],
        "p95_s": seconds[int(0.95 * (len(seconds) - 1))],
        "longest_s": max(seconds for _, seconds in answers),
    }


def memory(url: str, process: psutil.Process, count: int) -> dict[str, Any]:
    """MB resident over `count` requests of one step; growth from a quarter of them on."""
    points: list[tuple[int, float]] = []

    def look(done: int) -> None:
        points.append((done, process.memory_info().rss / 2**20))

    asyncio.run(load(url, 4, count, 1, max(1, count // 20), look))
    later = [megabytes for done, megabytes in points if done >= count // 4]
    return {"requests": count, "points_mb": points, "grown_mb": max(later) - later[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps, a few requests: does it run at all")
    parser.add_argument("--checkpoint", default="scenes")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--note", default="", help="what else the machine did, kept with the result")
    arguments = parser.parse_args()
    quick, checkpoint = arguments.quick, arguments.checkpoint
    steps, count = (2, 16) if quick else (None, 160)
    rows: list[dict[str, Any]] = []
    for turn in range(1 if quick else arguments.turns):
        rows.append({"what": "bare", "turn": turn, **apart(bare, checkpoint, steps, count)})
        with serving(checkpoint) as (url, process, ready_s):
            alone = asyncio.run(load(url, 1, count // 4, steps))
            rows.append({"what": "one client", "turn": turn, "ready_s": ready_s, **alone})
            rows.append({"what": "served", "turn": turn, **asyncio.run(load(url, CLIENTS, count, steps))})
            if turn == 0:
                rows.append({"what": "many", **asyncio.run(load(url, MANY, MANY, steps))})
                rows.append({"what": "memory", **memory(url, process, 40 if quick else 2000)})
        print(*rows[-3 if turn else -5 :], sep="\n", flush=True)

    def best(what: str, key: str, choose: Any) -> float:
        return choose(row[key] for row in rows if row["what"] == what)

    many, grown = (next(row for row in rows if row["what"] == what) for what in ("many", "memory"))
    lost = MANY - many["statuses"].get("200", 0) - many["statuses"].get("429", 0)
    most_s = 2 * (QUEUE + 1) / best("served", "images_per_s", max)
    summary = [
        judged(
            f"images a second, {CLIENTS} clients beside a bare loop",
            best("served", "images_per_s", max),
            best("bare", "images_per_s", max),
            "images/s",
            ">= 0.95",
        ),
        within(
            f"{CLIENTS} clients, p95",
            best("served", "p95_s", min),
            2 * CLIENTS / best("bare", "images_per_s", max),
            "s",
        ),
        within("one client, p50", best("one client", "p50_s", min), 0.5, "s"),
        within("ready after", best("one client", "ready_s", min), 15, "s"),
        within(f"grown over {grown['requests']} requests", max(grown["grown_mb"], 0.0), 32, "MB"),
        within(f"{MANY} clients: neither image nor 429", float(lost), 0.5, "requests"),
        within(f"{MANY} clients, longest answer", many["longest_s"], most_s, "s"),
    ]
    for row in summary:
        numbers = f"{row['ours']:>10.4g}{row['peer']:>10.4g} {row['unit']:<10}"
        print(f"{row['case']:<60}{numbers}{row['target']:>8} {row['met']}")
    if not quick:
        keep("serve_load", rows, summary, checkpoint=checkpoint, note=arguments.note)


if __name__ == "__main__":
    main()
