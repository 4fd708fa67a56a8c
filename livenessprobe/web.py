"""The HTTP server: one thread, many connections, hard limits; knows nothing of CSI.

A connection is reading (its request's head is not complete), waiting (its route has not answered), or leaving (the
answer is on its way). Nobody can keep one reading or leaving for more than a few seconds, and when there are too many,
the oldest reading one is evicted: half-open and idle clients, and those that left, cannot keep a proper request out.

Bytes have two budgets: heads that come in, and answers that are not delivered, in this process and in the kernel. A
body counts once, however many clients get it. When a budget is spent, the oldest connection of its kind is evicted.

It is one file of more than 250 lines, since each of its states and limits touches the others.
"""

import logging
import os
import resource
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http import HTTPStatus
from io import FileIO

from livenessprobe import limits
from livenessprobe.connection import NO_ANSWER, NOTHING, Connection, Undelivered
from livenessprobe.exchange import LONGEST_HEAD, Exchange, Response, head_of, head_size
from livenessprobe.listening import Listener

HEAD_SECONDS = 5.0
LEAVE_SECONDS = 2.0
MOST_CONNECTIONS = 2048
MOST_HEAD_BYTES = 2 * 1024 * 1024  # of all reading connections together
MOST_UNDELIVERED_BYTES = 1024 * 1024  # of all leaving connections together, here and in the kernel
_CONNECTION_BYTES = 4096  # what the kernel needs for one, measured
_SMALL_ANSWER = 2048  # bytes: what the kernel may keep of a closed connection
_RESERVED_DESCRIPTORS = 48  # for the driver's connections, the log, the interpreter
_LEAST_DESCRIPTORS = 1024
_ACCEPTS_A_TURN = 64  # then it is the open connections' turn
_FULL_PAUSE_SECONDS = 0.1
_EXHAUSTION_PAUSE_SECONDS = 0.5
_TELL_EXHAUSTION_SECONDS = 60.0  # it may come and go with each connection


