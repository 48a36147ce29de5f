"""One file of the project's code as far as raphael/base/code/graph.py needs to know it: its top-level statements, each
with a digest of what it says and the names that it uses. Nothing is imported. Summaries are kept in raphael/__pycache__
by the hash of their source."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = ("raphael", "data_pipeline", "flows")
MODULE_NAME = re.compile(rf"({'|'.join(PACKAGES)})(\.\w+)+")
FORM = 1  # of the summaries: raise it when what is in them changes
CACHE = "code_summaries"
MOST_ENTRIES = 2000


@dataclass
class Statement:
    """A top-level statement. names: what it binds. uses: dotted names in it, such as ("checkpoint", "finish").

    imports: alias -> [module, attribute or ""], of imports inside it. modules: strings in it that name modules. data:
    paths that it names from __file__, relative to its own file's folder.
    """

    kind: str  # "definition"; "effect": done whenever the module is loaded; "program": only when it is run by `-m`
    names: list[str]
    digest: str
    uses: list[list[str]]
    imports: dict[str, list[str]]
    modules: list[str]
    data: list[str]
    key: str = ""


@dataclass
class Module:
    """A file's summary. imports: alias -> [module, attribute or ""] at the top; loads: modules loaded with it."""

    imports: dict[str, list[str]]
    loads: list[str]
    statements: list[Statement]
    name: str = ""
    folder: Path = Path()
    bound: dict[str, list[Statement]] = field(default_factory=dict)


def summarise(text: str, package: str) -> Module:
    """A module's summary, from its source. package: what relative imports begin at."""
    module = Module({}, [], [])
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module.imports |= _imports(node, package)
            module.loads += _loads(node, package)
        elif not _is_idle(node):
            module.statements.append(_statement(node, package, module))
    module.imports = _own(module.imports)
    module.loads = [name for name in dict.fromkeys(module.loads) if name.split(".")[0] in PACKAGES]
    names = {*module.imports, *(name for statement in module.statements for name in statement.names)}
    for statement in module.statements:  # what is no name of the project's is of no use to the search
        statement.imports = _own(statement.imports)
        statement.uses = [use for use in statement.uses if use[0] in names or use[0] in statement.imports]
    return module


def _own(imports: dict[str, list[str]]) -> dict[str, list[str]]:
    return {alias: target for alias, target in imports.items() if target[0].split(".")[0] in PACKAGES}


def _is_idle(node: ast.stmt) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _statement(node: ast.stmt, package: str, module: Module) -> Statement:
    reader = _Reader(package)
    reader.put(node)
    digest = sha256_of(*reader.out)
    kind, names = "effect", []
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        kind, names = "definition", [node.name]
        called = node.decorator_list
    elif isinstance(node, ast.Assign | ast.AnnAssign) and (names := _bound(node)):
        kind, called = "definition", [node.value] if isinstance(node.value, ast.Call) else []
    else:
        names, called = _bound(node), []
        if isinstance(node, ast.If) and ast.unparse(node.test).startswith("__name__ =="):
            kind = "program"
        for inner in ast.walk(node):  # `try: import x`
            if isinstance(inner, ast.Import | ast.ImportFrom) and kind == "effect":
                module.imports |= _imports(inner, package)
                module.loads += _loads(inner, package)
    if kind == "definition" and any(_registers(call, module) for call in called):
        kind = "effect"
    data = _data_paths(node) if ["__file__"] in reader.uses else []
    uses = [use for use in reader.uses if use[0] not in ("self", "cls")]
    return Statement(kind, names, digest, uses, reader.imports, reader.modules, data)


def _registers(call: ast.expr, module: Module) -> bool:
    """Whether a decorator or call is a function of the project's, which may keep what it is given."""
    name = call.func if isinstance(call, ast.Call) else call
    while isinstance(name, ast.Attribute):
        name = name.value
    if not isinstance(name, ast.Name) or not name.id.islower():
        return False
    own = any(name.id in statement.names for statement in module.statements)
    return own or module.imports.get(name.id, [""])[0].split(".")[0] in PACKAGES


