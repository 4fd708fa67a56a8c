"""The HTTP server: one thread, many connections, hard limits; knows nothing of CSI.

A connection is reading (its request's head is not complete), waiting (its route has not answered), or leaving (the
answer is on its way). Nobody can keep one reading or leaving for more than a few seconds, and where there are too many,
the oldest reading one gives way: half-open and idle clients, and those that left, cannot keep a proper request out.
"""

import errno
import logging
import resource
import selectors
import socket
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import HTTPServer
from socketserver import TCPServer

from livenessprobe.exchange import LONGEST_HEAD, Exchange, Route

HEAD_SECONDS = 5.0
LEAVE_SECONDS = 2.0
MOST_CONNECTIONS = 2048
MOST_HEAD_BYTES = 2 * 1024 * 1024  # of all reading connections together
_RESERVED_DESCRIPTORS = 48  # for the driver's connections, the log, the interpreter
_ACCEPTS_A_TURN = 64  # then the connections that are open have their turn
_FULL_PAUSE_SECONDS = 0.1
_EXHAUSTION_PAUSE_SECONDS = 0.5
_TELL_EXHAUSTION_SECONDS = 60.0  # it may come and go with each connection
_EVERYWHERE = ("", "0.0.0.0", "::")  # for Go, too, each of them means all addresses of both families  # noqa: S104


class Listener(HTTPServer):
    """A listening socket and its routes."""

    request_queue_size = 4096  # the kernel takes the smaller of this and net.core.somaxconn
    allow_reuse_port = False  # else a second probe on the port would go unnoticed

    def __init__(self, host: str, port: int, routes: Mapping[str, Route]) -> None:
        """Listen. An empty host is all addresses of both families; a name is its IPv4 address where it has one.

        Raises OSError (socket.gaierror for a name that does not resolve).
        """
        self.routes = routes
        if host in _EVERYWHERE:
            try:
                self._listen(socket.AF_INET6, ("::", port))
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                self._listen(socket.AF_INET, ("0.0.0.0", port))  # noqa: S104 - IPv6 is off
            return
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, *_, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        self._listen(family, address)

    def _listen(self, family: int, address: tuple[object, ...]) -> None:
        self.address_family = family
        super().__init__(address, Exchange)  # type: ignore[arg-type]
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        """Bind; without HTTPServer's look-up of our own name, which can hang on DNS."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)

    @property
    def address(self) -> str:
        """Where it listens, as host:port."""
        host, port = self.server_address[:2]
        return f"[{host!s}]:{port}" if self.address_family == socket.AF_INET6 else f"{host!s}:{port}"


class Connection:
    """A client's connection and how far it has come."""

    __slots__ = ("client", "deadline", "exchange", "head", "routes", "unsent", "watched")

    def __init__(self, client: socket.socket, routes: Mapping[str, Route], deadline: float) -> None:
        self.client, self.routes, self.deadline = client, routes, deadline
        self.head = bytearray()
        self.exchange: Exchange | None = None
        self.unsent = b""
        self.watched = 0
        """The selector's events it is registered for; 0: not registered."""

    def unread(self) -> bytes | None:
        """Look whether the client sent more: b"" if it ended or broke the connection, None if neither."""
        try:
            return self.client.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError:
            return b""