class Server:
    """Serves all listeners in run(), on one thread; only stop() and routes' replies may come from others."""

    def __init__(
        self,
        *listeners: Listener,
        most: int = MOST_CONNECTIONS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raise an OSError that names the call if the system denies one."""
        self._listeners, self._clock = listeners, clock
        self._most = max(8, min(most, _descriptors(most + _RESERVED_DESCRIPTORS) - _RESERVED_DESCRIPTORS))
        with _named("pipe2"):
            ends = os.pipe()
        for end in ends:
            os.set_blocking(end, False)
        self._woken, self.wake_up = FileIO(ends[0], "r"), FileIO(ends[1], "w")
        """What is written into wake_up ends a wait: for signal.set_wakeup_fd()."""
        # Dicts as ordered sets; the deadlines within one grow, so the first is the next to expire.
        self._reading: dict[Connection, None] = {}
        self._leaving: dict[Connection, None] = {}
        self._waiting: dict[Connection, None] = {}
        self._head_bytes = 0
        self._undelivered = Undelivered()
        self._replies: deque[tuple[Connection, Response]] = deque()
        self._asleep = False
        self._accepting = True
        self._accept_at: float | None = None  # while not accepting: when to go on
        self._exhaustion_told = float("-inf")
        self._stops = 0
        try:
            self._selector = self._watching(selectors.DefaultSelector())
        except OSError:  # some part of epoll
            self._selector = self._watching(selectors.PollSelector())

    def stop(self) -> None:
        """Make run() return and, when called again, drain() too; from any thread or a signal's handler."""
        self._stops += 1
        self._wake()

    def run(self, between: Callable[[], None] = lambda: None) -> None:
        """Serve until stop(); then listen no more and drop the connections that have not sent a request.

        Between turns, work that has no thread of its own is done; nobody is served meanwhile.
        """
        while not self._stops:
            self._turn(None)
            between()
        self._turn(self._clock())  # what has come by now is still read
        between()
        self._pause_accepting(float("inf"))
        for listener in self._listeners:
            listener.close()
        for connection in [*self._reading]:
            self._drop(connection)

    def drain(self, seconds: float) -> None:
        """Deliver the answers that are still awaited, for some seconds at most, or until stop() is called again."""
        deadline = self._clock() + seconds
        while (self._waiting or self._leaving) and self._stops < 2 and self._clock() < deadline:
            self._turn(deadline)
        for connection in [*self._waiting, *self._leaving]:
            self._drop(connection)

    def close(self) -> None:
        """Give back what is left after drain()."""
        self._selector.close()
        self.wake_up.close()
        self._woken.close()

    def _turn(self, deadline: float | None) -> None:
        """Wait for something to happen, and handle all that did; if memory runs out, the rest is left to the next turn."""
        served: object = None
        try:
            alarms = [next(iter(group)).deadline for group in (self._reading, self._leaving) if group]
            alarms += [at for at in (self._accept_at, deadline) if at is not None]
            timeout = min(alarms) - self._clock() if alarms else None
            self._asleep = True
            for key, _ in self._selector.select(0.0 if self._replies else timeout):
                handle, served = key.data
                handle(served)
            self._asleep = False
            while self._replies:
                served, response = self._replies.popleft()
                self._answer(served, response)
            now = self._clock()
            for group in (self._reading, self._leaving):
                while group and (oldest := next(iter(group))).deadline <= now:
                    self._evict(oldest)
            if self._accept_at is not None and now >= self._accept_at:
                self._resume_accepting()
        except MemoryError as error:
            victim = served if isinstance(served, Connection) else self._dispensable()
            if victim is None:
                raise
            self._evict(victim)
            self._report_exhaustion(error)

    def _wake(self) -> None:
        with suppress(OSError, ValueError):  # closed, or just being closed: nobody left to wake
            self.wake_up.write(b"\0")

    def _clear_wake_ups(self, woken: FileIO) -> None:
        woken.read(4096)

    def _watching(self, selector: selectors.BaseSelector) -> selectors.BaseSelector:
        """Have it watch for wake-ups and connections; raises OSError where the system denies this way to wait."""
        selector.register(self._woken, selectors.EVENT_READ, (self._clear_wake_ups, self._woken))
        for listener in self._listeners:
            selector.register(listener, selectors.EVENT_READ, (self._accept, listener))
        selector.select(0)
        return selector

    def _accept(self, listener: Listener) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            full = len(self._reading) + len(self._waiting) + len(self._leaving) >= self._most
            dispensable = self._dispensable() if full else None
            if full and dispensable is None:
                self._pause_accepting(self._clock() + _FULL_PAUSE_SECONDS)
                return
            deadline = self._clock() + HEAD_SECONDS
            try:
                client, _ = listener.socket.accept()
            except BlockingIOError:
                return
            except (OSError, MemoryError) as error:  # out of descriptors or memory; hardly ever anything else
                dispensable = self._dispensable()
                if dispensable is None:
                    self._pause_accepting(self._clock() + _EXHAUSTION_PAUSE_SECONDS)
                else:
                    self._evict(dispensable)
                self._report_exhaustion(error)
                return
            if dispensable is not None:
                self._evict(dispensable)
            client.setblocking(False)
            connection = Connection(client, listener.routes, deadline)
            self._reading[connection] = None
            self._receive(connection)  # most often the request came with the connection

    def _dispensable(self) -> Connection | None:
        """Find whom to evict for a new connection: the oldest that is reading or leaving, or a waiting one that has left."""
        for group in (self._reading, self._leaving):
            if group:
                return next(iter(group))
        return next((connection for connection in self._waiting if connection.unread() == b""), None)

    def _pause_accepting(self, until: float) -> None:
        if self._accepting:
            for listener in self._listeners:
                self._selector.unregister(listener)
        self._accepting, self._accept_at = False, until

    def _resume_accepting(self) -> None:
        self._accepting, self._accept_at = True, None
        for listener in self._listeners:
            self._selector.register(listener, selectors.EVENT_READ, (self._accept, listener))

    def _report_exhaustion(self, error: Exception) -> None:
        now = self._clock()
        if now - self._exhaustion_told >= _TELL_EXHAUSTION_SECONDS:
            with suppress(MemoryError):  # then the next time
                reason = limits.denial(error) or str(error)
                logging.getLogger(__name__).error("Cannot accept connections", {"err": reason})
                self._exhaustion_told = now

    def _receive(self, connection: Connection) -> None:
        searched = len(connection.head)
        try:
            chunk = connection.client.recv(LONGEST_HEAD + 1 - searched)
        except BlockingIOError:
            self._watch(connection, selectors.EVENT_READ, self._receive)
            return
        except OSError:
            chunk = b""
        if not chunk:
            self._drop(connection)
            return
        # RFC 9112, 2.2: ignore empty lines before a request.
        connection.head = (connection.head + chunk).lstrip(b"\r\n")
        self._head_bytes += len(connection.head) - searched
        if size := head_size(connection.head, searched):
            self._ask(connection, size)
        else:
            self._watch(connection, selectors.EVENT_READ, self._receive)
        while self._head_bytes > MOST_HEAD_BYTES:
            self._evict(next(iter(self._reading)))

    def _ask(self, connection: Connection, size: int) -> None:
        exchange = Exchange(connection.head[:size])
        connection.may_still_send = len(connection.head) > size
        self._stop_reading(connection)
        self._watch(connection, 0)
        self._waiting[connection] = None
        try:
            exchange.ask(connection.routes, partial(self._reply, connection))
        except Exception as error:  # a defect in one route must not end the server
            logging.getLogger(__name__).error(
                "Cannot answer a request", {"err": repr(error), "path": exchange.path}
            )
            exchange.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)
        connection.may_still_send |= exchange.may_still_send
        connection.only_head = exchange.command == "HEAD"

    def _stop_reading(self, connection: Connection) -> None:
        if connection in self._reading:
            del self._reading[connection]
            self._head_bytes -= len(connection.head)
            connection.head = b""

    def _reply(self, connection: Connection, response: Response) -> None:
        """Take a route's answer, from any thread."""
        self._replies.append((connection, response))
        # After the append, since the server looks for replies after it has set the flag; once for many replies.
        if self._asleep:
            self._asleep = False
            self._wake()

    def _answer(self, connection: Connection, response: Response) -> None:
        if connection not in self._waiting:  # it was evicted
            return
        del self._waiting[connection]
        connection.answer = head_of(response), b"" if connection.only_head else response.body
        connection.deadline = self._clock() + LEAVE_SECONDS
        self._leaving[connection] = None
        self._send(connection)

    def _send(self, connection: Connection) -> None:
        try:
            with suppress(BlockingIOError):
                connection.sent += connection.client.sendmsg(connection.unsent())
        except OSError:  # the client has gone
            self._drop(connection)
            return
        size = len(connection.answer[0]) + len(connection.answer[1])
        if connection.sent < size:
            self._watch(connection, selectors.EVENT_WRITE, self._send)
            self._keep(connection, connection.in_kernel())
            return
        connection.answer = NO_ANSWER
        if connection.unread():
            connection.may_still_send = True
        in_kernel = connection.in_kernel() if size > _SMALL_ANSWER else 0
        if not connection.may_still_send and not in_kernel:
            self._drop(connection)
            return
        # Closing with a body unread would reset the connection, and the client might lose the answer; closing before it
        # has the answer would leave that to the kernel, uncounted. So end our side, and await the client's end.
        with suppress(OSError):
            connection.client.shutdown(socket.SHUT_WR)
        if connection.may_still_send:
            self._watch(connection, 0)
        else:
            self._watch(connection, selectors.EVENT_READ, self._see_end)
        self._keep(connection, in_kernel)

    def _see_end(self, connection: Connection) -> None:
        if connection.unread() == b"" and not connection.in_kernel():
            self._drop(connection)
        else:  # it sent more, or ended its side before it had the answer
            self._watch(connection, 0)

    def _keep(self, connection: Connection, in_kernel: int) -> None:
        self._undelivered.count(connection, _CONNECTION_BYTES + in_kernel, connection.answer[1])
        while self._undelivered.bytes > MOST_UNDELIVERED_BYTES and len(self._leaving) > 1:
            self._evict(next(iter(self._leaving)))

    def _evict(self, connection: Connection) -> None:
        """Drop a connection, and what the kernel keeps for it."""
        connection.forget_answer()
        self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        self._stop_reading(connection)
        self._waiting.pop(connection, None)
        self._leaving.pop(connection, None)
        self._watch(connection, 0)
        if connection.kept is not NOTHING:
            self._undelivered.count(connection)
        connection.client.close()

    def _watch(
        self, connection: Connection, events: int, handle: Callable[[Connection], None] | None = None
    ) -> None:
        """Have handle called for these events and no others; the same events again keep their handle."""
        if events == connection.watched:
            return
        if connection.watched:
            self._selector.unregister(connection.client)
        if handle:
            self._selector.register(connection.client, events, (handle, connection))
        connection.watched = events


@contextmanager
def _named(call: str) -> Iterator[None]:
    """Name the call that the system denies."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{call}: {error.strerror}") from None


def _descriptors(wanted: int) -> int:
    """Raise our limit on descriptors as far as wanted or allowed, since most systems begin low; return it."""
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    except OSError:  # denied: the least that a process gets anywhere
        return _LEAST_DESCRIPTORS
    if soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
            return min(wanted, hard)
    return soft
