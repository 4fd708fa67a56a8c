"""A CSI driver for tests: a real gRPC server in its own process, steered by a handle; imports grpc only.

In its own process, so that a test can stop it, kill it and take its file descriptors away. Its replies are written as
bytes, so that they can be wrong, and so that a mistake in our generated messages cannot hide on both sides.

Loading gRPC takes longer than most drivers live, so they are forks of one process that has loaded it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerContext, ForkServerProcess

SERVICE = "/csi.v1.Identity/"
METHODS = ("Probe", "GetPluginInfo", "GetPluginCapabilities")
Method = Literal["Probe", "GetPluginInfo", "GetPluginCapabilities"]

# The 16 codes of a failed call, as gRPC spells them.
CODES = tuple(code.name for code in grpc.StatusCode if code is not grpc.StatusCode.OK)

# Replies that no decoder accepts as a ProbeResponse or a GetPluginInfoResponse. A *known* field of another wire
# type is not among them: protobuf reads it as an unknown field, so b"\x08\x01" is a valid "ready is unset".
UNDECODABLE = {
    "no message at all": b"\xff\xff\xff",
    "length beyond the end": b"\n\x05\x08",
    "field without its value": b"\n\x02\x08",
    "wire type that does not exist": b"\x0f\x01",
}

Behaviour = Literal[
    "unset", "ready", "not-ready", "name", "raw", "error", "slow", "hang", "unimplemented", "no-service"
]
REPLIES = {"unset": b"", "ready": b"\n\x02\x08\x01", "not-ready": b"\n\x00"}


def plugin_info(name: str) -> bytes:
    """A GetPluginInfoResponse that has a name and nothing else."""
    text = name.encode()
    length, size = b"", len(text)
    while size > 0x7F:
        length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
    return b"\n" + length + bytes([size]) + text if text else b""


class Answer(NamedTuple):
    """What a method does: it does not exist, or after some seconds it returns an error or a reply."""

    reply: bytes = b""
    code: str = ""
    message: str = ""
    after: float = 0.0
    absent: bool = False


# ---- in the driver's process


class Identity(grpc.GenericRpcHandler):
    """The service: answers as it was last told to, and counts."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._answers = {method: Answer() for method in METHODS}
        self._calls: Counter[str] = Counter()
        self._probing: set[object] = set()
        self._most_probing = 0
        self._released = 0

    def tell(self, method: str, answer: Answer) -> None:
        with self._changed:
            self._answers[method] = answer
            self._changed.notify_all()

    def release(self) -> None:
        with self._changed:
            self._released += 1
            self._changed.notify_all()

    def seen(self) -> dict[str, int]:
        with self._changed:
            return {
                "probes": self._calls["Probe"],
                "infos": self._calls["GetPluginInfo"],
                "probing": len(self._probing),
                "most_probing": self._most_probing,
            }

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method.removeprefix(SERVICE)
        with self._changed:
            self._calls[method] += 1
            if self._answers.get(method, Answer(absent=True)).absent:
                return None
        return grpc.unary_unary_rpc_method_handler(partial(self._handle, method))

    def _handle(self, method: str, _request: bytes, context: grpc.ServicerContext) -> bytes:
        call = object()
        if method == "Probe":
            with self._changed:
                self._probing.add(call)
                self._most_probing = max(self._most_probing, len(self._probing))
        # A caller that gave up wakes the handler, which would hold its thread and count as a call under way.
        if not context.add_callback(partial(self._end, call)):
            self._end(call)
        try:
            answer = self._decide(method, context)
        finally:
            # Before the reply leaves, so that a quick caller's next call never counts as a second one at a time.
            self._end(call)
        if answer.code:
            context.abort(grpc.StatusCode[answer.code], answer.message)
        return answer.reply

    def _decide(self, method: str, context: grpc.ServicerContext) -> Answer:
        begin = time.monotonic()
        with self._changed:
            released = self._released
            while True:
                answer = self._answers[method]
                left = begin + answer.after - time.monotonic()
                if left <= 0 or self._released != released or not context.is_active():
                    return answer
                self._changed.wait(min(left, threading.TIMEOUT_MAX))

    def _end(self, call: object) -> None:
        with self._changed:
            self._probing.discard(call)
            self._changed.notify_all()


