"""What strangers send: request heads, a driver's bytes, command lines. None of it makes the program fail or wait.

Bytes are made of meaningful pieces, and then damaged: pure randomness never gets far.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Literal, NamedTuple

import peers
import program
import pytest
from fake_driver import CODES, REPLIES, UNDECODABLE, FakeDriver, plugin_info
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st
from test_driver import GO_NAMES
from test_exchange import FINE, MALFORMED, Answer, answer, healthz, read_answer
from torture import Tally, assert_well_formed, effort
from verdicts import field, message

from livenessprobe import config, goflags, health
from livenessprobe.config import Exit
from livenessprobe.driver import Driver, way_to
from livenessprobe.exchange import LONGEST_HEAD, Exchange, head_size
from livenessprobe.health import HEALTHY, NOT_READY, Outcome
from livenessprobe.identity_pb2 import GetPluginInfoResponse, ProbeResponse
from livenessprobe.quoting import LONGEST_TEXT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from conftest import ProbeFactory
    from hypothesis.strategies import DrawFn, SearchStrategy

    from livenessprobe.exchange import Response

# Longer than anything here takes.
PATIENCE = 20.0
# For peers that may say no more.
BRIEF = 0.25
# CPU time, not time by the clock; anything that takes a second for 16 KiB lets a client starve the kubelet.
MOST_CPU_SECONDS = 0.5


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Iterator[Tally]:
    """Figures for `make torture`."""
    tally = Tally()
    yield tally
    for name, value in tally.figures.items():
        record_property(name, value)


@st.composite
def damaged(draw: DrawFn, whole: SearchStrategy[bytes]) -> bytes:
    """Pieces of it removed, doubled, moved, or replaced by junk."""
    data = draw(whole)
    for _ in range(draw(st.integers(0, 3))):
        begin, end, to = (draw(st.integers(0, len(data))) for _ in range(3))
        piece = draw(st.sampled_from([b"", data[begin:end]]) | st.binary(max_size=4))
        data = data[:to] + piece + data[to + draw(st.integers(0, 3)) :]
    return data


# ---- heads of requests

BLANKS = [" ", " ", " ", "\t", "  ", ""]
LINE_ENDS = [b"\r\n", b"\r\n", b"\n", b"\r"]
METHODS = ["GET", "GET", "HEAD", "POST", "get", "OPTIONS", "G\0T", ""]
TARGETS = [
    "/healthz",
    "/livez",
    "/metrics",
    "/",
    "*",
    "http://x",
    "HTTP://x:1/healthz",
    "//",
    "?",
    "#",
    "%68",
    "%",
    "%zz",
    "\xff",
    "/..",
]
VERSIONS = ["HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/1.", "http/1.1", ""]
FIELDS = ["Host: x", "Host: x", "host:\ty ", "Content-Length: 5", "Content-Length: " + "9" * 5000, "Transfer-Encoding: chunked", "Expect: 100-continue", "A : b", " folded", "\xe9: \xe9", ":", "A:\0", "A"]  # fmt: skip


@st.composite
def _heads(draw: DrawFn) -> bytes:
    target = "".join(draw(st.lists(st.sampled_from(TARGETS), max_size=3)))
    pieces = [draw(st.sampled_from(METHODS)), target, draw(st.sampled_from(VERSIONS))]
    line = draw(st.sampled_from(BLANKS)).join(pieces)
    fields = draw(st.lists(st.sampled_from(FIELDS), max_size=4))
    end = draw(st.sampled_from(LINE_ENDS))
    return b"".join(text.encode("latin-1") + end for text in [line, *fields, ""])


PATHS = ("/healthz", "/livez", "/readyz", "/metrics")
CORPUS = [*FINE.values(), *(head for head, _ in MALFORMED.values())]
HEADS = damaged(st.sampled_from(CORPUS) | _heads()) | st.binary(max_size=300)


# A first line of HTTP/1, and what can complete its beginning.
REQUEST_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ [^\x00-\x20\x7f]+ HTTP/1\.[0-9]\r?")
RESTS = [b"G / HTTP/1.1"[cut:] for cut in range(13)]


def whole_head(stream: bytes) -> bytes | None:
    """Which of a client's bytes are the head, by the contract; None if it never ends."""
    stream = stream.lstrip(b"\r\n")
    line, complete, _ = stream.partition(b"\n")
    if complete and not REQUEST_LINE.fullmatch(line):
        return line + complete
    if not complete and not any(REQUEST_LINE.fullmatch(line + rest) for rest in RESTS):
        return line
    end = re.search(rb"\n\r?\n", stream)
    if end is None:
        return stream[:LONGEST_HEAD] if len(stream) > LONGEST_HEAD else None
    return stream[: min(end.end(), LONGEST_HEAD)]


