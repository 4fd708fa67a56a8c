"""Asks for /healthz as the kubelet does, a new connection each time, over raw sockets, at next to no cost of its own."""

import selectors
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

REQUEST = (
    b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: kube-probe/1.34\r\n"
    b"Accept: */*\r\nConnection: close\r\n\r\n"
)
PATIENCE_SECONDS = 10.0


class Answer(NamedTuple):
    """A status (0: none came), the body, and the seconds from before the connect until the last byte."""

    status: int
    body: bytes
    seconds: float


def get(port: int) -> Answer:
    """Raises OSError if nobody listens, or the answer takes too long."""
    begin = time.perf_counter()
    with connect(port) as connection:
        return ask(connection, begin)


def connect(port: int) -> socket.socket:
    """Not create_connection(), which asks the resolver."""
    connection = socket.socket()
    connection.settimeout(PATIENCE_SECONDS)
    try:
        connection.connect(("127.0.0.1", port))
    except BaseException:
        connection.close()
        raise
    return connection


def ask(connection: socket.socket, begin: float) -> Answer:
    """Send the request over a connection that is open already, and await the answer."""
    connection.sendall(REQUEST)
    received = b""
    while not _complete(received) and (chunk := connection.recv(4096)):
        received += chunk
    return _parse(received, time.perf_counter() - begin)


def storm(port: int, requests: int, sent: Callable[[], object] = lambda: None) -> list[Answer]:
    """Many requests at once; the answers in the order in which they came. sent is called when all are on their way."""
    answers = []
    received: dict[socket.socket, bytes] = {}
    begin = time.perf_counter()
    with selectors.DefaultSelector() as selector:
        try:
            for _ in range(requests):
                connection = connect(port)
                received[connection] = b""
                connection.sendall(REQUEST)
                selector.register(connection, selectors.EVENT_READ)
            sent()
            while received and time.perf_counter() - begin < PATIENCE_SECONDS:
                for key, _ in selector.select(1.0):
                    connection = key.fileobj  # type: ignore[assignment] # registered as a socket
                    try:
                        chunk = connection.recv(4096)
                    except OSError:
                        chunk = b""
                    received[connection] += chunk
                    if not chunk or _complete(received[connection]):
                        answers.append(_parse(received.pop(connection), time.perf_counter() - begin))
                        selector.unregister(connection)
                        connection.close()
        finally:
            for connection in received:
                connection.close()
    return answers + [Answer(0, b"", PATIENCE_SECONDS)] * len(received)


def _complete(received: bytes) -> bool:
    head, end, body = received.partition(b"\r\n\r\n")
    if not end:
        return False
    length = head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
    return bool(length) and len(body) >= int(length)


def _parse(received: bytes, seconds: float) -> Answer:
    head, end, body = received.partition(b"\r\n\r\n")
    return Answer(int(head.split(b" ", 2)[1]) if end else 0, body, seconds)
