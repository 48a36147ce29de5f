"""Which version of its code a stage has, and whether the code changed since that was said.

raphael/base/code/stage_code.json holds for every stage a version number, which DVC and the folders of unfinished work
see, and a digest of the code that it uses (raphael/base/code/graph.py). While the two differ, `make lint` fails until
someone says

    python -m raphael.base.code.stage_code changed STAGE --results     what comes out changes: the next number
    python -m raphael.base.code.stage_code changed STAGE --same        it does not: what was computed stays

    python -m raphael.base.code.stage_code check       what is not said yet, and results of code that nobody recorded
    python -m raphael.base.code.stage_code refresh     new stages, and modules that were moved or renamed without a
    change

"same" in the file lists former digests of the same number: code that gave the same. "also" names modules that a stage
uses out of sight of its imports; "left_out" those that decide how a stage runs and not what comes out, each with why.

A stage that asks the system (raphael/systems) has an entry for each, STAGE@SYSTEM, with that system's modules among
"also": dvc.yaml says under `meta`, `system`, which. Here and in messages the default system's is STAGE alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import raphael
from raphael.base.code.graph import CodeGraph
from raphael.base.config.systems import DEFAULT
from raphael.base.files import file_sha256
from raphael.base.pipeline import read_pipeline
from raphael.base.strict import ConfigError, read_yaml

PROJECT = Path(raphael.__file__).resolve().parents[1]
FILE = Path(__file__).resolve().with_name("stage_code.json").relative_to(PROJECT)
COMMAND = f"python -m {__name__ if __name__ != '__main__' else __spec__.name}"
SHOWN_FILES = 8
SYSTEMS, SYSTEM = "raphael.systems", "system"  # the package of systems, and the module that each of them has


@dataclass(frozen=True)
class StageCode:
    """A stage's code as it is now, beside what was recorded. files: digests by module or file of data."""

    stage: str
    version: int
    digest: str
    files: dict[str, str]
    known: frozenset[str]  # digests of this version
    recorded: dict[str, str]  # the files of the newest of them
    system: str = DEFAULT

    @property
    def label(self) -> str:
        return self.stage if self.system == DEFAULT else f"{self.stage}@{self.system}"

    @property
    def declared(self) -> bool:
        return self.digest in self.known

    def ways(self) -> str:
        return (
            f"{COMMAND} changed {self.label} --same (results stay the same: what is computed is kept) or --results "
            f"(they change: version {self.version + 1})"
        )

    def difference(self, before: dict[str, str]) -> str:
        """Which files differ from those digests, as a short list."""
        names = sorted(name for name in {*before, *self.files} if before.get(name) != self.files.get(name))
        shown = [name if "/" in name else f"{name.replace('.', '/')}.py" for name in names]
        more = f" and {len(shown) - SHOWN_FILES} more" if len(shown) > SHOWN_FILES else ""
        return ", ".join(shown[:SHOWN_FILES]) + more or "what a name in it means"

    def line(self) -> str:
        """What a person should read while the change is not declared."""
        return (
            f"{self.label}: the code of this stage changed since version {self.version} was recorded: "
            f"{self.difference(self.recorded)}; say what that means: {self.ways()}"
        )


