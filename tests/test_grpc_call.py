"""grpc_call.py: what grpcio says about servers, about peers that are not, and about a node that denies it things."""

from __future__ import annotations

import logging
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
import peers
import program
import pytest
from verdicts import BY_GRPCIO, CASES

from livenessprobe.grpc_call import GrpcCall
from livenessprobe.rpc import Reply, Unreachable

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

METHOD = "/csi.v1.Identity/Probe"
PATIENCE = 20.0
BRIEF = 0.4
STOPPING = Reply("Canceled", "the liveness probe is stopping", None)
TOO_LATE = Reply("DeadlineExceeded", f"no answer to {METHOD} in time", None)


def call(target: str, seconds: float = PATIENCE) -> Reply:
    return GrpcCall(target)(METHOD, b"", time.monotonic() + seconds)


def failed(target: str, seconds: float = PATIENCE) -> Unreachable:
    with pytest.raises(Unreachable) as raised:
        call(target, seconds)
    return raised.value


@contextmanager
def serving(answer: Callable[[bytes, grpc.ServicerContext], Sequence[bytes]]) -> Iterator[str]:
    """A server that replies with this many messages; yields its address."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
            return grpc.unary_stream_rpc_method_handler(
                lambda request, context: iter(answer(request, context))
            )

    server = grpc.server(ThreadPoolExecutor(4), [Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


# ---- servers


@pytest.mark.parametrize(
    ("messages", "reply"),
    [
        ([b""], Reply("OK", "", b"")),
        ([b"some"], Reply("OK", "", b"some")),
        ([], Reply("Internal", "the reply has no message", None)),
    ],
    ids=["empty", "some bytes", "none"],
)
def test_a_reply_is_one_message(messages: list[bytes], reply: Reply) -> None:
    with serving(lambda request, context: messages) as target:
        for form in ("{}", "dns:///{}", "ipv4:{}"):
            assert call(form.format(target)) == reply


def test_the_request_and_its_time_arrive() -> None:
    seen: list[tuple[bytes, float]] = []

    def answer(request: bytes, context: grpc.ServicerContext) -> list[bytes]:
        seen.append((request, context.time_remaining() or 0))
        return [b""]

    with serving(answer) as target:
        GrpcCall(target)(METHOD, b"request", time.monotonic() + 7)
    ((request, left),) = seen
    assert request == b"request"
    assert 0 < left <= 7.1


def test_an_error_has_its_name_in_go() -> None:
    def answer(request: bytes, context: grpc.ServicerContext) -> list[bytes]:
        context.abort(grpc.StatusCode.CANCELLED, "größer 100 %41")

    with serving(answer) as target:
        assert call(target) == Reply("Canceled", "größer 100 %41", None)


def test_a_deadline_of_the_drivers_own_is_told_from_ours() -> None:
    ended = threading.Event()

    def answer(request: bytes, context: grpc.ServicerContext) -> list[bytes]:
        if request:
            ended.wait(PATIENCE)
        context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer from backend")

    with serving(answer) as target:
        assert call(target) == Reply("DeadlineExceeded", "no answer from backend", None)
        begin = time.monotonic()
        assert GrpcCall(target)(METHOD, b"wait", begin + BRIEF) == TOO_LATE
        assert BRIEF * 0.9 <= time.monotonic() - begin < PATIENCE / 2
        ended.set()


def test_a_deadline_that_has_passed_is_kept() -> None:
    with serving(lambda request, context: [b""]) as target:
        assert call(target, -1) == TOO_LATE


# What the C core also says if it has begun the call before it reads what the peer said first.
RACES = {"GOAWAY before the call, then a new connection": ("Unavailable", "")}


@pytest.mark.parametrize("name", [name for name in CASES if BY_GRPCIO.get(name) != "DeadlineExceeded"])
def test_the_verdict_is_that_of_grpc_go_or_known_to_differ(name: str, socket_path: Path) -> None:
    with CASES[name].peer(socket_path):
        try:
            code = call(f"unix:{socket_path}").code
        except Unreachable:
            code = ""

    assert code in (BY_GRPCIO.get(name, CASES[name].code), *RACES.get(name, ()))


def test_each_call_has_a_connection_of_its_own() -> None:
    clients: set[str] = set()

    def answer(request: bytes, context: grpc.ServicerContext) -> list[bytes]:
        clients.add(context.peer())
        return [b""]

    with serving(answer) as target:
        calls = GrpcCall(target)
        for _ in range(5):
            calls(METHOD, b"", time.monotonic() + PATIENCE)
    assert len(clients) == 5


def literal(name: bytes, value: bytes) -> bytes:
    """A header field as HPACK writes it plainly."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def test_what_its_libraries_would_log_is_not_logged(
    socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = b"\x88" + literal(b"content-type", b"application/grpc") + literal(b"grpc-status", b"13")
    fields += literal(b"grpc-message", b"no \xff disk")

    def talk(connection: socket.socket) -> None:
        connection.sendall(peers.SETTINGS)
        received = b""
        while METHOD.encode() not in received:
            received += connection.recv(65536)
        connection.sendall(peers.frame(1, fields, flags=5, stream=1))
        while connection.recv(65536):
            pass

    with peers.talking(talk, socket_path):
        assert call(f"unix:{socket_path}") == Reply("Internal", "no ÿ disk", None)
    assert not caplog.records
    assert not logging.getLogger("grpc._channel").isEnabledFor(logging.CRITICAL)


