"""What the engine costs: `encode` in its own process, in two processes, in two actors of a Ray of this machine.

20,000 JPEGs of 512 x 512 px, 40 chunks; each run in a process of its own, its records compared with the first run's.
Seconds are of the tasks, from the first worker's being ready until the last is done; the start (a cluster, imports)
stands apart. Processor seconds are of all processes. The machine's load before each run, a mean over a minute, is kept:
on a machine with other work, seconds by the clock say little.

    python benchmarks/engine.py [--rows 20000] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from _machine import judged, keep
from encode_scale import make

SIDE_PX = 512
RUNS = (("local", 1), ("local", 2), ("ray", 2))


def encode(root: Path, engine: str, workers: int) -> dict[str, Any]:
    """Run the stage; what it took. In a process of its own."""
    import raphael.encoders.autoencoder  # noqa: F401  seconds of imports are no work on pictures
    import raphael.encoders.text  # noqa: F401
    from data_pipeline.encode import stage
    from raphael.base.config.data import PipelineConfig
    from raphael.base.config.params import load_config
    from raphael.base.stage import Stage

    os.chdir(root)
    config = replace(load_config(root / "params.yaml"), pipeline=PipelineConfig(engine, workers=workers))
    began_s, run, kept = time.perf_counter(), Stage("encode", root), {}
    whole = stage._encode

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        found = whole(*arguments)
        kept["tasks_s"] = time.perf_counter() - began
        return found

    stage._encode = timed
    stage.run(config, run)
    whole_s = time.perf_counter() - began_s
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    ran = run.timings["engine"]
    return {
        "engine": engine,
        "workers": workers,
        "starting_s": ran["starting_s"],
        "tasks_s": kept["tasks_s"] - ran["starting_s"],
        "whole_s": whole_s,
        "cpu_s": sum(one.ru_utime + one.ru_stime for one in used),
        "digest": stage.records_digest(root / "data/records"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--quick", action="store_true", help="600 rows, without Ray, nothing kept")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        root, engine, workers = arguments.run
        print(json.dumps(encode(Path(root), engine, int(workers))))
        return
    rows, count = [], 600 if arguments.quick else arguments.rows
    print("| engine | workers | start s | tasks s | CPU s | load |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), count, SIDE_PX)
        for engine, workers in RUNS[:2] if arguments.quick else RUNS:
            load = os.getloadavg()[0]
            command = [sys.executable, __file__, "--run", name, engine, str(workers)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row = json.loads(done.stdout.splitlines()[-1]) | {"load": round(load, 2)}
            rows.append(row)
            assert row["digest"] == rows[0]["digest"], row
            shutil.rmtree(Path(name) / "data/records")
            seconds = [f"{row[part]:.1f}" for part in ("starting_s", "tasks_s", "cpu_s")]
            print("|", " | ".join([engine, str(workers), *seconds, f"{load:.1f}"]), "|", flush=True)
    if not arguments.quick:
        alone, processes, ray = rows
        two = "two processes; peer: one"
        summary = [
            judged(
                "encode, Ray's two actors; peer: two processes", ray["tasks_s"], processes["tasks_s"], "s", "<= 1.053"
            ),
            judged(f"encode, {two}", processes["tasks_s"], alone["tasks_s"], "s", "<= 0.556"),
            judged(f"encode, {two}, processor time", processes["cpu_s"], alone["cpu_s"], "CPU s"),
        ]
        keep("engine", rows, summary, rows=count, side_px=SIDE_PX)


if __name__ == "__main__":
    main()
