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
GROUND_FLOOR = set(
    "checkpoint checkpoint_home checkpoint_parts config config_data manifest precision preset randomness ray_cluster "
    "records registry sampling stage strict tracking".split()
)
PURE = ("raphael/net/", "raphael/diffusion/", "raphael/objectives/", "raphael/train/loop.py")
PURE_MAY = {"torch", "numpy", "einops"}
LONG_BY_CONTRACT = {("raphael/generate/pipeline.py", "__call__")}  # diffusers' argument names
ONLY_HERE = {
    "mlflow": ("raphael/tracking.py",),
    "ray": (
        "raphael/ray_cluster.py",
        "raphael/train/ray_trainer.py",
        "raphael/evaluate/workers.py",
        "data_pipeline/score_ray.py",
    ),
}
MAY_NOT = {  # what lies in the left may not import what begins with one of the right
    "raphael/": ("data_pipeline", "flows"),
    "data_pipeline/": ("flows",),
    "raphael/net/": ("raphael.diffusion", "raphael.objectives"),
    "raphael/diffusion/": ("raphael.objectives",),
    "raphael/objectives/": ("raphael.train", "raphael.encoders"),
    "raphael/encoders/": ("raphael.train", "raphael.objectives", "raphael.generate", "raphael.evaluate"),
    "raphael/generate/": ("raphael.train",),
    "raphael/evaluate/": ("raphael.train",),
}
LATE = {"torch", "cv2", "pyarrow", "pandas", "diffusers", "transformers", "open_clip", "ray", "mlflow", "matplotlib"}


def modules(*rooms: str) -> list[Path]:
    return [file for room in rooms for file in sorted((PROJECT / room).rglob("*.py"))]


def imports(tree: ast.Module, file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = file.relative_to(PROJECT).with_suffix("").parts[: -node.level]
                base = ".".join([*home, base]).rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def import_faults(file: Path) -> Iterator[str]:
    path = file.relative_to(PROJECT).as_posix()
    for line, name in imports(ast.parse(file.read_text(encoding="utf-8")), file):
        top = name.split(".")[0]
        where = f"{path}:{line}: imports {name}"
        for room, banned in MAY_NOT.items():
            if path.startswith(room) and any(under(name, package) for package in banned):
                yield f"{where}: imports run one way, {room} may not import {', '.join(banned)}"
        if path.startswith(PURE):
            floor = top == "raphael" and name.split(".")[1] in GROUND_FLOOR | {
                "net",
                "diffusion",
                "objectives",
                "train",
            }
            if top not in PURE_MAY | STANDARD and not floor:
                yield f"{where}: here only {', '.join(sorted(PURE_MAY))}, the standard library and the ground floor"
        if top == "prefect" and not path.startswith(("flows/", "tests/")):
            yield f"{where}: only flows/ knows Prefect"
        if top in ONLY_HERE and not path.startswith(("tests/", "benchmarks/")) and path not in ONLY_HERE[top]:
            yield f"{where}: the only import of {top} is in {' and '.join(ONLY_HERE[top])}"


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