class Table:
    """stage_code.json of the project in the folder `root`. Raises ConfigError where it is damaged."""

    def __init__(self, root: Path = PROJECT):
        self.root, self.file = root, root / FILE
        try:
            self.data = json.loads(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{self.file}: no such file; it belongs to the code, restore it from git") from None
        except ValueError as error:
            raise ConfigError(
                f"{self.file}: not valid JSON ({error}); after a merge take either side, then: {COMMAND} refresh"
            ) from None
        self.stages: dict[str, dict[str, Any]] = self.data["stages"]
        # the list of systems says which there are; whose code a stage uses, its entry says
        self.graph = CodeGraph(root, [*self.data["left_out"], SYSTEMS])
        self.systems = systems_in(root)

    def key(self, stage: str, system: str = DEFAULT) -> str:
        """The name of a stage's entry; "" where it has none. stage: also STAGE@SYSTEM."""
        return next((name for name in (f"{stage}@{system}", stage) if name in self.stages), "")

    def code(self, stage: str, system: str = DEFAULT) -> StageCode | None:
        """None for a stage that has no entry. Raises ConfigError where its module is gone."""
        if not (key := self.key(stage, system)):
            return None
        entry = self.stages[key]
        stage, _, system = key.partition("@")
        try:
            others = [f"{SYSTEMS.replace('.', '/')}/{name}" for name in self.systems if system and name != system]
            use = self.graph.use(entry["module"], entry.get("also", ()), others)
        except (LookupError, SyntaxError) as error:
            raise ConfigError(f"{FILE}: stage {stage}: {error}; after moving modules: {COMMAND} refresh") from None
        known = frozenset([entry["code"], *entry.get("same", ())])
        return StageCode(stage, entry["version"], use.digest, use.files, known, entry["files"], system or DEFAULT)

    def record(self, stage: str, results_change: bool) -> str:
        """Say what the present code of a stage means. Returns a line."""
        code, entry = self.code(stage), self.stages[self.key(stage)]
        if results_change:
            entry |= {"version": code.version + 1, "code": code.digest, "files": code.files}
            entry.pop("same", None)
            return f"{stage}: version {code.version + 1}; what earlier code computed is out of date, and stays in work/"
        before = [digest for digest in (entry["code"], *entry.get("same", ())) if digest != code.digest]
        entry |= {"code": code.digest, "files": code.files, **({"same": before} if before else {})}
        return f"{stage}: still version {code.version}; what was computed is kept"

    def refresh(self, entries: dict[str, tuple[str, list[str]]]) -> list[str]:
        """Take over the entries that dvc.yaml asks for and their modules; record new names of modules where the code is
        the same. entries: of `entries_of`.

        Returns lines on what is still to be said.
        """
        lines = []
        for stage in [stage for stage in self.stages if f"{stage}@{DEFAULT}" in entries]:
            self.stages[f"{stage}@{DEFAULT}"] = self.stages.pop(stage)  # it asks the system now, and did the default's
        for stage in [stage for stage in self.stages if stage not in entries]:
            del self.stages[stage]
        for stage, (module, own) in entries.items():
            new = stage not in self.stages
            entry = self.stages.setdefault(stage, {"module": module, "version": 1, "code": "", "files": {}})
            kept = [name for name in entry.get("also", ()) if not name.startswith(f"{SYSTEMS}.")]
            entry |= {"module": module} | ({"also": [*kept, *own]} if kept or own else {})
            code = self.code(stage)
            if new or code.declared:
                entry |= {"files": code.files, "code": code.digest if new else entry["code"]}
            else:
                lines.append(code.line())
        self.data["stages"] = self.stages = {stage: self.stages[stage] for stage in entries}
        return lines

    def write(self) -> None:
        temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.file)


@functools.cache
def code_of(stage: str, system: str = DEFAULT) -> StageCode | None:
    """The code of a stage of the project that this process runs; None for one without an entry (a test's, say)."""
    return Table().code(stage, system)


def undeclared(root: Path, stages: list[str], system: str = DEFAULT) -> list[str]:
    """A line on each of these stages whose code changed without a word. root: a workspace, whose own copy counts."""
    table = Table(root if (root / FILE).is_file() else PROJECT)
    codes = [table.code(stage, system) for stage in stages]
    return [code.line() for code in codes if code is not None and not code.declared]


def programs_of(root: Path) -> dict[str, str]:
    """The module of every stage of dvc.yaml. Raises ConfigError for a command that is not `python -m MODULE`."""
    found = {}
    for stage, entry in read_pipeline(root).items():
        command = entry.command.split()
        if command[:2] != ["python", "-m"]:
            raise ConfigError(f"dvc.yaml: stage {stage}: got cmd {entry.command!r}, expected python -m MODULE")
        found[stage] = command[2]
    return found


def systems_in(root: Path) -> list[str]:
    """The systems of the project in `root`, the default one first. Nothing is imported."""
    found = {file.parent.name for file in root.joinpath(*SYSTEMS.split(".")).glob(f"*/{SYSTEM}.py")}
    return sorted(found, key=lambda name: (name != DEFAULT, name))


def entries_of(root: Path) -> dict[str, tuple[str, list[str]]]:
    """The entries that dvc.yaml asks for: name -> (module of the stage, modules of the system)."""
    found, pipeline = {}, read_pipeline(root)
    for stage, module in programs_of(root).items():
        asked = pipeline[stage].meta.get(SYSTEM)
        if asked is None:
            found[stage] = (module, [])
            continue
        for name in systems_in(root):
            modules = [f"{SYSTEMS}.{name}.{part}" for part in (SYSTEM, *asked)]
            there = [own for own in modules if root.joinpath(*own.split(".")).with_suffix(".py").is_file()]
            found[f"{stage}@{name}"] = (module, there)
    return found


