"""Peers that speak HTTP/2 in every odd way, with grpc-go's verdict on each, which is the kubelet's.

Everything that makes calls is tested with this table: `with case.peer(path): …`, then case.holds(…) of the call's result.
Where the rules are: `transport` is internal/transport/http2_client.go, `http_util` is internal/transport/http_util.go,
`framer` is golang.org/x/net/http2/frame.go (it breaks the connection, or one stream), all as of grpc-go 1.85; `here`
marks what this project decides for itself.
"""

from __future__ import annotations

import itertools
import struct
from typing import TYPE_CHECKING, NamedTuple

import peers
from peers import PREFACE, frame

from livenessprobe import __version__
from livenessprobe.http2_call import Http2Call, Unprocessed, request_head
from livenessprobe.rpc import Reply, Unreachable

if TYPE_CHECKING:
    import socket
    from contextlib import AbstractContextManager
    from pathlib import Path

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
END_STREAM = ACK = 1
END_HEADERS, PADDED, PRIORITIZED = 4, 8, 0x20
LAST_STREAM = 2**31 - 1
MIB = 1 << 20


# ---- words


def field(name: bytes, value: bytes) -> bytes:
    """A header field for no table, by section 6.2.2 of RFC 7541."""
    return b"\0" + _sized(name) + _sized(value)


def _sized(text: bytes) -> bytes:
    """A text with its length in front: in 7 bits or, if it is longer, the rest in more bytes of 7 bits."""
    length, rest = bytes([min(len(text), 127)]), len(text) - 127
    while rest >= 0:
        length, rest = length + bytes([rest & 127 | (rest > 127) << 7]), (rest >> 7) or -1
    return length + text


def message(data: bytes) -> bytes:
    """A gRPC message that is not compressed."""
    return b"\0" + len(data).to_bytes(4, "big") + data


def headers(block: bytes, flags: int = 0, stream: int = 1) -> bytes:
    """HEADERS, with CONTINUATION as needed, of a whole block."""
    pieces = [block[at : at + 16384] for at in range(0, len(block), 16384)] or [b""]
    kinds = [HEADERS] + [CONTINUATION] * (len(pieces) - 1)
    ends = [0] * (len(pieces) - 1) + [END_HEADERS]
    return b"".join(
        frame(kind, piece, end | (flags if kind == HEADERS else 0), stream)
        for kind, piece, end in zip(kinds, pieces, ends, strict=True)
    )


def data(payload: bytes, flags: int = 0, stream: int = 1) -> bytes:
    """DATA, as many frames as needed."""
    pieces = [payload[at : at + 16384] for at in range(0, len(payload), 16384)] or [b""]
    return b"".join(frame(DATA, piece, 0, stream) for piece in pieces[:-1]) + frame(
        DATA, pieces[-1], flags, stream
    )


def begin(content_type: bytes | None = b"application/grpc", *more: bytes, status: bytes = b"200") -> bytes:
    """The block of header fields that an answer begins with."""
    kind = field(b"content-type", content_type) if content_type is not None else b""
    return field(b":status", status) + kind + b"".join(more)


def trailers(status: bytes | None = b"0", text: bytes | None = None, *more: bytes, stream: int = 1) -> bytes:
    """The frame that ends an answer."""
    return headers(
        b"".join(
            [
                b"" if status is None else field(b"grpc-status", status),
                b"" if text is None else field(b"grpc-message", text),
                *more,
            ]
        ),
        END_STREAM,
        stream,
    )


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, b"".join(struct.pack(">HL", *pair) for pair in pairs))


def goaway(last: int, error: int = 0, debug: bytes = b"") -> bytes:
    return frame(GOAWAY, struct.pack(">LL", last, error) + debug)


def reset(error: int, stream: int = 1) -> bytes:
    return frame(RST_STREAM, error.to_bytes(4, "big"), 0, stream)


def window(increment: int, stream: int = 0) -> bytes:
    return frame(WINDOW_UPDATE, increment.to_bytes(4, "big"), 0, stream)


def padded(kind: int, payload: bytes, padding: int, flags: int = 0) -> bytes:
    return frame(kind, bytes([padding]) + payload + bytes(padding), flags | PADDED, 1)


REPLY = b"\n\x02\x08\x01"
BEGIN = headers(begin())
BODY = data(message(REPLY))
END = trailers()
ANSWER = BEGIN + BODY + END


# ---- peers


class Call(NamedTuple):
    """A step: the peer waits for a whole call on this stream."""

    stream: int = 1


class Said(NamedTuple):
    """A step: the peer waits until the client has said these bytes."""

    words: bytes


class Close(NamedTuple):
    """The last step: the peer closes. Without it, it stays, and says no more."""


Step = bytes | Call | Said | Close


