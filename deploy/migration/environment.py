"""The variables of a container, replaced in its arguments as the kubelet does."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from yaml_nodes import Node


class _Expanded(NamedTuple):
    """A text with its variables replaced (None if the value of one is elsewhere), and the variables that do not exist."""

    text: str | None
    undefined: tuple[str, ...] = ()


class Environment:
    """The variables of a container, for `$(NAME)` in its arguments."""

    def __init__(self, container: Node) -> None:
        self._incomplete = container["envFrom"].value is not None
        self._values: dict[str, _Expanded] = {}
        for variable in container["env"].items():
            elsewhere = variable["valueFrom"].value is not None
            # A value may use variables defined before it.
            value = _Expanded(None) if elsewhere else self._replace(variable["value"].text())
            self._values[variable["name"].text()] = value

    def expand(self, arguments: Node) -> tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, str], ...]]:
        """Return the arguments that are known, expanded, those that are not, as they are written, and the undefined."""
        known: list[str] = []
        unknown: list[str] = []
        undefined: list[tuple[str, str]] = []
        for argument in arguments.items():
            written = argument.text()
            expanded = self._replace(written)
            undefined += [(written, name) for name in expanded.undefined]
            if expanded.text is not None:
                known.append(expanded.text)
            elif not written.startswith("-") and known and re.fullmatch("-[^=]+", known[-1]):
                unknown.append(f"{known.pop()} {written}")  # the flag that it is the value of
            else:
                unknown.append(written)
        return tuple(known), tuple(unknown), tuple(undefined)

    def _replace(self, text: str) -> _Expanded:
        """Replace variables as the kubelet does: `$$` is a dollar, an undefined one stays."""
        elsewhere, undefined = False, list[str]()

        def value(found: re.Match[str]) -> str:
            nonlocal elsewhere
            if found[0] == "$$":
                return "$"
            if found[1] not in self._values:
                if not self._incomplete:
                    undefined.append(found[1])
                    return found[0]
                elsewhere = True
                return ""
            known = self._values[found[1]]
            elsewhere |= known.text is None
            undefined.extend(known.undefined)
            return known.text or ""

        expanded = re.sub(r"\$\$|\$\(([^)]*)\)", value, text)
        return _Expanded(None if elsewhere else expanded, tuple(undefined))
