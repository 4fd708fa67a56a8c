"""Peers that are not CSI drivers, on a unix socket: each a context manager that takes the socket's path."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from typing import TypeAlias

    Peer: TypeAlias = Callable[[Path], AbstractContextManager[object]]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    """An HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


SETTINGS = frame(4)
SETTINGS_ACK = frame(4, flags=1)
# Last stream 0, error code 11: ENHANCE_YOUR_CALM.
GOAWAY = frame(7, struct.pack(">II", 0, 11) + b"too_many_pings")


# ---- what a peer says to each connection, which it closes when it has said everything


def _read_preface(connection: socket.socket) -> None:
    """Wait for the call, so that this is an answer: sooner, the client may see the close before it has sent anything."""
    received = b""
    while len(received) < len(PREFACE) and (data := connection.recv(65536)):
        received += data


def _stay_silent(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def _junk(connection: socket.socket) -> None:
    connection.sendall(bytes(range(255, -1, -1)) * 64)
    _stay_silent(connection)


def _http1(connection: socket.socket) -> None:
    _read_preface(connection)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 4\r\n\r\nno\r\n")


def _settings(connection: socket.socket, *, stay: bool) -> None:
    """Too little HTTP/2: the settings, and then a close, or no more."""
    _read_preface(connection)
    connection.sendall(SETTINGS + SETTINGS_ACK)
    if stay:
        _stay_silent(connection)


def _close_at_once(connection: socket.socket) -> None:
    pass


@contextlib.contextmanager
def _bound(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, kind) as bound:
        bound.bind(str(path))
        try:
            yield bound
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def talking(talk: Callable[[socket.socket], None], path: Path) -> Iterator[list[socket.socket]]:
    """Listens and says `talk` to each connection, each in a thread; yields the connections so far."""
    connections: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def converse(connection: socket.socket) -> None:
        # The client may leave at any moment, and so may we.
        with connection, contextlib.suppress(OSError):
            talk(connection)

    def accept(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connections.append(listener.accept()[0])
                threads.append(threading.Thread(target=converse, args=connections[-1:], daemon=True))
                threads[-1].start()

    with _bound(path) as listener:
        listener.listen(128)
        accepting = threading.Thread(target=accept, args=(listener,), daemon=True)
        accepting.start()
        try:
            yield connections
        finally:
            # close() would wake neither accept() nor recv().
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join(60)
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(60)


def relay(
    path: Path, target: str, at_a_time: int | None = None
) -> contextlib.AbstractContextManager[list[socket.socket]]:
    """Passes each connection on to the socket at target, or only this many at a time; the others wait."""
    free = threading.Semaphore(at_a_time) if at_a_time else contextlib.nullcontext()

    def talk(connection: socket.socket) -> None:
        with free, socket.socket(socket.AF_UNIX) as onward:
            onward.connect(target)
            other = {connection: onward, onward: connection}
            while True:
                for ready in select.select([*other], [], [])[0]:
                    if not (data := ready.recv(65536)):
                        return
                    other[ready].sendall(data)

    return talking(talk, path)


junk = partial(talking, _junk)
closing_at_once = partial(talking, _close_at_once)
silent = partial(talking, _stay_silent)
http1 = partial(talking, _http1)
settings_then_close = partial(talking, partial(_settings, stay=False))
settings_then_silent = partial(talking, partial(_settings, stay=True))


# ---- what cannot be connected to


@contextlib.contextmanager
def never_accepting(path: Path) -> Iterator[None]:
    """A full queue: a blocking connect() waits for ever, any other gets EAGAIN."""
    with _bound(path) as listener, contextlib.ExitStack() as queue:
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = queue.enter_context(socket.socket(socket.AF_UNIX))
                waiting.settimeout(0)
                waiting.connect(str(path))
        yield


@contextlib.contextmanager
def stale_socket(path: Path) -> Iterator[None]:
    """What a killed driver leaves behind: connection refused."""
    with _bound(path) as bound:
        bound.close()
        yield


@contextlib.contextmanager
def datagram_socket(path: Path) -> Iterator[None]:
    """A unix socket of the wrong type: EPROTOTYPE."""
    with _bound(path, socket.SOCK_DGRAM):
        yield


@contextlib.contextmanager
def regular_file(path: Path) -> Iterator[None]:
    path.write_text("no socket\n")
    try:
        yield
    finally:
        path.unlink()


@contextlib.contextmanager
def directory(path: Path) -> Iterator[None]:
    path.mkdir()
    try:
        yield
    finally:
        path.rmdir()


@contextlib.contextmanager
def forbidden(path: Path) -> Iterator[None]:
    """A socket that not everyone may connect to: run the program with `user=program.unprivileged()`."""
    with silent(path):
        path.chmod(0)
        yield


@contextlib.contextmanager
def forbidden_folder(path: Path) -> Iterator[None]:
    """The socket's folder may not be entered: nobody can even tell whether the socket exists."""
    with silent(path):
        mode = path.parent.stat().st_mode
        path.parent.chmod(0)
        try:
            yield
        finally:
            path.parent.chmod(mode)