def answer_to(head: bytes) -> tuple[str, Answer]:
    """The method that was read, and the answer; every route says 500."""
    responses: list[Response] = []
    request = Exchange(head)
    request.ask(dict.fromkeys(PATHS, healthz), responses.append)
    (response,) = responses
    return request.command, read_answer(answer(request, response), request.command)


@given(HEADS)
@effort(400)
def test_each_head_gets_one_answer(tally: Tally, head: bytes) -> None:
    tally.add("request heads, in memory")
    _, (status, headers, body) = answer_to(head)

    assert status in (400, 404, 405, 431, 500)
    assert body.decode().isprintable()
    assert headers["Connection"] == "close"
    if status == 500:  # the route was asked
        line = head.partition(b"\n")[0].decode("latin-1").removesuffix("\r")
        assert re.fullmatch(r"(GET|HEAD) \S+ HTTP/1\.\d", line)


@given(HEADS, st.integers(0, 300))
@effort(400)
def test_heads_are_found_wherever_they_are_cut(tally: Tally, stream: bytes, cut: int) -> None:
    tally.add("request heads, in two pieces")
    stream = stream.lstrip(b"\r\n")[: LONGEST_HEAD + 1]
    head = stream[: head_size(stream[:cut]) or head_size(stream, cut)]
    expected = whole_head(stream)

    assert bool(head) == (expected is not None)
    if expected and head != expected:  # it was noticed sooner, or later, that this cannot become a request
        assert answer_to(head)[1].status == answer_to(expected)[1].status == 400


