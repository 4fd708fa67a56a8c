"""HTTP/2 and gRPC as a call reads them, in memory: the whole table of peers, in one piece and byte by byte."""

from __future__ import annotations

import pytest
import verdicts
from verdicts import CASES, HELLO, in_memory

from livenessprobe.http2_call import Http2Call, request_head
from livenessprobe.rpc import Reply

METHOD = "/csi.v1.Identity/Probe"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("piece", [0, 1])
def test_the_verdict_is_that_of_grpc_go(name: str, piece: int) -> None:
    assert CASES[name].holds(ended := in_memory(CASES[name], METHOD, piece)), ended


def test_a_reset_at_the_deadline_is_the_deadline() -> None:
    """As grpc-go says where the peer's clock was quicker than its own."""
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