class _Process:
    """Carries out the handle's commands."""

    def __init__(self, target: str) -> None:
        self._identity = Identity()
        self._target = target
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=64), [self._identity], options=[("grpc.so_reuseport", 0)]
        )

    def obey(self, do: str, *arguments: Any) -> Any:
        match do:
            case "listen":
                address = f"unix:{self._target}" if self._target.startswith("/") else self._target
                port = self._server.add_insecure_port(address)
                self._server.start()
                return port
            case "tell":
                return self._identity.tell(*arguments)
            case "release":
                return self._identity.release()
            case "seen":
                return self._identity.seen()
            case "stop":
                return self._server.stop(None).wait()


def _run(commands: Connection, target: str) -> None:
    """Answers each command with its result, until the handle, or the test's process, is gone."""
    # A stopped process does not see that, so its parent's end kills it: the end of the process that forks, which waits
    # for the test's process, and for whatever holds what it has given to its forks.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.closerange(3, commands.fileno())
    os.closerange(commands.fileno() + 1, 1024)
    process = _Process(target)
    with contextlib.suppress(EOFError):
        while True:
            commands.send(process.obey(*commands.recv()))
    # Not by returning: that would join threads whose calls hang.
    os._exit(0)


# ---- in the test's process


class Seen(NamedTuple):
    """What a driver has seen since it was started."""

    probes: int
    infos: int  # calls of GetPluginInfo
    probing: int  # Probe calls under way
    most_probing: int  # the most at one time
    connections: int  # accepted and still open


# What makes each new Python of our environment measure coverage.
_MEASURING = ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")


@contextlib.contextmanager
def unmeasured_children(**variables: str) -> Iterator[None]:
    """Processes that are started meanwhile measure no coverage, and have these variables too."""
    kept = dict(os.environ)
    for name in _MEASURING:
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


