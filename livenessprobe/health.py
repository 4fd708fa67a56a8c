"""The rules of a check, pure: no I/O, no clock of its own; the driver, time and observers are parameters."""

import enum
import threading
from collections.abc import Callable
from dataclasses import dataclass

from livenessprobe.quoting import cut

RETRY_SECONDS = 0.1
HANG_SECONDS = 5.0
_SHORTEST_ATTEMPT_SECONDS = 0.05
BURST_SECONDS = 0.1  # checks that follow one another sooner are a burst
_FIRST_REMINDER_SECONDS = 10.0
_LONGEST_REMINDER_SECONDS = 3600.0
# How many texts of one reason are news, one after the other: some drivers' texts vary with each call.
_MOST_TEXTS = 5


class Outcome(enum.Enum):
    """What a check found; the values name it in metrics and logs."""

    HEALTHY = "healthy"
    NOT_READY = "not_ready"  # alive and initializing, by the CSI specification's ProbeResponse.ready
    FAILED = "failed"  # the Probe call failed or was not answered in time
    UNREACHABLE = "unreachable"  # there was no connection to call over


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of one check."""

    outcome: Outcome
    reason: str
    """Few words from a small set: a gRPC code, or the system's words."""
    text: str
    """For people: `ok`, or what is wrong. May hold the driver's text: at most 4 KiB, not yet made printable."""
    may_heal: bool = False
    """Whether trying again within the same check makes sense: the socket is missing, or refuses."""


HEALTHY = Verdict(Outcome.HEALTHY, "OK", "ok")
NOT_READY = Verdict(Outcome.NOT_READY, "not ready", "driver responded but is not ready")


