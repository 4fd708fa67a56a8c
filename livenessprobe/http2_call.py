"""HTTP/2 (RFC 9113) for the client of one unary gRPC call, pure: bytes in, bytes to send and a Reply out.

What breaks HTTP/2, and whether that ends the connection or the call, is judged as grpc-go and the framer below it do.
Header compression is the library hpack's. A peer may say much in vain: frames, bytes and header fields are bounded.
"""

import struct
from collections.abc import Callable, Iterator

from hpack.exceptions import HPACKError, OversizedHeaderListError
from hpack.hpack import Decoder, Encoder, decode_integer

from livenessprobe import __version__
from livenessprobe.grpc_answer import Answer
from livenessprobe.rpc import Reply, Unreachable

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_END_STREAM = _ACK = 0x01
_END_HEADERS, _PADDED, _PRIORITIZED = 0x04, 0x08, 0x20
_ENABLE_PUSH, _INITIAL_WINDOW_SIZE = 2, 4
_HEADER = struct.Struct(">HBBBL")
_LONGEST_FRAME = 16384
_WINDOW = 65535
# By number, RFC 9113, 7: the name of an error, and the gRPC code for a stream reset with it.
_ERRORS = (
    *(("NO_ERROR", "Internal"), ("PROTOCOL_ERROR", "Internal"), ("INTERNAL_ERROR", "Internal")),
    *(("FLOW_CONTROL_ERROR", "ResourceExhausted"), ("SETTINGS_TIMEOUT", "Internal"), ("STREAM_CLOSED", "Internal")),
    *(("FRAME_SIZE_ERROR", "Internal"), ("REFUSED_STREAM", "Unavailable"), ("CANCEL", "Canceled")),
    *(("COMPRESSION_ERROR", "Internal"), ("CONNECT_ERROR", "Internal"), ("ENHANCE_YOUR_CALM", "ResourceExhausted")),
    *(("INADEQUATE_SECURITY", "PermissionDenied"), ("HTTP_1_1_REQUIRED", "Internal")),
)  # fmt: skip
_REFUSED_STREAM = 7

# An error text of 1 MiB, and what stands beside it.
_MOST_HEADER_BYTES = 1024 * 1024 + 64 * 1024
# One frame for each byte of the longest message, and as many again.
_MOST_FRAMES = 2 * 65536
_MOST_BYTES = 8 * 1024 * 1024
_SMALL_BLOCK = 4096


class _Kind:
    """The frames that matter here; others, of extensions too, are passed over."""

    DATA = 0
    HEADERS = 1
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Unprocessed(Exception):
    """The peer says that it did not process the call, and takes no other over this connection."""


class _Broken(Exception):
    """The peer broke HTTP/2 in a way that ends the connection."""


