"""The CSI driver's Identity service, whichever way it is called. The only importer of protobuf and of the generated messages.

Here, whatever `call` says becomes a verdict or a name; how to make a call is up to unix_call and grpc_call.
"""

import logging
import os
import time
from collections.abc import Callable

from google.protobuf.message import DecodeError

from livenessprobe import health
from livenessprobe.health import Outcome, Verdict
from livenessprobe.identity_pb2 import (
    GetPluginInfoRequest,
    GetPluginInfoResponse,
    ProbeRequest,
    ProbeResponse,
)
from livenessprobe.rpc import Call, Reply, Unreachable

PROBE = "/csi.v1.Identity/Probe"
GET_PLUGIN_INFO = "/csi.v1.Identity/GetPluginInfo"
LONGEST_NAME = 255  # characters; the CSI specification allows 63, and a label must stay bounded

_CALLS = logging.INFO - 5  # verbosity 5

_logger = logging.getLogger(__name__)


def way_to(address: str, socket_path: str | None) -> Call:
    """Return how to call an address: a unix socket or, if that is None, another gRPC target.

    Only what the address needs is loaded.
    """
    if socket_path is not None:
        from livenessprobe.unix_call import UnixCall

        return UnixCall(socket_path)
    from livenessprobe.grpc_call import GrpcCall

    return GrpcCall(address)


class Driver:
    """One CSI driver at an address. Calls may come from several threads."""

    def __init__(
        self,
        address: str,
        socket_path: str | None,
        call: Call,
        observe: Callable[[str, str, float], None] = lambda method, code, seconds: None,
    ) -> None:
        """Take the CSI address, its unix socket's path (None for another gRPC target), how to call it, and who observes.

        The observer gets each call's method, gRPC code (named as in Go) and seconds.
        """
        self._address, self._path, self._port, self._observe = address, socket_path, call, observe
        self._was_reached = True
        self._outages = 0

    def attempt(self, deadline: float) -> Verdict:
        """Connect and probe once, by a moment of time.monotonic()."""
        verdict = self._probe(deadline)
        reached = verdict.outcome is not Outcome.UNREACHABLE and verdict.reason != "DeadlineExceeded"
        self._outages += self._was_reached and not reached
        self._was_reached = reached
        return verdict

    def name(self, deadline: float) -> tuple[str, str]:
        """Ask the driver for its name, by a moment of time.monotonic().

        Returns the name and "", or "" and what went wrong: also "" if there was no connection to ask over.
        """
        try:
            reply = self._call(GET_PLUGIN_INFO, GetPluginInfoRequest().SerializeToString(), deadline)
        except Unreachable:
            return "", ""
        if reply.payload is None:
            return "", health.failed(reply.code, reply.message).text
        try:
            name = GetPluginInfoResponse.FromString(reply.payload).name
        except DecodeError as error:
            return "", f"cannot decode the reply: {error}"
        if not 0 < len(name) <= LONGEST_NAME:
            return "", f"the name has {len(name)} characters, not 1 to {LONGEST_NAME}"
        return name, ""

    def identity(self) -> tuple[object, ...]:
        """Return a value that changes when another driver may be behind the address: at a new socket, or after an outage."""
        try:
            status = os.stat(self._path) if self._path else None
        except OSError:
            status = None
        return self._outages, status and (status.st_dev, status.st_ino, status.st_ctime_ns)

    def close(self) -> None:
        """End the calls that are under way, and let no new one begin."""
        self._port.close()

    def _probe(self, deadline: float) -> Verdict:
        try:
            reply = self._call(PROBE, ProbeRequest().SerializeToString(), deadline)
        except Unreachable as error:
            text = f"cannot connect to {self._address}: {error.reason}{error.hint}"
            return Verdict(Outcome.UNREACHABLE, error.reason, text, error.may_heal)
        if reply.payload is None:
            return health.failed(reply.code, reply.message)
        try:
            ready = ProbeResponse.FromString(reply.payload)
        except DecodeError as error:
            return health.failed("Internal", f"cannot decode the reply: {error}")
        return health.NOT_READY if ready.HasField("ready") and not ready.ready.value else health.HEALTHY

    def _call(self, method: str, request: bytes, deadline: float) -> Reply:
        """Call; log and observe the outcome."""
        start = time.monotonic()
        _logger.log(
            _CALLS, "Calling the CSI driver", {"method": method, "timeout": f"{deadline - start:.3f}s"}
        )
        try:
            reply = self._port(method, request, deadline)
        except MemoryError:
            raise Unreachable("out of memory", " in the liveness probe itself") from None
        seconds = time.monotonic() - start
        _logger.log(
            _CALLS,
            "The CSI driver replied",
            {"method": method, "code": reply.code, "message": reply.message, "seconds": round(seconds, 6)},
        )
        self._observe(method, reply.code, seconds)
        return reply
