"""Calls to every gRPC target that is not a unix socket, by grpcio. The only importer of grpc; see rpc.Call.

grpcio judges by rules of its own, which docs/reference.md names. Whatever a node denies, it must neither hang nor end the
program: waiting for an answer is by our own clock, and no channel is opened without descriptors and threads to spare.
"""

import errno
import logging
import os
import threading
import time

os.environ["GRPC_VERBOSITY"] = "NONE"  # its C core writes to standard error in its own format

import grpc

from livenessprobe import __version__
from livenessprobe.rpc import Reply, Unreachable
from livenessprobe.stopping import Stop

_CODE_NAMES = {
    code: "OK" if code is grpc.StatusCode.OK else code.name.title().replace("_", "")
    for code in grpc.StatusCode
} | {grpc.StatusCode.CANCELLED: "Canceled"}
# grpc's own limit of 8 to 16 KiB would hide an error behind "metadata size exceeds limit" when its text is long; Go's
# of 16 MiB would take several times as much memory, more than our container has.
_METADATA_BYTES = 1024 * 1024
_LONGEST_REPLY = 64 * 1024
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # otherwise channels to the same address share a connection
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.max_metadata_size", _METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", _METADATA_BYTES),
    ("grpc.max_receive_message_length", _LONGEST_REPLY),
    ("grpc.primary_user_agent", f"livenessprobe/{__version__}"),
)
# How the C core begins the message of a call for which it got no connection.
_NO_CONNECTION = ("failed to connect to all addresses", "errors resolving", "DNS resolution failed")
# The system's words, as they end such a message.
_ERRORS = {
    os.strerror(number): os.strerror(number).lower()
    for number in (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT)
}
_STOPPING = Reply("Canceled", "the liveness probe is stopping", None)
_EMPTY = Reply("Internal", "the reply has no message", None)
_OURSELVES = " in the liveness probe itself"
_SPARE = 16  # descriptors, and threads: what a channel and its call take, and those of another thread of ours

# Channels that got no thread of their own. Closing one, or forgetting it, would wait for ever.
_lost: list[grpc.Channel] = []


class GrpcCall:
    """Makes calls to one target, over a new channel each."""

    def __init__(self, target: str) -> None:
        """Take a target in gRPC's own syntax."""
        logging.getLogger("grpc").setLevel(logging.CRITICAL + 1)  # we say what it has to say
        self._target = target
        self._stop = Stop()

    def __call__(self, method: str, request: bytes, deadline: float) -> Reply:
        if self._stop.is_set():
            return _STOPPING
        _spare_descriptors()
        _spare_threads()
        channel = grpc.insecure_channel(self._target, _OPTIONS)
        # Bytes in, bytes out: grpc's own decoding logs a traceback for a reply it cannot read.
        start = channel.unary_unary(method, bytes, _message).future
        try:
            call = start(request, timeout=max(deadline - time.monotonic(), 0.001))
        except RuntimeError as error:  # there is no thread after all
            _lost.append(channel)
            raise Unreachable(str(error), _OURSELVES) from None
        ended = threading.Event()
        call.add_done_callback(lambda _: ended.set())
        with self._stop.interrupting(call.cancel):
            # Not call.result(), which goes by the time of day.
            ended.wait(max(deadline - time.monotonic(), 0))
        call.cancel()  # else close() waits for it, and where gRPC lacks a thread nothing else ends it
        channel.close()
        if self._stop.is_set():
            return _STOPPING
        code, message = _CODE_NAMES[call.code()], call.details() or ""
        if code == "OK":
            payload = call.result()
            return _EMPTY if payload is None else Reply("OK", "", payload)
        # Our deadline, not the driver's word.
        if code in ("Canceled", "DeadlineExceeded") and time.monotonic() > deadline - 0.01:
            return Reply("DeadlineExceeded", f"no answer to {method} in time", None)
        if code == "Unavailable" and message.startswith(_NO_CONNECTION):
            raise _unreachable(message)
        return Reply(code, message, None)

    def close(self) -> None:
        self._stop.set()


def _message(data: bytes) -> bytes | None:
    """Take a reply as it is; None is how grpc says that there is no message."""
    return data


def _unreachable(message: str) -> Unreachable:
    """Say why grpc got no connection, in its own words if the system has none."""
    if "Failed parsing HTTP/2" in message:
        return Unreachable("the peer does not speak HTTP/2")
    reason = _ERRORS.get(message.rpartition(": ")[2], "no connection")
    return Unreachable(reason, f" ({message.rpartition('last error: ')[2]})", may_heal=True)


def _spare_descriptors() -> None:
    """Raise Unreachable if there are too few descriptors: gRPC would abort the process for lack of one."""
    spare: list[int] = []
    try:
        while len(spare) < _SPARE:
            spare.append(os.dup(2))
    except OSError as error:
        raise Unreachable(os.strerror(error.errno or 0).lower(), _OURSELVES) from None
    finally:
        for descriptor in spare:
            os.close(descriptor)


def _spare_threads() -> None:
    """Raise Unreachable if there are too few threads: gRPC would never recover from the lack of one."""
    enough = threading.Event()
    try:
        for _ in range(_SPARE):
            threading.Thread(target=enough.wait, daemon=True).start()
    except RuntimeError as error:
        raise Unreachable(str(error), _OURSELVES) from None
    finally:
        enough.set()
