"""Resolving the name to listen on. If no DNS server answers, that takes minutes; signals do not wait for it."""

import signal
import socket
import threading

from livenessprobe import threads

_LOOK_SECONDS = 0.05


class Interrupted(Exception):
    """A signal came, one that the program has blocked until it has handlers."""


def resolve(host: str, port: int) -> tuple[int, tuple[object, ...]]:
    """Return the family and address of a host, IPv4 if it has one.

    Raises OSError, UnicodeError for what cannot be a name, and Interrupted.
    """
    try:
        return _look_up(host, port, socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass  # a name
    found: list[tuple[int, tuple[object, ...]]] = []
    errors: list[Exception] = []
    done = threading.Event()

    def look_up() -> None:
        try:
            found.append(_look_up(host, port))
        except (OSError, UnicodeError) as error:
            errors.append(error)
        finally:
            done.set()

    # Nothing ends getaddrinfo(), and a handler would run only after it: a thread of its own, which ends with us.
    try:
        threads.start(look_up)
    except threads.Denied:
        look_up()
    while not done.wait(_LOOK_SECONDS):
        if signal.sigpending():
            raise Interrupted
    for error in errors:
        raise error
    return found[0]


def _look_up(host: str, port: int, flags: int = 0) -> tuple[int, tuple[object, ...]]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    family, *_, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    return family, address
