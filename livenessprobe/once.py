"""--once: one check, one line on standard output, one exit code. Never imports the HTTP server.

The check runs on the main thread, where a signal ends it; another thread says now and then what it is waiting for.
"""

import gc
import os
import signal
import time
from contextlib import suppress
from functools import partial
from typing import NoReturn

from livenessprobe import health, threads
from livenessprobe.config import Config, Exit
from livenessprobe.health import Outcome, Verdict
from livenessprobe.progress import MOMENT_SECONDS, Progress
from livenessprobe.quoting import printable
from livenessprobe.stopping import Stop
from livenessprobe.writer import write_out

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_EXITS = {
    Outcome.HEALTHY: Exit.OK,
    Outcome.NOT_READY: Exit.NOT_READY,
    Outcome.FAILED: Exit.FAILED,
    Outcome.UNREACHABLE: Exit.UNREACHABLE,
}


class _Interrupted(BaseException):
    """A signal came. Not an Exception, which other code may catch."""


def once(config: Config) -> Exit:
    """Check once; print the verdict, and return what it means. On SIGTERM or SIGINT the verdict is the one so far."""
    try:
        verdict = _check(config)
    except Exception as error:
        verdict = health.failed("Internal", f"the liveness probe itself failed: {error!r}")
    write_out(1, printable(verdict.text))  # if nobody reads, there is still the exit code
    return _EXITS[verdict.outcome]


def _check(config: Config) -> Verdict:
    from livenessprobe.driver import Driver, way_to

    call = way_to(config.csi_address, config.socket_path)
    driver = Driver(config.csi_address, config.socket_path, call)
    patience = health.one_shot(config.connection_timeout, config.probe_timeout)
    gc.freeze()  # what is loaded stays
    gc.enable()
    progress, done = Progress(time.monotonic), Stop()

    def attempt(deadline: float) -> Verdict:
        progress.begin()
        return driver.attempt(deadline)

    with suppress(threads.Denied):  # then it waits in silence
        saying = partial(
            progress.say, config.csi_address, patience.total, done.wait, on_terminal=os.isatty(2)
        )
        threads.start(saying)
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        verdict = health.check(
            attempt, patience, time.monotonic(), time.monotonic, done.wait, waiting=progress.wait
        )
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    except _Interrupted as interrupted:
        verdict = health.failed("Canceled", f"interrupted by {interrupted}")
        # There was no connection up to now: is there still none?
        if progress.obstacle():
            last = driver.attempt(time.monotonic() + MOMENT_SECONDS)
            verdict = last if last.outcome is Outcome.UNREACHABLE else verdict
    done.set()
    return verdict


def _interrupt(number: int, _: object) -> NoReturn:
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_DFL)  # a second one ends the program at once
    raise _Interrupted(signal.Signals(number).name)
