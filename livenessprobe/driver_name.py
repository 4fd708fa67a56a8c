"""Learning the driver's name in the background; the driver is a parameter."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from livenessprobe.stopping import Stop

MOST_PROBLEMS = 5  # logged in a row: with some drivers they vary with each call
DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # seconds between attempts; the last one from then on

_logger = logging.getLogger(__name__)


class Driver(Protocol):
    """What is asked of the driver."""

    def name(self, deadline: float) -> tuple[str, str]:
        """Return its name and "", or "" and what went wrong (also "" if there was no connection)."""

    def identity(self) -> object:
        """Return a value that differs once another driver may be behind the address."""


class Naming:
    """Asks a driver for its name until it tells it, and again whenever there may be another driver."""

    def __init__(
        self,
        driver: Driver,
        timeout: float,
        learnt: Callable[[str], None],
        delays: Sequence[float] = DELAYS,
    ) -> None:
        """Take how many seconds one attempt may last, and who is told of a new name."""
        self._driver, self._timeout, self._learnt, self._delays = driver, timeout, learnt, delays
        self._ask = threading.Event()
        self._asked: object = None

    def reached(self) -> None:
        """Note that a check reached the driver: if it may be another one, ask for its name at once."""
        if self._driver.identity() != self._asked:
            self._ask.set()

    def run(self, stop: Stop) -> None:
        """Learn names until the program stops; the attempt under way ends first."""
        known = said = ""
        problems = 0
        delays = iter(self._delays)
        with stop.interrupting(self._ask.set):
            while not stop.is_set():
                self._asked = self._driver.identity()
                name, problem = self._driver.name(time.monotonic() + self._timeout)
                problems = 0 if name else problems + (problem not in ("", said))
                if problem not in ("", said) and problems <= MOST_PROBLEMS and not stop.is_set():
                    _logger.warning("Cannot learn the CSI driver's name", {"reason": problem})
                said = problem
                if name not in ("", known):
                    known = name
                    self._learnt(name)
                    _logger.info("Learnt the CSI driver's name", {"driver": name})
                if self._ask.wait(None if name else next(delays, self._delays[-1])):
                    delays = iter(self._delays)
                self._ask.clear()  # before looking at the stop and the identity, which are set before _ask
