"""Do the tests see a changed line? Each mutant is one small wrong change of the code; the tests beside it have to fail.

The mutants are in benchmarks/mutants.txt. Every group of tests is run without a mutant first. torch and pyarrow are
imported once, here; each run is a fork in a copy of the tree.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

LIMIT_S = 300  # a mutant that makes a test run for ever is killed, too
OURS = ("raphael", "data_pipeline", "flows", "benchmarks", "_machine")
DESELECTED = "not slow and not gpu and not soak"

TESTS = {  # by the file's beginning, the longest that fits: the tests beside it
    "raphael/net/moe/gate.py": "tests/net/moe/test_moe.py tests/objectives/test_denoising.py",
    "raphael/net/moe/mixtures.py": "tests/net/moe/test_moe.py",
    "raphael/net/moe/edge.py": "tests/net/moe/test_edge.py",
    "raphael/net/attention.py": "tests/net/test_condition.py tests/net/test_unet.py",
    "raphael/diffusion/schedule.py": "tests/diffusion/test_schedule.py",
    "raphael/diffusion/prediction.py": "tests/diffusion",
    "raphael/diffusion/guidance.py": "tests/diffusion",
    "raphael/objectives": "tests/objectives/test_denoising.py",
    "raphael/train/batches.py": "tests/train/test_batches.py",
    "raphael/train/heldout.py": "tests/train/test_heldout.py",
    "raphael/train/state.py": "tests/train/test_heldout.py tests/train/test_loop.py",
    "raphael/train/optim/ema.py": "tests/train/test_heldout.py tests/train/optim",
    "raphael/train/faults.py": "tests/train/test_faults.py",
    "raphael/base/randomness.py": "tests/base/test_randomness.py",
    "raphael/base/manifest.py": "tests/base/test_files.py tests/base/test_parts.py tests/base/test_records.py",
    "raphael/base/files.py": "tests/base/test_files.py",
    "raphael/base/integrity": "tests/base/integrity",
    "raphael/base/cores/leftovers.py": "tests/base/test_leftovers.py",
    "raphael/base/checkpoint": "tests/base/test_parts.py tests/base/test_checkpoint.py",
    "data_pipeline/common/rules.py": "tests/data_pipeline/filter tests/data_pipeline/select",
    "data_pipeline/common/hashes": "tests/data_pipeline/filter tests/data_pipeline/download/test_hash_lists.py",
    "data_pipeline/common/tables.py": "tests/data_pipeline/common/test_tables.py tests/data_pipeline/test_bit_rot.py",
    "data_pipeline/filter": "tests/data_pipeline/filter",
    "data_pipeline/encode/buckets.py": "tests/data_pipeline/encode/test_buckets.py",
    "data_pipeline/encode/fields.py": "tests/data_pipeline/encode/test_fields.py",
    "data_pipeline/select": "tests/data_pipeline/select",
    "data_pipeline/gateway": "tests/data_pipeline/gateway",
    "data_pipeline/download/shards.py": "tests/data_pipeline/download/test_shards.py",
}


@dataclass(frozen=True)
class Mutant:
    file: str
    before: str
    after: str

    @property
    def tests(self) -> list[str]:
        return TESTS[max((start for start in TESTS if self.file.startswith(start)), key=len)].split()

    @property
    def line(self) -> str:
        return f"{self.file}: {self.before} -> {self.after}"

    def apply(self, tree: Path) -> None:
        path = tree / self.file
        text = path.read_text(encoding="utf-8")
        assert text.count(self.before) == 1, f"{self.file}: {text.count(self.before)} times {self.before!r}"
        path.write_text(text.replace(self.before, self.after), encoding="utf-8")


def table(text: str) -> list[Mutant]:
    """Lines of mutants.txt."""
    found, file = [], ""
    for line in (line for line in text.splitlines() if line.strip() and not line.startswith("#")):
        head, _, change = line.partition(" | ")
        file = head.strip() or file
        before, _, after = change.partition(" -> ")
        found.append(Mutant(file, before, after.replace("NOTHING", "")))
    return found


def copy_of_tree(home: Path) -> Path:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        target = home / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, target)
    return home


def fails(tree: Path, tests: list[str]) -> tuple[bool, float]:
    """Whether the tests fail in that tree, and the seconds that they took."""
    began_s = time.monotonic()
    if not (child := os.fork()):
        os.setsid()
        os.chdir(tree)
        sys.path[:] = [str(tree), str(tree / "tests"), *[path for path in sys.path if path != str(PROJECT)]]
        os.environ["PYTHONPATH"] = str(tree)
        for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
            del sys.modules[name]  # read before the fork, from where no mutant is
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            import pytest

            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", DESELECTED, *tests])
        os._exit(int(status))
    while time.monotonic() - began_s < LIMIT_S:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) != 0, time.monotonic() - began_s
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True, time.monotonic() - began_s


def survey(chosen: list[Mutant]) -> list[Mutant] | None:
    """Those that live; None where tests fail without any mutant."""
    for heavy in ("torch", "pyarrow.parquet", "PIL.Image", "yaml", "pytest"):
        __import__(heavy)
    alive = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as home:
        tree = copy_of_tree(Path(home) / "tree")
        for tests in sorted({" ".join(mutant.tests) for mutant in chosen}):
            failed, seconds = fails(tree, tests.split())
            print(f"without a mutant: {tests}: {'FAILS' if failed else 'passes'} in {seconds:.0f} s", flush=True)
            if failed:
                return None
        for number, mutant in enumerate(chosen, 1):
            whole = (tree / mutant.file).read_bytes()
            mutant.apply(tree)
            killed, seconds = fails(tree, mutant.tests)
            (tree / mutant.file).write_bytes(whole)
            alive += [] if killed else [mutant]
            said = f"{number}/{len(chosen)} {'killed' if killed else 'ALIVE'} in {seconds:.0f} s"
            print(f"{said}: {mutant.line}", flush=True)
    return alive


def main() -> int:
    from benchmarks._machine import judged, keep

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutants whose file or change has one of these")
    parser.add_argument("--quick", action="store_true", help="one mutant of a quick test: does it run at all")
    arguments = parser.parse_args()
    words = ["data_pipeline/encode/buckets.py"] if arguments.quick else arguments.words
    everyone = table((PROJECT / "benchmarks/mutants.txt").read_text(encoding="utf-8"))
    chosen = [each for each in everyone if not words or any(word in each.line for word in words)]
    alive = survey(chosen)
    if alive is None:
        return 1
    killed = len(chosen) - len(alive)
    print(f"{killed} of {len(chosen)} mutants killed ({killed / max(len(chosen), 1):.0%})")
    if not words:
        rows = [{"mutant": each.line, "killed": each not in alive} for each in chosen]
        keep("mutants", rows, [judged("mutants killed, all", killed, len(chosen), "mutants", ">= 0.95")])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