class Case(NamedTuple):
    """A peer, and the verdict on it."""

    connections: tuple[tuple[Step, ...], ...]
    """What it does on one connection after another; the last one is repeated for all that follow."""
    code: str
    """The reply's code; empty if the peer counts as unreachable."""
    words: str
    """A part of the message or, for code OK, the whole reply."""
    rule: str
    """Whose rule it is, and where to find it."""

    def peer(self, path: Path, piece: int = 0) -> AbstractContextManager[list[socket.socket]]:
        """Play it on a socket; piece: how many bytes to send at once, instead of all there are."""
        numbers = itertools.count()

        def talk(connection: socket.socket) -> None:
            steps = self.connections[min(next(numbers), len(self.connections) - 1)]
            _play(connection, steps, piece)

        return peers.talking(talk, path)

    def holds(self, outcome: Reply | Unreachable) -> bool:
        """Tell whether this is what a call should end with."""
        if isinstance(outcome, Unreachable):
            return not self.code and self.words in str(outcome)
        if self.code == "OK":
            return outcome == Reply("OK", "", self.words.encode("latin-1"))
        return (outcome.code, outcome.payload) == (self.code, None) and self.words in outcome.message


def in_memory(case: Case, method: str, piece: int = 0) -> Reply | Unreachable:
    """The result of a call to this peer without a socket in between; fails if the peer would wait for ever."""
    for number in itertools.count():
        call = Http2Call(request_head(method), b"", lambda: 1.0, again=number == 0)
        try:
            return _converse(call, case.connections[min(number, len(case.connections) - 1)], piece)
        except Unprocessed:
            assert number == 0, "a call is made again once at most"
        except Unreachable as unreachable:
            return unreachable
    raise AssertionError


def request_fields(method: str) -> list[tuple[bytes, bytes]]:
    """The header fields of a call, all but its timeout."""
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", method.encode()),
        (b":authority", b"localhost"),
        (b"content-type", b"application/grpc"),
        (b"user-agent", f"livenessprobe/{__version__}".encode()),
        (b"te", b"trailers"),
    ]


def _converse(call: Http2Call, steps: tuple[Step, ...], piece: int) -> Reply:
    said = b""
    for step in steps:
        said += call.to_send
        call.to_send.clear()
        if isinstance(step, Close):
            return call.ended("closed by the peer")
        if isinstance(step, bytes):
            for at in range(0, len(step), piece or len(step) or 1):
                if reply := call.receive(step[at : at + (piece or len(step))]):
                    return reply
        else:
            assert _has_call(said, step.stream) if isinstance(step, Call) else step.words in said, step
    raise AssertionError("the peer has said all, and there is no reply")


def _play(connection: socket.socket, steps: tuple[Step, ...], piece: int) -> None:
    received = b""
    for step in steps:
        if isinstance(step, Close):
            return
        if isinstance(step, bytes):
            for at in range(0, len(step), piece or len(step) or 1):
                connection.sendall(step[at : at + (piece or len(step))])
            continue
        while not (_has_call(received, step.stream) if isinstance(step, Call) else step.words in received):
            if not (more := connection.recv(65536)):
                return
            received += more
    while connection.recv(65536):
        pass


def _has_call(received: bytes, stream: int) -> bool:
    """Whether a client's bytes have reached the end of its call on this stream."""
    at = len(PREFACE)
    while at + 9 <= len(received):
        size, kind, flags = int.from_bytes(received[at : at + 3], "big"), received[at + 3], received[at + 4]
        on = int.from_bytes(received[at + 5 : at + 9], "big")
        if (kind, flags & END_STREAM, on) == (DATA, END_STREAM, stream):
            return True
        at += 9 + size
    return False


HELLO = peers.SETTINGS + peers.SETTINGS_ACK


def answered(*steps: Step) -> tuple[tuple[Step, ...], ...]:
    """Connections of a peer that speaks HTTP/2, and says this once it is called."""
    return ((HELLO, Call(), *steps),)


def ok(*said: bytes, rule: str = "RFC 9113") -> Case:
    return Case(answered(b"".join(said)), "OK", REPLY.decode(), rule)


def bad(code: str, words: str, rule: str, *said: Step) -> Case:
    return Case(answered(*said), code, words, rule)


HEADERS_RULE = "transport, operateHeaders"
MESSAGE_RULE = "rpc_util.go, recvMsg and checkRecvPayload"
CARDINALITY_RULE = "stream.go, recvMsg: cardinality violation"
RETRY_RULE = "stream.go, shouldRetry: once, where the stream is unprocessed"
GOAWAY_RULE = "transport, handleGoAway"
RESET_RULE = "transport, handleRSTStream; http_util, http2ErrConvTab"
STATUS_RULE = "http_util, HTTPStatusConvTab"
TEXT_RULE = "http_util, decodeGrpcMessage"
FRAMER_RULE = "framer"
UNKNOWN_FRAMES = b"".join(
    frame(kind, b"anything", 255, stream) for kind in (10, 16, 254) for stream in (0, 1, 3)
)
HTML = data(b"<html>no</html>", END_STREAM)


LARGE = message(b"x" * 65536)
SINGLE = {byte: data(bytes([byte])) for byte in set(LARGE)}