def failed(code: str, message: str) -> Verdict:
    """Say that the Probe call failed, in the words of Go's gRPC; code is a gRPC code's name as in Go."""
    return Verdict(Outcome.FAILED, code, cut(f"rpc error: code = {code} desc = {message}"))


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a check may take, in seconds."""

    connect: float
    """To go on retrying a socket that is missing or refuses."""
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
    """Attempt to probe the driver until there is a verdict that waiting would not change, or patience ends.

    start is when, by the clock, somebody began to wait for it. attempt gets the seconds it may take; pause sleeps and
    returns True where the program is stopping; waiting sees the verdict of every attempt that is about to be repeated.
    """
    while True:
        begin = clock()
        verdict = attempt(min(patience.answer, start + patience.total - begin))
        end = clock()
        # One more attempt, with less time than this one took, would find nothing but that.
        needed = max(_SHORTEST_ATTEMPT_SECONDS, end - begin)
        left = start + min(patience.connect, patience.total - needed) - end
        if not verdict.may_heal or left <= 0:
            return verdict
        waiting(verdict)
        if pause(min(RETRY_SECONDS, left)):
            return verdict


@dataclass(frozen=True, slots=True)
class Checked:
    """A check that has ended, as observers see it."""

    verdict: Verdict
    answers: int
    """Requests that shared the verdict; at least 1."""
    asked: float
    """When, by the clock, the first of them arrived."""


class Checks:
    """Runs one check at a time, on the thread in run(); requests that come during a check share its verdict."""

    def __init__(
        self,
        check: Callable[[float], Verdict],
        clock: Callable[[], float],
        *observers: Callable[[Checked], None],
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        """Take what checks: it gets the moment, by the clock, when the first of the requests it is for arrived.

        rest is called on the same thread when a burst is over.
        """
        self._check, self._clock, self._observers, self._rest = check, clock, observers, rest
        self.in_burst = False
        """Whether the check in flight, or the last one, came soon after the one before it."""
        self._asked = 0.0
        self._found_late: float | None = None
        self._changed = threading.Condition()
        self._waiting: list[Callable[[Verdict], None]] = []
        self._closed = False

    def ask(self, answer: Callable[[Verdict], None]) -> None:
        """Have answer called with the verdict of the check in flight, or else of a new one; from any thread.

        answer is called on the thread in run() (after close(): on the caller's), must not block and must not raise.
        """
        with self._changed:
            closed = self._closed
            if not closed:
                if not self._waiting:
                    self._asked = self._clock()
                self._waiting.append(answer)
                self._changed.notify()
        if closed:
            answer(failed("Canceled", "the liveness probe is stopping"))

    def hangs(self, longest: float) -> bool:
        """Tell whether the check in flight, which was to take so many seconds at most, will never end.

        It is well over its time, and was so some seconds ago: after a stop of the whole process, it needs a moment.
        """
        with self._changed:
            now = self._clock()
            if not self._waiting or now - self._asked < longest + HANG_SECONDS:
                return False
            if self._found_late is None:
                self._found_late = now
            return now - self._found_late >= HANG_SECONDS

    def run(self) -> None:
        """Check whenever asked, until close()."""
        ended = float("-inf")
        while True:
            if self.in_burst and not self._await(BURST_SECONDS):
                self.in_burst = False
                self._rest()
            self._await(None)
            with self._changed:
                if not self._waiting:
                    return
                asked = self._asked
            self.in_burst = asked - ended < BURST_SECONDS
            try:
                verdict = self._check(asked)
            except Exception as error:  # a defect of ours must not silence the probe
                verdict = failed("Internal", f"the liveness probe itself failed: {error!r}")
            ended = self._clock()
            # From here on the check has ended: who asks now waits for the next one.
            with self._changed:
                answers, self._waiting = self._waiting, []
                self._found_late = None
            try:  # first, so that who has the answer finds it counted
                for observe in self._observers:
                    observe(Checked(verdict, len(answers), asked))
            finally:
                for answer in answers:
                    answer(verdict)

    def _await(self, seconds: float | None) -> bool:
        """Wait until there is something to do; tell whether there is."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._waiting or self._closed, seconds))

    def close(self) -> None:
        """Let run() return once the check in flight has been answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()


@dataclass(frozen=True, slots=True)
class Change:
    """Something in a row of verdicts that is worth a line in the log."""

    verdict: Verdict
    failures: int
    """Checks in a row that were not healthy; at recovery: that had not been."""
    seconds: float
    """How long that has lasted, from the first of them being asked for."""
    repeated: bool = False
    """Whether this only reminds of what was said before."""


class History:
    """Finds the changes in a row of verdicts: new states and reasons at once, the same again at growing intervals."""

    def __init__(self) -> None:
        self._last: Verdict | None = None
        self._failures = 0
        self._texts = 1
        self._since = self._remind_at = self._interval = 0.0

    def add(self, verdict: Verdict, asked: float, now: float) -> Change | None:
        """Take the next verdict, asked for and found at moments of a monotonic clock; return what is worth saying."""
        last, self._last = self._last, verdict
        if verdict.outcome is Outcome.HEALTHY:
            if last is not None and last.outcome is Outcome.HEALTHY:
                return None
            change = Change(verdict, self._failures, now - self._since if self._failures else 0.0)
            self._failures = 0
            return change
        if not self._failures:
            self._since = asked
        self._failures += 1
        repeated = last is not None and not self._is_news(last, verdict)
        if repeated and now < self._remind_at:
            return None
        self._interval = (
            min(self._interval * 2, _LONGEST_REMINDER_SECONDS) if repeated else _FIRST_REMINDER_SECONDS
        )
        self._remind_at = now + self._interval
        return Change(verdict, self._failures, now - self._since, repeated)

    def _is_news(self, last: Verdict, verdict: Verdict) -> bool:
        """Compare with the verdict before, and count the texts of one reason."""
        if (last.outcome, last.reason) != (verdict.outcome, verdict.reason):
            self._texts = 1
            return True
        if last.text == verdict.text:
            return False
        self._texts += 1
        return self._texts <= _MOST_TEXTS
