"""The CSI driver over gRPC: connect, Probe, GetPluginInfo. The only importer of grpc and of the generated messages.

Every attempt opens a new connection, as the kubelet does for each volume operation: a driver that is out of file
descriptors, or whose socket was unlinked or replaced, must not look healthy because an old connection still works. One
attempt after another may call over an old one nevertheless, once a new one has been answered.
"""

import errno
import logging
import os
import re
import socket
import stat
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C core writes to standard error in a format of its own

import grpc
from google.protobuf.message import DecodeError

from livenessprobe import __version__, health
from livenessprobe.health import Outcome, Verdict
from livenessprobe.identity_pb2 import (
    GetPluginInfoRequest,
    GetPluginInfoResponse,
    ProbeRequest,
    ProbeResponse,
)

PROBE = "/csi.v1.Identity/Probe"
GET_PLUGIN_INFO = "/csi.v1.Identity/GetPluginInfo"
LONGEST_NAME = 255  # characters; the CSI specification allows 63, and a label must stay bounded

GRPC_VERSION: str = grpc.__version__

_CALLS = logging.INFO - 5  # verbosity 5
_CODE_NAMES = {
    code: "OK" if code is grpc.StatusCode.OK else code.name.title().replace("_", "")
    for code in grpc.StatusCode
} | {grpc.StatusCode.CANCELLED: "Canceled"}
# grpc's own limit of 8 to 16 KiB would hide an error behind "metadata size exceeds limit" when its text is long; Go's
# of 16 MiB would take several times that of memory, more than a container of ours has.
_METADATA_BYTES = 1024 * 1024
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # else channels to the same address share a connection
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.max_metadata_size", _METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", _METADATA_BYTES),
    ("grpc.primary_user_agent", f"livenessprobe/{__version__}"),
)
# How grpc's C core begins the message of a call for which it got no connection.
_NO_CONNECTION = ("failed to connect to all addresses", "errors resolving", "DNS resolution failed")
_NOT_CONNECTED = "no connection"
_LONGEST_OWN_MESSAGE = 4096  # characters; only a driver's is longer
# The system's words, as they end such a message.
_ERRORS = {
    os.strerror(number): os.strerror(number).lower()
    for number in (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT)
}
_NOT_HTTP2 = "the peer does not speak HTTP/2"

_SPARE_DESCRIPTORS = 16  # what a channel and its call take, and those of the other thread

# A client's first bytes (RFC 9113, 3.4): the preface and an empty SETTINGS frame; the server answers with SETTINGS.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_FRAME_HEADER_BYTES = 9
_SETTINGS = 0x04


