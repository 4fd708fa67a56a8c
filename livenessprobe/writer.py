"""Writing to standard output or error without ever waiting for a reader.

It may be a terminal on which somebody pressed ^S, a pipe shared with other writers, a socket: whether a write would
block can't be known beforehand, and O_NONBLOCK would hold for everybody who shares the descriptor. So a thread writes,
and may wait for ever; a bounded queue is in front of it.
"""

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from livenessprobe import threads

MOST_BYTES = 64 * 1024  # in the queue; a pipe holds as much again
MOMENT_SECONDS = 0.3  # for the last lines; two of these and the answers still on their way fit into a second
_TURN_SECONDS = 5.0  # in which a thread gets its turn on a busy machine, or under a tight limit
_MEMORY_PAUSE_SECONDS = 0.1  # in which others may give some back


class Writer:
    """Writes lines in order, each whole or not at all; those it has no room for are lost and counted."""

    def __init__(self, descriptor: int, loss: Callable[[int], str]) -> None:
        """Take what makes a line of how many were lost: it goes where they would have been."""
        self._descriptor, self._loss = descriptor, loss
        self._changed = threading.Condition()
        self._queue: deque[tuple[bytes, int]] = deque()
        """Each line, and how many are lost with it; the first one stays until it's written."""
        self._size = self._lost = 0
        self._torn = False
        self._has_thread = True
        try:
            threads.start(self._run)
        except threads.Denied:
            self._has_thread = False

    def write(self, line: str) -> None:
        """Take a line, without its end, or lose it; from any thread."""
        with self._changed:
            data = _encoded(line)
            # Once lines are lost, no more are taken until the queue is empty: one gap, and one line that reports it.
            if self._queue and (self._lost or self._size + len(data) > MOST_BYTES):
                self._lost += 1
                return
            self._tell_loss()
            self._append(data, 1)
            while self._queue and not self._has_thread:
                self._write_first()

    def flush(self, seconds: float = MOMENT_SECONDS) -> None:
        """Wait until all is written: no longer than this if nobody reads, and five seconds more if somebody does."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queue, seconds)
            if self._queue and self._is_ready():  # somebody reads, so it is the thread that had no turn
                self._changed.wait_for(lambda: not self._queue, _TURN_SECONDS)

    def _run(self) -> None:
        while True:
            try:
                with self._changed:
                    self._changed.wait_for(lambda: self._queue)
                self._write_first()
            except MemoryError:
                # Even to wait takes some. Without this thread nothing would ever be written again.
                time.sleep(_MEMORY_PAUSE_SECONDS)

    def _write_first(self) -> None:
        data, lines = self._queue[0]
        written = self._write(data)
        with self._changed:
            self._queue.popleft()
            self._size -= len(data)
            if not written:
                self._lost += lines
            elif not self._queue:
                self._tell_loss()
            self._changed.notify_all()

    def _tell_loss(self) -> None:
        if self._lost:
            self._append(_encoded(self._loss(self._lost)), self._lost)
            self._lost = 0

    def _append(self, data: bytes, lines: int) -> None:
        self._queue.append((data, lines))
        self._size += len(data)
        self._changed.notify_all()

    def _write(self, data: bytes) -> bool:
        """Return whether all was written; after a part of a line, the next one doesn't continue it."""
        data = rest = b"\n" * self._torn + data
        with suppress(OSError, MemoryError):  # closed, full, or nobody reads any more
            while rest:
                rest = rest[self._write_some(rest) :]
        if len(rest) < len(data):
            self._torn = bool(rest)
        return not rest

    def _write_some(self, data: bytes) -> int:
        if not self._has_thread:  # for a moment, others who share it see it non-blocking too
            blocking = os.get_blocking(self._descriptor)
            os.set_blocking(self._descriptor, False)
            try:
                return os.write(self._descriptor, data)
            finally:
                os.set_blocking(self._descriptor, blocking)
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # somebody else made it so
            self._is_ready(None)
            return 0

    def _is_ready(self, milliseconds: int | None = 0) -> bool:
        """Tell whether it takes more, after this time at most; not if nobody can read it any more."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return poll.poll(milliseconds) == [(self._descriptor, select.POLLOUT)]


def write_out(descriptor: int, text: str) -> None:
    """Write the one text there is to write, without its last line end; give up soon if nobody reads."""
    writer = Writer(descriptor, str)
    writer.write(text)
    writer.flush()


def _encoded(line: str) -> bytes:
    return (line + "\n").encode(errors="backslashreplace")