def faults(root: Path, work: Path) -> list[str]:
    """What is wrong with the code's versions in the project `root` and with the results in the workspace `work`."""
    table, found = Table(root), []
    pipeline = read_yaml(root / "dvc.yaml")["stages"]
    entries = entries_of(root)
    for stage, (module, own) in entries.items():
        entry = table.stages.get(stage, {})
        if entry.get("module") != module or not set(own) <= set(entry.get("also", ())):
            found.append(
                f"{stage}: {FILE} has no entry for it as {' with '.join([module, *own])}; run {COMMAND} refresh"
            )
    for stage in programs_of(root):
        key = f"stages.{stage}@${{model.system}}.version" if SYSTEM in pipeline[stage].get("meta", {}) else ""
        key = key or f"stages.{stage}.version"
        if {FILE.as_posix(): [key]} not in pipeline[stage].get("params", []):
            found.append(f"{stage}: dvc.yaml does not see its version; add to its params: {FILE}: [{key}]")
    found += [
        f"{stage}: {FILE} has an entry for it, dvc.yaml has not" for stage in table.stages if stage not in entries
    ]
    used = [*table.data["left_out"], *(name for entry in table.stages.values() for name in entry.get("also", ()))]
    for name in used:
        if not (table.graph.file(name) or (root / name).exists()):
            found.append(f"{FILE}: {name}: no such module or file; correct the name")
    if found:
        return found
    for stage in table.stages:
        code = table.code(stage)
        if not code.declared:
            found.append(code.line())
        found += _result_fault(code, work)
    return found


def _result_fault(code: StageCode, work: Path) -> list[str]:
    """A line on a finished result that was made by code which is neither recorded nor the present one."""
    report, timings = work / "reports" / f"{code.stage}.json", work / "work" / "timings" / f"{code.stage}.json"
    try:
        made = json.loads(timings.read_text(encoding="utf-8"))["made_by"]
        untouched = file_sha256(report) == made["report_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if made.get("system", DEFAULT) != code.system:
        return []
    if not untouched or made["code"] in {*code.known, code.digest} or made["version"] != code.version:
        return []
    return [
        f"{code.label}: its result was made by code that is not recorded as version {code.version}; run the stage "
        f"again: dvc repro --force --single-item {code.stage}"
    ]


def main(argv: list[str] | None = None, root: Path = PROJECT) -> int:
    """The command line. Returns 0 where nothing is left to say."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="is everything said? (make lint)")
    commands.add_parser("refresh", help="take over new stages and new names of modules")
    changed = commands.add_parser("changed", help="say what a change of code means")
    changed.add_argument("stages", nargs="+", metavar="STAGE", help="stages of dvc.yaml, or all: those that changed")
    meaning = changed.add_mutually_exclusive_group(required=True)
    meaning.add_argument("--results", action="store_true", help="what comes out changes: the next number")
    meaning.add_argument("--same", action="store_true", help="it does not: what was computed stays")
    arguments = parser.parse_args(argv)
    try:
        return _answer(arguments, root)
    except ConfigError as error:
        print(f"stage_code: error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"stage_code: error: {error.strerror}: {error.filename}", file=sys.stderr)
    return 1


def _answer(arguments: argparse.Namespace, root: Path) -> int:
    if arguments.command == "check":
        lines = faults(root, Path.cwd())
        print("\n".join(lines), end="\n" if lines else "", file=sys.stderr)
        return 1 if lines else 0
    table = Table(root)
    if arguments.command == "refresh":
        lines = table.refresh(entries_of(root))
    else:
        labels = [table.code(stage).label for stage in table.stages]
        if unknown := {stage for stage in arguments.stages if stage != "all" and not table.key(stage)}:
            raise ConfigError(f"got the stage {sorted(unknown)[0]}, expected all, or some of {', '.join(labels)}")
        wanted = labels if "all" in arguments.stages else arguments.stages
        changed = [stage for stage in wanted if "all" not in arguments.stages or not table.code(stage).declared]
        for stage in changed:
            print(table.record(stage, arguments.results))
        lines = []
    table.write()
    print("\n".join(lines), end="\n" if lines else "", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