def split(block: bytes, flags: int) -> bytes:
    """A block of header fields, one byte per frame, with empty frames in between."""
    pieces = [b"", *(block[at : at + 1] for at in range(len(block))), b""]
    return frame(HEADERS, pieces[0], flags, 1) + b"".join(
        frame(CONTINUATION, piece, END_HEADERS if last else 0, 1)
        for piece, last in zip(pieces[1:], [*[False] * (len(pieces) - 2), True], strict=True)
    )


CASES: dict[str, Case] = {
    # ---- legal HTTP/2
    "an answer": ok(ANSWER),
    "an answer, then a close": Case(answered(ANSWER, Close()), "OK", REPLY.decode(), "RFC 9113"),
    "an answer, then a reset": ok(ANSWER + reset(0)),
    "an empty reply": Case(answered(BEGIN + data(message(b"")) + END), "OK", "", "RFC 9113"),
    "padding": ok(
        padded(HEADERS, begin(), 255, END_HEADERS),
        padded(DATA, message(REPLY)[:3], 7),
        padded(DATA, b"", 0),
        padded(DATA, message(REPLY)[3:], 255),
        padded(HEADERS, field(b"grpc-status", b"0"), 1, END_HEADERS | END_STREAM),
    ),
    "padding and nothing else": ok(BEGIN, padded(DATA, b"", 255), BODY, END),
    "a priority": ok(
        frame(HEADERS, bytes(5) + begin(), END_HEADERS | PRIORITIZED, 1),
        frame(PRIORITY, bytes(5), 0, 1) + BODY,
        frame(HEADERS, b"\2" + bytes(5) + field(b"grpc-status", b"0") + b"\0\0", 0x2D, 1),
    ),
    "early hints": ok(
        headers(field(b":status", b"103") + field(b"link", b"</x>")),
        headers(field(b":status", b"100")),
        ANSWER,
        rule=HEADERS_RULE,
    ),
    "interim answers from the first to the last": ok(
        *(headers(field(b":status", status)) for status in (b"100", b"199")), ANSWER, rule=HEADERS_RULE
    ),
    "data before header fields": ok(BODY, BEGIN, END, rule="transport, handleData"),
    "CONTINUATION": ok(split(begin(), 0), BODY, split(field(b"grpc-status", b"0"), END_STREAM)),
    "unknown frames": ok(UNKNOWN_FRAMES, BEGIN, UNKNOWN_FRAMES, BODY, UNKNOWN_FRAMES, END),
    "a promise": ok(
        frame(PUSH_PROMISE, b"\0\0\0\2\x82", END_HEADERS, 1), ANSWER, rule="transport, reader: passed over"
    ),
    "late SETTINGS": ok(
        BEGIN, settings((4, 0), (5, 2**24 - 1), (77, 7)), BODY, settings((1, 0), (3, 0), (2, 1)), END
    ),
    "SETTINGS of all kinds at first": Case(
        (
            (
                settings((1, 0), (3, 1), (4, 1), (4, 0), (5, 2**24 - 1), (6, 1), (99, 2**32 - 1)),
                Call(),
                ANSWER,
            ),
        ),
        "OK",
        REPLY.decode(),
        "transport, handleSettings",
    ),
    "SETTINGS acknowledged first of all": Case(
        ((peers.SETTINGS_ACK, Call(), ANSWER),), "OK", REPLY.decode(), "transport, readServerPreface"
    ),
    "an answer before SETTINGS are acknowledged": Case(
        ((peers.SETTINGS, Call(), ANSWER),), "OK", REPLY.decode(), "RFC 9113"
    ),
    "SETTINGS that must be acknowledged": Case(
        ((peers.SETTINGS, Call(), Said(peers.SETTINGS_ACK), ANSWER),), "OK", REPLY.decode(), "RFC 9113, 6.5.3"
    ),
    "a PING that must be answered": Case(
        answered(BEGIN + frame(PING, b"question"), Said(frame(PING, b"question", ACK)), BODY + END),
        "OK",
        REPLY.decode(),
        "transport, handlePing",
    ),
    "a PING that is an answer": ok(frame(PING, b"whatever", ACK), ANSWER),
    "wide windows": ok(window(LAST_STREAM - 65535), window(LAST_STREAM - 65535, 1), window(9, 3), ANSWER),
    "frames of other streams": ok(
        headers(begin(b"text/html"), END_STREAM, 3),
        data(b"x", 0, 5),
        reset(2, 3),
        BEGIN,
        data(b"x", END_STREAM, 7),
        BODY,
        END,
    ),
    "empty DATA": ok(BEGIN, data(b"") * 100, BODY, data(b""), END),
    "a message in single bytes": ok(
        BEGIN, b"".join(data(message(REPLY)[at : at + 1]) for at in range(9)), END
    ),
    "64 KiB": Case(
        answered(BEGIN + data(LARGE[:65535]), Said(window(1)[:9]), data(LARGE[65535:]) + END),
        "OK",
        "x" * 65536,
        "RFC 9113, 5.2: the window is opened again",
    ),
    "64 KiB in single bytes": Case(
        answered(BEGIN + b"".join(SINGLE[byte] for byte in LARGE) + END),
        "OK",
        "x" * 65536,
        "RFC 9113, 6.1",
    ),
    "64 KiB, and more padding": Case(
        answered(
            BEGIN + b"".join(padded(DATA, LARGE[at : at + 99], 200) for at in range(0, 65541, 99)) + END
        ),
        "OK",
        "x" * 65536,
        "RFC 9113, 6.1",
    ),
    # ---- a call that the peer did not process
    "GOAWAY, for later calls": ok(goaway(1), ANSWER, rule=GOAWAY_RULE),
    "GOAWAY in two steps": ok(
        goaway(LAST_STREAM),
        BEGIN,
        frame(PING, b"1 2 3 45"),
        goaway(1, 0, b"bye"),
        BODY,
        END,
        rule=GOAWAY_RULE,
    ),
    "GOAWAY before the call, then a new connection": Case(
        ((peers.SETTINGS + goaway(0), Close()), (HELLO, Call(), ANSWER)), "OK", REPLY.decode(), RETRY_RULE
    ),
    "GOAWAY instead of an answer, then a new connection": Case(
        (*answered(goaway(0, 11, b"too_many_pings")), (HELLO, Call(), ANSWER)),
        "OK",
        REPLY.decode(),
        RETRY_RULE,
    ),
    "GOAWAY each time": bad(
        "Unavailable", "ENHANCE_YOUR_CALM, too_many_pings", RETRY_RULE, goaway(0, 11, b"too_many_pings")
    ),
    "GOAWAY, then nobody to answer": bad(
        "Unavailable",
        "the connection ended before the answer did, after GOAWAY: INTERNAL_ERROR",
        GOAWAY_RULE,
        goaway(1, 2),
        Close(),
    ),
    "GOAWAY for an even stream": bad("Unavailable", "GOAWAY", GOAWAY_RULE, goaway(2)),
    "GOAWAY for more than before": bad("Unavailable", "GOAWAY", GOAWAY_RULE, goaway(1) + goaway(3)),
    "GOAWAY with an error of its own": bad(
        "Unavailable", "after GOAWAY: error 70007", GOAWAY_RULE, goaway(1, 70007), Close()
    ),
    "refused, then answered": Case(
        answered(reset(7), Call(3), headers(begin(), 0, 3) + data(message(REPLY), 0, 3) + trailers(stream=3)),
        "OK",
        REPLY.decode(),
        RETRY_RULE,
    ),
    "refused with windows and tables closed, then answered": Case(
        (
            (
                settings((1, 0), (4, 0)),
                Call(),
                reset(7),
                Said(b"\x20\x83"),
                *(window(1, 3), window(3, 3), window(9, 3)),
                Call(3),
                headers(begin(), 0, 3) + data(message(REPLY), 0, 3) + trailers(stream=3),
            ),
        ),
        "OK",
        REPLY.decode(),
        RETRY_RULE,
    ),
    "refused while no call is allowed": Case(
        (
            (
                settings((3, 0)),
                Call(),
                reset(7) + frame(PING, b"no calls"),
                Said(frame(PING, b"no calls", ACK)),
                settings((3, 1)),
                Call(3),
                headers(begin(), 0, 3) + data(message(REPLY), 0, 3) + trailers(stream=3),
            ),
        ),
        "OK",
        REPLY.decode(),
        "transport, handleSettings and NewStream: waits for its turn",
    ),
    "refused after GOAWAY, then a new connection": Case(
        (*answered(goaway(1) + reset(7)), (HELLO, Call(), ANSWER)), "OK", REPLY.decode(), RETRY_RULE
    ),
    "refused twice": bad("Unavailable", "REFUSED_STREAM", RETRY_RULE, reset(7), Call(3), reset(7, 3)),
    "refused on each connection": bad("Unavailable", "REFUSED_STREAM", RETRY_RULE, goaway(1) + reset(7)),
    **{
        f"reset with {error}": bad(code, f"the peer reset the call: {name}", RESET_RULE, reset(error))
        for error, name, code in [
            (0, "NO_ERROR", "Internal"),
            (1, "PROTOCOL_ERROR", "Internal"),
            (2, "INTERNAL_ERROR", "Internal"),
            (3, "FLOW_CONTROL_ERROR", "ResourceExhausted"),
            (4, "SETTINGS_TIMEOUT", "Internal"),
            (5, "STREAM_CLOSED", "Internal"),
            (6, "FRAME_SIZE_ERROR", "Internal"),
            (8, "CANCEL", "Canceled"),
            (9, "COMPRESSION_ERROR", "Internal"),
            (10, "CONNECT_ERROR", "Internal"),
            (11, "ENHANCE_YOUR_CALM", "ResourceExhausted"),
            (12, "INADEQUATE_SECURITY", "PermissionDenied"),
            (13, "HTTP_1_1_REQUIRED", "Internal"),
            (14, "error 14", "Unknown"),
            (2**32 - 1, "error 4294967295", "Unknown"),
        ]
    },
    "reset in the middle": bad("Internal", "INTERNAL_ERROR", RESET_RULE, BEGIN + BODY + reset(2)),
    # ---- status and message
    "trailers only": bad(
        "NotFound",
        "no",
        HEADERS_RULE,
        headers(begin() + field(b"grpc-status", b"5") + field(b"grpc-message", b"no"), END_STREAM),
    ),
    "trailers only, and all is well": bad(
        "Internal", "no message", CARDINALITY_RULE, headers(begin() + field(b"grpc-status", b"0"), END_STREAM)
    ),
    "no status": bad("Unknown", "no grpc-status", HEADERS_RULE, BEGIN + BODY + trailers(None)),
    "no status, but a message": bad("Unknown", "hm", HEADERS_RULE, BEGIN + BODY + trailers(None, b"hm")),
    **{
        f"status {status!r}": bad(
            "Unknown", "malformed grpc-status", HEADERS_RULE, BEGIN + BODY + trailers(status)
        )
        for status in [
            b"",
            b"x",
            b" 0",
            b"0x0",
            b"1_0",
            b"0.",
            b"-",
            b"2147483648",
            b"-2147483649",
            b"9" * 5000,
        ]
    },
    "a status that is no number, at first": bad(
        "Unknown", "malformed", HEADERS_RULE, headers(begin() + field(b"grpc-status", b"x"))
    ),
    **{
        f"status {status!r}, OK": ok(BEGIN, BODY, trailers(status), rule=HEADERS_RULE)
        for status in [b"00", b"+0", b"-0", b"0" * 5000]
    },
    **{
        f"status {status!r}, a code": bad(code, "", HEADERS_RULE, BEGIN + BODY + trailers(status))
        for status, code in [
            (b"16", "Unauthenticated"),
            (b"17", "Code(17)"),
            (b"404", "Code(404)"),
            (b"-1", "Code(4294967295)"),
            (b"-2147483648", "Code(2147483648)"),
            (b"2147483647", "Code(2147483647)"),
            (b"0000000000000013", "Internal"),
        ]
    },
    "a status at first counts for nothing": ok(
        headers(begin() + field(b"grpc-status", b"13")), BODY, END, rule=HEADERS_RULE
    ),
    "two statuses": bad(
        "NotFound", "", HEADERS_RULE, BEGIN + trailers(b"0", None, field(b"grpc-status", b"5"))
    ),
    "details": bad(
        "NotFound",
        "no",
        HEADERS_RULE,
        BEGIN + trailers(b"5", b"no", field(b"grpc-status-details-bin", b"CAUSAm5v")),
    ),
    **{
        f"message {text!r}": bad("Internal", shown, TEXT_RULE, BEGIN + trailers(b"13", text))
        for text, shown in [
            (b"all's well", "all's well"),
            (b"two%0Alines%0a", "two\nlines\n"),
            (b"100%", "100%"),
            (b"%", "%"),
            (b"%4", "%4"),
            (b"%zz%41", "%zzA"),
            (b"%+1", "%+1"),
            (b"%e4%bd%a0", "\u4f60"),
            (b"%e4%bd", "\udce4\udcbd"),
            ("\u4f60".encode(), "\u4f60"),
            (b"\xff\xfe", "\udcff\udcfe"),
        ]
    },
    "a message of 1 MiB": bad("Internal", "x" * MIB, "here", BEGIN + trailers(b"13", b"x" * MIB)),
    "a message of 1 MiB, all escaped": bad(
        "Internal", "A" * (MIB // 3), "here", BEGIN + trailers(b"13", b"%41" * (MIB // 3))
    ),
    "a message of more than 1 MiB": bad(
        "ResourceExhausted", "more than 1 MiB", "here", BEGIN + trailers(b"13", b"x" * (MIB + 65536))
    ),
    "no answer but many header fields": bad(
        "ResourceExhausted", "more than 1 MiB", "here", headers(begin() + b"\x90" * 40000)
    ),
    # ---- not gRPC
    **{
        f"content-type {kind!r}": ok(
            headers(begin(kind)), BODY, END, rule="grpcutil/method.go, ContentSubtype"
        )
        for kind in [
            b"application/grpc+proto",
            b"application/grpc;x=y",
            b"application/grpc+",
            b"application/grpc+json",
        ]
    },
    "two content-types": ok(
        headers(begin(b"text/html", field(b"content-type", b"application/grpc"))),
        BODY,
        END,
        rule=HEADERS_RULE,
    ),
    **{
        f"content-type {kind!r}, not gRPC": bad(
            "Unknown",
            f"HTTP status 200, content-type {kind.decode()}",
            HEADERS_RULE,
            headers(begin(kind)) + HTML,
        )
        for kind in [
            b"text/html",
            b"application/grpcx",
            b"application/grpc-web",
            b"Application/gRPC",
            b"application/json",
            b"",
        ]
    },
    "no content-type": bad(
        "Unknown", "HTTP status 200, no content-type", HEADERS_RULE, headers(begin(None)) + BODY + END
    ),
    "no content-type, but a status": bad(
        "Unknown",
        "HTTP status 200, no content-type, grpc-status 12: no such method",
        HEADERS_RULE,
        headers(
            begin(None) + field(b"grpc-status", b"12") + field(b"grpc-message", b"no such%20method"),
            END_STREAM,
        ),
    ),
    **{
        f"HTTP {status}": bad(
            code,
            f"not gRPC: HTTP status {status}, content-type text/html",
            STATUS_RULE,
            headers(begin(b"text/html", status=b"%d" % status)) + HTML,
        )
        for status, code in [
            (99, "Unknown"),
            (200, "Unknown"),
            (204, "Unknown"),
            (302, "Unknown"),
            (400, "Internal"),
            (401, "Unauthenticated"),
            (403, "PermissionDenied"),
            (404, "Unimplemented"),
            (429, "Unavailable"),
            (500, "Unknown"),
            (502, "Unavailable"),
            (503, "Unavailable"),
            (504, "Unavailable"),
            (999, "Unknown"),
        ]
    },
    "HTTP 404 and no more": bad(
        "Unimplemented",
        "HTTP status 404, no content-type",
        HEADERS_RULE,
        headers(begin(None, status=b"404"), END_STREAM),
    ),
    "no HTTP status": bad("Internal", "HTTP status", HEADERS_RULE, headers(field(b"server", b"x"))),
    "an HTTP status that is no number": bad(
        "Internal", "HTTP status", HEADERS_RULE, headers(begin(None, status=b"abc"))
    ),
    "an interim answer that ends": bad(
        "Internal", "interim answer (103)", HEADERS_RULE, headers(field(b":status", b"103"), END_STREAM)
    ),
    "HTTP 503 in a gRPC answer": bad(
        "Aborted",
        "later",
        HEADERS_RULE,
        headers(
            begin(status=b"503") + field(b"grpc-status", b"10") + field(b"grpc-message", b"later"), END_STREAM
        ),
    ),
    # ---- messages
    "no message": bad("Internal", "no message", CARDINALITY_RULE, BEGIN + END),
    "an error after a message": bad(
        "NotFound", "gone", CARDINALITY_RULE, BEGIN + BODY + trailers(b"5", b"gone")
    ),
    "two messages": bad("Internal", "more than one", CARDINALITY_RULE, BEGIN + BODY + BODY + END),
    "two messages, and no end": bad("Internal", "more than one", CARDINALITY_RULE, BEGIN + BODY + BODY),
    "a message and a bit": bad("Internal", "more than one", MESSAGE_RULE, BEGIN + BODY + data(b"\0") + END),
    "a message cut short": bad(
        "Internal", "cut short", MESSAGE_RULE, BEGIN + data(message(REPLY)[:-1]) + END
    ),
    "a message cut short, and an error": bad(
        "Internal", "cut short", MESSAGE_RULE, BEGIN + data(message(REPLY)[:-1]) + trailers(b"5")
    ),
    "a message cut to a bit": bad("Internal", "cut short", MESSAGE_RULE, BEGIN + data(b"\0") + END),
    "a message of more than 64 KiB": bad(
        "ResourceExhausted",
        "65537 bytes",
        "here; rpc_util.go, recvMsg for more than 4 MiB",
        BEGIN + data(message(b"x" * 65537)[:9]),
    ),
    "a message of 4 GiB": bad(
        "ResourceExhausted", "4294967295", MESSAGE_RULE, BEGIN + data(b"\0\xff\xff\xff\xff")
    ),
    "a compressed message": bad(
        "Internal",
        "compressed (gzip)",
        "here; " + MESSAGE_RULE,
        headers(begin(b"application/grpc", field(b"grpc-encoding", b"gzip"))) + data(b"\1\0\0\0\4gzip") + END,
    ),
    "a compressed message, of no encoding": bad(
        "Internal", "compressed (1)", MESSAGE_RULE, BEGIN + data(b"\1\0\0\0\4gzip") + END
    ),
    "compressed data before header fields": bad(
        "Internal", "compressed (1)", MESSAGE_RULE, data(b"\1\0\0\0\4gzip")
    ),
    "gzip announced, and not used": ok(
        headers(begin(b"application/grpc", field(b"grpc-encoding", b"gzip"))), BODY, END, rule=MESSAGE_RULE
    ),
    "a message without trailers": bad(
        "Internal", "without trailers", "transport, handleData", BEGIN + data(message(REPLY), END_STREAM)
    ),
    "headers in the middle": bad("Internal", "in the middle", HEADERS_RULE, BEGIN + BODY + BEGIN),
    # ---- header fields
    "a connection field": ok(
        headers(begin(b"application/grpc", field(b"connection", b"close"))),
        BODY,
        END,
        rule="transport, operateHeaders: unread",
    ),
    "a content-length that lies": ok(
        headers(begin(b"application/grpc", field(b"content-length", b"1"))),
        BODY,
        END,
        rule="transport, operateHeaders: unread",
    ),
    "binary fields": ok(
        headers(
            begin(
                b"application/grpc",
                *(field(b"x-bin", value) for value in [b"", b"QQ", b"QQ==", b"QUI", b"QUI=", b"QUJD"]),
            )
        ),
        BODY,
        END,
        rule="http_util, decodeMetadataHeader",
    ),
    **{
        f"a binary field with {value!r}": bad(
            "Internal",
            "x-bin: not base64",
            "http_util, decodeMetadataHeader",
            BEGIN + BODY + trailers(b"0", None, field(b"x-bin", value)),
        )
        for value in [b"Q", b"QQ=", b"====", b"Q Q=", b"QQ_-"]
    },
    "a field in capitals": bad(
        "Internal", "'X'", FRAMER_RULE, headers(begin(b"application/grpc", field(b"X", b"")))
    ),
    "a field without a name": bad(
        "Internal", "''", FRAMER_RULE, headers(begin(b"application/grpc", field(b"", b"")))
    ),
    "a control character": bad(
        "Internal", "control character in grpc-message", FRAMER_RULE, BEGIN + trailers(b"13", b"\x1b[2J")
    ),
    "a status after other fields": bad(
        "Internal", ":status", FRAMER_RULE, headers(field(b"x", b"") + begin())
    ),
    "two HTTP statuses": bad(
        "Internal", ":status", FRAMER_RULE, headers(field(b":status", b"200") + begin())
    ),
    "an unknown pseudo field": bad("Internal", ":x", FRAMER_RULE, headers(field(b":x", b"") + begin())),
    "a request for an answer": bad(
        "Internal", "of a request", FRAMER_RULE, headers(field(b":path", b"/") + begin())
    ),
    # ---- broken HTTP/2
    **{
        name: bad("Unavailable", "the peer broke HTTP/2", FRAMER_RULE, said)
        for name, said in {
            "header fields that cannot be decoded": headers(b"\xff\xff\xff\xff\xff\xff"),
            "header fields cut short": headers(begin()[:-1]),
            "many header fields cut short": headers(begin() + field(b"x", b"x" * 5000)[:-1]),
            "many table sizes": headers(b"\x20" * 3 + begin()),
            "a long frame": frame(77, bytes(16385)),
            "DATA on no stream": frame(DATA, b"x"),
            "HEADERS on no stream": headers(begin(), 0, 0),
            "too much padding in DATA": BEGIN + frame(DATA, b"\5xxxx", PADDED, 1),
            "padding of no length": BEGIN + frame(DATA, b"", PADDED, 1),
            "a priority cut short": frame(HEADERS, bytes(4), PRIORITIZED | END_HEADERS, 1),
            "CONTINUATION of nothing": frame(CONTINUATION, begin(), END_HEADERS, 1),
            "CONTINUATION of another stream": frame(HEADERS, begin(), 0, 1)
            + frame(CONTINUATION, b"", END_HEADERS, 3),
            "a header block interrupted": frame(HEADERS, begin(), 0, 1) + frame(PING, bytes(8)),
            "SETTINGS of five bytes": frame(SETTINGS, bytes(5)),
            "SETTINGS on a stream": frame(SETTINGS, b"", 0, 1),
            "SETTINGS acknowledged with more": frame(SETTINGS, bytes(6), ACK),
            "SETTINGS with a window of 2 GiB": settings((4, 2**31)),
            "a PING of seven bytes": frame(PING, bytes(7)),
            "a PING on a stream": frame(PING, bytes(8), 0, 1),
            "a GOAWAY cut short": frame(GOAWAY, bytes(7)),
            "a GOAWAY on a stream": frame(GOAWAY, bytes(8), 0, 1),
            "a reset of no stream": reset(0, 0),
            "a reset cut short": frame(RST_STREAM, b"", 0, 1),
            "a window opened by nothing": window(0),
            "a window update cut short": frame(WINDOW_UPDATE, b"", 0, 1),
        }.items()
    },
    "a window of the call opened by nothing": bad(
        "Internal", "WINDOW_UPDATE of zero", FRAMER_RULE, window(0, 1)
    ),
    "a window of another stream opened by nothing": ok(window(0, 3), ANSWER, rule=FRAMER_RULE),
    "too much padding in HEADERS": bad(
        "Internal", "more padding", FRAMER_RULE, frame(HEADERS, b"\5xxxx", PADDED | END_HEADERS, 1)
    ),
    # ---- connections that end
    "closed before a word": Case(((Said(PREFACE), Close()),), "", "closed by the peer", "here"),
    "closed in the middle of SETTINGS": Case(
        ((Call(), peers.SETTINGS[:5], Close()),),
        "",
        "does not speak HTTP/2 (it closed the connection after 5 bytes)",
        "here",
    ),
    **{
        name: Case(
            ((Call(), said, Close()),),
            "",
            f"does not speak HTTP/2 (it began with {said[:9]!r})",
            "transport, readServerPreface",
        )
        for name, said in {
            "HTTP/1.1": b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
            "TLS": b"\x15\x03\x01\x00\x02\x02\x16 and so on",
            "its own preface": PREFACE,
            "GOAWAY first of all": goaway(0, 1),
            "SETTINGS that cannot be": frame(SETTINGS, b"", 0, 1),
            "SETTINGS too long": frame(SETTINGS, bytes(16386)),
        }.items()
    },
    **{
        name: bad(
            "Unavailable",
            "the connection ended before the answer did",
            "transport, reader: error reading from server",
            said,
            Close(),
        )
        for name, said in {
            "closed after SETTINGS": b"",
            "closed in a frame": BEGIN[:11],
            "closed after header fields": BEGIN,
            "closed after the message": BEGIN + BODY,
            "closed in the trailers": ANSWER[:-1],
        }.items()
    },
}

# What a peer that never ends does within a call's time: that is DeadlineExceeded.
SILENT = {
    "from the first": (b"",),
    "after half of SETTINGS": (peers.SETTINGS[:5],),
    "after SETTINGS": (HELLO,),
    "after header fields": (HELLO, Call(), BEGIN),
    "after the message": (HELLO, Call(), BEGIN + BODY),
    "refused, and no call allowed again": (settings((3, 0)), Call(), reset(7)),
    "refused, and no window": (settings((4, 0)), Call(), reset(7)),
}

# Where grpcio, which grpc_call uses, has another verdict. Where that is DeadlineExceeded, it waits for ever.
BY_GRPCIO = {
    "DATA on no stream": "DeadlineExceeded",
    "GOAWAY first of all": "DeadlineExceeded",
    "GOAWAY for an even stream": "DeadlineExceeded",
    "GOAWAY for more than before": "DeadlineExceeded",
    "HEADERS on no stream": "DeadlineExceeded",
    "HTTP/1.1": "DeadlineExceeded",
    "SETTINGS acknowledged first of all": "DeadlineExceeded",
    "SETTINGS of all kinds at first": "DeadlineExceeded",
    "SETTINGS that cannot be": "DeadlineExceeded",
    "SETTINGS too long": "DeadlineExceeded",
    "TLS": "DeadlineExceeded",
    "a PING on a stream": "DeadlineExceeded",
    "a long frame": "DeadlineExceeded",
    "a message and a bit": "DeadlineExceeded",
    "a request for an answer": "DeadlineExceeded",
    "a reset of no stream": "DeadlineExceeded",
    "a status after other fields": "DeadlineExceeded",
    "closed in the middle of SETTINGS": "DeadlineExceeded",
    "compressed data before header fields": "DeadlineExceeded",
    "its own preface": "DeadlineExceeded",
    "no HTTP status": "DeadlineExceeded",
    "refused while no call is allowed": "DeadlineExceeded",
    "refused with windows and tables closed, then answered": "DeadlineExceeded",
    "two HTTP statuses": "DeadlineExceeded",
    "two messages": "DeadlineExceeded",
    "two messages, and no end": "DeadlineExceeded",
    "64 KiB, and more padding": "Internal",
    "a priority": "Internal",
    "a priority cut short": "Internal",
    "a status that is no number, at first": "Internal",
    "header fields cut short": "Internal",
    "header fields that cannot be decoded": "Internal",
    "many header fields cut short": "Internal",
    "many table sizes": "Internal",
    "padding": "Internal",
    "padding and nothing else": "Internal",
    "padding of no length": "Internal",
    "reset with 14": "Internal",
    "reset with 3": "Internal",
    "reset with 4294967295": "Internal",
    "status b''": "Internal",
    "status b'-'": "Internal",
    "status b'-1', a code": "Internal",
    "status b'-2147483648', a code": "Internal",
    "status b'-2147483649'": "Internal",
    "status b'0.'": "Internal",
    "status b'0x0'": "Internal",
    "status b'1_0'": "Internal",
    "status b'2147483647', a code": "Internal",
    "status b'2147483648'": "Internal",
    f"status {b'9' * 5000!r}": "Internal",
    "status b'x'": "Internal",
    "too much padding in DATA": "Internal",
    "a message cut short, and an error": "NotFound",
    "a binary field with b'===='": "OK",
    "a binary field with b'QQ='": "OK",
    "a compressed message, of no encoding": "OK",
    "no content-type": "OK",
    "status b' 0'": "OK",
    "a message of 1 MiB": "ResourceExhausted",
    "a message of 1 MiB, all escaped": "ResourceExhausted",
    "GOAWAY instead of an answer, then a new connection": "Unavailable",
    "refused after GOAWAY, then a new connection": "Unavailable",
    "refused, then answered": "Unavailable",
    "no content-type, but a status": "Unimplemented",
    "CONTINUATION of another stream": "Unknown",
    "CONTINUATION of nothing": "Unknown",
    "SETTINGS acknowledged with more": "Unknown",
    "SETTINGS of five bytes": "Unknown",
    "SETTINGS on a stream": "Unknown",
    "SETTINGS with a window of 2 GiB": "Unknown",
    "a GOAWAY cut short": "Unknown",
    "a PING of seven bytes": "Unknown",
    "a header block interrupted": "Unknown",
    "a message without trailers": "Unknown",
    "a reset cut short": "Unknown",
    "a window of the call opened by nothing": "Unknown",
    "a window opened by nothing": "Unknown",
    "a window update cut short": "Unknown",
    "an interim answer that ends": "Unknown",
    "early hints": "Unknown",
    "headers in the middle": "Unknown",
    "interim answers from the first to the last": "Unknown",
    "status b'17', a code": "Unknown",
    "status b'404', a code": "Unknown",
}
