"""HTTP/2 for the client of one unary gRPC call, pure: bytes in, bytes to send and a Reply out, as grpc-go judges.

A little over 250 lines, since each kind of frame may change the state of the one call.
"""

import struct
from collections.abc import Callable

from hpack.hpack import Encoder

from livenessprobe import __version__
from livenessprobe.grpc_answer import Answer
from livenessprobe.http2_frames import (
    ACK,
    END_STREAM,
    LONGEST_FRAME,
    Broken,
    Frame,
    Frames,
    HeaderFields,
    Kind,
    TooMuch,
    expect,
    written,
    written_headers,
)
from livenessprobe.rpc import Reply, Unreachable

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_ENABLE_PUSH, _MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE = 2, 3, 4
_WINDOW = 65535
# Errors by number (RFC 9113, 7), and the gRPC code of a call that was reset with one.
_ERRORS = tuple(
    words.split()
    for words in """
    NO_ERROR Internal,PROTOCOL_ERROR Internal,INTERNAL_ERROR Internal,FLOW_CONTROL_ERROR ResourceExhausted
    ,SETTINGS_TIMEOUT Internal,STREAM_CLOSED Internal,FRAME_SIZE_ERROR Internal,REFUSED_STREAM Unavailable
    ,CANCEL Canceled,COMPRESSION_ERROR Internal,CONNECT_ERROR Internal,ENHANCE_YOUR_CALM ResourceExhausted
    ,INADEQUATE_SECURITY PermissionDenied,HTTP_1_1_REQUIRED Internal
    """.split(",")
)


class Unprocessed(Exception):
    """The peer says that it did not process the call, and takes no more calls over this connection."""


def request_head(method: str) -> bytes:
    """Encode the header fields of a request, all but its timeout; the same each time, so it can be kept."""
    fields = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("user-agent", f"livenessprobe/{__version__}"),
        ("te", "trailers"),
    )
    return bytes(Encoder().encode(fields))


