"""Stopping: one fact, kept once. It is never taken back, ends waits, and interrupts whatever cannot look at it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stop:
    """Whether the program, or a part of it, has to end. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._set = threading.Event()
        self._interrupts: list[Callable[[], object]] = []

    def set(self) -> None:
        """Stop; whoever waits goes on, and whatever is under way is interrupted."""
        self._set.set()
        for interrupt in [*self._interrupts]:
            interrupt()

    def is_set(self) -> bool:
        """Tell whether it was set."""
        return self._set.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait until it is set, for some seconds at most; tell whether it is."""
        return self._set.wait(seconds)

    @contextmanager
    def interrupting(self, interrupt: Callable[[], object]) -> Iterator[None]:
        """Have set() call this while the body runs; at once if it is set already, and twice if both come at the same time."""
        # In this order, and set() in the other: whatever comes first, one of them sees the other.
        self._interrupts.append(interrupt)
        try:
            if self.is_set():
                interrupt()
            yield
        finally:
            self._interrupts.remove(interrupt)
