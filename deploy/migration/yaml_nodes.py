"""YAML whose values know their place in it, for errors that name it; of Kubernetes it knows only quantities."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

# Not `import yaml`, which loads what writes YAML as well; the packed file has only what reads it.
from yaml.error import YAMLError
from yaml.loader import SafeLoader

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_UNITS = {
    unit: 1000.0**power for power, unit in enumerate(("n", "u", "m", "", "k", "M", "G", "T", "P", "E"), -3)
}
_UNITS |= {unit: 1024.0**power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), 1)}
_TEMPLATE = "a template, not a manifest: render it first, as by `helm template`"


class ManifestError(Exception):
    """What is wrong with a manifest, in one line."""


class Node:
    """A value and its place. If it is absent, its value is None, and so is everything that would be below it."""

    def __init__(self, value: Any, place: str) -> None:
        self.value, self.place = value, place

    def __getitem__(self, key: str) -> Node:
        return Node(self.mapping().get(key), f"{self.place}.{key}".lstrip("."))

    def at(self, path: str) -> Node:
        """Go down a path of keys, with dots between them."""
        node = self
        for key in path.split("."):
            node = node[key]
        return node

    def mapping(self) -> Mapping[str, Any]:
        return self._typed(dict, "a mapping") or {}

    def items(self) -> list[Node]:
        values = self._typed(list, "a list") or []
        return [Node(value, f"{self.place}[{number}]") for number, value in enumerate(values)]

    def words(self) -> list[str]:
        """Look for text, alone or in a list; anything else found here is not an error."""
        values = self.value if isinstance(self.value, list) else [self.value]
        return [value for value in values if isinstance(value, str)]

    def text(self) -> str:
        text: str = self._typed(str, "a string") or ""
        if "{{" in text:
            raise ManifestError(f"{self.place}: {_TEMPLATE}")
        return text

    def number(self) -> int | None:
        number: int | None = self._typed(int, "a whole number")
        return number

    def flag(self) -> bool | None:
        flag: bool | None = self._typed(bool, "true or false")
        return flag

    def quantity(self) -> float | None:
        """Read bytes as Kubernetes writes them: 64Mi, 1e8, 0.5Gi, +1Pi."""
        if self.value is None:
            return None
        number = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
        found = re.fullmatch(rf"({number}(?:[eE][+-]?[0-9]+)?)([KMGTPE]i|[numkMGTPE]?)", str(self.value))
        if found is None:
            raise ManifestError(f"{self.place}: not a quantity: {self.value!r:.60}")
        return float(found[1]) * _UNITS[found[2]]

    def _typed(self, kind: type, what: str) -> Any:
        # To Python, true is a number.
        if self.value is None or (
            isinstance(self.value, kind) and (kind is bool) == (type(self.value) is bool)
        ):
            return self.value
        raise ManifestError(f"{self.place or 'a document'}: not {what}: {self.value!r:.60}")


class _Loader(SafeLoader):
    """Reads dates, `=` and `<<` as Kubernetes does: as text."""


for _tag in ("timestamp", "value", "merge"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", lambda _, node: str(node.value))


def _values(text: str) -> Iterator[Any]:
    loader: Any = _Loader(text)
    while loader.check_data():
        yield loader.get_data()


def documents(text: str) -> list[Node]:
    """Read a stream of YAML documents, empty ones left out; raises ManifestError."""
    try:
        return [Node(value, "") for value in _values(text) if value is not None]
    # ValueError and LookupError come from tags such as `!!int a`.
    except (YAMLError, ValueError, LookupError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        line = f"line {mark.line + 1}: " if mark else ""
        what = _TEMPLATE if "{{" in text else f"not YAML: {problem}"
        raise ManifestError(line + what) from None
