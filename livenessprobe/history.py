"""The changes in a row of verdicts: what is worth a line in the log; pure, time is a parameter."""

from typing import NamedTuple

from livenessprobe.health import Outcome, Verdict

_FIRST_REMINDER_SECONDS = 10.0
_LONGEST_REMINDER_SECONDS = 3600.0
# How many texts in a row with the same reason are news: some drivers' texts vary with each call.
_MOST_TEXTS = 5
_KEPT = 16


class Change(NamedTuple):
    """Something in a row of verdicts that is worth a line in the log."""

    at: float
    """When, by a monotonic clock, the verdict was found."""
    verdict: Verdict
    failures: int
    """Checks in a row that were not healthy; at recovery, how many had not been."""
    seconds: float
    """How long that has lasted, from when the first of them was asked for."""
    repeated: bool = False
    """Whether this only repeats what was said before."""


class Seen(NamedTuple):
    """The last verdict and what led to it; one value, so that other threads never see half of it."""

    verdict: Verdict
    asked: float
    """When, by a monotonic clock, its check was asked for."""
    found: float
    changes: tuple[Change, ...]
    """The last 16 that were new, the newest last: its `at` is when the present state began."""


class History:
    """Finds the changes in a row of verdicts: new states and reasons at once, the same ones again at growing intervals."""

    def __init__(self) -> None:
        self.seen: Seen | None = None
        """None before the first verdict."""
        self._last: Verdict | None = None
        self._failures = 0
        self._texts = 1
        # Each failure that is news sets these.
        self._since: float
        self._remind_at: float
        self._interval: float

    def add(self, verdict: Verdict, asked: float, now: float) -> Change | None:
        """Take the next verdict, asked for and found at moments of a monotonic clock; return what is worth saying."""
        change = self._change(verdict, asked, now)
        changes = self.seen.changes if self.seen else ()
        if change is not None and not change.repeated:
            changes = (*changes, change)[-_KEPT:]
        self.seen = Seen(verdict, asked, now, changes)
        return change

    def _change(self, verdict: Verdict, asked: float, now: float) -> Change | None:
        last, self._last = self._last, verdict
        if verdict.outcome is Outcome.HEALTHY:
            if last is not None and last.outcome is Outcome.HEALTHY:
                return None
            change = Change(now, verdict, self._failures, now - self._since if self._failures else 0.0)
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
        return Change(now, verdict, self._failures, now - self._since, repeated)

    def _is_news(self, last: Verdict, verdict: Verdict) -> bool:
        """Compare with the verdict before, and count the texts of one reason."""
        if (last.outcome, last.reason) != (verdict.outcome, verdict.reason):
            self._texts = 1
            return True
        if last.text == verdict.text:
            return False
        self._texts += 1
        return self._texts <= _MOST_TEXTS
