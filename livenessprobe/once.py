"""--once: one check, one line on standard output, one exit code. Never imports the HTTP server."""

import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable

from livenessprobe import health
from livenessprobe.config import Config, Exit
from livenessprobe.health import Outcome, Verdict
from livenessprobe.quoting import printable
from livenessprobe.writer import write_out

_SAY_WAITING_SECONDS = 10.0
_SAY_WAITING_ON_TERMINAL_SECONDS = 0.3
_MOMENT_SECONDS = 0.1  # in which an attempt that finds no driver has come to its end
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_EXITS = {
    Outcome.HEALTHY: Exit.OK,
    Outcome.NOT_READY: Exit.NOT_READY,
    Outcome.FAILED: Exit.FAILED,
    Outcome.UNREACHABLE: Exit.UNREACHABLE,
}


class _Progress:
    """What the check has found so far: nothing while an attempt is under way."""

    def __init__(self) -> None:
        self.begun = False
        self._verdict = health.HEALTHY
        self._known = threading.Event()

    def begin(self) -> None:
        self._known.clear()
        self.begun = True

    def tell(self, verdict: Verdict) -> None:
        self._verdict = verdict
        self._known.set()

    def verdict(self) -> Verdict | None:
        return self._verdict if self._known.wait(_MOMENT_SECONDS) else None


def once(config: Config) -> Exit:
    """Check once; print the verdict, and return what it means. On SIGTERM or SIGINT the verdict is the one so far."""
    progress = _Progress()
    woken, wake_up = socket.socketpair()
    wake_up.setblocking(False)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(wake_up.fileno())  # a signal's number arrives at the other end
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_check, args=(config, progress, lambda: wake_up.send(b"\0")), daemon=True).start()
    caught = _wait(woken, config, progress)
    verdict = progress.verdict()
    if caught and (verdict is None or verdict.outcome is not Outcome.UNREACHABLE):
        verdict = health.failed("Canceled", f"interrupted by {signal.Signals(caught).name}")
    verdict = verdict or health.failed("DeadlineExceeded", "the check does not end")
    write_out(1, printable(verdict.text))  # where nobody reads, the exit code still tells
    return _EXITS[verdict.outcome]


def _check(config: Config, progress: _Progress, done: Callable[[], object]) -> None:
    try:
        from livenessprobe.driver import Driver

        driver = Driver(config.csi_address, config.socket_path)
        patience = health.one_shot(config.connection_timeout, config.probe_timeout)

        def attempt(timeout: float) -> Verdict:
            progress.begin()
            return driver.attempt(timeout)

        progress.tell(
            health.check(attempt, patience, time.monotonic(), time.monotonic, _pause, waiting=progress.tell)
        )
    except Exception as error:
        progress.tell(health.failed("Internal", f"the liveness probe itself failed: {error!r}"))
    done()


def _pause(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _wait(woken: socket.socket, config: Config, progress: _Progress) -> int:
    """Wait for the check (return 0; also where it does not end) or a signal (return its number); say now and then what for."""
    start = time.monotonic()
    # grpc keeps no deadline where the system denies it a thread, nor ever after.
    longest = config.connection_timeout + config.probe_timeout + health.HANG_SECONDS
    said_after = _SAY_WAITING_ON_TERMINAL_SECONDS if os.isatty(2) else _SAY_WAITING_SECONDS
    waiting = select.poll()  # not select(), which takes no descriptor above 1,023
    waiting.register(woken, select.POLLIN)
    while not waiting.poll(said_after * 1e3):
        if not progress.begun:  # still loading
            start = time.monotonic()
            continue
        if time.monotonic() - start > longest:
            return 0
        said_after = _SAY_WAITING_SECONDS
        verdict = progress.verdict()
        logging.getLogger(__name__).info(
            "Waiting for the CSI driver",
            {
                "for": verdict.text if verdict else "its answer to Probe",
                "address": config.csi_address,
                "waited": f"{time.monotonic() - start:.0f}s",
            },
        )
    return woken.recv(1)[0]
