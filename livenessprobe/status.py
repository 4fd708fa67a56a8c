"""The pages /statusz and /flagz, for people, laid out as Kubernetes' own components do (KEP-4827, KEP-4828); pure text."""

import time
from collections.abc import Iterable
from typing import NamedTuple

from livenessprobe.history import Seen
from livenessprobe.quoting import printable

_WARNING = "Warning: this page is for people; what it shows, and how, may change in any release."


class Program(NamedTuple):
    """What does not change while it runs."""

    started: float
    """By the monotonic clock, as are all moments of a Seen."""
    versions: tuple[tuple[str, str], ...]
    """(what, its version)."""
    paths: tuple[str, ...]
    address: str
    """The driver's."""


def statusz(program: Program, driver_name: str, seen: Seen | None, now: float, ahead: float) -> str:
    """Write /statusz; ahead is how far the time of day is ahead of the monotonic clock."""

    def dated(moment: float) -> str:
        return time.strftime("%a %b %e %H:%M:%S UTC %Y", time.gmtime(moment + ahead))

    lines = [
        "",
        "livenessprobe statusz",
        _WARNING,
        "",
        f"Started: {dated(program.started)}",
        f"Up: {_lasted(now - program.started)}",
        *(f"{what} version: {which}" for what, which in program.versions),
        f"Paths: {' '.join(program.paths)}",
        "",
        f"Driver address: {printable(program.address)}",
        f"Driver name: {printable(driver_name) or 'not known yet'}",
    ]
    if seen is None:
        return "\n".join([*lines, "Last verdict: none yet, as nobody has asked for one", ""])
    since = seen.changes[-1].at
    lines += [
        f"Last verdict: {seen.verdict.outcome.value}: {printable(seen.verdict.text)}",
        f"Since: {dated(since)}, for {_lasted(now - since)}",
        f"Last check: {dated(seen.found)}, {_lasted(now - seen.found)} ago, took {seen.found - seen.asked:.3f} s",
        "",
        "Last changes, the newest first:",
    ]
    lines += [
        f"{dated(change.at)}  {change.verdict.outcome.value}: {printable(change.verdict.text)}"
        for change in reversed(seen.changes)
    ]
    return "\n".join([*lines, ""])


def flagz(flags: Iterable[tuple[str, str]]) -> str:
    """Write /flagz from the names and values of all flags."""
    lines = [f"{name}={printable(value)}" for name, value in sorted(flags)]
    return "\n".join(["", "livenessprobe flagz", _WARNING, "", *lines, ""])


def _lasted(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} hr {minutes:02} min {rest:02} sec"
