"""The Stage seam: what every step of the pipeline has in common.

A stage is `python -m <module>`: it reads params.yaml and its inputs, writes its outputs atomically, writes
`reports/<stage>.json` whose counts add up, and exits non-zero with one clear line. Unfinished work lives in
`work/<stage>/<hash of its input>/`, outside the outputs (DVC deletes those before a stage runs), so that a killed stage
resumes where it stopped. Times and rates go to `work/timings/`, which nobody tracks: equal runs give equal reports.
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base import devices, stage_work
from raphael.base.code.stage_code import StageCode, code_of
from raphael.base.config.consent import trust_settings
from raphael.base.config.params import Config, load_config
from raphael.base.config.systems import DEFAULT
from raphael.base.cores.leftovers import sweep_semaphores
from raphael.base.cores.threads import wait_passively
from raphael.base.files import file_sha256, put, written_whole
from raphael.base.integrity import published
from raphael.base.strict import ConfigError

__all__ = [
    "HASHED_WHOLE_BYTES", "Progress", "Stage", "StageError", "TERMINATED", "device_of", "file_sha256", "harmless",
    "main", "of_a_stranger", "one_clear_line", "only_run", "read_json", "write_json",
]  # fmt: skip

if TYPE_CHECKING:
    import torch

HASHED_WHOLE_BYTES = 64 << 20  # larger inputs are known by size and time of change: hashing terabytes would take hours
LONGEST_LINE = 1600  # characters of an error
TERMINATED = 143  # the status of a process that SIGTERM ended


class StageError(Exception):
    """The stage cannot go on. The message is one line: what was got, what was expected, what to do."""


class Stage:
    """One run of one stage in the workspace `root` (the folder of params.yaml)."""

    def __init__(self, name: str, root: str | Path = ".", anew: bool = False, system: str = DEFAULT):
        """anew: begin in a folder of its own where other code left unfinished work. system: whose code it is."""
        self.name, self.anew, self.system = name, anew, system
        self.root = Path(root).resolve()
        self.started_s = time.monotonic()
        self.timings: dict[str, Any] = {}

    @property
    def code(self) -> StageCode | None:
        return code_of(self.name, self.system)

    def workdir(self, *inputs: Any) -> Path:
        """The folder for unfinished work on exactly these inputs, by code that gives the same; made if absent.

        inputs: paths (their content or, when large, size and time of change), and anything JSON can hold.
        Leftovers of other inputs are removed, but for checkpoints (raphael/base/stage_work.py). Raises StageError where
        unfinished work is there that other code made, and nobody said whether it still counts, and where an input is
        not what was published (raphael/base/integrity/published.py).
        """
        self.expect_whole(*(item for item in inputs if isinstance(item, Path)))
        digest = hashlib.sha256("\n".join(_fingerprint(item) for item in inputs).encode()).hexdigest()
        home = self.root / "work" / self.name
        try:
            found = stage_work.find(home, digest, self.code, self.anew)
        except stage_work.OtherCode as error:
            raise StageError(str(error)) from None
        for other in found.others:
            print(f"{self.name}: work/{self.name}/{other.name} was made by other code and is left as it is", flush=True)
        for folder in ("reports", "work/progress", "work/timings"):
            for name in (self.root / folder).glob(f".{self.name}.json.*"):  # of a run killed while it wrote
                name.unlink(missing_ok=True)
        for line in stage_work.sweep(home, found, digest):
            print(f"{self.name}: {line}", flush=True)
        return found.path

    def expect_whole(self, *inputs: Path) -> None:
        """Raises StageError where a file, or one in a folder, is not what the stage that made it published."""
        if damaged := published.faults(self.root, inputs, HASHED_WHOLE_BYTES):
            raise StageError(damaged[0])

    def publish(self, finished: Path, out: str | Path, known: Mapping[str, str] | None = None) -> Path:
        """Rename finished work (a file or folder on the same disk) to its place; the step that makes it count.

        known: xxh3 of its files by name, where they were hashed when they were written.
        """
        out = self.root / out
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir() and not out.is_symlink():
            shutil.rmtree(out)
        put(finished, out)
        published.note(self.root, out, known)
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
        if self.code is not None:
            sha256 = file_sha256(self.root / "reports" / f"{self.name}.json")
            made_by = {"version": self.code.version, "code": self.code.digest, "report_sha256": sha256}
            self.timings["made_by"] = made_by | ({"system": self.system} if self.system != DEFAULT else {})
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
            state = {"done": self.bar.n, "total": self.bar.total, "unit": self.bar.unit.strip()}
            write_json(self.file, state, lasting=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        self.file.unlink(missing_ok=True)


def main(
    name: str,
    run: Callable[[Config, Stage], None],
    description: str,
    argv: list[str] | None = None,
    *,
    device: Callable[[Config], torch.device | None] | None = None,
) -> int:
    """The command line of a stage: `--params FILE`; the file's folder is the workspace. Returns the exit status.

    device: of a stage that computes with torch, where it will, by the settings; None where these ask for nothing to be
    computed. Such a stage has --device, and its first line says the device. A stage without imports no torch.
    """
    parser = argparse.ArgumentParser(prog=name, description=description)
    about = "settings; its folder is the workspace (default: %(default)s)"
    parser.add_argument("--params", default="params.yaml", help=about)
    about = "begin in a folder of its own where other code left unfinished work, which stays"
    parser.add_argument("--anew", action="store_true", help=about)
    if device is not None:
        devices.add_option(parser, None, "instead of what the settings say under `device`")
    arguments = parser.parse_args(argv)
    wait_passively()
    with one_clear_line(name) as outcome:
        config = load_config(arguments.params)
        trust_settings(config)
        if device is not None:
            config = replace(config, device=arguments.device or config.device)
            if (chosen := device(config)) is not None:
                print(f"{name}: device {devices.describe(chosen)}", flush=True)
        stage = Stage(name, Path(arguments.params).resolve().parent, arguments.anew, config.model.system)
        if stage.code is not None and not stage.code.declared:
            print(stage.code.line(), flush=True)
        os.chdir(stage.root)
        with only_run(name, stage.root):
            sweep_semaphores()
            run(config, stage)
    return outcome.status


@contextlib.contextmanager
def only_run(name: str, root: Path) -> Iterator[None]:
    """Keep other runs of the stage out of the workspace. Raises StageError where one is going on."""
    try:
        with stage_work.only_run(root / "work" / "locks" / name, name):
            yield
    except stage_work.OtherRun as error:
        raise StageError(str(error)) from None


def device_of(config: Config) -> torch.device:
    """What a stage computes on by its settings. Raises ConfigError."""
    return devices.resolve(config.device)


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
        print(f"{name}: error: {harmless(str(error))}", file=sys.stderr)
        outcome.status = 1
    except OSError as error:
        if os.environ.get("RAPHAEL_TRACEBACK"):
            raise
        where = f": {error.filename}" if error.filename else ""
        text = harmless(f"{error.strerror or error}{where}")
        print(f"{name}: error: {text} (RAPHAEL_TRACEBACK=1 shows where)", file=sys.stderr)
        outcome.status = 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command resumes from here", file=sys.stderr)
        outcome.status = 130
    except SystemExit as end:
        if end.code == TERMINATED:
            print(f"{name}: terminated; the same command resumes from here", file=sys.stderr)
        raise


@contextlib.contextmanager
def of_a_stranger(where: str | Path) -> Iterator[None]:
    """Around the reading of a file whose maker decided every key, type and number in it: what does not fit is one line.

    A list where a mapping belongs, a key that is gone, a side of 10^400: no reader asks for each. Raises StageError in
    place of the errors that such things end in; with RAPHAEL_TRACEBACK=1 these themselves.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError, *_damaged()) as error:
        if os.environ.get("RAPHAEL_TRACEBACK"):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise StageError(f"{where}: its files do not fit ({reason}); RAPHAEL_TRACEBACK=1 shows where") from error


