"""HTTP/2 and gRPC as a call reads them, in memory: the whole table of peers, in one piece and byte by byte."""

from __future__ import annotations

import peers
import pytest
import verdicts
from hpack import Decoder
from verdicts import CASES, HELLO, in_memory

from livenessprobe.http2_call import Http2Call, request_head
from livenessprobe.rpc import Reply, Unreachable

METHOD = "/csi.v1.Identity/Probe"


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_is_that_of_grpc_go(name: str) -> None:
    assert CASES[name].holds(ended := in_memory(CASES[name], METHOD)), ended


@pytest.mark.unmeasured
@pytest.mark.parametrize("name", CASES)
def test_the_verdict_is_the_same_byte_by_byte(name: str) -> None:
    case = CASES[name]
    said = [len(step) for steps in case.connections for step in steps if isinstance(step, bytes)]
    # A byte at a time, if that ever ends.
    assert case.holds(ended := in_memory(case, METHOD, piece=1 + max(said, default=0) // 20_000)), ended


def test_what_is_said_of_an_answer_is_said_word_for_word() -> None:
    outcomes = [in_memory(case, METHOD) for case in CASES.values()]
    said = {outcome.message for outcome in outcomes if isinstance(outcome, Reply)}

    assert {
        "a HEADERS frame in the middle of the answer",
        "malformed header: the fields of a request in an answer",
        "more than one message in the reply",
        "the answer has no grpc-status",
        "the message in the reply was cut short",
        "the peer ended its answer without trailers",
        "the reply has no message",
    } <= said


def test_what_is_said_of_broken_http2_is_said_word_for_word() -> None:
    said = {
        outcome.message.removeprefix("the peer broke HTTP/2: ").partition(", after GOAWAY")[0]
        for case in CASES.values()
        if isinstance(outcome := in_memory(case, METHOD), Reply)
        if outcome.message.startswith("the peer broke HTTP/2: ")
    }

    assert said == {
        "a GOAWAY for a stream that cannot be ours",
        "a GOAWAY that takes back an earlier one",
        "a WINDOW_UPDATE of zero",
        "a frame of more than 16 KiB",
        "a frame on no stream",
        "a frame too short for its padding",
        "a frame too short for its priority",
        "a header block that was not continued, or never begun",
        "a malformed GOAWAY",
        "a malformed PING",
        "a malformed RST_STREAM",
        "a malformed SETTINGS",
        "a malformed WINDOW_UPDATE",
        "a window of 2 GiB",
        "header fields that cannot be decoded",
        "more padding than frame",
        "more than two new sizes of the table of header fields",
    }


@pytest.mark.parametrize(
    ("said", "code", "shown"),
    [
        (verdicts.BEGIN + verdicts.trailers(b"9" * 100), "Unknown", f"malformed grpc-status: {'9' * 99}"),
        (
            verdicts.headers(verdicts.begin(None, status=b"9" * 100)),
            "Internal",
            f"malformed HTTP status: {'9' * 99}",
        ),
        (verdicts.headers(verdicts.field(b"x", b"y")), "Internal", "malformed HTTP status: None"),
        (
            verdicts.headers(verdicts.begin(b"x" * 1000)),
            "Unknown",
            f"the peer's answer is not gRPC: HTTP status 200, content-type {'x' * 999}",
        ),
        (
            verdicts.BEGIN + verdicts.trailers(b"0", None, verdicts.field(b"x" * 100 + b"-bin", b"Q")),
            "Internal",
            f"malformed {'x' * 99}: not base64",
        ),
        (
            verdicts.BEGIN + verdicts.trailers(b"0", None, verdicts.field(b"x" * 100, b"\0")),
            "Internal",
            f"malformed header: a control character in {'x' * 99}",
        ),
    ],
)
def test_a_peer_s_own_words_are_cut(said: bytes, code: str, shown: str) -> None:
    assert call_with(said=HELLO).receive(said) == Reply(code, shown, None)


def test_a_code_without_a_message_says_nothing() -> None:
    assert call_with(said=HELLO + verdicts.BEGIN).receive(verdicts.trailers(b"5")) == Reply(
        "NotFound", "", None
    )


@pytest.mark.parametrize("name", [b":method", b":path", b":scheme", b":authority", b":protocol"])
def test_the_fields_of_a_request_make_no_answer(name: bytes) -> None:
    said = verdicts.headers(verdicts.field(name, b"x") + verdicts.begin())

    assert call_with(said=HELLO).receive(said) == Reply(
        "Internal", "malformed header: the fields of a request in an answer", None
    )


def test_trying_again_makes_sense_where_the_peer_says_nothing_but_not_where_it_says_something_else() -> None:
    silent, other = (in_memory(CASES[name], METHOD) for name in ("closed before a word", "HTTP/1.1"))

    assert isinstance(silent, Unreachable)
    assert (silent.reason, silent.hint, silent.may_heal) == ("closed by the peer", "", True)
    assert isinstance(other, Unreachable)
    assert (other.reason, other.may_heal) == ("the peer does not speak HTTP/2", False)
    assert other.hint == " (it began with b'HTTP/1.1 ')"


def test_a_reset_at_the_deadline_is_the_deadline() -> None:
    """As in grpc-go, if the peer's clock was ahead of its own."""
    call = Http2Call(request_head(METHOD), b"", lambda: 0.0, again=True)
    reply = call.receive(HELLO + verdicts.reset(8))

    assert reply == Reply("DeadlineExceeded", "the peer reset the call: CANCEL", None)


@pytest.mark.parametrize(
    ("seconds", "timeout"),
    [
        (0.0, b"1u"),
        (0.0000001, b"1u"),
        (0.5, b"500000u"),
        (99.5, b"99500000u"),
        (100.0, b"100000m"),
        (99_999.0, b"99999000m"),
        (100_000.0, b"100000S"),
        (99_999_999.0, b"99999999S"),
        (360_000_000.0, b"100000H"),
        (1e15, b"99999999H"),
    ],
)
def test_the_timeout_has_eight_digits_at_most(seconds: float, timeout: bytes) -> None:
    call = Http2Call(request_head(METHOD), b"", lambda: seconds, again=True)

    assert verdicts.field(b"grpc-timeout", timeout) in call.to_send


# ---- what is said, and when


def call_with(request: bytes = b"", *, said: bytes = b"") -> Http2Call:
    """A call after the peer has said something; the reaction to that is not sent yet."""
    call = Http2Call(request_head(METHOD), request, lambda: 1.0, again=True)
    if said:
        call.to_send.clear()
        assert call.receive(said) is None
    return call


def test_the_first_words_are_the_whole_call() -> None:
    head = request_head(METHOD)
    assert call_with(b"request").to_send == (
        peers.PREFACE
        + verdicts.settings((2, 0))
        + peers.frame(1, head + verdicts.field(b"grpc-timeout", b"1000000u"), 4, 1)
        + peers.frame(0, b"\0\0\0\0\7request", 1, 1)
    )
    assert list(Decoder().decode(head, raw=True)) == verdicts.request_fields(METHOD)


def test_a_goaway_for_later_calls_may_come_again_and_leave_fewer_of_them() -> None:
    call = call_with(said=HELLO)
    for last in (2**31 + 9, 9, 3, 1):  # the first bit is reserved, and means nothing
        assert call.receive(verdicts.goaway(last)) is None

    assert call.receive(verdicts.ANSWER) == Reply("OK", "", verdicts.REPLY)


@pytest.mark.parametrize(
    ("debug", "shown"), [(b"", ""), (b"\xff" + b"x" * 1022 + b"yz", f", \udcff{'x' * 1022}y")]
)
def test_a_kib_of_what_a_goaway_says_is_shown(debug: bytes, shown: str) -> None:
    call = call_with(said=HELLO + verdicts.goaway(1, 0, debug))

    assert call.ended("closed") == Reply(
        "Unavailable", f"the connection ended before the answer did, after GOAWAY: NO_ERROR{shown}", None
    )


def test_what_asks_for_nothing_gets_nothing() -> None:
    assert call_with(said=peers.SETTINGS).to_send == peers.SETTINGS_ACK
    assert (
        call_with(said=peers.SETTINGS_ACK + peers.frame(6, b"answered", 1) + verdicts.goaway(1)).to_send
        == b""
    )
    assert call_with(said=HELLO + peers.frame(6, b"question")).to_send == (
        peers.SETTINGS_ACK + peers.frame(6, b"question", 1)
    )


def test_a_refused_call_waits_until_it_is_allowed() -> None:
    call = call_with(said=verdicts.settings((3, 0)) + verdicts.reset(7))
    assert call.to_send == peers.SETTINGS_ACK
    assert call.receive(verdicts.settings((3, 0)) + verdicts.settings((4, 9))) is None
    assert call.to_send == peers.SETTINGS_ACK * 3
    assert call.receive(verdicts.settings((3, 1))) is None
    assert call.to_send.endswith(peers.frame(0, b"\0\0\0\0\0", 1, 3))


def test_a_message_is_sent_as_far_as_the_windows_go() -> None:
    call = call_with(bytes(70_000))
    sent = data_in(call.to_send)
    assert sent == 65_535
    for said, more in [
        (HELLO, 0),
        (verdicts.window(1), 0),
        (verdicts.window(3, 1), 1),
        (verdicts.window(1), 1),
        (verdicts.window(2**31 - 1), 1),
        (verdicts.settings((4, 65_536)), 1),
        (verdicts.settings((4, 65_530)), 0),
        (verdicts.window(6, 1), 0),
        (verdicts.window(9, 3), 0),
        (verdicts.window(1, 1), 1),
    ]:
        call.to_send.clear()
        assert call.receive(said) is None
        assert data_in(call.to_send) == more, said
    call.to_send.clear()
    assert call.receive(verdicts.window(70_000, 1)) is None
    assert call.to_send.endswith(peers.frame(0, bytes(4465), 1, 1))


def data_in(said: bytes | bytearray) -> int:
    """How many bytes of DATA there are, none of them the last."""
    at, count = len(peers.PREFACE) if said.startswith(peers.PREFACE) else 0, 0
    while at < len(said):
        size = int.from_bytes(said[at : at + 3], "big")
        assert size <= 16_384
        if said[at + 3] == 0:
            assert said[at + 4] == 0, "it is not the end"
            count += size
        at += 9 + size
    return count


def test_windows_are_opened_again_by_as_much_as_came() -> None:
    some = verdicts.padded(0, b"x" * 99, 100)
    call = call_with(said=HELLO + verdicts.BEGIN + verdicts.data(b"\0\0\1\0\0"))
    call.to_send.clear()
    for _ in range(81):
        assert call.receive(some) is None
    assert not call.to_send
    assert call.receive(some) is None
    # 5 bytes, and 82 times 99 and 100 and one that counts them.
    opened = 5 + 82 * 200
    assert call.to_send == verdicts.window(opened) + verdicts.window(opened, 1)


def test_windows_are_opened_again_once_a_quarter_has_come() -> None:
    call = call_with(said=HELLO + verdicts.BEGIN)
    call.to_send.clear()
    assert call.receive(verdicts.data(b"\0\0\1\0\0" + bytes(65_535 // 4 - 5))) is None
    assert not call.to_send
    for more in (b"x", bytes(16_384)):
        assert call.receive(verdicts.data(more)) is None
        assert call.to_send == verdicts.window(16_384) + verdicts.window(16_384, 1)
        call.to_send.clear()
