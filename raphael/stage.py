"""The Stage seam: what every step of the pipeline has in common.

A stage is `python -m <module>`: it reads params.yaml and its inputs, writes its outputs whole or not at all, writes
`reports/<stage>.json` whose counts add up, and exits non-zero with one clear line. Unfinished work lives in
`work/<stage>/<hash of its input>/`, outside the outputs (DVC deletes those before a stage runs), so that a killed stage
goes on where it stopped. Times and rates go to `work/timings/`, which nobody tracks: equal runs give equal reports.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raphael.config import Config, load_config
from raphael.strict import ConfigError

HASHED_WHOLE_BYTES = 64 << 20  # larger inputs are known by size and time of change: hashing terabytes would take hours
TERMINATED = 143  # the status of a process that SIGTERM ended


class StageError(Exception):
    """The stage cannot go on. The message is one line: what was got, what was expected, what to do."""


class Stage:
    """One run of one stage in the workspace `root` (the folder of params.yaml)."""

    def __init__(self, name: str, root: str | Path = "."):
        self.name = name
        self.root = Path(root).resolve()
        self.started_s = time.monotonic()
        self.timings: dict[str, Any] = {}

    def workdir(self, *inputs: Any) -> Path:
        """The folder for unfinished work on exactly these inputs; made if absent.

        inputs: paths (their content or, when large, size and time of change), and anything JSON can hold.
        Leftovers of other inputs are removed: nobody would come back for them.
        """
        digest = hashlib.sha256("\n".join(_fingerprint(item) for item in inputs).encode()).hexdigest()[:16]
        home = self.root / "work" / self.name
        path = home / digest
        path.mkdir(parents=True, exist_ok=True)
        for folder in ("reports", "work/progress", "work/timings"):
            for name in (self.root / folder).glob(f".{self.name}.json.*"):  # of a run killed while it wrote
                name.unlink(missing_ok=True)
        for other in home.iterdir():
            if other != path:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
        return path

    def publish(self, finished: Path, out: str | Path) -> Path:
        """Rename finished work (a file or folder on the same disk) to its place; the step that makes it count."""
        out = self.root / out
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir() and not out.is_symlink():
            shutil.rmtree(out)
        os.replace(finished, out)
        return out

    def report(self, total: int, kept: int, dropped: dict[str, int] | None = None, **facts: Any) -> None:
        """Write reports/<stage>.json. total = kept + everything dropped, each by exactly one reason."""
        dropped = {reason: count for reason, count in (dropped or {}).items() if count}
        lost = total - kept - sum(dropped.values())
        assert lost == 0, f"{self.name}: {total} in, {kept} kept, {dropped} dropped: {lost} unaccounted for"
        write_json(
            self.root / "reports" / f"{self.name}.json",
            {"stage": self.name, "total": total, "kept": kept, "dropped": dropped, **facts},
        )
        self.timings["seconds"] = round(time.monotonic() - self.started_s, 3)
        if self.timings["seconds"] > 0:
            self.timings["items_per_s"] = round(total / self.timings["seconds"], 3)
        write_json(self.root / "work" / "timings" / f"{self.name}.json", self.timings)
        detail = "".join(f", {count:,} {reason}" for reason, count in dropped.items())
        print(f"{self.name}: kept {kept:,} of {total:,}{detail} in {self.timings['seconds']:.1f} s", flush=True)

    def progress(self, total: int | None, unit: str, initial: int = 0) -> Progress:
        """A bar with rate and time left on standard error, and work/progress/<stage>.json for whoever watches."""
        return Progress(self, total, unit, initial)


class Progress:
    """`with stage.progress(total, "rows") as bar: bar.update(n)`."""

    def __init__(self, stage: Stage, total: int | None, unit: str, initial: int = 0):
        from tqdm import tqdm

        interval_s = 0.2 if sys.stderr.isatty() else 10.0  # a log file wants lines, not a film
        self.bar = tqdm(
            total=total, initial=initial, desc=stage.name, unit=f" {unit}", mininterval=interval_s, dynamic_ncols=True
        )
        self.file = stage.root / "work" / "progress" / f"{stage.name}.json"
        self.written_s = 0.0

    def update(self, count: int = 1, **shown: Any) -> None:
        if shown:
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update(count)
        if time.monotonic() - self.written_s > 1.0:
            self.written_s = time.monotonic()
            write_json(self.file, {"done": self.bar.n, "total": self.bar.total, "unit": self.bar.unit.strip()})

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        self.file.unlink(missing_ok=True)


def main(name: str, run: Callable[[Config, Stage], None], description: str, argv: list[str] | None = None) -> int:
    """The command line of a stage: `--params FILE`; the file's folder is the workspace. Returns the exit status."""
    parser = argparse.ArgumentParser(prog=name, description=description)
    about = "settings; its folder is the workspace (default: %(default)s)"
    parser.add_argument("--params", default="params.yaml", help=about)
    arguments = parser.parse_args(argv)
    with one_clear_line(name) as outcome:
        config = load_config(arguments.params)
        stage = Stage(name, Path(arguments.params).resolve().parent)
        os.chdir(stage.root)
        run(config, stage)
    return outcome.status


class _Outcome:
    status = 0


@contextlib.contextmanager
def one_clear_line(name: str) -> Iterator[_Outcome]:
    """Turn what a user can cause (settings, files, full disk, Ctrl-C) into one line on standard error and a status.

    SIGTERM becomes SystemExit, so that `finally` blocks run and children end. Programming errors keep their traceback.
    """
    outcome = _Outcome()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield outcome
    except (StageError, ConfigError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        outcome.status = 1
    except OSError as error:
        if os.environ.get("RAPHAEL_TRACEBACK"):
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"{name}: error: {error.strerror or error}{where} (RAPHAEL_TRACEBACK=1 shows where)", file=sys.stderr)
        outcome.status = 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on from here", file=sys.stderr)
        outcome.status = 130
    except SystemExit as end:
        if end.code == TERMINATED:
            print(f"{name}: terminated; the same command goes on from here", file=sys.stderr)
        raise


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: str | Path) -> Any:
    """Read JSON. Raises StageError, one line, where the file is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; run the stage that makes it (dvc repro)") from None
    except json.JSONDecodeError as error:
        raise StageError(f"{path}: not valid JSON ({error}); delete it and run the stage that makes it again") from None


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(item: Any) -> str:
    if not isinstance(item, Path):
        return json.dumps(item, sort_keys=True, default=str)
    if item.is_dir():
        files = sorted(path for path in item.rglob("*") if path.is_file())
        return "\n".join(f"{path.relative_to(item)} {_fingerprint(path)}" for path in files)
    stat = item.stat()
    return file_sha256(item) if stat.st_size <= HASHED_WHOLE_BYTES else f"{stat.st_size} {stat.st_mtime_ns}"
