"""Which modules a program can reach: follows the imports in its sources, and in the sources of what these import.

It errs on the side of too many: an import in a function that is never called counts too.
"""

import ast
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "__init__.py"


@dataclass
class Imports:
    """What one module imports."""

    all: set[str] = field(default_factory=set)
    needed: set[str] = field(default_factory=set)
    """Those without which its own import fails: outside functions, conditions, and try blocks that catch the failure."""


def imports(source: bytes, package: str) -> Imports:
    """Read a module's imports; relative ones need the package it is in."""
    found = Imports()
    _read(ast.parse(source).body, package, True, found)
    return found


def _read(nodes: Sequence[ast.AST], package: str, needed: bool, found: Imports) -> None:
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Call)):
            names = set(_named(node, package))
            found.all |= names
            if needed and isinstance(node, ast.Import):
                found.needed |= names
            elif needed and isinstance(node, ast.ImportFrom):
                found.needed.add(_base(node, package))
        if isinstance(node, ast.If) and _never(node.test):
            _read(node.orelse, package, needed, found)
        else:
            conditional = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.If, ast.Try)
            inner = needed and not isinstance(node, conditional)
            _read(list(ast.iter_child_nodes(node)), package, inner, found)


def _never(test: ast.expr) -> bool:
    """Whether a condition only holds for type checkers, or when the module is run as a script."""
    text = ast.unparse(test)
    return text in ("TYPE_CHECKING", "typing.TYPE_CHECKING") or text.startswith("__name__ == ")


def _base(node: ast.ImportFrom, package: str) -> str:
    parents = package.split(".")[: -node.level + 1 or None] if node.level else []
    return ".".join([*parents, *filter(None, [node.module])])


def _named(node: ast.Import | ast.ImportFrom | ast.Call, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = _base(node, package)
        yield base
        yield from (
            f"{base}.{alias.name}" for alias in node.names
        )  # a submodule, or just a name in the module
    elif ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__"):
        first = node.args[0] if node.args else None
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield first.value


@dataclass(frozen=True)
class Search:
    """Where modules are looked for: folders in Python's order, and the names that extension modules end with."""

    folders: Sequence[Path]
    suffixes: Sequence[str]

    def find(self, name: str) -> Path | None:
        """A module's file, or a namespace package's folder; None for a built-in module, and for anything that is not a module."""
        relative = name.replace(".", "/")
        for folder in self.folders:
            files = [f"{relative}/{PACKAGE}", *(relative + suffix for suffix in (*self.suffixes, ".py"))]
            for file in (folder / file for file in files):
                if file.is_file():
                    return file
        return next((folder / relative for folder in self.folders if (folder / relative).is_dir()), None)


def reached(
    search: Search,
    roots: Collection[str],
    compiled: Mapping[str, Collection[str]],
    unused: Collection[str],
    postponed: Collection[str],
) -> dict[str, Path]:
    """All modules that importing the roots can load, and their files.

    `compiled` says what extension modules import, which cannot be read from them. `unused` modules, and those below
    them, are left out; exits where a module that stays cannot be imported without one of them, unless that is
    `postponed`, so that importing it always works.
    """
    modules: dict[str, Path] = {}
    waiting = sorted(roots)
    while waiting:
        name = waiting.pop()
        if name in modules or _within(name, unused):
            continue
        file = search.find(name)
        if file is None:
            continue
        modules[name] = file
        found = Imports(set(compiled.get(name, ())))
        if file.suffix == ".py":
            package = name if file.name == PACKAGE else name.rpartition(".")[0]
            found = imports(file.read_bytes(), package)
        for broken in sorted(found.needed):
            if _within(broken, unused) and broken not in postponed:
                sys.exit(f"{name} imports {broken}, which was said to be unused")
        for each in {name, *found.all}:
            parts = each.split(".")
            waiting += sorted(".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return modules


def _within(name: str, packages: Collection[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)
