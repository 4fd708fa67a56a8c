"""How far a check of --once has come, and a line now and then about what it waits for; pure, waiting is a parameter."""

import logging
from collections.abc import Callable

from livenessprobe.health import Verdict

MOMENT_SECONDS = 0.1  # an attempt that finds no driver has ended by then
_SAY_WAITING_SECONDS = 10.0
_SAY_WAITING_ON_TERMINAL_SECONDS = 0.3

_logger = logging.getLogger(__name__)


class Progress:
    """How far a check has come; begin() and wait() may be called on another thread than say()."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._begun = float("-inf")
        self._obstacle: Verdict | None = None

    def begin(self) -> None:
        """Note that an attempt begins."""
        self._begun = self._clock()

    def wait(self, obstacle: Verdict) -> None:
        """Note why the last attempt will be repeated."""
        self._begun, self._obstacle = float("inf"), obstacle

    def obstacle(self) -> Verdict | None:
        """Return why there is no connection; None if there seems to be one, as the attempt under way is taking its time."""
        return self._obstacle if self._clock() - self._begun < MOMENT_SECONDS else None

    def say(self, address: str, longest: float, done: Callable[[float], bool], *, on_terminal: bool) -> None:
        """Log what it waits for until that is done: on a terminal soon, then every 10 seconds; done waits that many seconds."""
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
