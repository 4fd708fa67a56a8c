"""The frames of HTTP/2 (RFC 9113) as a client reads them, pure: bytes in, frames and header fields out, all bounded.

What breaks HTTP/2, and whether that ends the stream or the connection, is judged as grpc-go's framer judges it.
Header compression is left to the library hpack.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from hpack.exceptions import HPACKError, OversizedHeaderListError
from hpack.hpack import Decoder, decode_integer

END_STREAM = ACK = 0x01
_END_HEADERS, _PADDED, _PRIORITY = 0x04, 0x08, 0x20
_HEADER = struct.Struct(">HBBBL")
LONGEST_FRAME = 16384  # the most a peer may send unless it is allowed more

# More than any answer: a frame for each byte of the longest message, and some.
_MOST_FRAMES = 70_000
_MOST_BYTES = 8 * 1024 * 1024
# Of header fields: an error text of 1 MiB, and what stands beside it.
_MOST_FIELD_BYTES = 1024 * 1024 + 64 * 1024
_FIELD_OVERHEAD = 32  # RFC 9113, 6.5.2
_TOO_MANY_FIELDS = "more than 1 MiB of header fields, which hold an error's text too"
_SMALL_BLOCK = 4096


class Kind:
    """The frames that matter here; others, including extensions', are passed over."""

    DATA = 0
    HEADERS = 1
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Frame(NamedTuple):
    """One frame; HEADERS has a whole block, its CONTINUATION included, and like DATA no padding."""

    kind: int
    flags: int
    stream: int
    payload: bytes
    size: int
    """Of the payload, with padding: what counts for the windows."""


class Broken(Exception):
    """The peer broke HTTP/2, which ends a stream, or for 0 the connection."""

    def __init__(self, how: str, stream: int = 0) -> None:
        super().__init__(how)
        self.stream = stream


class TooMuch(Exception):
    """The peer sends more than is accepted."""


def expect(fact: bool, otherwise: str, stream: int = 0) -> None:
    """Raise Broken unless something is as it must be."""
    if not fact:
        raise Broken(otherwise, stream)


def written(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    """Write a frame."""
    return _HEADER.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def written_headers(block: bytes, stream: int) -> bytes:
    """Write a block of header fields that is followed by data."""
    return written(Kind.HEADERS, block, _END_HEADERS, stream)


class Frames:
    """Reads frames from the pieces in which they come."""

    def __init__(self) -> None:
        self.bytes = 0
        """How many came."""
        self.first = b""
        """The bytes that are, or should be, the first frame's header."""
        self._frames = 0
        self._buffer = bytearray()
        self._begun: Frame | None = None
        """HEADERS whose block goes on."""
        self._block: bytearray
        """What has come of it."""

    def add(self, data: bytes) -> None:
        """Take bytes from the peer."""
        self.bytes += len(data)
        self.first += data[: _HEADER.size - len(self.first)]
        self._buffer += data

    def next(self) -> Frame | None:
        """Return the next frame, once there is one. Raises Broken, TooMuch."""
        while (frame := self._read()) is not None:
            self._frames += 1
            if self._frames > _MOST_FRAMES or self.bytes > _MOST_BYTES:
                raise TooMuch("the peer sends too much that is not an answer")
            if self._begun is None and frame.kind != Kind.CONTINUATION:
                frame = _unpadded(frame)
                if frame.kind != Kind.HEADERS or frame.flags & _END_HEADERS:
                    return frame
                self._begun, self._block = frame, bytearray(frame.payload)
            elif whole := self._continue(frame):
                return whole
        return None

    def _continue(self, frame: Frame) -> Frame | None:
        """Take the next piece of a header block; return it in HEADERS once it is whole."""
        begun = self._begun
        if begun is None or (frame.kind, frame.stream) != (Kind.CONTINUATION, begun.stream):
            raise Broken("a header block that was not continued, or never begun")
        self._block += frame.payload
        if len(self._block) > _MOST_FIELD_BYTES:
            raise TooMuch(_TOO_MANY_FIELDS)
        if not frame.flags & _END_HEADERS:
            return None
        self._begun = None
        return begun._replace(payload=bytes(self._block))

    def _read(self) -> Frame | None:
        if len(self._buffer) < _HEADER.size:
            return None
        high, low, kind, flags, stream = _HEADER.unpack_from(self._buffer)
        size = high << 8 | low
        expect(self._frames > 0 or kind == Kind.SETTINGS, "its first frame is not SETTINGS")
        expect(size <= LONGEST_FRAME, "a frame of more than 16 KiB")
        end = _HEADER.size + size
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[_HEADER.size : end])
        del self._buffer[:end]
        return Frame(kind, flags, stream & 0x7FFFFFFF, payload, size)


def _unpadded(frame: Frame) -> Frame:
    """Take padding, and a priority, which nobody uses, from a frame that may have them."""
    if frame.kind not in (Kind.DATA, Kind.HEADERS):
        return frame
    expect(frame.stream != 0, "a frame on no stream")
    payload, padding, is_headers = frame.payload, 0, frame.kind == Kind.HEADERS
    if frame.flags & _PADDED:
        expect(payload != b"", "a frame too short for its padding")
        padding, payload = payload[0], payload[1:]
    if is_headers and frame.flags & _PRIORITY:
        expect(len(payload) >= 5, "a frame too short for its priority")
        payload = payload[5:]
    expect(padding <= len(payload), "more padding than frame", frame.stream if is_headers else 0)
    return frame._replace(payload=payload[: len(payload) - padding])


class HeaderFields:
    """Reads the header fields of one connection."""

    def __init__(self) -> None:
        self._decoder = Decoder()
        self._left = _MOST_FIELD_BYTES
        """Of all blocks together."""

    def read(self, block: bytes) -> list[tuple[bytes, bytes]]:
        """Decode a block. Raises Broken, TooMuch."""
        fields: list[tuple[bytes, bytes]] = []
        self._left -= _FIELD_OVERHEAD  # an empty block costs time, too
        try:
            for piece in _pieces(block):
                self._decoder.max_header_list_size = self._left
                for name, value in self._decoder.decode(piece, raw=True):
                    self._left -= len(name) + len(value) + _FIELD_OVERHEAD
                    fields.append((name, value))
        except OversizedHeaderListError:
            raise TooMuch(_TOO_MANY_FIELDS) from None
        except HPACKError:  # whose words may differ each time
            raise Broken("header fields that cannot be decoded") from None
        if self._left < 0:
            raise TooMuch(_TOO_MANY_FIELDS)
        return fields


def _pieces(block: bytes) -> Iterator[bytes]:
    """Cut a long header block into its fields: for each field, hpack copies all that follows it.

    From a short one, only new sizes of the table are cut: an answer has two at most, and a flood of them costs much.
    """
    view, begin, sizes = memoryview(block), 0, 0
    while begin < len(block):
        first = block[begin]
        is_size = first & 0xE0 == 0x20
        if not is_size and len(block) <= _SMALL_BLOCK:
            yield block[begin:]
            return
        sizes += is_size
        expect(sizes <= 2, "more than two new sizes of the table of header fields")
        if first & 0x80:  # a field of the table
            prefix, strings = 7, 0
        elif is_size:
            prefix, strings = 5, 0
        else:
            prefix = 6 if first & 0x40 else 4
            strings = 1 if first & ((1 << prefix) - 1) else 2  # a name of the table, or one of its own
        end = begin + decode_integer(view[begin:], prefix)[1]
        for _ in range(strings):
            length, consumed = decode_integer(view[end:], 7)
            end += consumed + length
        yield block[begin:end]
        begin = end
