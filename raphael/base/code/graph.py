"""What code of the project a program uses: the definitions that it reaches, as far as a reader of the source can tell.

A file is more than a stage needs of it, so the unit is a top-level statement: a function, class or constant that is
reached by name from the program, and whatever else an imported module does when it is loaded. A statement is known by
its syntax tree without comments, docstrings, formatting, annotations of functions and import lines; a name in it stands
for what it means. So an edit of those changes nothing here, nor does moving code to another module.

What counts as use: imports at the top and inside functions, not those under TYPE_CHECKING; a string that is the name of
a module, as in `python -m` and importlib; files of data that a statement names from `__file__`, whole folders too.
Whoever passes a module on as a value uses all of it. Not seen: names made up at run time (getattr of a computed name
on an object, registries filled by subclassing), other packages, and the interpreter.

Nothing is imported; 20 ms where raphael/base/code/summary.py knows the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from raphael.base.code.summary import PACKAGES, Module, Statement, Summaries, sha256_of

ROUNDS = 4  # how far along its names a statement is known by what they mean


@dataclass(frozen=True)
class Use:
    """What a program uses. digest: of all of it. files: a digest of what it uses of each module or file of data."""

    digest: str
    files: dict[str, str]


class CodeGraph:
    """The code in the folder `root`, which holds the packages. Modules in `left_out` are neither used nor loaded."""

    def __init__(self, root: Path, left_out: Iterable[str] = ()):
        self.root, self.left_out = root, set(left_out)
        self.modules: dict[str, Module | None] = {}
        self.cache = Summaries(root)

    def use(self, program: str, also: Iterable[str] = (), without: Iterable[str] = ()) -> Use:
        """What `python -m program` uses, and all of the modules `also`. Raises LookupError where there is none such.

        without: folders whose files of data do not count, as "raphael/systems/ddpm".
        """
        return self._reach(program, also, without).result()

    def definitions(self, program: str, also: Iterable[str] = ()) -> set[tuple[str, str]]:
        """(module, name) of all functions, classes and constants of that."""
        nodes = self._reach(program, also).nodes.values()
        return {(module.name, name) for module, statement in nodes for name in statement.names}

    def _reach(self, program: str, also: Iterable[str], without: Iterable[str] = ()) -> _Reach:
        found = _Reach(self, without)
        found.load(program, run=True)
        for name in also:
            found.whole(name)
        self.cache.write()
        return found

    def file(self, name: str, run: bool = False) -> Path | None:
        """The file of a module: of a package its __init__, or its __main__ where it is run."""
        base = self.root.joinpath(*name.split("."))
        names = (base.with_suffix(".py"), base / ("__main__.py" if run else "__init__.py"))
        return next((file for file in names if file.is_file()), None)

    def module(self, name: str) -> Module | None:
        if name not in self.modules:
            known = name.split(".")[0] in PACKAGES and name not in self.left_out
            file = self.file(name) if known else None
            self.modules[name] = self._read(name, file) if file else None
        return self.modules[name]

    def _read(self, name: str, file: Path) -> Module:
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        module = self.cache.summary(file, package)
        module.name, module.folder = name, file.parent
        for number, statement in enumerate(module.statements):
            statement.key = f"{name}:{number}"
            for bound in statement.names:
                module.bound.setdefault(bound, []).append(statement)
        return module


class _Reach:
    """The search. A node is a statement; its edges lead to what its names mean."""

    def __init__(self, graph: CodeGraph, without: Iterable[str] = ()):
        self.graph, self.without = graph, {*graph.left_out, *without}
        self.nodes: dict[str, tuple[Module, Statement]] = {}
        self.edges: dict[str, list[tuple[str, str]]] = defaultdict(list)
        self.data: dict[str, str] = {}
        self.loaded: set[str] = set()
        self.waiting: list[tuple[Module, Statement]] = []

    def load(self, name: str, run: bool = False) -> None:
        """Import a module, or run it: what it does by that counts, and what it loads in turn."""
        if run:
            if self.graph.file(name, run) is None:
                raise LookupError(f"{name}: no such module below {self.graph.root}")
            name = name if self.graph.file(name, run).name != "__main__.py" else f"{name}.__main__"
        todo = [name]
        while todo:
            parts = todo.pop().split(".")
            for end in range(1, len(parts) + 1):  # a package is loaded before what is in it
                here = ".".join(parts[:end])
                module = self.graph.module(here)
                if here in self.loaded or module is None:
                    continue
                self.loaded.add(here)
                for statement in module.statements:
                    if statement.kind == "effect" or (run and here == name and statement.kind == "program"):
                        self.reach(module, statement)
                todo += module.loads
        self._spread()

    def whole(self, name: str) -> None:
        module = self.graph.module(name)
        for statement in module.statements if module else ():
            if statement.kind != "program":
                self.reach(module, statement)
        self._spread()

    def reach(self, module: Module, statement: Statement) -> None:
        if statement.key not in self.nodes:
            self.nodes[statement.key] = (module, statement)
            self.waiting.append((module, statement))

    def _spread(self) -> None:
        while self.waiting:
            module, statement = self.waiting.pop()
            for chain in statement.uses:
                for meant in self._means(module, statement, chain):
                    self.edges[statement.key].append((".".join(chain), meant))
            for name in statement.modules:
                if self.graph.file(name, run=True):
                    self.load(name, run=True)
                elif self.graph.module(name):
                    self.load(name)
                    self.whole(name)
            for target, _ in statement.imports.values():
                self.load(target)
            for path in statement.data:
                self._take_data(module.folder / path)

    def _means(self, module: Module, statement: Statement, chain: list[str]) -> Iterator[str]:
        local = statement.imports.get(chain[0])
        if local:
            yield from self._follow(*local, chain[1:], set())
        else:
            yield from self._in_module(module, chain, set())

    def _in_module(self, module: Module, chain: list[str], seen: set) -> Iterator[str]:
        """What a dotted name means in a module: keys of statements, which are reached by that."""
        if (module.name, chain[0]) in seen:
            return
        seen.add((module.name, chain[0]))
        for statement in module.bound.get(chain[0], ()):
            self.reach(module, statement)
            yield statement.key
        if chain[0] in module.imports and chain[0] not in module.bound:
            yield from self._follow(*module.imports[chain[0]], chain[1:], seen)

    def _follow(self, name: str, attribute: str, rest: list[str], seen: set) -> Iterator[str]:
        module = self.graph.module(name)
        chain = [attribute, *rest] if attribute else rest
        if module is None:
            if chain and self.graph.module(f"{name}.{chain[0]}"):  # what is in a package that is left out is not
                self.load(f"{name}.{chain[0]}")
                yield from self._follow(f"{name}.{chain[0]}", "", chain[1:], seen)
            return
        if chain and (chain[0] in module.bound or chain[0] in module.imports):
            yield from self._in_module(module, chain, seen)
        elif chain and self.graph.module(f"{name}.{chain[0]}"):
            self.load(f"{name}.{chain[0]}")
            yield from self._follow(f"{name}.{chain[0]}", "", chain[1:], seen)
        elif f"{name}.{chain[0]}" not in self.graph.left_out if chain else True:
            self.whole(name)  # a module handed on as a value, or a name that it makes up

    def _take_data(self, path: Path) -> None:
        path = Path(os.path.normpath(path))
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            name = file.relative_to(self.graph.root).as_posix() if file.is_relative_to(self.graph.root) else ""
            skipped = not name or file.suffix == ".py" or "__pycache__" in file.parts or not file.is_file()
            if not skipped and not any(name == out or name.startswith(f"{out}/") for out in self.without):
                self.data[name] = data_digest(file)

    def result(self) -> Use:
        marks = {key: statement.digest for key, (_, statement) in self.nodes.items()}
        start = dict(marks)
        for _ in range(ROUNDS):
            marks = {
                key: sha256_of(start[key], *sorted({f"{name}={marks[meant]}" for name, meant in self.edges[key]}))
                for key in marks
            }
        parts: dict[str, list[str]] = defaultdict(list)
        for module, statement in self.nodes.values():
            parts[module.name].append(statement.digest)
        files = {name: sha256_of(*sorted(digests))[:12] for name, digests in parts.items()}
        digest = sha256_of(*sorted(set(marks.values())), *(f"{Path(n).name}={d}" for n, d in sorted(self.data.items())))
        return Use(digest[:16], dict(sorted({**files, **self.data}.items())))


def data_digest(file: Path) -> str:
    """Of a file of data: YAML and JSON by what they say, everything else by its bytes."""
    content = file.read_bytes()
    if file.suffix in (".yaml", ".yml", ".json"):
        import yaml

        with contextlib.suppress(yaml.YAMLError, ValueError):
            content = json.dumps(yaml.safe_load(content), sort_keys=True, default=str).encode()
    return hashlib.sha256(content).hexdigest()[:12]
