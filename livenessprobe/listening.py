"""A listening socket: where it binds, what its connections inherit, and the routes it offers."""

import errno
import socket
from collections.abc import Mapping
from contextlib import suppress
from http.server import HTTPServer
from socketserver import TCPServer

from livenessprobe import resolving
from livenessprobe.exchange import Exchange, Route

_EVERYWHERE = ("", "0.0.0.0", "::")  # for Go, too, each of them means all addresses of both families  # noqa: S104
# Bytes that the kernel may keep for a connection each way; it doubles them, for its own book-keeping.
_SEND_BUFFER, _RECEIVE_BUFFER = 128 * 1024, 2304  # the least: heads are read as they come, and bodies are not
_GIVE_UP_MILLISECONDS = 5000  # the kernel, to deliver what is left of a closed connection


class Listener(HTTPServer):
    """A listening socket and its routes."""

    request_queue_size = 4096  # the kernel takes the smaller of this and net.core.somaxconn
    allow_reuse_port = False  # else a second probe on the port would go unnoticed

    def __init__(self, host: str, port: int, routes: Mapping[str, Route]) -> None:
        """Listen. An empty host is all addresses of both families; a name is its IPv4 address where it has one.

        Raises OSError (socket.gaierror for a name that does not resolve), and resolving.Interrupted.
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
        self._listen(*resolving.resolve(host, port))

    def _listen(self, family: int, address: tuple[object, ...]) -> None:
        self.address_family = family
        super().__init__(address, Exchange)  # type: ignore[arg-type]
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        """Bind; without HTTPServer's look-up of our own name, which can hang on DNS."""
        # Accepted connections have these from the listening one.
        for level, option, value in (
            (socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER),
            (socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GIVE_UP_MILLISECONDS),
        ):
            with suppress(OSError):  # where that is denied, it does without
                self.socket.setsockopt(level, option, value)
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)

    @property
    def address(self) -> str:
        """Where it listens, as host:port."""
        host, port = self.server_address[:2]
        return f"[{host!s}]:{port}" if self.address_family == socket.AF_INET6 else f"{host!s}:{port}"
