"""The rules of the house that a program can check, each failure with file, line and rule."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
ROOMS = ("raphael", "data_pipeline", "flows", "tests", "benchmarks")
STANDARD = set(sys.stdlib_module_names)
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_LOOP, MOST_ARGUMENTS = 400, 60, 150, 8
MOST_MODULES = 12  # of a folder; __init__ and __main__ are not counted
# Rooms of raphael from the ground up; a room imports its own height and what is below. Doors (__main__) are free.
FLOORS = {
    "base": 0,
    "pretrained": 1,
    "net": 1,
    "encoders": 2,
    "diffusion": 2,
    "objectives": 3,
    "summary": 3,
    "train": 4,
    "systems": 5,
    "generate": 6,
    "evaluate": 7,
    "edit": 7,
    "cli": 8,
    "serve": 8,
}
PURE = ("raphael/net/", "raphael/diffusion/", "raphael/objectives/", "raphael/train/loop.py")
PURE_MAY = {"torch", "numpy", "einops"}
LONG_BY_CONTRACT = {("raphael/systems/pipeline.py", "__call__")}  # diffusers' argument names
ONLY_HERE = {
    "mlflow": (
        "raphael/base/tracking/tracker.py",
        "raphael/base/tracking/registry.py",
        "flows/serve/guard.py",  # starts MLflow's server
    ),
    "ray": (
        "raphael/base/ray_cluster.py",
        "raphael/train/distributed/ray_trainer.py",
        "raphael/evaluate/features/workers.py",
        "data_pipeline/engine/on_ray.py",
        "raphael/serve/replicas.py",
    ),
}
MAY_NOT = {  # what lies in the left may not import what begins with one of the right
    "raphael/": ("data_pipeline", "flows"),
    "data_pipeline/": ("flows",),
    "raphael/diffusion/": ("raphael.encoders",),
    "raphael/encoders/": ("raphael.diffusion",),
    "raphael/objectives/": ("raphael.encoders",),
}
SYSTEMS = {file.parent.name for file in (PROJECT / "raphael" / "systems").glob("*/system.py")}
STUDIES = {"ablation", "sweep", "systems"}  # rooms of flows; what they share lies in flows/arms
SHARED = {
    "common",
    "engine",
    "gateway",
    "local_images",
}  # rooms of data_pipeline that every stage may import; tools/ may import the stages
LATE = {"torch", "cv2", "pyarrow", "pandas", "diffusers", "transformers", "open_clip", "ray", "mlflow", "matplotlib"}


def modules(*rooms: str) -> list[Path]:
    return [file for room in rooms for file in sorted((PROJECT / room).rglob("*.py"))]


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


def is_module(name: str) -> bool:
    base = PROJECT.joinpath(*name.split("."))
    return base.with_suffix(".py").is_file() or (base / "__main__.py").is_file()


def imports(tree: ast.Module, file: Path) -> Iterator[tuple[int, str]]:
    """Every import, at the top, inside functions and under TYPE_CHECKING, and names of modules in strings: what
    `python -m` and importlib are given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = file.relative_to(PROJECT).with_suffix("").parts[: -node.level]
                base = ".".join([*home, base]).rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"(raphael|data_pipeline|flows)(\.\w+)+", node.value) and is_module(node.value):
                yield node.lineno, node.value


