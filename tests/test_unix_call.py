"""A call over a unix socket: whatever the peer says, the verdict is grpc-go's, and comes in time."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import socket
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import peers
import pytest
import verdicts
from hpack import Decoder
from verdicts import CASES, HELLO, SILENT, Call, Case

from livenessprobe.rpc import Reply, Unreachable
from livenessprobe.unix_call import UnixCall

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fake_driver import FakeDriver

METHOD = "/csi.v1.Identity/Probe"
# Longer than anything here takes.
PATIENCE = 20.0
BRIEF = 0.3
STOPPING = Reply("Canceled", "the liveness probe is stopping", None)


def outcome(path: Path, seconds: float = PATIENCE, request: bytes = b"") -> Reply | Unreachable:
    """What comes of a call."""
    return ended(UnixCall(str(path)), seconds, request)


def ended(call: UnixCall, seconds: float = PATIENCE, request: bytes = b"") -> Reply | Unreachable:
    """What comes of a call; fails if that is no end."""
    future = Future[Reply | Unreachable]()

    def end() -> None:
        try:
            future.set_result(call(METHOD, request, time.monotonic() + seconds))
        except Unreachable as unreachable:
            future.set_result(unreachable)
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=end, daemon=True).start()
    return future.result(max(0.0, seconds) + PATIENCE)


# ---- the table of peers


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_is_that_of_grpc_go(name: str, socket_path: Path) -> None:
    with CASES[name].peer(socket_path):
        assert CASES[name].holds(ended := outcome(socket_path)), ended


@pytest.mark.parametrize(
    "name", ["an answer", "padding", "CONTINUATION", "refused, then answered", "HTTP/1.1"]
)
def test_the_verdict_is_the_same_byte_by_byte(name: str, socket_path: Path) -> None:
    """test_http2_call.py has all of them, byte by byte."""
    with CASES[name].peer(socket_path, piece=1):
        assert CASES[name].holds(ended := outcome(socket_path)), ended


@pytest.mark.parametrize("name", SILENT)
def test_a_peer_that_does_not_go_on(name: str, socket_path: Path) -> None:
    said_hello = name not in ("from the first", "after half of SETTINGS")
    case = Case(
        (SILENT[name],), "DeadlineExceeded", "no answer" if said_hello else "nobody there answers", ""
    )
    begin = time.monotonic()
    with case.peer(socket_path):
        assert case.holds(ended := outcome(socket_path, BRIEF)), ended
    assert BRIEF <= time.monotonic() - begin < PATIENCE


def test_a_peer_that_goes_on_with_other_things(socket_path: Path) -> None:
    def talk(connection: socket.socket) -> None:
        connection.sendall(HELLO)
        while connection.recv(65536):
            connection.sendall(peers.frame(6, b"and on.."))

    begin = time.monotonic()
    with peers.talking(talk, socket_path):
        assert outcome(socket_path, BRIEF) == Reply(
            "DeadlineExceeded", f"no answer to {METHOD} in time", None
        )
    assert BRIEF <= time.monotonic() - begin < PATIENCE


def test_a_peer_that_goes_on_and_does_not_listen(socket_path: Path) -> None:
    def talk(connection: socket.socket) -> None:
        connection.sendall(HELLO)
        while not over.wait(0.01):
            connection.sendall(peers.frame(77, b"x"))

    over = threading.Event()
    timer = threading.Timer(PATIENCE, over.set)
    timer.start()
    begin = time.monotonic()
    with peers.talking(talk, socket_path):
        found = outcome(socket_path, BRIEF)
        over.set()
    timer.cancel()
    assert found == Reply("DeadlineExceeded", f"no answer to {METHOD} in time", None)
    assert BRIEF <= time.monotonic() - begin < PATIENCE


def test_a_driver_that_keeps_our_deadline_may_say_so_in_its_words_but_not_in_the_last_moment(
    socket_path: Path,
) -> None:
    """Otherwise the text would change from check to check, with which of the two is quicker."""
    says = verdicts.headers(
        verdicts.begin()
        + verdicts.field(b"grpc-status", b"4")
        + verdicts.field(b"grpc-message", b"too slow"),
        verdicts.END_STREAM,
    )
    with peers.talking(lambda connection: connection.sendall(HELLO + says), socket_path):
        assert outcome(socket_path) == Reply("DeadlineExceeded", "too slow", None)
        for _ in range(20):
            found = outcome(socket_path, 0.009)
            assert isinstance(found, Reply)
            assert (found.code, "too slow" in found.message) == ("DeadlineExceeded", False)


# ---- what the peer hears


def test_the_request_is_as_that_of_grpc_go(socket_path: Path) -> None:
    heard: list[bytes] = []
    with peers.talking(lambda connection: heard.append(connection.recv(65536)), socket_path):
        outcome(socket_path, 5.0)
    (words,) = heard
    assert words.startswith(peers.PREFACE + verdicts.settings((2, 0)))
    rest = words[len(peers.PREFACE) + 15 :]
    length = int.from_bytes(rest[:3], "big")
    assert rest[3:9] == bytes([1, 4, 0, 0, 0, 1])
    *fields, (name, timeout) = Decoder().decode(rest[9 : 9 + length], raw=True)
    assert fields == verdicts.request_fields(METHOD)
    assert name == b"grpc-timeout"
    assert 4_000_000 < int(timeout.removesuffix(b"u")) <= 5_000_000
    # All of it in one write, including the message and its end.
    assert rest[9 + length :] == peers.frame(0, b"\0\0\0\0\0", 1, 1)


def test_a_long_request_goes_as_the_windows_open(driver: FakeDriver, socket_path: Path) -> None:
    """More than a window and many frames; a real server opens the window."""
    assert outcome(socket_path, request=b"\n\xc0\x9a\x0c" + bytes(200_000)) == Reply("OK", "", b"")


# ---- connections


def test_each_call_has_a_connection_of_its_own(socket_path: Path) -> None:
    call = UnixCall(str(socket_path))
    with CASES["an answer"].peer(socket_path) as connections:
        assert [ended(call), ended(call)] == [Reply("OK", "", verdicts.REPLY)] * 2
        assert len(connections) == 2


@pytest.mark.parametrize(
    ("name", "connections"),
    [
        ("refused, then answered", 1),
        ("refused twice", 1),
        ("refused on each connection", 2),
        ("GOAWAY each time", 2),
        ("closed after SETTINGS", 1),
    ],
)
def test_a_call_is_made_again_once_at_most(name: str, connections: int, socket_path: Path) -> None:
    with CASES[name].peer(socket_path) as made:
        outcome(socket_path)
        assert len(made) == connections


def test_no_descriptor_is_left(socket_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for name in ("an answer", "GOAWAY each time", "HTTP/1.1", "closed after SETTINGS"):
        with CASES[name].peer(socket_path):
            outcome(socket_path)
    outcome(socket_path)

    assert os.listdir("/proc/self/fd") == before


def reason(path: Path) -> tuple[str, str, bool]:
    """Why there was no connection."""
    unreachable = outcome(path, BRIEF)
    assert isinstance(unreachable, Unreachable)
    assert str(unreachable) == unreachable.reason + unreachable.hint
    return unreachable.reason, unreachable.hint, unreachable.may_heal


def test_nothing_there(socket_path: Path) -> None:
    assert reason(socket_path) == ("no such file or directory", "", True)


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (peers.stale_socket, ("connection refused", "", True)),
        (peers.datagram_socket, ("protocol wrong type for socket", "", False)),
        (peers.regular_file, ("not a socket", "", False)),
        (peers.directory, ("not a socket", "", False)),
        (
            peers.never_accepting,
            ("its queue of connections is full", ": stopped, hung, or overloaded", True),
        ),
    ],
)
def test_what_cannot_be_connected_to(
    peer: peers.Peer, expected: tuple[str, str, bool], socket_path: Path
) -> None:
    with peer(socket_path):
        assert reason(socket_path) == expected


def without_privileges(path: Path) -> tuple[str, str, bool]:
    """The same on a thread that the file system treats like anybody's, even if we are root."""
    found: list[tuple[str, str, bool]] = []

    def find() -> None:
        ctypes.CDLL(None).setfsuid(65534)
        found.append(reason(path))

    thread = threading.Thread(target=find, daemon=True)
    thread.start()
    thread.join(2 * PATIENCE)
    return found[0]