class Driver:
    """One CSI driver at an address. Calls may come from several threads, those that keep from one; close() ends all."""

    def __init__(
        self,
        address: str,
        socket_path: str | None,
        observe: Callable[[str, str, float], None] = lambda method, code, seconds: None,
    ) -> None:
        """Take the CSI address, its unix socket's path (None for another gRPC target), and an observer of calls.

        The observer gets each call's method, gRPC code (named as in Go) and seconds.
        """
        self._address = address
        self._path = socket_path
        self._target = address if socket_path is None else "unix:" + _escaped(socket_path)
        # As Go's client says; of itself the C core sends the escaped path, which strict servers refuse as malformed.
        self._options = _OPTIONS + ((("grpc.default_authority", "localhost"),) if socket_path else ())
        self._observe = observe
        self._lock = threading.Lock()
        self._closed = False
        self._cancels: list[Callable[[], object]] = []
        self._was_reached = True
        self._outages = 0
        self._kept: grpc.Channel | None = None
        self._kept_for: tuple[int, ...] | None = None
        """The identity of the socket that the kept channel was opened for."""

    def attempt(self, timeout: float, keep: bool = False) -> Verdict:
        """Connect and probe once, within timeout seconds.

        keep: other attempts follow at once. Until rest(), their calls go over one channel, whose opening is what costs
        most; before each, a plain connection shows that the driver takes and answers new ones.
        """
        deadline = time.monotonic() + timeout
        socket_now = self._socket_identity() if keep else None
        if self._kept is not None and socket_now != self._kept_for:
            self.rest()
        # While there was no connection, a plain one is tried first, too: far cheaper than a channel that fails.
        plain_first = self._kept is not None or not self._was_reached
        try:
            verdict = (self._obstacle(deadline) if plain_first else None) or self._probe(deadline, socket_now)
        except OSError as error:
            verdict = self._explain(error)
        if verdict not in (health.HEALTHY, health.NOT_READY):
            self.rest()
        reached = verdict.outcome is not Outcome.UNREACHABLE and verdict.reason != "DeadlineExceeded"
        self._outages += self._was_reached and not reached
        self._was_reached = reached
        if self._closed:
            return health.failed("Canceled", "the liveness probe is stopping")
        return verdict

    def rest(self) -> None:
        """Close what was kept for more attempts; an open channel wakes up some twenty times a second."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def name(self, timeout: float) -> tuple[str, str]:
        """Ask the driver for its name, within timeout seconds.

        Returns the name and "", or "" and what went wrong: "" as well where there was no connection to ask over.
        """
        request = GetPluginInfoRequest().SerializeToString()
        try:
            with self._channel() as channel:
                code, message, reply = self._call(
                    channel, GET_PLUGIN_INFO, request, time.monotonic() + timeout
                )
        except OSError:
            return "", ""
        if reply is None:
            return "", "" if self._lacked_connection(code, message) else health.failed(code, message).text
        try:
            name = GetPluginInfoResponse.FromString(reply).name
        except DecodeError as error:
            return "", f"cannot decode the reply: {error}"
        if not 0 < len(name) <= LONGEST_NAME:
            return "", f"the name has {len(name)} characters, not 1 to {LONGEST_NAME}"
        return name, ""

    def identity(self) -> tuple[object, ...]:
        """Return a value that differs once another driver may be behind the address: a new socket, or after an outage."""
        return self._socket_identity(), self._outages

    def close(self) -> None:
        """End the attempts that are under way, and let no new one begin."""
        with self._lock:
            self._closed = True
            for cancel in self._cancels:
                cancel()

    @contextmanager
    def _cancelled_by_close(self, cancel: Callable[[], object]) -> Iterator[None]:
        with self._lock:
            if self._closed:
                cancel()
            self._cancels.append(cancel)
        try:
            yield
        finally:
            with self._lock:
                self._cancels.remove(cancel)

    def _socket_identity(self) -> tuple[int, ...] | None:
        """Return a value that differs for another socket at the path; None where there is none."""
        try:
            status = os.stat(self._path) if self._path else None
        except OSError:
            status = None
        return (status.st_dev, status.st_ino, status.st_ctime_ns) if status else None

    def _channel(self) -> grpc.Channel:
        """Open a channel; raises OSError where there are too few descriptors: grpc would abort the process for want of one."""
        spare: list[int] = []
        try:
            while len(spare) < _SPARE_DESCRIPTORS:
                spare.append(os.dup(2))
        finally:
            for descriptor in spare:
                os.close(descriptor)
        return grpc.insecure_channel(self._target, self._options)

    def _probe(self, deadline: float, keep_for: tuple[int, ...] | None) -> Verdict:
        """Call over the kept channel or a new one, and keep that for the socket given."""
        was_kept = self._kept is not None
        channel, self._kept = self._kept or self._channel(), None
        try:
            code, message, reply = self._call(channel, PROBE, ProbeRequest().SerializeToString(), deadline)
            if keep_for and reply is not None:
                self._kept, self._kept_for = channel, keep_for
        finally:
            if self._kept is None:
                channel.close()
        if was_kept and code == "Unavailable":  # of the kept connection, which says nothing of a new one
            return self._probe(deadline, keep_for)
        if reply is None:
            if self._lacked_connection(code, message):
                # A plain connection tells why, in the system's words; where it finds nothing, all may be well by now.
                return self._obstacle(deadline) or self._no_connection(message)
            return health.failed(code, message)
        try:
            ready = ProbeResponse.FromString(reply)
        except DecodeError as error:
            return health.failed("Internal", f"cannot decode the reply: {error}")
        return health.NOT_READY if ready.HasField("ready") and not ready.ready.value else health.HEALTHY

    def _call(
        self, channel: grpc.Channel, method: str, request: bytes, deadline: float
    ) -> tuple[str, str, bytes | None]:
        """Call; return the code, the message, and where the code is OK the reply."""
        logger = logging.getLogger(__name__)
        start = time.monotonic()
        timeout = max(deadline - start, 0.001)
        logger.log(_CALLS, "Calling the CSI driver", {"method": method, "timeout": f"{timeout:.3f}s"})
        reply = None
        with self._cancelled_by_close(channel.close):
            try:
                # Bytes in, bytes out: grpc's own decoding logs a traceback for a reply it cannot read.
                reply = channel.unary_unary(method, bytes, bytes)(request, timeout=timeout)
                code, message = "OK", ""
            except grpc.RpcError as error:
                code, message = _CODE_NAMES[error.code()], error.details() or ""
            except ValueError:  # close() was quicker than the call
                code, message = "Canceled", "the liveness probe is stopping"
        if code == "OK" and reply is None:  # an error to Go's client, too
            code, message = "Internal", "the reply has no message"
        seconds = time.monotonic() - start
        if code == "DeadlineExceeded" and seconds >= timeout - 0.01:  # our deadline, not the driver's word
            message = f"no answer to {method} in time"  # a number would vary, a change in the log's eyes
        logger.log(
            _CALLS,
            "The CSI driver replied",
            {"method": method, "code": code, "message": message, "seconds": round(seconds, 6)},
        )
        if reply is not None or not self._lacked_connection(code, message):
            self._observe(method, code, seconds)
        return code, message, reply

    def _lacked_connection(self, code: str, message: str) -> bool:
        """Tell whether grpc got no connection; a driver may report the same of a backend, at another address."""
        return (
            code == "Unavailable"
            and message.startswith(_NO_CONNECTION)
            and (
                self._path is None
                or f"unix:{self._path}:"
                in urllib.parse.unquote(message[:_LONGEST_OWN_MESSAGE], errors="surrogateescape")
            )
        )

    def _no_connection(self, message: str) -> Verdict:
        """Say why grpc got no connection, in its own words."""
        if "Failed parsing HTTP/2" in message:
            return self._unreachable(_NOT_HTTP2)
        reason = _ERRORS.get(message.rpartition(": ")[2], _NOT_CONNECTED)
        return self._unreachable(reason, f" ({message.rpartition('last error: ')[2]})", may_heal=True)

    def _unreachable(self, reason: str, hint: str = "", may_heal: bool = False) -> Verdict:
        return Verdict(
            Outcome.UNREACHABLE, reason, f"cannot connect to {self._address}: {reason}{hint}", may_heal
        )

    def _obstacle(self, deadline: float) -> Verdict | None:
        """Find out, over a plain connection, what keeps grpc from connecting; None where nothing does."""
        if self._path is None:
            return None
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                connection.connect(self._path)
                with self._cancelled_by_close(lambda: _shut_down(connection)):
                    return self._handshake(connection, deadline)
        except OSError as error:
            return self._explain(error)

    def _handshake(self, connection: socket.socket, deadline: float) -> Verdict | None:
        """Exchange the first frames of HTTP/2; None where the peer does its part."""
        received = b""
        try:
            connection.sendall(_PREFACE)
            while len(received) < _FRAME_HEADER_BYTES:
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                chunk = connection.recv(_FRAME_HEADER_BYTES - len(received))
                if not chunk:
                    break
                received += chunk
        except TimeoutError:
            return health.failed("DeadlineExceeded", f"{self._address} takes connections, but nobody there answers: stopped, hung, or out of file descriptors")  # fmt: skip
        except OSError:  # closed with our bytes unread
            pass
        if len(received) < _FRAME_HEADER_BYTES:
            return self._unreachable(_NOT_HTTP2, f" (it closed the connection after {len(received)} bytes)")
        if received[3] != _SETTINGS:
            return self._unreachable(_NOT_HTTP2, f" (it began with {received!r})")
        return None

    def _explain(self, error: OSError) -> Verdict:
        """Say why a plain connect failed, or a channel could not be opened."""
        reason = os.strerror(error.errno or 0).lower()
        try:
            status = os.stat(self._path) if self._path else None
        except OSError:
            status = None
        if error.errno == errno.ECONNREFUSED and status and not stat.S_ISSOCK(status.st_mode):
            return self._unreachable("not a socket")
        if error.errno == errno.EAGAIN:
            return self._unreachable(
                "its queue of connections is full", ": stopped, hung, or overloaded", may_heal=True
            )
        if error.errno in (errno.EACCES, errno.EPERM):
            owner = (
                f"the socket belongs to uid {status.st_uid}, mode {status.st_mode & 0o7777:04o}"
                if status
                else "it may not enter the folder"
            )
            return self._unreachable(
                reason, f" (this program is uid {os.geteuid()}, {owner}; where these fit, SELinux denies it)"
            )
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return self._unreachable(reason, " in the liveness probe itself")
        return self._unreachable(reason, may_heal=error.errno in (errno.ENOENT, errno.ECONNREFUSED))


def _escaped(path: str) -> str:
    """Write a path as URIs have it; most need nothing, and no module loaded."""
    return path if re.fullmatch(r"[\w/.~-]+", path, re.ASCII) else urllib.parse.quote(os.fsencode(path))


def _shut_down(connection: socket.socket) -> None:
    with suppress(OSError):  # the peer may have gone
        connection.shutdown(socket.SHUT_RDWR)
