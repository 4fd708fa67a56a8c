"""Command lines in the syntax of Go's flag package; knows no flag of ours, prints nothing, never exits."""

import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from livenessprobe.quoting import printable, quote

# Go keeps a duration as a signed 64-bit count of nanoseconds.
_LONGEST_DURATION = (2**63 - 1) / 1e9
# Unambiguous, so that a long argument takes time in proportion to its length.
_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_PART = rf"({_NUMBER})([^0-9.]+)"
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_BOOLEANS = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
}


class FlagError(Exception):
    """The command line breaks the syntax; the message names the argument and what to do."""


class HelpRequested(Exception):
    """The command line asks for the usage (-h, -help)."""


def string(text: str) -> str:
    """Take any text as it stands."""
    return text


def boolean(text: str) -> bool:
    """Read Go's words for true and false; raises ValueError for any other."""
    if text not in _BOOLEANS:
        raise ValueError("not a boolean: write true or false")
    return _BOOLEANS[text]


def unsigned(text: str) -> int:
    """Read a whole number of at most 64 bits that is not negative; raises ValueError for anything else."""
    if not re.fullmatch(r"\+?[0-9]{1,20}", text) or int(text) >= 2**64:
        raise ValueError("not a whole number from 0 on")
    return int(text)


def duration(text: str) -> float:
    """Read a duration such as 300ms, 3s, 1m0.5s as seconds; raises ValueError with what to write instead.

    The syntax is that of Go's time.ParseDuration: numbers with units, one after the other, one sign in front.
    """
    unsigned = text[1:] if text[:1] in ("+", "-") else text
    if unsigned == "0":
        return 0.0
    if re.fullmatch(_NUMBER, unsigned):
        raise ValueError(f"missing unit in duration: write {text}s for seconds, {text}ms for milliseconds")
    if not re.fullmatch(f"(?:{_PART})+", unsigned):
        raise ValueError("not a duration: write a number with a unit, as in 300ms, 3s, 1m30s")
    parts = re.findall(_PART, unsigned)
    for _, unit in parts:
        if unit not in _SECONDS:
            raise ValueError(f"unknown unit {quote(unit)} in duration: the units are ns, us, ms, s, m, h")
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if seconds > _LONGEST_DURATION:
        raise ValueError("duration too long: the longest is 2562047h")
    return -seconds if text.startswith("-") else seconds


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: its name without dashes, how its value is read, and what the usage says of it."""

    name: str
    read: Callable[[str], object]
    """Turns the value's text into a value; raises ValueError with the reason."""
    default: str
    """As the usage shows it; empty for none."""
    usage: str

    @property
    def takes_argument(self) -> bool:
        """Whether the next argument is the value where there is no `=`: never for a boolean."""
        return self.read is not boolean


def parse(arguments: Sequence[str], flags: Iterable[Flag]) -> Mapping[str, object]:
    """Read the command line (without the program's name) into the values that were given, the last of each name.

    A flag that was not given is not in the result, so the caller sees what is explicit.
    Raises FlagError, or HelpRequested at -h and -help.
    """
    known = {flag.name: flag for flag in flags}
    values: dict[str, object] = {}
    rest = deque(arguments)
    while rest and len(rest[0]) > 1 and rest[0].startswith("-"):
        argument = rest.popleft()
        if argument == "--":
            break
        name, equals, text = argument.removeprefix("-").removeprefix("-").partition("=")
        flag = _find(known, name, argument)
        if not equals:
            text = _next_argument(flag, rest)
        try:
            values[name] = flag.read(text)
        except ValueError as error:
            raise FlagError(f"invalid value {quote(text)} for flag -{name}: {error}") from None
    if rest:
        advice = "only flags are taken, and a boolean's value goes after ="
        raise FlagError(f"unexpected argument {quote(rest[0])}: {advice}")
    return values


def _find(known: Mapping[str, Flag], name: str, argument: str) -> Flag:
    if not name or name.startswith("-"):
        raise FlagError(f"bad flag syntax: {quote(argument)}")
    if name in known:
        return known[name]
    if name in ("h", "help"):
        raise HelpRequested
    raise FlagError(f"flag provided but not defined: -{printable(name)}")


def _next_argument(flag: Flag, rest: deque[str]) -> str:
    if not flag.takes_argument:
        return "true"
    if not rest:
        raise FlagError(f"flag needs an argument: -{flag.name}")
    return rest.popleft()


def usage(program: str, flags: Iterable[Flag]) -> str:
    """Describe the flags in the layout of Go's PrintDefaults, in the order given."""
    kinds: dict[Callable[[str], object], str] = {boolean: "", duration: " duration", unsigned: " uint"}
    lines = [f"Usage of {program}:"]
    for flag in flags:
        default = quote(flag.default) if flag.read is string else flag.default
        lines.append(f"  -{flag.name}{kinds.get(flag.read, ' string')}")
        lines.append(f"    \t{flag.usage}" + (f" (default {default})" if flag.default else ""))
    return "\n".join(lines) + "\n"
