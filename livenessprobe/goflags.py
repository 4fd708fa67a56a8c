"""Command lines in the syntax of Go's flag package; knows none of our flags, prints nothing, never exits."""

import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from livenessprobe.quoting import cut, printable, quote

# Unambiguous, so that matching takes time in proportion to the argument's length.
_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_PART = rf"({_NUMBER})([^0-9.]+)"
_NANOSECONDS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9} | {
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_DECIMALS = 18  # of a number in a duration; more than a nanosecond needs, even in hours
_UNREPLACED = r"\$(?:\(([\w.-]+)\)|\{([\w.-]+)\})"
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
    """Read a whole number from 0 to 2**64 - 1; raises ValueError for anything else."""
    digits = text.removeprefix("+")
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 20 or int(digits) >= 2**64:
        raise ValueError("not a whole number: write 0 or more")
    return int(digits)


def duration(text: str) -> float:
    """Read a duration such as 300ms, 3s, 1m0.5s as seconds; raises ValueError with what to write instead.

    The syntax is that of Go's time.ParseDuration: numbers with units, one after another, with one sign in front.
    """
    number = text[1:] if text[:1] in ("+", "-") else text
    if number == "0":
        return 0.0
    if not re.fullmatch(f"(?:{_PART})+", number):
        if re.fullmatch(_NUMBER, number):
            raise ValueError(
                f"missing unit in duration: write {text}s for seconds, {text}ms for milliseconds"
            )
        raise ValueError("not a duration: write a number with a unit, as in 300ms, 3s, 1m30s")
    negative = text.startswith("-")
    nanoseconds = sum(_scaled(*part) for part in re.findall(_PART, number)) // 10**_DECIMALS
    if nanoseconds >= 2**63 + negative:  # Go keeps a signed 64-bit count
        raise ValueError("duration too long: the longest is 2562047h")
    seconds: float = nanoseconds / 1e9
    return -seconds if negative else seconds


def written(seconds: float) -> str:
    """Write a duration as Go does: 300ms, 3s, 1m0.5s, 1h0m0s."""
    sign, nanoseconds = "-" * (seconds < 0), round(abs(seconds) * 1e9)
    if 0 < nanoseconds < 10**9:
        unit = next(unit for unit in ("ms", "µs", "ns") if nanoseconds >= _NANOSECONDS[unit])
        return f"{sign}{_decimal(nanoseconds, _NANOSECONDS[unit])}{unit}"
    minutes, rest = divmod(nanoseconds, _NANOSECONDS["m"])
    hours, minutes = divmod(minutes, 60)
    shown = f"{hours}h{minutes}m" if hours else f"{minutes}m" * (minutes > 0)
    return f"{sign}{shown}{_decimal(rest, 10**9)}s"


def _decimal(number: int, unit: int) -> str:
    whole, rest = divmod(number, unit)
    return f"{whole}.{rest * 10**9 // unit:09}".rstrip("0").rstrip(".")


def _scaled(number: str, unit: str) -> int:
    """Return a number with its unit in nanoseconds, times ten to the power of _DECIMALS: exact, unlike sums of floats."""
    if unit not in _NANOSECONDS:
        raise ValueError(f"unknown unit {quote(cut(unit))} in duration: the units are ns, us, ms, s, m, h")
    whole, _, fraction = number.partition(".")
    digits = whole.lstrip("0")[: _DECIMALS + 2]  # that many are too long in any unit
    return int((digits or "0") + fraction[:_DECIMALS].ljust(_DECIMALS, "0")) * _NANOSECONDS[unit]


def unreplaced(text: str) -> str:
    """Say which variable in a value was not replaced, and what to do about it; empty if there is none."""
    found = re.search(_UNREPLACED, text) if "$" in text else None
    if found is None:
        return ""
    if found[1]:
        return f"{found[0]} was not replaced: define the variable {found[1]} in the container's env"
    return f"{found[0]} was not replaced: in a manifest, Kubernetes replaces only $({found[2]})"


class Flag(NamedTuple):
    """One flag: its name without dashes, how its value is read, and what the usage says about it."""

    name: str
    read: Callable[[str], object]
    """Turns the value's text into a value; raises ValueError with the reason."""
    default: str
    """As the usage shows it; empty for none."""
    usage: str

    @property
    def takes_argument(self) -> bool:
        """Whether the next argument is the value if there is no `=`: never for a boolean."""
        return self.read is not boolean


def parse(arguments: Sequence[str], flags: Iterable[Flag]) -> Mapping[str, object]:
    """Read the command line (without the program's name) into the values that were given, the last one for each flag.

    A flag that was not given is not in the result, so the caller sees which ones are explicit.
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
            reason = unreplaced(text) or error
            raise FlagError(f"invalid value {quote(cut(text))} for flag -{name}: {reason}") from None
    if rest:
        advice = "only flags are accepted, and a boolean's value goes after ="
        raise FlagError(f"unexpected argument {quote(cut(rest[0]))}: {advice}")
    return values


def _find(known: Mapping[str, Flag], name: str, argument: str) -> Flag:
    if not name or name.startswith("-"):
        raise FlagError(f"bad flag syntax: {quote(cut(argument))}")
    if name in known:
        return known[name]
    if name in ("h", "help"):
        raise HelpRequested
    raise FlagError(f"flag provided but not defined: -{printable(cut(name))}{_advice(known, name, argument)}")


def _advice(known: Mapping[str, Flag], name: str, argument: str) -> str:
    """Suggest what an unknown name may have meant."""
    flag, blank, value = argument.lstrip("-").partition(" ")
    if blank and flag in known:
        apart = ", or make them two items" if known[flag].takes_argument else ""
        return f": flag and value are one item: write -{flag}={printable(cut(value))}{apart}"
    from difflib import get_close_matches  # only now: it costs start-up time

    nearest = get_close_matches(name, [*known, "help"], 1)
    return f"; the nearest is -{nearest[0]}" if nearest else ""


def _next_argument(flag: Flag, rest: deque[str]) -> str:
    if not flag.takes_argument:
        return "true"
    if not rest:
        raise FlagError(f"flag needs an argument: -{flag.name}")
    return rest.popleft()


def describe(flags: Iterable[Flag]) -> str:
    """Describe the flags in the layout of Go's PrintDefaults, in the order given."""
    kinds: dict[Callable[[str], object], str] = {boolean: "", duration: " duration", unsigned: " uint"}
    lines = []
    for flag in flags:
        default = quote(flag.default) if flag.read is string else flag.default
        lines.append(f"  -{flag.name}{kinds.get(flag.read, ' string')}")
        lines.append(f"    \t{flag.usage}" + (f" (default {default})" if flag.default else ""))
    return "\n".join(lines)