@contextlib.contextmanager
def closed_to_others(path: Path) -> Iterator[None]:
    with peers.silent(path):
        path.chmod(0o440)
        yield


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (peers.forbidden, "the socket belongs to uid {uid}, mode 0000"),
        (closed_to_others, "the socket belongs to uid {uid}, mode 0440"),
        (peers.forbidden_folder, "it may not enter the folder"),
    ],
)
def test_permission_denied(peer: peers.Peer, expected: str, socket_path: Path) -> None:
    with peer(socket_path):
        found = without_privileges(socket_path)

    uid = os.geteuid()
    hint = f" (this program is uid {uid}, {expected.format(uid=uid)}; if that allows it, SELinux does not)"
    assert found == ("permission denied", hint, False)


def test_a_file_that_may_not_be_opened_is_no_socket_either(socket_path: Path) -> None:
    with peers.regular_file(socket_path):
        socket_path.chmod(0)
        assert without_privileges(socket_path) == ("not a socket", "", False)


def test_too_few_descriptors(socket_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with peers.silent(socket_path):
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            found = reason(socket_path)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert found == ("too many open files", " in the liveness probe itself", False)


@pytest.mark.parametrize("unread", [False, True])
def test_closed_or_reset_before_a_word(unread: bool, socket_path: Path) -> None:
    """It is a reset if the peer has not read all that was sent."""

    def talk(connection: socket.socket) -> None:
        connection.recv(1 if unread else 65536)

    with peers.talking(talk, socket_path):
        assert reason(socket_path) == ("connection reset" if unread else "closed by the peer", "", True)


# ---- ends


@pytest.mark.parametrize("says", [b"", HELLO], ids=["silent", "greeting"])
def test_close_ends_a_call_under_way_and_lets_no_other_begin(says: bytes, socket_path: Path) -> None:
    call = UnixCall(str(socket_path))
    outcomes: list[Reply | Unreachable] = []
    called = threading.Event()

    def talk(connection: socket.socket) -> None:
        connection.sendall(says)
        heard = b""
        while more := connection.recv(65536):
            heard += more
            if not says or peers.SETTINGS_ACK in heard:  # by then it waits for the answer
                called.set()

    with peers.talking(talk, socket_path) as connections:
        calling = threading.Thread(target=lambda: outcomes.append(ended(call)), daemon=True)
        calling.start()
        assert called.wait(PATIENCE)
        begin = time.monotonic()
        call.close()
        calling.join(2 * PATIENCE)
        assert time.monotonic() - begin < PATIENCE / 2
        assert [*outcomes, ended(call)] == [STOPPING] * 2
        call.close()
        assert len(connections) <= 2


def test_close_outdoes_a_missing_socket(socket_path: Path) -> None:
    call = UnixCall(str(socket_path))
    call.close()

    assert ended(call) == STOPPING


def test_no_time_left(socket_path: Path) -> None:
    with CASES["an answer"].peer(socket_path):
        reply = outcome(socket_path, -1.0)

    assert isinstance(reply, Reply)
    assert reply.code == "DeadlineExceeded"


def test_a_driver_that_ends_before_it_accepts_resets_the_call(socket_path: Path) -> None:
    """Which may heal: a check sees this when a stopped driver is killed and comes back."""
    outcomes: list[Reply | Unreachable] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_path))
        listener.listen()
        calling = threading.Thread(target=lambda: outcomes.append(outcome(socket_path)), daemon=True)
        calling.start()
        assert select.select([listener], [], [], PATIENCE)[0]
    calling.join(2 * PATIENCE)

    (found,) = outcomes
    assert isinstance(found, Unreachable)
    assert found.reason in ("closed by the peer", "connection reset")  # as the call was sent, or not yet
    assert found.may_heal