@functools.cache
def _forks() -> ForkServerContext:
    """Starts the process that forks, once, with gRPC loaded, and silent."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grpc._server"])
    with unmeasured_children(GRPC_VERBOSITY="NONE"):
        forkserver.ensure_running()
    return context


class FakeDriver:
    """A driver on a unix socket (an absolute path) or on TCP (`127.0.0.1:0`), started and steered by a test.

    What was `set` before `start` holds from the first call on; it outlives `restart`, and `kill` followed by `start`.
    """

    def __init__(self, target: str | Path, *, name: str = "fake.csi.k8s.io") -> None:
        self.target = str(target)
        self.address = self.target  # with the real port once started
        self._answers = {method: Answer() for method in METHODS}
        self._process: ForkServerProcess | None = None
        self._turn = threading.Lock()
        self._paused = False
        self.set("name", name=name)

    def __enter__(self) -> FakeDriver:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    # ---- life

    def start(self) -> FakeDriver:
        """Returns when the driver listens."""
        assert not self.running, "the driver runs already"
        self._commands, theirs = _forks().Pipe()
        self._process = _forks().Process(target=_run, args=(theirs, self.target), daemon=True)
        self._process.start()
        theirs.close()
        try:
            for method, answer in self._answers.items():
                self._ask("tell", method, answer)
            port = self._ask("listen")
        except BaseException:
            self.kill()
            raise
        if not self.target.startswith("/"):
            self.address = f"{self.target.rpartition(':')[0]}:{port}"
        return self

    def stop(self) -> None:
        """Like a driver that is asked to end: calls under way are cancelled, the socket is removed."""
        self.resume()
        self._ask("stop")
        self.kill()

    def kill(self) -> None:
        """SIGKILL, which leaves the socket's file behind. Does nothing if none runs."""
        if self._process is None:
            return
        self._process.kill()
        self._process.join()
        self._process.close()
        self._commands.close()
        self._process, self._paused = None, False

    def restart(self) -> None:
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP; returns when every thread has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        # Asks again and again: only its parent could await it.
        while set(self._thread_states()) != {"T"}:
            time.sleep(0.002)
        self._paused = True

    def resume(self) -> None:
        if self._paused:
            os.kill(self.pid, signal.SIGCONT)
            self._paused = False

    # ---- behaviour

    def set(
        self,
        behaviour: Behaviour,
        *,
        method: Method = "Probe",
        code: str = "INTERNAL",
        message: str = "",
        data: bytes = b"",
        name: str = "",
        after: float = 0.0,
    ) -> None:
        """In force when it returns, even for calls that hang: they then get the new answer.

        unset, ready, not-ready   the replies of Probe
        name                      GetPluginInfo gives `name` (which may be empty)
        raw                       the reply is `data` as it is
        error                     `code` (one of CODES) and `message`
        slow                      the reply of now, `after` seconds
        hang                      no answer until another `set` or `release`
        unimplemented             the service has no such method
        no-service                nothing of the service is there
        """
        match behaviour:
            case "unset" | "ready" | "not-ready":
                answer = Answer(REPLIES[behaviour], after=after)
            case "name":
                method, answer = "GetPluginInfo", Answer(plugin_info(name), after=after)
            case "raw":
                answer = Answer(data, after=after)
            case "error":
                answer = Answer(code=code, message=message, after=after)
            case "slow":
                answer = Answer(self._answers[method].reply, after=after)
            case "hang":
                answer = Answer(self._answers[method].reply, after=math.inf)
            case "unimplemented" | "no-service":
                answer = Answer(absent=True)
        for each in METHODS if behaviour == "no-service" else (method,):
            self._answers[each] = answer
            if self._process:
                self._ask("tell", each, answer)

    def release(self) -> None:
        """Answers the calls that hang or are slow now; later calls hang as before."""
        self._ask("release")

    def unlink(self) -> None:
        """Removes the socket's file while the driver lives."""
        Path(self.target).unlink()

    def exhaust_descriptors(self) -> None:
        """Open connections go on; a new one is queued by the kernel and never accepted."""
        # Below what is open already, so that a descriptor that is freed does not help either.
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (3, self._descriptor_limit()))

    def release_descriptors(self) -> None:
        """gRPC tries to accept again within a second."""
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (self._descriptor_limit(),) * 2)

    # ---- what it has seen

    @property
    def pid(self) -> int:
        assert self._process, "the driver was not started"
        assert self._process.pid
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def seen(self) -> Seen:
        return Seen(connections=self.connections(), **self._ask("seen"))

    def wait(self, timeout: float = 20.0, **at_least: int) -> Seen:
        """Until each counter has at least the value given, as in wait(probes=3)."""
        return self.wait_until(lambda seen: all(getattr(seen, k) >= n for k, n in at_least.items()), timeout)

    def wait_until(self, true: Callable[[Seen], bool], timeout: float = 20.0) -> Seen:
        # Asks again and again: connections are up to the kernel, which reports no event for them.
        end = time.monotonic() + timeout
        while not true(seen := self.seen()):
            if time.monotonic() > end:
                raise AssertionError(f"the driver has only seen {seen}")
            time.sleep(0.002)
        return seen

    def connections(self) -> int:
        """From /proc, so that it works for a stopped driver and for one without descriptors too."""
        inodes = set()
        for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
        if self.target.startswith("/"):
            rows = _table("unix")
            return sum(row[5] == "03" and row[6] in inodes and row[7:] == [self.target] for row in rows)
        port = f":{int(self.address.rpartition(':')[2]):04X}"
        # gRPC's listener on an IPv4 address may be one of IPv6 with that address mapped.
        rows = _table("tcp") + _table("tcp6")
        return sum(row[1].endswith(port) and row[3] == "01" and row[9] in inodes for row in rows)

    # ---- inside

    def _descriptor_limit(self) -> int:
        return resource.prlimit(self.pid, resource.RLIMIT_NOFILE)[1]

    def _thread_states(self) -> list[str]:
        threads = Path(f"/proc/{self.pid}/task").iterdir()
        return [(thread / "stat").read_text().rpartition(")")[2].split()[0] for thread in threads]

    def _ask(self, do: str, *arguments: Any) -> Any:
        assert self._process, "the driver was not started"
        assert not self._paused, "a paused driver takes no commands"
        with self._turn, contextlib.suppress(EOFError):
            self._commands.send((do, *arguments))
            if self._commands.poll(60):
                return self._commands.recv()
        raise AssertionError(f"the driver has not answered to {do!r}")


def _table(kind: str) -> list[list[str]]:
    """The kernel's list of such sockets; there is none for an address family that is switched off."""
    file = Path(f"/proc/net/{kind}")
    return [line.split() for line in file.read_text().splitlines()[1:]] if file.exists() else []
