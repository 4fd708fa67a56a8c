"""All small changes of meaning that can be made to a module, one at a time: its mutants. Pure: source in, sources out."""

from __future__ import annotations

import ast
import copy
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Break: ast.Continue,
    ast.Continue: ast.Break,
}
# What declares and does nothing, or whose loss any test shows.
_KEPT = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Pass, ast.Global, ast.Nonlocal)
_BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)


class Mutant(NamedTuple):
    """A module with one change."""

    key: str
    """What was changed and how, the same for as long as the line is: `module: line | change`."""
    line: int
    """Where it is in the unchanged source."""
    source: str


def mutants(module: str, source: str) -> Iterator[Mutant]:
    """Make the mutants of a module, in the order of its lines."""
    tree = ast.parse(source)
    lines = source.splitlines()
    seen: Counter[str] = Counter()
    for change, node, mutated in sorted(_changes(tree), key=lambda found: found[1].lineno):
        text = " ".join(lines[node.lineno - 1].split())
        key = f"{module}: {text} | {change}"
        seen[key] += 1
        number = f" #{seen[key]}" if seen[key] > 1 else ""
        yield Mutant(key + number, node.lineno, mutated)


def _changes(tree: ast.Module) -> Iterator[tuple[str, ast.expr | ast.stmt, str]]:
    """Change the tree in place, yield the result, and change it back."""
    for parent, place, node, ignored in _walk(tree):
        for change, other in _others(node):
            if ignored and not change.startswith("drop"):
                continue
            kept = _get(parent, place)
            _set(parent, place, other)
            yield change, node, ast.unparse(tree)
            _set(parent, place, kept)


Place = tuple[str, int | None]


def _get(parent: ast.AST, place: Place) -> object:
    field = getattr(parent, place[0])
    return field if place[1] is None else field[place[1]]


def _set(parent: ast.AST, place: Place, value: object) -> None:
    if place[1] is None:
        setattr(parent, place[0], value)
    else:
        getattr(parent, place[0])[place[1]] = value


def _walk(tree: ast.AST) -> Iterator[tuple[ast.AST, Place, ast.expr | ast.stmt, bool]]:
    """Yield each expression and statement with its place, except type hints, docstrings and texts of f-strings."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "ctx", "format_spec", "type_params"):
            continue
        children = value if isinstance(value, list) else [value]
        for number, child in enumerate(children):
            if not isinstance(child, ast.AST) or _is_text_alone(child):
                continue
            if isinstance(child, ast.expr | ast.stmt):
                place = (name, number if isinstance(value, list) else None)
                yield tree, place, child, isinstance(tree, ast.JoinedStr)
            yield from _walk(child)


def _is_text_alone(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _others(node: ast.expr | ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    """Yield what may replace a node, and what to call that."""
    if isinstance(node, ast.Compare | ast.BoolOp | ast.BinOp | ast.AugAssign | ast.Break | ast.Continue):
        yield from _swapped(node)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield f"drop {'not' if isinstance(node.op, ast.Not) else 'minus'}", node.operand
    elif isinstance(node, ast.Constant):
        yield from _constants(node)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("min", "max"):
        for each in node.args:
            yield f"{node.func.id}() is {ast.unparse(each)}", each
    elif isinstance(node, ast.IfExp):
        yield "always the first", node.body
        yield "always the second", node.orelse
    elif isinstance(node, ast.Return) and node.value and not _is_nothing(node.value):
        yield "return None", ast.Return(ast.Constant(None))
    if isinstance(node, ast.If | ast.While) and ast.unparse(node.test) != "TYPE_CHECKING":
        for value in (True, False) if isinstance(node, ast.If) else (False,):
            yield f"condition is {value}", _with(node, "test", ast.Constant(value))
    if isinstance(node, ast.stmt) and not isinstance(node, (*_KEPT, *_BLOCKS, ast.Return, ast.AnnAssign)):
        yield "drop it", ast.Pass()
    if isinstance(node, ast.AnnAssign) and node.value and isinstance(node.target, ast.Attribute):
        yield "drop it", ast.Pass()


def _is_nothing(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and not value.value


def _swapped(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.Break | ast.Continue):
        other = _SWAPS[type(node)]()
        yield _name(other), other
    elif isinstance(node, ast.Compare):
        for number, operator in enumerate(node.ops):
            other = _SWAPS[type(operator)]()
            operators = [*node.ops[:number], other, *node.ops[number + 1 :]]
            yield f"{_name(operator)} is {_name(other)}", _with(node, "ops", operators)
    elif isinstance(node, ast.BoolOp | ast.BinOp | ast.AugAssign) and type(node.op) in _SWAPS:
        if isinstance(node.op, ast.Mod | ast.BitOr | ast.Add) and _has_text(node):
            return  # puts texts together, or types
        other = _SWAPS[type(node.op)]()
        yield f"{_name(node.op)} is {_name(other)}", _with(node, "op", other)


def _with(node: ast.AST, field: str, value: object) -> ast.AST:
    changed = copy.copy(node)
    setattr(changed, field, value)
    return changed


def _has_text(node: ast.AST) -> bool:
    return any(
        isinstance(each, ast.JoinedStr)
        or (isinstance(each, ast.Constant) and isinstance(each.value, str | bytes))
        for each in ast.walk(node)
    )


def _name(operator: ast.AST) -> str:
    return type(operator).__name__.lower()


def _constants(node: ast.Constant) -> Iterator[tuple[str, ast.AST]]:
    value = node.value
    if isinstance(value, bool):
        yield f"{value} is {not value}", ast.Constant(not value)
    elif isinstance(value, int | float):
        yield f"{value} + 1", ast.Constant(value + 1)
    elif isinstance(value, str):
        yield f"text {value[:20]!r}", ast.Constant(value + "X")
    elif isinstance(value, bytes):
        yield f"text {value[:20]!r}", ast.Constant(value + b"X")