# ---- floods


FLOODS = {
    "PING": peers.frame(6, b"flooding"),
    "SETTINGS": verdicts.settings((4, 65535)),
    "full SETTINGS": verdicts.settings(*[(4, 65535)] * 2700),
    "WINDOW_UPDATE": verdicts.window(1),
    "WINDOW_UPDATE of the call": verdicts.window(1, 1),
    "empty DATA": verdicts.data(b""),
    "DATA of nobody": verdicts.data(bytes(16384), 0, 3),
    "padding": verdicts.padded(0, b"", 255),
    "interim answers": verdicts.headers(verdicts.field(b":status", b"103")),
    "header fields of nobody": verdicts.headers(b"\x82" * 4000, 0, 3),
    "new sizes of the table": verdicts.headers(b"\x20" * 2, 0, 3),
    "a bomb": verdicts.headers(b"\x40" + verdicts.field(b"x", b"x" * 4000)[1:] + b"\xbe" * 9999, 0, 3),
    "unknown frames": peers.frame(77, b"x"),
    "promises": peers.frame(5, b"\0\0\0\2\x82", 4, 1),
    "GOAWAY": verdicts.goaway(1, 0, b"x" * 999),
}
CONTINUATIONS = {
    "nothing": peers.frame(9, b"", 0, 1),
    "a byte": peers.frame(9, b"x", 0, 1),
    "much": peers.frame(9, bytes(16384), 0, 1),
}
# Twice what was measured on a slow machine, and far from what hurts.
MOST_CPU_SECONDS = 1.5
MOST_MEMORY = 10 << 20