class Server:
    """Serves all listeners in run(), on one thread; only stop() and routes' replies may come from others."""

    def __init__(self, *listeners: Listener, most: int = MOST_CONNECTIONS) -> None:
        self._listeners = listeners
        self._most = max(8, min(most, _descriptors(most + _RESERVED_DESCRIPTORS) - _RESERVED_DESCRIPTORS))
        self._selector = selectors.DefaultSelector()
        self.wake_up, self._woken = socket.socketpair()
        """What is written into it ends a wait: for signal.set_wakeup_fd()."""
        self.wake_up.setblocking(False)
        self._woken.setblocking(False)
        # Dicts as ordered sets; the deadlines within one grow, so the first is the next to expire.
        self._reading: dict[Connection, None] = {}
        self._leaving: dict[Connection, None] = {}
        self._waiting: dict[Connection, None] = {}
        self._head_bytes = 0
        self._answers: deque[tuple[Connection, bytes]] = deque()
        self._accepting = True
        self._accept_at: float | None = None  # while not accepting: when to go on
        self._exhaustion_told = float("-inf")
        self._stops = 0
        self._selector.register(self._woken, selectors.EVENT_READ, self._drain_wake_ups)
        for listener in listeners:
            self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))

    def stop(self) -> None:
        """Make run() return, and called again drain() too; from any thread or a signal's handler."""
        self._stops += 1
        self._wake()

    def run(self) -> None:
        """Serve until stop(); then listen no more and drop the connections that have not sent a request."""
        while not self._stops:
            self._turn(None)
        self._turn(time.monotonic())  # what has come by now is still read
        self._pause_accepting(float("inf"))
        for listener in self._listeners:
            listener.server_close()
        for connection in [*self._reading]:
            self._drop(connection)

    def drain(self, seconds: float) -> None:
        """Deliver the answers that are still awaited, for some seconds at most, or until stop() is called again."""
        deadline = time.monotonic() + seconds
        while (self._waiting or self._leaving) and self._stops < 2 and time.monotonic() < deadline:
            self._turn(deadline)
        for connection in [*self._waiting, *self._leaving]:
            self._drop(connection)

    def close(self) -> None:
        """Give back what is left after drain()."""
        self._selector.close()
        self.wake_up.close()
        self._woken.close()

    def _turn(self, deadline: float | None) -> None:
        """Wait for something to happen, and handle all that did."""
        alarms = [next(iter(group)).deadline for group in (self._reading, self._leaving) if group]
        alarms += [at for at in (self._accept_at, deadline) if at is not None]
        timeout = max(0.0, min(alarms) - time.monotonic()) if alarms else None
        for key, _ in self._selector.select(timeout):
            key.data()
        while self._answers:
            self._answer(*self._answers.popleft())
        now = time.monotonic()
        for group in (self._reading, self._leaving):
            while group and (oldest := next(iter(group))).deadline <= now:
                self._drop(oldest)
        if self._accept_at is not None and now >= self._accept_at:
            self._resume_accepting()

    def _wake(self) -> None:
        with suppress(OSError):  # full: awake already; closed: nobody left to wake
            self.wake_up.send(b"\0")

    def _drain_wake_ups(self) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(4096)

    def _accept(self, listener: Listener) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            full = len(self._reading) + len(self._waiting) + len(self._leaving) >= self._most
            dispensable = self._dispensable() if full else None
            if full and dispensable is None:
                self._pause_accepting(time.monotonic() + _FULL_PAUSE_SECONDS)
                return
            try:
                client, _ = listener.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:  # out of descriptors or memory; hardly ever anything else
                self._report_exhaustion(error)
                dispensable = self._dispensable()
                if dispensable is None:
                    self._pause_accepting(time.monotonic() + _EXHAUSTION_PAUSE_SECONDS)
                else:
                    self._drop(dispensable)
                return
            if dispensable is not None:
                self._drop(dispensable)
            client.setblocking(False)
            connection = Connection(client, listener.routes, time.monotonic() + HEAD_SECONDS)
            self._reading[connection] = None
            self._read(connection)  # most often the request came with the connection

    def _dispensable(self) -> Connection | None:
        """Find who gives way to a new connection: the oldest without a request or with its answer, or one that left."""
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
            self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))

    def _report_exhaustion(self, error: OSError) -> None:
        now = time.monotonic()
        if now - self._exhaustion_told >= _TELL_EXHAUSTION_SECONDS:
            logging.getLogger(__name__).error("Cannot accept connections", {"err": error.strerror})
            self._exhaustion_told = now

    def _read(self, connection: Connection) -> None:
        try:
            chunk = connection.client.recv(LONGEST_HEAD + 1 - len(connection.head))
        except BlockingIOError:
            self._watch(connection, selectors.EVENT_READ)
            return
        except OSError:
            chunk = b""
        if not chunk:
            self._drop(connection)
            return
        searched = max(0, len(connection.head) - 3)
        if not connection.head:
            chunk = chunk.lstrip(b"\r\n")  # RFC 9112, 2.2: empty lines before a request are to be ignored
        connection.head += chunk
        self._head_bytes += len(chunk)
        ends = [
            at + len(end) for end in (b"\n\r\n", b"\n\n") if (at := connection.head.find(end, searched)) >= 0
        ]
        if ends or len(connection.head) > LONGEST_HEAD:
            self._serve(connection, min(ends, default=LONGEST_HEAD))
        else:
            self._watch(connection, selectors.EVENT_READ)
        while self._head_bytes > MOST_HEAD_BYTES:
            self._drop(next(iter(self._reading)))

    def _serve(self, connection: Connection, end: int) -> None:
        head = bytes(connection.head[: min(end, LONGEST_HEAD)])
        excess = len(connection.head) > end
        self._stop_reading(connection)
        self._watch(connection, 0)
        self._waiting[connection] = None
        exchange = Exchange(head, connection.routes, partial(self._send, connection))
        exchange.has_body = excess
        connection.exchange = exchange
        try:
            exchange.handle()
        except Exception as error:  # a defect in one route must not end the server
            logging.getLogger(__name__).error(
                "Cannot answer a request", {"err": repr(error), "path": exchange.path}
            )
            exchange.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)

    def _stop_reading(self, connection: Connection) -> None:
        if connection in self._reading:
            del self._reading[connection]
            self._head_bytes -= len(connection.head)
            connection.head.clear()

    def _send(self, connection: Connection, answer: bytes) -> None:
        """Take an exchange's answer, from any thread."""
        self._answers.append((connection, answer))
        self._wake()

    def _answer(self, connection: Connection, answer: bytes) -> None:
        if connection not in self._waiting:  # it gave way
            return
        del self._waiting[connection]
        connection.unsent = answer
        connection.deadline = time.monotonic() + LEAVE_SECONDS
        self._leaving[connection] = None
        self._write(connection)

    def _write(self, connection: Connection) -> None:
        try:
            with suppress(BlockingIOError):
                connection.unsent = connection.unsent[connection.client.send(connection.unsent) :]
        except OSError:  # the client has gone
            self._drop(connection)
            return
        if connection.unsent:
            self._watch(connection, selectors.EVENT_WRITE)
            return
        if not (connection.exchange and connection.exchange.has_body) and connection.unread() in (b"", None):
            self._drop(connection)
            return
        # To close with a body unread would reset the connection, and the client might lose the answer: end our side,
        # and give the client until the deadline.
        self._watch(connection, 0)
        with suppress(OSError):
            connection.client.shutdown(socket.SHUT_WR)

    def _drop(self, connection: Connection) -> None:
        self._stop_reading(connection)
        self._waiting.pop(connection, None)
        self._leaving.pop(connection, None)
        self._watch(connection, 0)
        connection.client.close()

    def _watch(self, connection: Connection, events: int) -> None:
        if events == connection.watched:
            return
        if connection.watched:
            self._selector.unregister(connection.client)
        if events:
            handle = self._read if events == selectors.EVENT_READ else self._write
            self._selector.register(connection.client, events, partial(handle, connection))
        connection.watched = events


def _descriptors(wanted: int) -> int:
    """Raise our limit of descriptors to what is wanted, or as far as we may: most systems begin low; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        soft = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft
