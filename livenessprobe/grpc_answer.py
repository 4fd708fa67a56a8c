"""A unary gRPC answer, pure: header fields and data in, a Reply out as soon as there is one, by grpc-go's rules.

The gRPC protocol over HTTP/2 is on https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

import re
from collections.abc import Sequence

from livenessprobe.rpc import Reply, code_name

LONGEST_MESSAGE = 64 * 1024
_PREFIX_BYTES = 5  # of a message: whether it is compressed, and its length

# Any other HTTP status is Unknown.
_CODES_OF_HTTP = {
    400: "Internal",
    401: "Unauthenticated",
    403: "PermissionDenied",
    404: "Unimplemented",
    **dict.fromkeys((429, 502, 503, 504), "Unavailable"),
}
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_PSEUDO = {b":status", b":method", b":path", b":scheme", b":authority", b":protocol"}
_NOT_IN_A_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_STATUS = re.compile(rb"([+-]?)0*([0-9]{1,10})")
# Not compiled before a driver's words need it, which takes time.
_BASE64 = rb"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}(?:==)?|[A-Za-z0-9+/]{3}=?)?"
_ESCAPE = rb"%([0-9A-Fa-f]{2})"


class Answer:
    """As much of an answer as has come so far."""

    def __init__(self) -> None:
        self._began = False
        self._encoding = b""
        self._body = bytearray()
        self._size = _PREFIX_BYTES
        """What the body has once the message is complete, as far as that is known."""

    def headers(self, fields: Sequence[tuple[bytes, bytes]], *, ended: bool) -> Reply | None:
        """Take a block of header fields: interim ones, those that begin the answer, or its trailers."""
        if self._began and not ended:
            return Reply("Internal", "a HEADERS frame in the middle of the answer", None)
        if problem := _malformed(fields):
            return Reply("Internal", problem, None)
        values: dict[bytes, bytes] = {}
        is_grpc = self._began
        not_base64 = b""
        for name, value in fields:
            values[name] = value
            is_grpc = is_grpc or (name == b"content-type" and _is_grpc(value))
            if name.endswith(b"-bin") and not re.fullmatch(_BASE64, value):
                not_base64 = name
        number = _STATUS.fullmatch(values.get(b"grpc-status", b"2"))
        code = int(b"".join(number.groups())) if number else 2**31
        if not -(2**31) <= code < 2**31:
            return Reply("Unknown", f"malformed grpc-status: {_text(values[b'grpc-status'][:99])}", None)
        if not is_grpc:
            return _not_grpc(values, ended=ended)
        if not_base64:
            return Reply("Internal", f"malformed {_text(not_base64[:99])}: not base64", None)
        if not ended:
            self._began, self._encoding = True, values.get(b"grpc-encoding", b"")
            return None
        return self._result(code % 2**32, values)

    def data(self, data: bytes, *, ended: bool) -> Reply | None:
        """Take a piece of the answer's messages."""
        self._body += data
        if len(self._body) >= _PREFIX_BYTES:
            compressed, length = self._body[0], int.from_bytes(self._body[1:_PREFIX_BYTES], "big")
            if compressed:
                return Reply("Internal", f"the reply is compressed ({_text(self._encoding) or compressed}), which was not asked for", None)  # fmt: skip
            if length > LONGEST_MESSAGE:
                return Reply("ResourceExhausted", f"a reply of {length} bytes; at most {LONGEST_MESSAGE} are accepted", None)  # fmt: skip
            self._size = _PREFIX_BYTES + length
            if len(self._body) > self._size:
                return Reply("Internal", "more than one message in the reply", None)
        if ended:
            return Reply("Internal", "the peer ended its answer without trailers", None)
        return None

    def _result(self, code: int, trailers: dict[bytes, bytes]) -> Reply:
        if self._body and len(self._body) < self._size:
            return Reply("Internal", "the message in the reply was cut short", None)
        if code == 0 and not self._body:
            return Reply("Internal", "the reply has no message", None)
        if code == 0:
            return Reply("OK", "", bytes(self._body[_PREFIX_BYTES:]))
        if b"grpc-status" not in trailers and b"grpc-message" not in trailers:
            return Reply("Unknown", "the answer has no grpc-status", None)
        return Reply(code_name(code), _message(trailers), None)


def _malformed(fields: Sequence[tuple[bytes, bytes]]) -> str:
    """Say what makes header fields malformed, or nothing."""
    pseudo: list[bytes] = []
    for at, (name, value) in enumerate(fields):
        shown = _text(name[:99])
        if _NOT_IN_A_VALUE.search(value):
            return f"malformed header: a control character in {shown}"
        if name.startswith(b":"):
            if len(pseudo) < at or name in pseudo or name not in _PSEUDO:
                return f"malformed header: {shown} in the wrong place"
            pseudo.append(name)
        elif not _NAME.fullmatch(name):
            return f"malformed header: the name {shown!r}"
    if b":status" in pseudo and len(pseudo) > 1:
        return "malformed header: the fields of a request in an answer"
    return ""


def _is_grpc(content_type: bytes) -> bool:
    return content_type == b"application/grpc" or content_type.startswith(
        (b"application/grpc+", b"application/grpc;")
    )


def _not_grpc(values: dict[bytes, bytes], *, ended: bool) -> Reply | None:
    """Say what came instead of gRPC; nothing for an interim answer."""
    status, content_type = values.get(b":status"), values.get(b"content-type")
    if status is None or not re.fullmatch(rb"[+-]?[0-9]{1,9}", status):
        return Reply("Internal", f"malformed HTTP status: {status and _text(status[:99])}", None)
    if 100 <= int(status) < 200:
        if ended:
            return Reply("Internal", f"an interim answer ({int(status)}) that ends the stream", None)
        return None
    described = "no content-type" if content_type is None else f"content-type {_text(content_type[:999])}"
    if b"grpc-status" in values:  # some servers forget the content-type in an error
        described += f", grpc-status {_text(values[b'grpc-status'])}: {_message(values)}"
    return Reply(
        _CODES_OF_HTTP.get(int(status), "Unknown"),
        f"the peer's answer is not gRPC: HTTP status {int(status)}, {described}",
        None,
    )


def _message(values: dict[bytes, bytes]) -> str:
    """Decode the grpc-message, if any; a percent sign that escapes nothing stands for itself."""
    message = values.get(b"grpc-message", b"")
    unescaped, begin = bytearray(), 0
    for escape in re.finditer(_ESCAPE, message):  # one by one, to save memory
        unescaped += message[begin : escape.start()] + bytes.fromhex(escape[1].decode())
        begin = escape.end()
    return _text(bytes(unescaped) + message[begin:])


def _text(raw: bytes) -> str:
    return raw.decode(errors="surrogateescape")