def measured(path: Path) -> tuple[Reply, float]:
    """What comes of a call beside other work, and the seconds of the processor that it takes itself, on this thread."""
    begin = time.thread_time()
    reply = UnixCall(str(path))(METHOD, b"", time.monotonic() + 6 * PATIENCE)
    return reply, time.thread_time() - begin


def resident(figure: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of this process in memory now, or the most there were."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{figure}:")[2].split()[0]) << 10


@pytest.mark.parametrize(
    ("begin", "flood"),
    [
        *[pytest.param(HELLO, flood, id=name) for name, flood in FLOODS.items()],
        *[
            pytest.param(HELLO + peers.frame(1, b"", 0, 1), flood, id=f"CONTINUATION of {name}")
            for name, flood in CONTINUATIONS.items()
        ],
    ],
)
@pytest.mark.unmeasured
def test_a_flood_ends_the_call_soon(begin: bytes, flood: bytes, socket_path: Path) -> None:
    def talk(connection: socket.socket) -> None:
        connection.sendall(begin)
        connection.setblocking(False)
        pieces = flood * (1 + 16384 // len(flood))
        sent = 0
        while True:
            ready = select.select([connection], [connection], [])
            if ready[0] and not connection.recv(65536):
                return
            if ready[1]:
                sent += connection.send(pieces[sent % len(flood) :])

    with peers.talking(talk, socket_path):
        Path("/proc/self/clear_refs").write_text("5")  # the most from now on
        before = resident("VmRSS")
        reply, cpu = measured(socket_path)
        grown = resident("VmHWM") - before

    assert reply.code == "ResourceExhausted"
    assert cpu < MOST_CPU_SECONDS
    assert grown < MOST_MEMORY


@pytest.mark.parametrize(
    "block",
    {
        "small fields, then a large one": b"\0\1a\0" * 20_000 + verdicts.field(b"x", b"x" * 380_000),
        "fields of the table": b"\x82" * 300_000,
        "sizes of the table": b"\x20" * 1_000_000,
        "an escaped text": verdicts.field(b"grpc-message", b"%41" * 349_000),
    }.items(),
    ids=lambda named: named[0],
)
def test_a_costly_block_of_header_fields(block: tuple[str, bytes], socket_path: Path) -> None:
    """hpack's time would grow with the square of some of these, if it got them whole."""
    with Case(((HELLO, Call(), verdicts.headers(verdicts.begin() + block[1], 1)),), "", "", "").peer(
        socket_path
    ):
        reply, cpu = measured(socket_path)

    assert reply.code != "OK"
    assert cpu < MOST_CPU_SECONDS
