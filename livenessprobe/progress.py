"""How far a check of --once has come, and saying now and then what it waits for; pure, waiting is a parameter."""

import logging
from collections.abc import Callable

from livenessprobe.health import Verdict

MOMENT_SECONDS = 0.1  # by which an attempt that finds no driver has ended
_SAY_WAITING_SECONDS = 10.0
_SAY_WAITING_ON_TERMINAL_SECONDS = 0.3

_logger = logging.getLogger(__name__)


class Progress:
    """How far a check has come; what it hears and what it says may be on different threads."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._begun = float("-inf")
        self._obstacle: Verdict | None = None

    def begin(self) -> None:
        """Hear that an attempt begins."""
        self._begun = self._clock()

    def wait(self, obstacle: Verdict) -> None:
        """Hear why the last attempt is to be repeated."""
        self._begun, self._obstacle = float("inf"), obstacle

    def obstacle(self) -> Verdict | None:
        """Say why there is no connection; None if there seems to be one, since the attempt under way takes its time."""
        return self._obstacle if self._clock() - self._begun < MOMENT_SECONDS else None

    def say(self, address: str, longest: float, done: Callable[[float], bool], *, on_terminal: bool) -> None:
        """Log what is waited for until it is done: soon on a terminal, and every 10 seconds; done waits some seconds for that."""
        start = self._clock()
        said_after = _SAY_WAITING_ON_TERMINAL_SECONDS if on_terminal else _SAY_WAITING_SECONDS
        while not done(said_after):
            said_after = _SAY_WAITING_SECONDS
            obstacle = self.obstacle()
            _logger.info(
                "Waiting for the CSI driver",
                {
                    "for": obstacle.text if obstacle else "its answer to Probe",
                    "address": address,
                    "waited": f"{self._clock() - start:.0f}s",
                    "longest": f"{longest:.0f}s",
                },
            )