def graph() -> dict[str, set[str]]:
    """module -> modules of ours that it imports."""
    known = {name_of(file): file for file in modules("raphael", "data_pipeline", "flows")}

    def nearest(name: str) -> str:
        while name and name not in known:
            name = name.rpartition(".")[0]
        return name

    found = {}
    for name, file in known.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found[name] = {nearest(used) for _, used in imports(tree, file)} - {name, ""}
    return found


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def import_faults(file: Path) -> Iterator[str]:
    path = file.relative_to(PROJECT).as_posix()
    door = file.name == "__main__.py"
    for line, name in imports(ast.parse(file.read_text(encoding="utf-8")), file):
        top = name.split(".")[0]
        where = f"{path}:{line}: imports {name}"
        for room, banned in MAY_NOT.items():
            if path.startswith(room) and any(under(name, package) for package in banned):
                yield f"{where}: imports run one way, {room} may not import {', '.join(banned)}"
        if not door and (fault := floor_fault(path, name)):
            yield f"{where}: {fault}"
        if path.startswith(PURE):
            ours = top == "raphael" and name.split(".")[1] in ("base", "net", "diffusion", "objectives", "train")
            if top not in PURE_MAY | STANDARD and not ours:
                yield f"{where}: here only {', '.join(sorted(PURE_MAY))}, the standard library and the ground floor"
        if top == "prefect" and not path.startswith(("flows/", "tests/")):
            yield f"{where}: only flows/ knows Prefect"
        if top in ONLY_HERE and not path.startswith(("tests/", "benchmarks/")) and path not in ONLY_HERE[top]:
            yield f"{where}: the only import of {top} is in {' and '.join(ONLY_HERE[top])}"


def names_system(name: list[str]) -> bool:
    return name[:2] == ["raphael", "systems"] and len(name) > 2 and name[2] in SYSTEMS


def floor_fault(path: str, name: str) -> str:
    """What is wrong with a module of ours that imports `name`: upwards, sideways, or a layer that names a system."""
    here, there = path.split("/"), name.split(".")
    if here[0] == there[0] == "raphael" and len(here) > 2 and len(there) > 1 and there[1] in FLOORS:
        if FLOORS[here[1]] < FLOORS[there[1]]:
            return f"raphael/{here[1]} stands below raphael/{there[1]}"
        if here[1] == there[1] == "systems" and names_system(there) and here[2] != there[2]:
            both = here[2] in SYSTEMS
            return "a system never imports another" if both else "what systems share never names one"
    if names_system(there) and here[0] in ("raphael", "data_pipeline", "flows") and here[1] != "systems":
        return "a layer never names a system"
    if here[0] == there[0] == "data_pipeline" and len(here) > 2 and len(there) > 1:
        stage, other = here[1], there[1]
        if stage != other and stage != "tools" and other not in SHARED:
            return f"a stage never imports another: what {stage} and {other} share belongs to data_pipeline/common"
        if stage in SHARED and other not in SHARED:
            return f"data_pipeline/{stage} stands below the stages"
    if here[0] == there[0] == "flows" and len(here) > 2 and here[1] != there[1] and {here[1], there[1]} <= STUDIES:
        return "a study never imports another"
    return ""


def size_faults(file: Path) -> Iterator[str]:
    path = file.relative_to(PROJECT).as_posix()
    text = file.read_text(encoding="utf-8")
    if (lines := len(text.splitlines())) > LONGEST_FILE:
        yield f"{path}:{lines}: {lines} lines, a file has up to {LONGEST_FILE}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            longest = LONGEST_LOOP if path == "raphael/train/loop.py" and node.name == "train" else LONGEST_FUNCTION
            arguments = [a for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs if a.arg != "self"]
            if length > longest:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines, a function has up to {longest}"
            if len(arguments) > MOST_ARGUMENTS and (path, node.name) not in LONG_BY_CONTRACT:
                yield f"{path}:{node.lineno}: {node.name} has {len(arguments)} arguments, at most {MOST_ARGUMENTS}"


def tracked_texts() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for path in listed.stdout.split("\n"):
        file = PROJECT / path
        if path and file.suffix in {".py", ".yaml", ".toml", ".md", ".html", ".lock", ""} and file.is_file():
            try:
                yield path, file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way_and_stay_in_their_rooms(room: str) -> None:
    faults = [fault for file in modules(room) for fault in import_faults(file)]
    assert not faults, "\n".join(faults)


def test_no_modules_import_each_other_in_a_circle() -> None:
    uses, seen, faults = graph(), {}, []

    def visit(name: str, way: list[str]) -> None:
        seen[name] = "open"
        for used in sorted(uses[name]):
            if seen.get(used) == "open":
                faults.append(" -> ".join([*way[way.index(used) :], used]))
            elif used not in seen:
                visit(used, [*way, used])
        seen[name] = "done"

    for name in uses:
        if name not in seen:
            visit(name, [name])
    assert not faults, "\n".join(faults)