class Http2Call:
    """One call over one new connection. Send what is in `to_send`, and give what comes to receive()."""

    def __init__(self, head: bytes, request: bytes, remaining: Callable[[], float], *, again: bool) -> None:
        """Take the request's head and message, what tells the seconds left, and whether the call may be made again.

        Again: once more over this connection, if the peer says that it did not process the call and the connection goes
        on, or else by raising Unprocessed.
        """
        self.to_send = bytearray(_PREFACE + written(Kind.SETTINGS, struct.pack(">HL", _ENABLE_PUSH, 0)))
        self.greeted = False
        """Whether the peer speaks HTTP/2."""
        self._head, self._message = head, b"\0" + len(request).to_bytes(4, "big") + request
        self._remaining, self._again = remaining, again
        self._frames, self._fields = Frames(), HeaderFields()
        self._goaway, self._last_taken = "", 2**31 - 1
        self._initial_window = self._connection_window = _WINDOW
        self._may_begin = True
        self._to_give_back = 0
        self._stream = -1
        self._begin()

    def receive(self, data: bytes) -> Reply | None:
        """Take bytes from the peer; return how the call ended, once it has.

        Raises Unreachable if the peer does not speak HTTP/2, and Unprocessed.
        """
        self._frames.add(data)
        while True:
            try:
                frame = self._frames.next()
                if frame is None:
                    return None
                reply = self._take(frame)
            except TooMuch as much:
                reply = Reply("ResourceExhausted", str(much), None)
            except Broken as broken:
                reply = self._broken(broken)
            if reply is not None:
                return reply

    def ended(self, how: str) -> Reply:
        """Say what it means that the connection ended; how: closed or reset."""
        if not self._frames.bytes:
            raise Unreachable(how, may_heal=True)
        if not self.greeted:
            raise _no_http2(f"it closed the connection after {self._frames.bytes} bytes")
        # How it ended depends only on whether the peer had read our last acknowledgement: not worth telling.
        return Reply("Unavailable", f"the connection ended before the answer did{self._goaway}", None)

    def _broken(self, broken: Broken) -> Reply | None:
        if not self.greeted:
            raise _no_http2(f"it began with {self._frames.first!r}") from None
        if broken.stream == 0:
            return Reply("Unavailable", f"the peer broke HTTP/2: {broken}{self._goaway}", None)
        if broken.stream == self._stream:
            return Reply("Internal", f"the peer broke HTTP/2: {broken}", None)
        return None

    # ---- what the peer says

    def _take(self, frame: Frame) -> Reply | None:
        match frame.kind:
            case Kind.HEADERS:
                return self._take_headers(frame)
            case Kind.DATA:
                return self._take_data(frame)
            case Kind.RST_STREAM:
                return self._take_rst_stream(frame)
            case Kind.GOAWAY:
                return self._take_goaway(frame)
            case Kind.SETTINGS:
                self._take_settings(frame)
            case Kind.WINDOW_UPDATE:
                self._take_window_update(frame)
            case Kind.PING:
                self._take_ping(frame)
        return None

    def _take_headers(self, frame: Frame) -> Reply | None:
        fields = self._fields.read(frame.payload)  # of other streams, too: they change what later ones mean
        if frame.stream != self._stream:
            return None
        return self._answer.headers(fields, ended=bool(frame.flags & END_STREAM))

    def _take_ping(self, frame: Frame) -> None:
        expect(frame.stream == 0 and frame.size == 8, "a malformed PING")
        if not frame.flags & ACK:
            self.to_send += written(Kind.PING, frame.payload, ACK)

    def _take_data(self, frame: Frame) -> Reply | None:
        self._to_give_back += frame.size
        if self._to_give_back > _WINDOW // 4:
            increment = self._to_give_back.to_bytes(4, "big")
            for stream in 0, self._stream:
                self.to_send += written(Kind.WINDOW_UPDATE, increment, stream=stream)
            self._to_give_back = 0
        if frame.stream != self._stream:
            return None
        return self._answer.data(frame.payload, ended=bool(frame.flags & END_STREAM))

    def _take_settings(self, frame: Frame) -> None:
        is_ack = frame.flags & ACK
        expect(frame.stream == 0 and frame.size % 6 == 0 and not is_ack * frame.size, "a malformed SETTINGS")
        for setting, value in struct.iter_unpack(">HL", frame.payload):
            if setting == _INITIAL_WINDOW_SIZE:
                expect(value < 2**31, "a window of 2 GiB")
                self._stream_window += value - self._initial_window
                self._initial_window = value
            elif setting == _MAX_CONCURRENT_STREAMS:
                self._may_begin = value > 0
        self.greeted = True
        if is_ack:
            return
        self.to_send += written(Kind.SETTINGS, flags=ACK)
        if self._waits and self._may_begin:
            self._begin()
        self._send_message()

    def _take_window_update(self, frame: Frame) -> None:
        expect(frame.size == 4, "a malformed WINDOW_UPDATE")
        increment = int.from_bytes(frame.payload, "big") & 0x7FFFFFFF
        expect(increment > 0, "a WINDOW_UPDATE of zero", frame.stream)
        if frame.stream == 0:
            self._connection_window += increment
        elif frame.stream == self._stream:
            self._stream_window += increment
        self._send_message()

    def _take_rst_stream(self, frame: Frame) -> Reply | None:
        expect(frame.stream != 0 and frame.size == 4, "a malformed RST_STREAM")
        if frame.stream != self._stream:
            return None
        name, code = _error(int.from_bytes(frame.payload, "big"))
        if name == "REFUSED_STREAM" and self._again:
            self._call_again()
            return None
        if code == "Canceled" and self._remaining() <= 0:
            code = "DeadlineExceeded"
        return Reply(code, f"the peer reset the call: {name}{self._goaway}", None)

    def _take_goaway(self, frame: Frame) -> Reply | None:
        expect(frame.stream == 0 and frame.size >= 8, "a malformed GOAWAY")
        last, error = struct.unpack_from(">LL", frame.payload)
        last &= 0x7FFFFFFF
        debug = frame.payload[8:1032].decode(errors="surrogateescape")
        self._goaway = f", after GOAWAY: {_error(error)[0]}" + (f", {debug}" if debug else "")
        expect(last % 2 == 1 or last == 0, "a GOAWAY for a stream that cannot be ours")
        expect(last <= self._last_taken, "a GOAWAY that takes back an earlier one")
        self._last_taken = last
        if last < self._stream and not self._again:
            return Reply("Unavailable", f"the peer did not process the call{self._goaway}", None)
        if last < self._stream:
            self._call_again()
        return None

    # ---- what we say

    def _call_again(self) -> None:
        self._again = False
        if self._goaway:
            raise Unprocessed
        self._waits = not self._may_begin
        if not self._waits:
            self._begin()

    def _begin(self) -> None:
        """Make the call, over a new stream."""
        first, self._waits = self._stream < 0, False
        self._stream += 2
        self._answer = Answer()
        self._stream_window = self._initial_window
        self._unsent = self._message
        timeout = _timeout(self._remaining())
        # 0x20 acknowledges a smaller table of header fields, in case the peer asked for one: 0 always fits.
        block = (b"" if first else b"\x20") + self._head
        block += b"\x00\x0cgrpc-timeout" + bytes([len(timeout)]) + timeout
        self.to_send += written_headers(block, self._stream)
        self._send_message()

    def _send_message(self) -> None:
        """Queue as much of the message as the peer's windows have room for."""
        while self._unsent:
            room = min(self._stream_window, self._connection_window, LONGEST_FRAME)
            if room <= 0:
                return
            piece, self._unsent = self._unsent[:room], self._unsent[room:]
            self._stream_window -= len(piece)
            self._connection_window -= len(piece)
            flags = 0 if self._unsent else END_STREAM
            self.to_send += written(Kind.DATA, piece, flags, self._stream)


def _error(number: int) -> tuple[str, str]:
    """Name an error of HTTP/2, and the gRPC code for it."""
    if number < len(_ERRORS):
        name, code = _ERRORS[number]
        return name, code
    return f"error {number}", "Unknown"


def _timeout(seconds: float) -> bytes:
    """Write a timeout as grpc-timeout has it: at most 8 digits and a unit."""
    for unit, in_unit in (b"u", 1e-6), (b"m", 1e-3), (b"S", 1):
        if seconds / in_unit < 10**8:
            return b"%d%s" % (max(seconds / in_unit, 1), unit)
    return b"%dH" % min(seconds / 3600, 10**8 - 1)


def _no_http2(hint: str) -> Unreachable:
    return Unreachable("the peer does not speak HTTP/2", f" ({hint})")