def request_head(method: str) -> bytes:
    """Encode the header fields of a request, all but its timeout; never changes, so it can be kept."""
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

        Again: once more over this connection, where the peer says that it did not process the call and the connection
        goes on, or else by raising Unprocessed.
        """
        self.to_send = bytearray(_PREFACE + _frame(_Kind.SETTINGS, struct.pack(">HL", _ENABLE_PUSH, 0)))
        self.greeted = False
        """Whether the peer speaks HTTP/2."""
        self._head, self._message = head, b"\0" + len(request).to_bytes(4, "big") + request
        self._remaining, self._again = remaining, again
        self._buffer = bytearray()
        self._first = b""
        self._frames = self._bytes = 0
        self._decoder = Decoder()
        self._header_bytes_left = _MOST_HEADER_BYTES
        self._block: tuple[int, int, bytearray] | None = None
        """The stream, the flags and the pieces of a header block that goes on."""
        self._goaway = ""
        self._initial_window = self._connection_window = _WINDOW
        self._to_give_back = 0
        self._stream = -1
        self._begin()

    def receive(self, data: bytes) -> Reply | None:
        """Take bytes from the peer; return how the call ended, if it did.

        Raises Unreachable where the peer does not speak HTTP/2, and Unprocessed.
        """
        self._buffer += data
        self._bytes += len(data)
        if not self.greeted:
            self._first = bytes(self._buffer[: _HEADER.size])
        try:
            while len(self._buffer) >= _HEADER.size:
                high, low, kind, flags, stream = _HEADER.unpack_from(self._buffer)
                end = _HEADER.size + (high << 8 | low)
                _expect(self.greeted or kind == _Kind.SETTINGS, "its first frame is no SETTINGS")
                _expect(end <= _HEADER.size + _LONGEST_FRAME, "a frame of more than 16 KiB")
                if len(self._buffer) < end:
                    return None
                payload = bytes(self._buffer[_HEADER.size : end])
                del self._buffer[:end]
                self._frames += 1
                if self._frames > _MOST_FRAMES or self._bytes > _MOST_BYTES:
                    return Reply("ResourceExhausted", "the peer says too much that is no answer", None)
                goes_on = self._block is not None
                _expect(goes_on == (kind == _Kind.CONTINUATION), "a header block out of order")
                if reply := self._take(kind, flags, stream & 0x7FFFFFFF, payload):
                    return reply
        except _Broken as broken:
            if not self.greeted:
                began = bytes(self._buffer[: _HEADER.size])
                raise _no_http2(f"it began with {began!r}") from None
            return Reply("Unavailable", f"the peer broke HTTP/2: {broken}{self._goaway}", None)
        return None

    def ended(self, how: str) -> Reply:
        """Say what it means that the connection ended, how being closed or reset."""
        if not self._bytes:
            raise Unreachable(how, may_heal=True)
        if not self.greeted:
            raise _no_http2(f"it closed the connection after {self._bytes} bytes")
        return Reply("Unavailable", f"the connection ended before the answer did: {how}{self._goaway}", None)

    # ---- what the peer says, frame by frame

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> Reply | None:
        match kind:
            case _Kind.DATA:
                return self._take_data(flags, stream, payload)
            case _Kind.HEADERS:
                return self._take_headers(flags, stream, payload)
            case _Kind.CONTINUATION:
                return self._take_continuation(flags, stream, payload)
            case _Kind.RST_STREAM:
                return self._take_rst_stream(stream, payload)
            case _Kind.SETTINGS:
                self._take_settings(flags, stream, payload)
            case _Kind.PING:
                self._take_ping(flags, stream, payload)
            case _Kind.GOAWAY:
                return self._take_goaway(stream, payload)
            case _Kind.WINDOW_UPDATE:
                return self._take_window_update(stream, payload)
        return None

    def _take_data(self, flags: int, stream: int, payload: bytes) -> Reply | None:
        _expect(stream != 0, "DATA on no stream")
        self._to_give_back += len(payload)
        if self._to_give_back > _WINDOW // 4:
            increment = self._to_give_back.to_bytes(4, "big")
            self._to_give_back = 0
            self.to_send += _frame(_Kind.WINDOW_UPDATE, increment)
            self.to_send += _frame(_Kind.WINDOW_UPDATE, increment, stream=self._stream)
        data = _unpadded(flags, payload)
        return self._answer.data(data, ended=bool(flags & _END_STREAM)) if stream == self._stream else None

    def _take_headers(self, flags: int, stream: int, payload: bytes) -> Reply | None:
        _expect(stream != 0, "HEADERS on no stream")
        block = _unpadded(flags, payload)
        if flags & _PRIORITIZED:
            _expect(len(block) >= 5, "HEADERS too short for a priority")
            block = block[5:]
        return self._take_block(flags, stream, bytearray(block))

    def _take_continuation(self, flags: int, stream: int, payload: bytes) -> Reply | None:
        began_on, began_with, block = self._block or (0, 0, bytearray())
        _expect(stream == began_on, "CONTINUATION on another stream")
        self._block = None
        block += payload
        return self._take_block(began_with & ~_END_HEADERS | flags & _END_HEADERS, stream, block)

    def _take_block(self, flags: int, stream: int, block: bytearray) -> Reply | None:
        if len(block) > self._header_bytes_left:
            return _too_long_headers()
        if not flags & _END_HEADERS:
            self._block = (stream, flags, block)
            return None
        fields: list[tuple[bytes, bytes]] = []
        try:
            for piece in _pieces(bytes(block)):
                self._decoder.max_header_list_size = self._header_bytes_left
                for name, value in self._decoder.decode(piece, raw=True):
                    self._header_bytes_left -= len(name) + len(value) + 32
                    fields.append((name, value))
        except OversizedHeaderListError:
            return _too_long_headers()
        except HPACKError as error:
            raise _Broken(f"header fields that cannot be decoded: {error}") from None
        if stream != self._stream:
            return None
        return self._answer.headers(fields, ended=bool(flags & _END_STREAM))

    def _take_rst_stream(self, stream: int, payload: bytes) -> Reply | None:
        _expect(stream != 0 and len(payload) == 4, "a malformed RST_STREAM")
        if stream != self._stream:
            return None
        error = int.from_bytes(payload, "big")
        if error == _REFUSED_STREAM and self._again:
            if self._goaway:
                raise Unprocessed
            self._again = False
            self._begin()
            return None
        name, code = _ERRORS[error] if error < len(_ERRORS) else (f"0x{error:x}", "Unknown")
        if code == "Canceled" and self._remaining() <= 0:
            code = "DeadlineExceeded"
        return Reply(code, f"the peer reset the call: {name}", None)

    def _take_settings(self, flags: int, stream: int, payload: bytes) -> None:
        is_ack = flags & _ACK
        _expect(stream == 0 and len(payload) % 6 == 0 and not (is_ack and payload), "a malformed SETTINGS")
        for setting, value in struct.iter_unpack(">HL", payload):
            if setting == _INITIAL_WINDOW_SIZE:
                _expect(value < 2**31, "a window of more than 2 GiB")
                self._stream_window += value - self._initial_window
                self._initial_window = value
        self.greeted = True
        if not is_ack:
            self.to_send += _frame(_Kind.SETTINGS, flags=_ACK)
            self._send_message()

    def _take_ping(self, flags: int, stream: int, payload: bytes) -> None:
        _expect(stream == 0 and len(payload) == 8, "a malformed PING")
        if not flags & _ACK:
            self.to_send += _frame(_Kind.PING, payload, _ACK)

    def _take_goaway(self, stream: int, payload: bytes) -> Reply | None:
        _expect(stream == 0 and len(payload) >= 8, "a malformed GOAWAY")
        last, error = struct.unpack_from(">LL", payload)
        last &= 0x7FFFFFFF
        name = _ERRORS[error][0] if error < len(_ERRORS) else f"0x{error:x}"
        debug = payload[8:1032].decode(errors="surrogateescape")
        self._goaway = f", after GOAWAY: {name}" + (f", {debug}" if debug else "")
        _expect(last == 0 or last % 2 == 1, "a GOAWAY for an even stream")
        if last >= self._stream:
            return None
        if self._again:
            raise Unprocessed
        return Reply("Unavailable", f"the peer does not process the call{self._goaway}", None)

    def _take_window_update(self, stream: int, payload: bytes) -> Reply | None:
        _expect(len(payload) == 4, "a malformed WINDOW_UPDATE")
        increment = int.from_bytes(payload, "big") & 0x7FFFFFFF
        if stream == 0:
            _expect(increment > 0, "a WINDOW_UPDATE of nothing")
            self._connection_window += increment
        elif stream == self._stream:
            if not increment:
                return Reply("Internal", "the peer sent a WINDOW_UPDATE of nothing", None)
            self._stream_window += increment
        self._send_message()
        return None

    # ---- what we say

    def _begin(self) -> None:
        """Make the call, over a new stream."""
        first = self._stream < 0
        self._stream += 2
        self._answer = Answer()
        self._stream_window = self._initial_window
        self._unsent = self._message
        timeout = _timeout(self._remaining())
        # The peer may have made the table of header fields smaller in between, which 0x20 takes note of: 0 fits always.
        block = (b"" if first else b"\x20") + self._head
        block += b"\x00\x0cgrpc-timeout" + bytes([len(timeout)]) + timeout
        self.to_send += _frame(_Kind.HEADERS, block, _END_HEADERS, self._stream)
        self._send_message()

    def _send_message(self) -> None:
        """Queue as much of the message as the peer's windows have room for."""
        while self._unsent:
            room = min(self._stream_window, self._connection_window, _LONGEST_FRAME)
            if room <= 0:
                return
            piece, self._unsent = self._unsent[:room], self._unsent[room:]
            self._stream_window -= len(piece)
            self._connection_window -= len(piece)
            self.to_send += _frame(_Kind.DATA, piece, 0 if self._unsent else _END_STREAM, self._stream)


