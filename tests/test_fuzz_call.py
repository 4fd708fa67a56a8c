"""What drivers may say to a call, at random: it only fails in the ways it may, and never waits beyond its time.

And beside grpcio as the client: on a server that keeps to the rules, both must find the same.
"""

from __future__ import annotations

import base64
import re
import time
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import grpc
import peers
import pytest
import verdicts
from hpack import Encoder
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz import SCRIPTS, Actor, Script, damaged, tally
from test_unix_call import METHOD, PATIENCE, outcome
from torture import effort
from verdicts import CASES, END_STREAM, HELLO, Call, Case

from livenessprobe.http2_call import Http2Call, Unprocessed, request_head
from livenessprobe.rpc import Reply, Unreachable, code_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hypothesis.strategies import DrawFn
    from torture import Tally

__all__ = ["tally"]  # a fixture

BRIEF = 0.1
# Much less than that is queued at a time, whatever the peer says.
MOST_QUEUED = 1 << 20

# Not one whose status is in pieces: nobody could tell that from its words.
SAID = [
    b"".join(step for step in steps if isinstance(step, bytes))
    for name, case in CASES.items()
    for steps in case.connections
    if name != "CONTINUATION"
]
SHORT = [said for said in SAID if len(said) < 2000]
WORDS = (
    damaged(st.sampled_from(SHORT))
    | st.lists(st.sampled_from(SHORT), max_size=3).map(b"".join)
    | SCRIPTS.map(lambda script: HELLO + script.says)
    | st.binary(max_size=100).map(HELLO.__add__)
)
# `00` is one way to write it.
OK = re.compile(rb"\x0bgrpc-status[\x01-\x7f][+-]?0")
CODES = {code_name(number) for number in range(17)}


def assert_possible(found: Reply | Unreachable, said: bytes) -> None:
    """Made of words that any peer may say."""
    if isinstance(found, Unreachable):
        assert found.reason in ("closed by the peer", "connection reset", "the peer does not speak HTTP/2")
        return
    assert found.code in CODES or re.fullmatch(r"Code\(\d{2,10}\)", found.code)
    assert (found.payload is not None) == (found.code == "OK")
    assert bool(found.message) or found.code == "OK" or b"grpc-status" in said
    # Only a peer that says so counts as healthy.
    assert found.code != "OK" or OK.search(said)


@given(WORDS, st.lists(st.integers(0, 3000), max_size=5))
@effort(800)
def test_a_call_takes_any_words(tally: Tally, words: bytes, cuts: list[int]) -> None:
    tally.add("words to a call, in memory")
    call = Http2Call(request_head(METHOD), b"", lambda: 1.0, again=True)
    found: Reply | Unreachable | None = None
    try:
        for begin, end in pairwise([0, *sorted(cuts), len(words)]):
            found = found or call.receive(words[begin : max(begin, end)])
            assert len(call.to_send) < MOST_QUEUED
        found = found or call.ended("closed by the peer")
    except Unprocessed:
        return
    except Unreachable as unreachable:
        found = unreachable
    assert_possible(found, words)


@given(WORDS)
@effort(200)
def test_how_words_are_cut_makes_no_difference(tally: Tally, words: bytes) -> None:
    tally.add("words to a call, byte by byte")
    whole, bytewise = (list(_results(words, size)) for size in (len(words) or 1, 1))

    assert whole == bytewise


def _results(words: bytes, size: int) -> Iterator[Reply | str]:
    call = Http2Call(request_head(METHOD), b"", lambda: 1.0, again=True)
    try:
        for at in range(0, len(words), size):
            if reply := call.receive(words[at : at + size]):
                yield reply
                return
        yield call.ended("closed by the peer")
    except (Unprocessed, Unreachable) as ended:
        yield f"{ended!r} {ended}"


@pytest.mark.timeout(900)
def test_a_peer_may_say_anything(tally: Tally, socket_path: Path) -> None:
    actor = Actor()

    @given(WORDS, st.sampled_from(["at once", "greeted", "called"]), st.booleans())
    @effort(150)
    def check(words: bytes, begins: str, stays: bool) -> None:
        tally.add("words to a call, on sockets")
        actor.script = Script(begins, words, stays)  # type: ignore[arg-type] # one of them
        begin = time.monotonic()
        found = outcome(socket_path, BRIEF)

        assert time.monotonic() - begin < PATIENCE
        assert_possible(found, words)

    with peers.talking(actor.play, socket_path):
        check()


