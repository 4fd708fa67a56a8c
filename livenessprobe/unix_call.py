"""A unary gRPC call over a new connection to a unix socket, as in production. No grpc, no protobuf.

HTTP/2 and gRPC are in http2_call.py; here are the socket, the clock, and the system's errors in words.
"""

import errno
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from livenessprobe.http2_call import Http2Call, Unprocessed, request_head
from livenessprobe.rpc import Reply, Unreachable
from livenessprobe.stopping import Stop

_RECEIVED_AT_ONCE = 16384
_SAME_MOMENT_SECONDS = 0.01
_STOPPING = Reply("Canceled", "the liveness probe is stopping", None)


class UnixCall:
    """Calls to the socket at a path; from any number of threads."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._heads: dict[str, bytes] = {}
        self._stop = Stop()

    def __call__(self, method: str, request: bytes, deadline: float) -> Reply:
        """Call a method; see rpc.Call. A call that the peer did not process is made again, once, as grpc-go does."""
        try:
            try:
                return self._attempt(method, request, deadline, again=True)
            except Unprocessed:
                return self._attempt(method, request, deadline, again=False)
        except Unreachable:
            if self._stop.is_set():
                return _STOPPING
            raise

    def close(self) -> None:
        """End the calls under way, and let no new one begin; from any thread."""
        self._stop.set()

    def _attempt(self, method: str, request: bytes, deadline: float, *, again: bool) -> Reply:
        head = self._heads.get(method) or self._heads.setdefault(method, request_head(method))
        with self._connected() as connection:
            call = Http2Call(head, request, lambda: deadline - time.monotonic(), again=again)
            reply = None
            while reply is None and not self._stop.is_set():
                try:
                    received = _exchange(connection, call.to_send, deadline)
                except TimeoutError:
                    reply = self._unanswered(method, call)
                except OSError as error:
                    was_reset = isinstance(error, ConnectionResetError)
                    reply = call.ended("connection reset" if was_reset else _words(error))
                else:
                    reply = call.receive(received) if received else call.ended("closed by the peer")
            if (
                reply
                and reply.code == "DeadlineExceeded"
                and time.monotonic() > deadline - _SAME_MOMENT_SECONDS
            ):
                reply = self._unanswered(method, call)  # the driver keeps our deadline too, and was quicker
        return _STOPPING if self._stop.is_set() or reply is None else reply

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        """Connect, for the time of a call."""
        try:
            connection = socket.socket(socket.AF_UNIX)
        except OSError as error:
            raise self._unreachable(error) from None
        with connection:
            try:
                connection.setblocking(False)  # otherwise it waits for as long as the peer's queue is full
                connection.connect(self._path)
            except OSError as error:
                raise self._unreachable(error) from None
            with self._stop.interrupting(lambda: _shut_down(connection)):
                yield connection

    def _unanswered(self, method: str, call: Http2Call) -> Reply:
        if call.greeted:  # no number that varies: the log would take it for news
            return Reply("DeadlineExceeded", f"no answer to {method} in time", None)
        return Reply("DeadlineExceeded", f"{self._path} takes connections, but nobody there answers: stopped, hung, or out of file descriptors", None)  # fmt: skip

    def _unreachable(self, error: OSError) -> Unreachable:
        """Say why there is no connection."""
        reason = _words(error)
        try:
            status = os.stat(self._path)
        except OSError:
            status = None
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return Unreachable(reason, " in the liveness probe itself")
        if error.errno == errno.EAGAIN:
            return Unreachable(
                "its queue of connections is full", ": stopped, hung, or overloaded", may_heal=True
            )
        if error.errno in (errno.ECONNREFUSED, errno.EACCES) and status and not stat.S_ISSOCK(status.st_mode):
            return Unreachable("not a socket")
        if error.errno in (errno.EACCES, errno.EPERM):
            owner = (
                f"the socket belongs to uid {status.st_uid}, mode {status.st_mode & 0o7777:04o}"
                if status
                else "it may not enter the folder"
            )
            return Unreachable(
                reason, f" (this program is uid {os.geteuid()}, {owner}; if that allows it, SELinux does not)"
            )
        return Unreachable(reason, may_heal=error.errno in (errno.ENOENT, errno.ECONNREFUSED))


def _shut_down(connection: socket.socket) -> None:
    with suppress(OSError):  # the peer may have gone
        connection.shutdown(socket.SHUT_RDWR)


def _words(error: OSError) -> str:
    return os.strerror(error.errno or 0).lower()


def _exchange(connection: socket.socket, to_send: bytearray, deadline: float) -> bytes:
    """Send what there is, and wait for what comes; nothing if the peer has closed the connection."""
    if to_send:
        connection.settimeout(_left(deadline))
        with suppress(BrokenPipeError, ConnectionResetError):  # what the peer said before may still be read
            connection.sendall(to_send)
        to_send.clear()
    connection.settimeout(_left(deadline))
    return connection.recv(_RECEIVED_AT_ONCE)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