def test_no_folder_has_more_modules_than_a_reader_can_hold() -> None:
    counted: dict[str, int] = {}
    for file in modules("raphael", "data_pipeline", "flows"):
        if file.name not in ("__init__.py", "__main__.py"):
            folder = file.parent.relative_to(PROJECT).as_posix()
            counted[folder] = counted.get(folder, 0) + 1
    full = {folder: count for folder, count in counted.items() if count > MOST_MODULES}
    assert not full, f"more than {MOST_MODULES} modules: {full}; make a package of those that belong together"


def test_every_package_says_what_it_is() -> None:
    silent = [
        file.relative_to(PROJECT).as_posix()
        for file in modules("raphael", "data_pipeline", "flows")
        if file.name == "__init__.py" and not ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert not silent, f"no docstring in {', '.join(silent)}"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("from raphael.train.loop import train", "raphael/net stands below raphael/train"),
        ('RUN = ["-m", "flows.finetune"]', "imports run one way"),
        ("def f():\n    import raphael.systems.raphael.training", "raphael/net stands below raphael/systems"),
        ("if TYPE_CHECKING:\n    from raphael.encoders.text import TextEncoder", "raphael/net stands below"),
        ("import pandas", "here only einops, numpy, torch"),
        ("raphael/evaluate/stage.py: import raphael.systems.raphael.training", "a layer never names a system"),
        ('data_pipeline/encode/stage.py: X = "raphael.systems.raphael.training"', "a layer never names a system"),
        ("raphael/systems/job.py: import raphael.systems.raphael.training", "what systems share never names one"),
    ],
)
def test_the_rules_of_imports_see_what_they_forbid(line: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, colon, rest = line.partition(".py: ")
    file, line = (PROJECT / f"{name}.py", rest) if colon else (PROJECT / "raphael/net/unet.py", line)
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, **kw: line if self == file else real(self, **kw))
    assert any(fault in found for found in import_faults(file))


@pytest.mark.parametrize("room", ROOMS)
def test_files_and_functions_stay_within_their_budget(room: str) -> None:
    faults = [fault for file in modules(room) for fault in size_faults(file)]
    assert not faults, "\n".join(faults)


def test_programs_import_heavy_libraries_only_inside_functions() -> None:
    faults = []
    for file in modules("raphael", "data_pipeline", "flows"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        is_program = file.name == "__main__.py" or any(
            isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body
        )
        for node in tree.body if is_program else []:
            if isinstance(node, ast.Import | ast.ImportFrom):
                for line, name in imports(ast.Module([node], []), file):
                    if name.split(".")[0] in LATE:
                        path = file.relative_to(PROJECT)
                        faults.append(f"{path}:{line}: {name} at the top of a program: --help would wait for it")
    assert not faults, "\n".join(faults)


def test_no_file_names_a_path_of_one_machine() -> None:
    machine = re.compile(
        r"(?<![\w./-])/(?:home/(?!user\b)\w+|root/|Users/\w+|work/(?:main|shared)|opt/wheels|opt/pypi)"
    )
    faults = []
    for path, text in tracked_texts():
        if path == "tests/test_boundaries.py":
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if machine.search(line) and path != ".gitignore":
                faults.append(f"{path}:{number}: {line.strip()[:100]}: a path of one machine")
    assert not faults, "\n".join(faults)


def test_the_lock_holds_versions_and_hashes_and_no_address() -> None:
    text = (PROJECT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text and "--index" not in text and "--find-links" not in text
    entries = re.split(r"\n(?=\S)", text.strip())
    without = [entry.split("\n")[0] for entry in entries if "==" not in entry or "--hash=sha256:" not in entry]
    assert not without, f"entries of requirements.lock without an exact version and hashes: {without}"


def test_no_file_names_a_package_index() -> None:
    faults = [path for path, text in tracked_texts() if re.search(r"--(extra-)?index-url|files\.pythonhosted", text)]
    assert set(faults) <= {"tests/test_boundaries.py"}, f"index addresses in {faults}"