# ---- beside grpcio


class Answer(NamedTuple):
    """What a server that keeps to the rules may say to a call."""

    code: int
    text: str
    reply: bytes | None
    """None: trailers only, or an error without a message."""
    trailers_only: bool
    metadata: list[tuple[bytes, bytes]]
    more: list[tuple[bytes, bytes]]
    """In the trailers."""
    huffman: bool
    sizes: list[int]
    """Of the DATA frames; what is left is in the last."""

    def frames(self) -> bytes:
        encoder = Encoder()
        ends = [
            (b"grpc-status", b"%d" % self.code),
            *([(b"grpc-message", _escaped(self.text))] if self.text else []),
        ]
        begins = [(b":status", b"200"), (b"content-type", b"application/grpc"), *self.metadata]
        if self.trailers_only:
            return verdicts.headers(encoder.encode([*begins, *ends], huffman=self.huffman), END_STREAM)
        said = verdicts.headers(encoder.encode(begins, huffman=self.huffman))
        body = b"" if self.reply is None else verdicts.message(self.reply)
        for size in self.sizes if body else []:
            said += verdicts.data(body[:size])
            body = body[size:]
        said += verdicts.data(body) if body else b""
        return said + verdicts.headers(encoder.encode([*ends, *self.more], huffman=self.huffman), END_STREAM)


def _escaped(text: str) -> bytes:
    """As the gRPC protocol says: printable ASCII other than the percent sign stands for itself."""
    return b"".join(
        bytes([byte]) if 0x20 <= byte < 0x7F and byte != 0x25 else b"%%%02X" % byte for byte in text.encode()
    )


NAMES = st.from_regex(r"x-[a-z0-9._-]{1,9}", fullmatch=True).filter(lambda name: not name.endswith("-bin"))
METADATA = st.lists(
    st.tuples(
        NAMES.map(str.encode), st.from_regex(r"[!-~]([ -~]{0,40}[!-~])?", fullmatch=True).map(str.encode)
    )
    | st.tuples(NAMES.map(lambda name: f"{name}-bin".encode()), st.binary(max_size=30).map(base64.b64encode)),
    max_size=4,
)


@st.composite
def _answers(draw: DrawFn) -> Answer:
    code = draw(st.sampled_from([0, 0, 0, *range(1, 17)]))
    trailers_only = bool(code) and draw(st.booleans())
    has_reply = not code or (not trailers_only and draw(st.booleans()))
    reply = draw(st.binary(max_size=50) | st.integers(0, 60_000).map(bytes)) if has_reply else None
    # What people write, and long ones; grpcio drops the message of a success, which should have none.
    text = draw(st.text() | st.integers(1, 9000).map("x".__mul__)) if code else ""
    sizes = draw(st.lists(st.integers(0, 20_000), max_size=4))
    return Answer(
        code, text, reply, trailers_only, draw(METADATA), draw(METADATA), draw(st.booleans()), sizes
    )


def by_grpcio(path: Path) -> Reply:
    """The same call by grpcio."""
    with grpc.insecure_channel(
        f"unix:{path}",
        [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),
            ("grpc.max_metadata_size", 1 << 20),
            ("grpc.absolute_max_metadata_size", 1 << 20),
        ],
    ) as channel:
        try:
            reply: bytes = channel.unary_unary(METHOD, bytes, bytes)(b"", timeout=PATIENCE)
        except grpc.RpcError as error:
            return Reply(code_name(error.code().value[0]), error.details() or "", None)
        return Reply("OK", "", reply)


@pytest.mark.timeout(900)
def test_grpcio_finds_the_same(tally: Tally, socket_path: Path) -> None:
    @given(_answers())
    @effort(60)
    def compare(answer: Answer) -> None:
        tally.add("answers judged by two clients")
        with Case(((HELLO, Call(), answer.frames()),), "", "", "").peer(socket_path):
            found = outcome(socket_path)

            assert found == by_grpcio(socket_path)
        assert isinstance(found, Reply)
        assert found == Reply(code_name(answer.code), answer.text, None if answer.code else answer.reply)

    compare()
