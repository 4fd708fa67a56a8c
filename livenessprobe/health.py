"""The rules of a check, pure: no I/O, no thread, no clock of its own; the driver and time are parameters."""

import enum
from collections.abc import Callable
from typing import NamedTuple

from livenessprobe.quoting import cut

RETRY_SECONDS = 0.1
_SHORTEST_ATTEMPT_SECONDS = 0.05


class Outcome(enum.Enum):
    """What a check found; the values name it in metrics and logs."""

    HEALTHY = "healthy"
    NOT_READY = "not_ready"  # alive and initializing, by the CSI specification's ProbeResponse.ready
    FAILED = "failed"  # the Probe call failed or was not answered in time
    UNREACHABLE = "unreachable"  # there was no connection to call over


class Verdict(NamedTuple):
    """The result of one check."""

    outcome: Outcome
    reason: str
    """A few words from a small set: a gRPC code, or the system's words."""
    text: str
    """For people: `ok`, or what is wrong. May hold the driver's text: at most 4 KiB, not yet made printable."""
    may_heal: bool = False
    """Whether trying again within the same check makes sense: the socket is missing, or refuses."""


HEALTHY = Verdict(Outcome.HEALTHY, "OK", "ok")
NOT_READY = Verdict(Outcome.NOT_READY, "not ready", "driver responded but is not ready")


def failed(code: str, message: str) -> Verdict:
    """Say that the Probe call failed, in the words of Go's gRPC; code is a gRPC code's name as in Go."""
    return Verdict(Outcome.FAILED, code, cut(f"rpc error: code = {code} desc = {message}"))


class Patience(NamedTuple):
    """How long a check may take, in seconds."""

    connect: float
    """How long to go on retrying a socket that is missing or refuses."""
    answer: float
    """For one attempt to connect and get the answer."""
    total: float
    """For the whole check."""


def served(connection_timeout: float, probe_timeout: float) -> Patience:
    """Give the patience of a served check: the answer is out some 50 ms before probe_timeout.

    In the field the kubelet's own timeout often equals probe_timeout, and the answer with the reason must win.
    """
    total = probe_timeout - min(0.05, probe_timeout / 4)
    return Patience(connect=min(connection_timeout, total), answer=total, total=total)


def one_shot(connection_timeout: float, probe_timeout: float) -> Patience:
    """Give the patience of --once: first for the socket, then for the answer."""
    return Patience(
        connect=connection_timeout, answer=probe_timeout, total=connection_timeout + probe_timeout
    )


def check(
    attempt: Callable[[float], Verdict],
    patience: Patience,
    start: float,
    clock: Callable[[], float],
    pause: Callable[[float], bool],
    waiting: Callable[[Verdict], None] = lambda verdict: None,
) -> Verdict:
    """Try to probe the driver until there is a verdict that waiting would not change, or patience runs out.

    start is when, by the clock, somebody began to wait for it. attempt gets the moment by which it must end; pause
    sleeps and returns True if the program is stopping; waiting sees the verdict of every attempt that is about to be
    repeated.
    """
    while True:
        begin = clock()
        verdict = attempt(min(begin + patience.answer, start + patience.total))
        end = clock()
        # One more attempt, with less time than this one took, would only run out of it.
        needed = max(_SHORTEST_ATTEMPT_SECONDS, end - begin)
        left = start + min(patience.connect, patience.total - needed) - end
        if not verdict.may_heal or left <= 0:
            return verdict
        waiting(verdict)
        if pause(min(RETRY_SECONDS, left)):
            return verdict
