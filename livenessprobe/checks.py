"""Sharing checks: one at a time, on one thread, for all requests that come while it runs."""

import threading
from collections.abc import Callable
from typing import NamedTuple

from livenessprobe.health import Verdict, failed
from livenessprobe.stopping import Stop


class Checked(NamedTuple):
    """A check that has ended, as observers see it."""

    verdict: Verdict
    answers: int
    """Requests that shared the verdict; at least 1."""
    asked: float
    """When, by the clock, the first of them arrived."""


class Checks:
    """Runs one check at a time, on the thread in run(); requests that come during a check share its verdict."""

    def __init__(self, stop: Stop, clock: Callable[[], float]) -> None:
        self._stop, self._clock = stop, clock
        self._asked: float
        """When the first of those who wait asked."""
        self._changed = threading.Condition()
        self._waiting: list[Callable[[Verdict], None]] = []

    def ask(self, answer: Callable[[Verdict], None]) -> None:
        """Have answer called with the verdict of the check in flight, or else of a new one; from any thread.

        answer is called on the thread in run() (while stopping: on the caller's), must not block and must not raise.
        """
        with self._changed:
            stopping = self._stop.is_set()
            if not stopping:
                if not self._waiting:
                    self._asked = self._clock()
                self._waiting.append(answer)
                self._changed.notify()
        if stopping:
            answer(failed("Canceled", "the liveness probe is stopping"))

    def run(self, check: Callable[[float], Verdict], *observers: Callable[[Checked], None]) -> None:
        """Check whenever asked, until the program stops.

        check gets the moment, by the clock, when the first of its requests arrived.
        """
        with self._stop.interrupting(self._wake):
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or self._stop.is_set())
                    if not self._waiting:
                        return
                self.run_once(check, *observers)

    def run_once(self, check: Callable[[float], Verdict], *observers: Callable[[Checked], None]) -> None:
        """Check if anybody waits for it; used if the system grants no thread for run()."""
        with self._changed:
            if not self._waiting:
                return
            asked = self._asked
        try:
            verdict = check(asked)
        except Exception as error:  # a defect of ours must not silence the probe
            verdict = failed("Internal", f"the liveness probe itself failed: {error!r}")
        # From here on the check has ended: whoever asks now waits for the next one.
        with self._changed:
            answers, self._waiting = self._waiting, []
        try:  # before the answers, so that whoever gets one finds it counted
            for observe in observers:
                observe(Checked(verdict, len(answers), asked))
        finally:
            for answer in answers:
                answer(verdict)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()