def _bound(node: ast.stmt) -> list[str]:
    """Names that a statement binds at the top of its module; of an assignment to anything else none."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        parts = [part for target in targets for part in getattr(target, "elts", [target])]
        return [part.id for part in parts] if all(isinstance(part, ast.Name) for part in parts) else []
    found = []
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.ClassDef):
            found.append(inner.name)
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            found.append(inner.id)
    return found


def _imports(node: ast.Import | ast.ImportFrom, package: str) -> dict[str, list[str]]:
    if isinstance(node, ast.Import):
        return {
            alias.asname or alias.name.split(".")[0]: [alias.name if alias.asname else alias.name.split(".")[0], ""]
            for alias in node.names
        }
    return {alias.asname or alias.name: [_from(node, package), alias.name] for alias in node.names}


def _loads(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = _from(node, package)
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]  # a name of it, or a module in it


def _from(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    home = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*home, *([node.module] if node.module else [])])


class _Reader:
    """Writes a statement down so that equal means the same, and collects the names in it."""

    def __init__(self, package: str):
        self.package = package
        self.out: list[str] = []
        self.uses: list[list[str]] = []
        self.imports: dict[str, list[str]] = {}
        self.modules: list[str] = []

    def put(self, node: Any) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            self.imports |= _imports(node, self.package)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            pass  # a docstring
        elif isinstance(node, ast.If) and _is_idle(node):
            pass
        elif isinstance(node, ast.Constant):
            self._constant(node.value)
        elif isinstance(node, ast.Name | ast.Attribute) and (chain := _chain(node)):
            if chain not in self.uses:
                self.uses.append(chain)
            self.out.append(".".join(chain))
        else:
            self._fields(node)

    def _constant(self, value: Any) -> None:
        if isinstance(value, str) and MODULE_NAME.fullmatch(value):
            self.modules.append(value)
            self.out.append("a module's name")
        else:
            self.out.append(f"{type(value).__name__} {value!r}")

    def _fields(self, node: ast.AST) -> None:
        self.out.append(type(node).__name__)
        for name in node._fields:
            value = getattr(node, name, None)
            if name in ("ctx", "type_comment", "kind", "returns") or value in (None, []):
                continue
            if name == "annotation" and isinstance(node, ast.arg):
                continue
            self.out.append(name)
            if isinstance(value, ast.AST):
                self.put(value)
            elif isinstance(value, list):
                self.out.append("[")
                for item in value:
                    self.put(item) if isinstance(item, ast.AST) else self.out.append(str(item))
                self.out.append("]")
            else:
                self.out.append(str(value))


def _chain(node: ast.expr) -> list[str]:
    """a.b.c -> ["a", "b", "c"]; [] for what does not begin with a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []


def _data_paths(node: ast.stmt) -> list[str]:
    """Paths, relative to the file's folder, of what the statement builds from __file__ by `/`, parent, parents[n] and
    with_name; folders that hold the file itself are no data."""
    found: list[str] = []

    def look(part: ast.AST) -> None:
        path = _path(part) if isinstance(part, ast.expr) else None
        if path is None:
            for child in ast.iter_child_nodes(part):
                look(child)
        elif (name := os.path.relpath(path, "/x/x/x/x/x/x")) and not re.fullmatch(r"\.|\.\.(/\.\.)*", name):
            found.append(name)

    look(node)
    return [name for name in found if name != "itself.py"]


def _path(node: ast.AST) -> str | None:
    match node:
        case ast.Name(id="__file__"):
            return "/x/x/x/x/x/x/itself.py"
        case ast.Call(func=ast.Name(id="Path"), args=[inner]):
            return _path(inner)
        case ast.Call(func=ast.Attribute(value=inner, attr="resolve" | "absolute")):
            return _path(inner)
        case ast.Call(func=ast.Attribute(value=inner, attr="with_name"), args=[ast.Constant(value=str(name))]):
            return f"{Path(base).parent}/{name}" if (base := _path(inner)) else None
        case ast.Attribute(value=inner, attr="parent"):
            return str(Path(base).parent) if (base := _path(inner)) else None
        case ast.Subscript(value=ast.Attribute(value=inner, attr="parents"), slice=ast.Constant(value=int(up))):
            return str(Path(base).parents[up]) if (base := _path(inner)) else None
        case ast.BinOp(left=inner, op=ast.Div(), right=ast.Constant(value=str(name))):
            return f"{base}/{name}" if (base := _path(inner)) else None
    return None


class Summaries:
    """Summaries by the sha256 of what they summarise, in a file that may vanish at any time."""

    def __init__(self, root: Path):
        self.file = root / "raphael" / "__pycache__" / CACHE
        self.entries: dict[str, Any] = {}
        self.kept: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, zlib.error):
            stored = json.loads(zlib.decompress(self.file.read_bytes()))
            self.kept = stored["entries"] if stored.get("form") == FORM else {}
        self.new = False

    def summary(self, file: Path, package: str) -> Module:
        content = file.read_bytes()
        key = hashlib.sha256(package.encode() + b"\0" + content).hexdigest()[:32]
        if key not in self.kept:
            made = summarise(content.decode("utf-8"), package)
            statements = [{k: v for k, v in vars(one).items() if k != "key"} for one in made.statements]
            self.kept[key] = {"imports": made.imports, "loads": made.loads, "statements": statements}
            self.new = True
        self.entries[key] = kept = self.kept[key]
        return Module(kept["imports"], kept["loads"], [Statement(**one) for one in kept["statements"]])

    def write(self) -> None:
        if not self.new:
            return
        self.new = False
        kept = self.kept if len(self.kept) < MOST_ENTRIES else self.entries  # the others are of former contents
        temporary = self.file.with_name(f".{CACHE}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(exist_ok=True)
            temporary.write_bytes(zlib.compress(json.dumps({"form": FORM, "entries": kept}).encode(), 1))
            os.replace(temporary, self.file)


def sha256_of(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