def _frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return _HEADER.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def _expect(fact: bool, otherwise: str) -> None:
    if not fact:
        raise _Broken(otherwise)


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & _PADDED:
        return payload
    _expect(payload != b"" and payload[0] < len(payload), "more padding than frame")
    return payload[1 : len(payload) - payload[0]]


def _pieces(block: bytes) -> Iterator[bytes]:
    """Cut a long header block into its fields: hpack copies what is left of a block for each field in it."""
    if len(block) <= _SMALL_BLOCK:
        yield block
        return
    view = memoryview(block)
    begin = 0
    while begin < len(block):
        first = block[begin]
        if first & 0x80 or first & 0xE0 == 0x20:  # a field of the table; a new size of it
            strings, prefix = 0, 7 if first & 0x80 else 5
        else:
            prefix = 6 if first & 0x40 else 4
            strings = 1 if first & ((1 << prefix) - 1) else 2  # the name may be one of the table
        end = begin + decode_integer(view[begin:], prefix)[1]
        for _ in range(strings):
            length, consumed = decode_integer(view[end:], 7)
            end += consumed + length
        yield block[begin:end]
        begin = end


def _timeout(seconds: float) -> bytes:
    """Write a timeout as grpc-timeout has it: at most 8 digits and a unit."""
    for unit, in_unit in (b"u", 1e-6), (b"m", 1e-3), (b"S", 1):
        if seconds / in_unit < 10**8:
            return b"%d%s" % (max(seconds / in_unit, 1), unit)
    return b"%dH" % min(seconds / 3600, 10**8 - 1)


def _too_long_headers() -> Reply:
    return Reply("ResourceExhausted", "more than 1 MiB of header fields, where an error's text is", None)


def _no_http2(hint: str) -> Unreachable:
    return Unreachable("the peer does not speak HTTP/2", f" ({hint})")