def _damaged() -> tuple[type[Exception], ...]:
    library = sys.modules.get("safetensors")
    return (library.SafetensorError,) if library else ()


def harmless(text: str) -> str:
    """A message in one line that says nothing else to a terminal: names in it may be a stranger's. Of a very long one,
    its beginning and its end."""
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE * 3 // 4]} ... {text[-LONGEST_LINE // 4 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def write_json(path: Path, data: Any, lasting: bool = True) -> None:
    """Write JSON atomically. lasting: whether it should survive a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, lasting) as temporary:
        temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read JSON. Raises StageError, one line, where the file is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; run the stage that makes it (dvc repro)") from None
    except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets, a thousand deep
        raise StageError(f"{path}: not valid JSON ({error}); delete it and run the stage that makes it again") from None


def _fingerprint(item: Any) -> str:
    if not isinstance(item, Path):
        return json.dumps(item, sort_keys=True, default=str)
    if item.is_dir():
        files = sorted(path for path in item.rglob("*") if path.is_file())
        return "\n".join(f"{path.relative_to(item)} {_fingerprint(path)}" for path in files)
    stat = item.stat()
    return file_sha256(item) if stat.st_size <= HASHED_WHOLE_BYTES else f"{stat.st_size} {stat.st_mtime_ns}"