# ---- no connection


@pytest.mark.parametrize("form", ["{}", "dns:///{}", "ipv4:{}"])
def test_a_refused_connection_may_heal(form: str) -> None:
    error = failed(form.format(f"127.0.0.1:{program.free_port()}"))

    assert (error.reason, error.may_heal) == ("connection refused", True)
    assert error.hint.startswith(" (")


def test_names_that_do_not_resolve() -> None:
    error = failed("dns:///livenessprobe.invalid:1")

    assert (error.reason, error.may_heal) == ("no connection", True)
    assert error.hint.startswith(" (")


@pytest.mark.parametrize("peer", [peers.junk, peers.http1])
def test_a_peer_that_does_not_speak_http2_does_not_heal(socket_path: Path, peer: peers.Peer) -> None:
    with peer(socket_path):
        error = failed(f"unix:{socket_path}")

    assert (error.reason, error.hint, error.may_heal) == ("the peer does not speak HTTP/2", "", False)


def test_a_silent_peer_does_not_answer_in_time(socket_path: Path) -> None:
    with peers.silent(socket_path):
        assert call(f"unix:{socket_path}", BRIEF).code == "DeadlineExceeded"


# ---- close


def test_close_ends_calls_and_lets_none_begin() -> None:
    begun, ended = threading.Semaphore(0), threading.Event()

    def answer(request: bytes, context: grpc.ServicerContext) -> list[bytes]:
        begun.release()
        ended.wait(PATIENCE)
        return [b""]

    with serving(answer) as target, ThreadPoolExecutor(2) as pool:
        calls = GrpcCall(target)
        under_way = [pool.submit(calls, METHOD, b"", time.monotonic() + 10 * PATIENCE) for _ in range(2)]
        for _ in range(2):
            assert begun.acquire(timeout=PATIENCE)
        calls.close()
        assert [each.result(PATIENCE) for each in under_way] == [STOPPING] * 2
        assert calls(METHOD, b"", time.monotonic() + PATIENCE) == STOPPING
        assert not begun.acquire(blocking=False)
        ended.set()


# ---- what a node denies


def test_out_of_file_descriptors_ourselves() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving(lambda request, context: [b""]) as target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            error = failed(target)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert (str(error), error.may_heal) == ("too many open files in the liveness probe itself", False)
        assert call(target).code == "OK"
