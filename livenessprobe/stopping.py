"""Stopping: one fact, kept once. It is never taken back; it ends waits, and interrupts calls that cannot look at it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class Stop:
    """Whether the program, or a part of it, has to end. Methods may be called from any thread, set() by a signal's handler."""

    def __init__(self) -> None:
        self._is_set = False
        # Not an Event: its set() takes a lock, which the thread that a handler interrupts may hold.
        self._gate = threading.Lock()
        """Closed until stopped; then those who wait pass through it, one after another."""
        self._gate.acquire()
        self._interrupts: list[Callable[[], object]] = []

    def set(self) -> None:
        """Stop: end all waits, and interrupt what is under way."""
        self._is_set = True
        self._open()
        for interrupt in [*self._interrupts]:
            interrupt()

    def is_set(self) -> bool:
        """Tell whether it was set."""
        return self._is_set

    def wait(self, seconds: float) -> bool:
        """Wait until it is set, for some seconds at most; tell whether it is."""
        if self._gate.acquire(timeout=min(seconds, threading.TIMEOUT_MAX)):
            self._open()
        return self._is_set

    def _open(self) -> None:
        with suppress(RuntimeError):  # it is open already
            self._gate.release()

    @contextmanager
    def interrupting(self, interrupt: Callable[[], object]) -> Iterator[None]:
        """Have set() call this while the body runs; at once if it is set already, and twice if both come at the same time."""
        # In this order, while set() has the other: whichever comes first, one of them sees the other.
        self._interrupts.append(interrupt)
        try:
            if self.is_set():
                interrupt()
            yield
        finally:
            self._interrupts.remove(interrupt)