@given(
    st.text("AGET/:%41 \t\r\n\0.HTP1?#", min_size=1, max_size=6),
    st.sampled_from(["", "\0", "\r\n", "\r\n\r\n"]),
)
@effort(150)
@example("\t", "\0")
@example("%", "")
@example("A:\r\n", "\0")
@example(" HTTP/1.", "")
def test_no_head_takes_long(tally: Tally, pattern: str, end: str) -> None:
    tally.add("request heads, of one pattern over and over")
    begin = time.process_time()
    for start in ("", "GET /", "GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\nHost: x\r\nA:"):
        room = LONGEST_HEAD - len(start + end + "\r\n\r\n")
        answer_to((start + pattern * (room // len(pattern)) + end + "\r\n\r\n").encode())

    assert time.process_time() - begin < MOST_CPU_SECONDS


def test_streams_of_clients(tally: Tally, probe_factory: ProbeFactory, socket_path: Path) -> None:
    # Without a driver, every check fails at once.
    probe = probe_factory(
        f"--csi-address={socket_path}", "--http-endpoint=127.0.0.1:0", "--connection-timeout=0", "-v=5"
    )

    @given(HEADS, st.lists(st.integers(0, 300), max_size=3))
    @effort(150)
    def talk(stream: bytes, cuts: list[int]) -> None:
        tally.add("streams of clients")
        with probe.connect() as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answer = b""
            with contextlib.suppress(ConnectionError):
                for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(stream)], strict=True):
                    client.sendall(stream[begin:end])
                client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while data := client.recv(65536):
                    answer += data
        head = whole_head(stream)
        if head is None:
            assert not answer
        else:
            method, expected = answer_to(head)
            metrics_or_verdict = (200, 500)
            status = read_answer(answer, method).status
            assert status in (metrics_or_verdict if expected.status == 500 else [expected.status])

    talk()
    assert probe.get("/livez").status == 500
    assert probe.stop() == 0
    assert_well_formed(probe.log_lines)


# ---- what a driver sends


# The least that a peer must say for a call to count as a success: `00` is one way to write it.
OK = re.compile(rb"\x0bgrpc-status[\x01-\x7f]0")
HEAD = b"\x88" + field(b"content-type", b"application/grpc")  # 0x88: `:status: 200`
GOAWAY = 7
END_STREAM, END_HEADERS = 1, 4
HAPPY = (Exit.OK, Exit.NOT_READY)
# Only a few, as each is a label in the metrics.
REASONS = {
    *(
        "OK",
        "not ready",
        "the peer does not speak HTTP/2",
        "no connection",
        "its queue of connections is full",
    ),
    *GO_NAMES.values(),
    *(os.strerror(number).lower() for number in errno.errorcode),
}
# Each byte of the cut text may be shown as four characters.
LONGEST_LINE = 4 * LONGEST_TEXT + 1

REPLIES_OF_ALL_KINDS = damaged(
    st.sampled_from(
        [*REPLIES.values(), *UNDECODABLE.values(), plugin_info("x"), b"\n\0\n\x02\x08\1", b"\x13\x14"]
    )
)
STATUSES = st.sampled_from([b"0", b"0", b"2", b"13", b"16", b"17", b"99", b"-1", b"", b"00", b"x", b"9" * 40])
TEXTS = st.sampled_from(
    [b"", b"%0a", b"%", b"%ff%fe", b"\xff", b"x" * 9000, b"failed to connect to all addresses"]
)
TRAILERS = st.builds(
    lambda status, text: field(b"grpc-status", status) + field(b"grpc-message", text), STATUSES, TEXTS
)
HEADERS = st.sampled_from(
    [HEAD, HEAD, b"\x8d", b"\x88" + field(b"content-type", b"text/html"), b"\xff" * 9, b""]
)
FRAMES = st.builds(
    peers.frame,
    st.integers(0, 10) | st.just(255),
    HEADERS | TRAILERS | REPLIES_OF_ALL_KINDS.map(message) | st.binary(max_size=16),
    st.sampled_from([0, END_STREAM, END_HEADERS, END_HEADERS | END_STREAM, 0x08, 0x20, 255]),
    st.sampled_from([1, 1, 1, 0, 2, 3, 2**31 - 1, 2**32 - 1]),
)


@st.composite
def _calls(draw: DrawFn) -> bytes:
    """A whole answer to one call, whose parts need not make sense."""
    return b"".join(
        [
            peers.frame(1, draw(HEADERS), END_HEADERS, 1),
            peers.frame(0, message(draw(REPLIES_OF_ALL_KINDS)), 0, 1),
            peers.frame(1, draw(TRAILERS), END_HEADERS | END_STREAM, 1),
        ]
    )


class Script(NamedTuple):
    """What a peer does with each connection."""

    begins: Literal["at once", "greeted", "called"]
    says: bytes
    stays: bool
    """Silent once everything is said."""


ANSWERS = st.builds(
    Script,
    st.just("called"),
    _calls() | damaged(_calls()) | st.lists(FRAMES, max_size=6).map(b"".join),
    st.booleans(),
)
GREETINGS = st.builds(
    Script,
    st.sampled_from(["at once", "greeted"]),
    damaged(st.just(peers.SETTINGS + peers.GOAWAY))
    | damaged(st.lists(FRAMES, max_size=4).map(lambda frames: peers.SETTINGS + b"".join(frames)))
    | st.binary(max_size=40),
    # A peer that goes on after too little costs the whole timeout.
    st.sampled_from([False, False, False, True]),
)


class Actor:
    """A peer that plays one script after another."""

    def __init__(self) -> None:
        self.script = Script("at once", b"", stays=False)

    def play(self, connection: socket.socket) -> None:
        script = self.script
        received = b"" if script.begins == "at once" else connection.recv(65536)
        if script.begins == "called":
            connection.sendall(peers.SETTINGS + peers.SETTINGS_ACK)
            while not _has_headers(received) and (data := connection.recv(65536)):
                received += data
        connection.sendall(script.says)
        while script.stays and connection.recv(65536):
            pass


def _has_headers(received: bytes) -> bool:
    """Whether a client's bytes have reached its call."""
    at = len(peers.PREFACE)
    while at + 9 <= len(received):
        if received[at + 3] == 1:
            return True
        at += 9 + int.from_bytes(received[at : at + 3], "big")
    return False


@pytest.fixture
def actor(socket_path: Path) -> Iterator[Actor]:
    actor = Actor()
    with peers.talking(actor.play, socket_path):
        yield actor


SCRIPTS = ANSWERS | GREETINGS


def _check_once(actor: Actor, socket_path: Path, script: Script) -> None:
    """Runs the file once beside a peer that plays this script."""
    actor.script = script
    timeouts = [f"--probe-timeout={BRIEF}s", "--connection-timeout=50ms"]
    done = program.run_once(["--once", f"--csi-address={socket_path}", *timeouts])

    assert done.returncode in (Exit.UNREACHABLE, Exit.FAILED, *(HAPPY if OK.search(script.says) else []))
    assert done.stdout.removesuffix("\n").isprintable()
    assert 0 < len(done.stdout.encode()) <= LONGEST_LINE
    assert_well_formed(done.stderr.splitlines())


@pytest.mark.timeout(900)
def test_peers_that_say_anything(tally: Tally, actor: Actor, socket_path: Path) -> None:
    # One process for each, as some bytes may end it.
    @given(SCRIPTS)
    @effort(40)
    def check(script: Script) -> None:
        tally.add("scripts of drivers")
        _check_once(actor, socket_path, script)

    check()


def test_any_code_of_goaway_is_survived(actor: Actor, socket_path: Path) -> None:
    """With some versions of grpcio, a code beyond those defined by HTTP/2 ends the process."""
    for code in (13, 14, 70007):
        says = peers.frame(GOAWAY, struct.pack(">II", 0, code))
        _check_once(actor, socket_path, Script("called", says, stays=False))


def client_of(path: Path) -> Driver:
    return Driver(str(path), str(path), way_to(str(path), str(path)))


def status_alone(path: Path) -> AbstractContextManager[object]:
    """A peer that answers a call with OK, and nothing else."""
    actor = Actor()
    says = peers.frame(1, HEAD + field(b"grpc-status", b"0"), END_HEADERS | END_STREAM, 1)
    actor.script = Script("called", says, stays=True)
    return peers.talking(actor.play, path)


def test_a_status_without_a_message_is_a_failure(socket_path: Path) -> None:
    with status_alone(socket_path):
        verdict = client_of(socket_path).attempt(time.monotonic() + PATIENCE)
    assert verdict == health.failed("Internal", "the reply has no message")


@pytest.mark.timeout(900)
def test_the_program_beside_peers_that_say_anything(
    tally: Tally, actor: Actor, probe_factory: ProbeFactory, socket_path: Path
) -> None:
    timeouts = [f"--probe-timeout={BRIEF}s", "--connection-timeout=50ms"]
    probe = probe_factory(f"--csi-address={socket_path}", "--http-endpoint=127.0.0.1:0", "-v=5", *timeouts)

    @given(SCRIPTS)
    @effort(60)
    def ask(script: Script) -> None:
        tally.add("scripts of drivers, one after the other")
        actor.script = script
        response = probe.get()

        assert response.seconds < PATIENCE
        assert response.status in (200, 500)
        assert response.text.isprintable()
        # Only a peer that says so counts as healthy.
        assert OK.search(script.says) or response.status == 500

    ask()
    found = set(re.findall(r'{result="(\w+)",reason="([^"]*)"}', probe.get("/metrics").text))
    assert {reason for _, reason in found} <= REASONS
    assert {result for result, reason in found if reason == "OK"} <= {"healthy"}
    assert probe.threads() < 40
    assert probe.memory() < 96 << 20
    assert probe.stop() == 0
    assert_well_formed(probe.log_lines)


@pytest.mark.timeout(900)
def test_replies_are_read_as_protobuf_does(tally: Tally, driver: FakeDriver, socket_path: Path) -> None:
    client = client_of(socket_path)

    @given(REPLIES_OF_ALL_KINDS | st.binary(max_size=20))
    @effort(150)
    def attempt(reply: bytes) -> None:
        tally.add("replies of drivers")
        driver.set("raw", data=reply)
        verdict = client.attempt(time.monotonic() + PATIENCE)
        driver.set("raw", data=reply, method="GetPluginInfo")
        name, problem = client.name(time.monotonic() + PATIENCE)

        try:
            ready = ProbeResponse.FromString(reply)
        except DecodeError:
            assert (verdict.outcome, verdict.reason) == (Outcome.FAILED, "Internal")
        else:
            assert verdict == (NOT_READY if ready.HasField("ready") and not ready.ready.value else HEALTHY)
        try:
            expected = GetPluginInfoResponse.FromString(reply).name
        except DecodeError:
            expected = ""
        assert (name, bool(problem)) == (expected, not expected)

    attempt()


@pytest.mark.timeout(900)
def test_errors_are_told_in_the_drivers_words(tally: Tally, driver: FakeDriver, socket_path: Path) -> None:
    client = client_of(socket_path)

    @given(st.sampled_from(CODES), st.text() | st.text(min_size=1, max_size=4).map(lambda text: text * 2000))
    @effort(100)
    def attempt(code: str, text: str) -> None:
        tally.add("errors of drivers")
        driver.set("error", code=code, message=text)

        verdict = client.attempt(time.monotonic() + PATIENCE)
        assert verdict == health.failed(GO_NAMES[code], text)
        assert len(verdict.text.encode()) <= LONGEST_TEXT

    attempt()


# ---- command lines

NAMES = [*(flag.name for flag in config.FLAGS), "h", "help", "x", "", "-", "v\n", "\udcff"]
VALUES = ["", "0", "1", "-1", "true", "5", "3s", "-3s", "1ns", "2562047h", "1h" * 50, ".s", "1e9", "9" * 30, "/s", "unix:/s", "unix:", "dns:///x:1", "x:1", ":1", ":0", "[::1]:0", "[:1", "::1", ":99999", "/" + "x" * 107, "/m", "/\udcff", "/é\u202e", "%s", "a=1,b=2", "a=", "[=1", "json", "text", "INFO", "4Ki", "\n", "\udcff"]  # fmt: skip
VALUE = (
    st.sampled_from(VALUES)
    | st.text(max_size=10)
    | st.lists(st.sampled_from(VALUES), max_size=3).map("".join)
)
ARGUMENTS = st.lists(
    st.builds("{}{}{}{}".format, st.sampled_from(["-", "--"]), st.sampled_from(NAMES), st.just("="), VALUE)
    | st.builds("{}{}".format, st.sampled_from(["-", "--"]), st.sampled_from(NAMES))
    | VALUE,
    max_size=4,
)


def outcome(arguments: list[str]) -> Exit | config.Config:
    """What parsing leads to: a configuration, or how the program should end."""
    told, code = "", Exit.OK
    try:
        return config.parse(arguments)
    except goflags.HelpRequested:
        pass
    except goflags.FlagError as error:
        told, code = str(error), Exit.FLAGS
    except config.ConfigError as error:
        told, code = f"{error.flag}: {error.reason}", Exit.CONFIGURATION
    assert told.isprintable()
    return code


@given(ARGUMENTS)
@effort(500)
def test_command_lines(tally: Tally, arguments: list[str]) -> None:
    tally.add("command lines, in memory")
    parsed = outcome(arguments)
    if isinstance(parsed, config.Config):
        assert 0 < parsed.probe_timeout < threading.TIMEOUT_MAX
        assert 0 <= parsed.connection_timeout <= (2**63 - 1) / 1e9
        assert all(0 <= endpoint.port <= 65535 for endpoint in filter(None, [parsed.health, parsed.metrics]))
        assert len(os.fsencode(parsed.socket_path or "")) <= 107
        assert not parsed.metrics or parsed.metrics_path.isprintable()


@given(
    st.sampled_from(config.FLAGS),
    st.text("019.:/[]=,+-msh%ü\n\0", min_size=1, max_size=4),
    st.sampled_from(["", "x", "\n"]),
)
@effort(150)
@example(config.FLAGS[1], "1", "x")
def test_no_value_takes_long(tally: Tally, flag: goflags.Flag, pattern: str, end: str) -> None:
    tally.add("values of one pattern over and over")
    begin = time.process_time()
    outcome([f"--{flag.name}={pattern * (100_000 // len(pattern))}{end}"])

    assert time.process_time() - begin < MOST_CPU_SECONDS


# Whatever comes before (the first of these may be taken for a value), it ends at once; there is no driver.
AT_ONCE = [
    "--once",
    "--once",
    "--version=false",
    "--csi-address=/nowhere/csi.sock",
    "--connection-timeout=0",
    "--probe-timeout=5s",
]


@pytest.mark.timeout(900)
@given(ARGUMENTS.filter(lambda arguments: not any("\0" in argument for argument in arguments)))
@effort(12)
@example(["--probe-timeout=5"])
@example(["--health-port=\x1b[31m\n"])
@example(["-v=18446744073709551615", "--vmodule=[=1"])
@example(["-\udcff=1"])
@example([""])
@example(["--csi-address", "--"])
@example(["--csi-address"])
@example(["-x=" + "x" * 100_000])
def test_the_program_ends_as_its_command_line_says(tally: Tally, arguments: list[str]) -> None:
    tally.add("command lines")
    arguments = [*arguments, *AT_ONCE]
    expected = outcome(arguments)
    done = program.run_once(arguments)
    log = done.stderr.splitlines()

    assert "Traceback" not in done.stderr
    if isinstance(expected, config.Config):
        assert done.returncode == Exit.UNREACHABLE
        assert done.stdout == "cannot connect to /nowhere/csi.sock: no such file or directory\n"
        assert_well_formed(log)
    else:
        assert done.returncode == expected
        assert ("\nExamples:\n" in done.stdout) == (expected is Exit.OK)
        assert len(log) == (expected is not Exit.OK)
        if expected is Exit.CONFIGURATION:
            assert_well_formed(log)
        else:
            assert all(line.isprintable() and line.endswith("; -h lists all flags") for line in log)


@pytest.mark.parametrize("flag", ["probe-timeout", "connection-timeout"])
def test_the_longest_timeouts_are_as_good_as_none(driver: FakeDriver, flag: str) -> None:
    done = program.run_once(["--once", f"--csi-address={driver.target}", f"--{flag}=2562047h"])

    assert (done.returncode, done.stdout) == (Exit.OK, "ok\n")
