"""A client's connection to the HTTP server, and the count of the bytes that all of them have not taken yet."""

import fcntl
import socket
import struct
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

from livenessprobe.exchange import Route

NOTHING = (0, b"")
NO_ANSWER = (b"", b"")
_RESET = struct.pack("ii", 1, 0)  # of SO_LINGER: to close is to reset
_SIOCOUTQ = 0x5411  # of linux/sockios.h; the standard library has no name for it


class Connection:
    """A client's connection and how far it has come."""

    __slots__ = (
        *("answer", "client", "deadline", "head", "kept", "may_still_send", "only_head", "routes", "sent"),
        "watched",
    )

    def __init__(self, client: socket.socket, routes: Mapping[str, Route], deadline: float) -> None:
        self.client, self.routes, self.deadline = client, routes, deadline
        self.head = b""
        """What has come of the request's head, while reading."""
        # Known once it has asked.
        self.may_still_send: bool
        self.only_head: bool
        self.answer: tuple[bytes, bytes]
        """Head and body, while they are not sent."""
        self.sent = 0
        """Bytes of the answer that the kernel took."""
        self.kept = NOTHING
        """What Undelivered has counted."""
        self.watched = 0
        """The selector's events it is registered for; 0: not registered."""

    def unsent(self) -> Sequence[bytes | memoryview]:
        """Return what the kernel has not taken of the answer."""
        head, body = self.answer
        if not self.sent:
            return self.answer
        return memoryview(head)[self.sent :], memoryview(body)[max(0, self.sent - len(head)) :]

    def unread(self) -> bytes | None:
        """Look whether the client sent more: b"" if it ended or broke the connection, None if neither."""
        try:
            return self.client.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def in_kernel(self) -> int:
        """Return how many bytes of the answer the kernel keeps, as the client has not acknowledged them."""
        with suppress(OSError, ValueError):
            return int.from_bytes(fcntl.ioctl(self.client, _SIOCOUTQ, bytes(4)), sys.byteorder)
        return 0  # the kernel does not say, or an event just before evicted the connection

    def forget_answer(self) -> None:
        """Have the kernel drop what it keeps of the answer once the connection is closed."""
        if self.in_kernel():
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


class Undelivered:
    """Counts the bytes of answers that clients have not taken; a body counts once, however many are to get it."""

    def __init__(self) -> None:
        self.bytes = 0
        self._clients: Counter[int] = Counter()  # of each body, by its id

    def count(self, connection: Connection, in_kernel: int = 0, body: bytes = b"") -> None:
        """Count what is kept for a connection now, instead of what was."""
        self.bytes += in_kernel - connection.kept[0]
        self._add(body, 1)
        self._add(connection.kept[1], -1)
        connection.kept = in_kernel, body

    def _add(self, body: bytes, clients: int) -> None:
        before = self._clients[id(body)]
        after = self._clients[id(body)] = before + clients
        self.bytes += len(body) * ((after > 0) - (before > 0))
        if not after:
            del self._clients[id(body)]
