"""Listening sockets: where they bind, and what their connections inherit.

They come before everything else that serving needs, which takes time to load: requests wait in the queue meanwhile.
"""

import errno
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from livenessprobe import resolving
from livenessprobe.config import Config, ConfigError, Endpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from livenessprobe.exchange import Route

_EVERYWHERE = ("", "0.0.0.0", "::")  # each of them means all addresses of both families, as in Go  # noqa: S104
_QUEUE = 4096  # the kernel takes the smaller of this and net.core.somaxconn
# Bytes that the kernel may keep for a connection each way; it doubles them, for its own book-keeping.
_SEND_BUFFER, _RECEIVE_BUFFER = 128 * 1024, 2304  # the least: heads are read as they come, and bodies are not
_GIVE_UP_MILLISECONDS = 5000  # the kernel, to deliver what is left of a closed connection


class Listener:
    """A listening socket, and the routes that are offered there."""

    def __init__(self, host: str, port: int, routes: "Mapping[str, Route]") -> None:
        """Listen. An empty host means all addresses of both families; a name, its IPv4 address if it has one.

        Raises OSError (socket.gaierror for a name that does not resolve), and resolving.Interrupted.
        """
        self.routes = routes
        self.socket = _listening(host, port)
        self.since = time.monotonic()
        """When somebody may have begun to wait for an answer."""

    def fileno(self) -> int:
        """Return the socket's descriptor, for selectors."""
        return self.socket.fileno()

    def close(self) -> None:
        """Stop listening."""
        self.socket.close()

    @property
    def port(self) -> int:
        """The port that was asked for, or that the system chose."""
        return int(self.socket.getsockname()[1])

    @property
    def address(self) -> str:
        """Where it listens, as host:port."""
        host = self.socket.getsockname()[0]
        return f"[{host}]:{self.port}" if self.socket.family == socket.AF_INET6 else f"{host}:{self.port}"


def listen(config: Config) -> list[Listener]:
    """Listen where health and metrics are to be served; the listeners have no routes yet.

    Raises a ConfigError that names the flag, and resolving.Interrupted.
    """
    endpoints = [config.health]
    if config.metrics not in (None, config.health):
        endpoints.append(config.metrics)
    return [_listener(endpoint) for endpoint in endpoints]


def _listener(endpoint: Endpoint) -> Listener:
    try:
        return Listener(endpoint.host, endpoint.port, {})
    except socket.gaierror as error:
        raise ConfigError(
            endpoint.flag, endpoint.value, f"cannot resolve the host: {str(error.strerror).lower()}"
        ) from None
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise ConfigError(endpoint.flag, endpoint.value, f"cannot listen: {reason}") from None


def _listening(host: str, port: int) -> socket.socket:
    if host not in _EVERYWHERE:
        return _bound(*resolving.resolve(host, port))
    try:
        return _bound(socket.AF_INET6, ("::", port))
    except OSError as error:
        if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            raise
        return _bound(socket.AF_INET, ("0.0.0.0", port))  # noqa: S104 - IPv6 is off


def _bound(family: int, address: tuple[object, ...]) -> socket.socket:
    listening = socket.socket(family)
    try:
        for level, option, value in (
            # A port is free again as soon as the program before has ended; a second one on it does not go unnoticed.
            (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
            # Accepted connections have these from the listening one.
            (socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER),
            (socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GIVE_UP_MILLISECONDS),
        ):
            with suppress(OSError):  # where that is denied, it does without
                listening.setsockopt(level, option, value)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind(address)
        listening.listen(_QUEUE)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening
