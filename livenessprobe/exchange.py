"""One HTTP request and its answer, as values: no sockets, no waiting. Strict in what it takes, since it gets a lot of junk.

Every connection serves one request: an answer says `Connection: close`, and nothing of a request's body is read.
"""

import logging
import re
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial, reduce
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from typing import NamedTuple

LONGEST_HEAD = 16 * 1024  # bytes

_MALFORMED = logging.INFO - 4  # verbosity 4
_END_OF_HEAD = re.compile(rb"\n\r?\n")
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, 5.6.2
_TARGET = r"[^\x00-\x20\x7f]+"
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ({_TARGET}) HTTP/1\.[0-9]")
_VERSION_PIECES = (*"HTTP/1", r"\.", "[0-9]", r"\r")
_VERSION_BEGUN = reduce(lambda rest, piece: f"(?:{piece}{rest})?", reversed(_VERSION_PIECES), "")
# Not compiled before a request comes in pieces: that takes time.
_REQUEST_LINE_BEGUN = rf"(?:{_TOKEN}(?: (?:{_TARGET}(?: {_VERSION_BEGUN})?)?)?)?"
# Spaces around the value are part of it: an optional part before it would take quadratic time to refuse a line.
_FIELD_LINE = re.compile(rf"({_TOKEN}):([^\x00-\x08\x0a-\x1f\x7f]*)")
# RFC 9110, 12.5.3. Not compiled before a client has such a field, as above.
_TAKES_GZIP = r"(?:^|,)[ \t]*gzip[ \t]*(?:$|,|;[ \t]*q=(?!0(?:\.0*)?[ \t]*(?:$|,)))"
# Gzip (16) with a window of 2 KiB (11 bits) packs the metrics as well as 32 KiB would, in 16 KiB of memory instead of 256.
_WINDOW, _MEMORY = 27, 4


class Response(NamedTuple):
    """What a route answers."""

    status: int
    body: bytes
    """Sent as it is, never copied: routes that give many clients the same bytes object hold it once."""
    content_type: str = "text/plain; charset=utf-8"
    may_pack: bool = False
    """Whether clients that take gzip get it packed."""
    encoding: str = ""
    """How the body is packed, if it is."""


Reply = Callable[[Response], None]
"""Takes the answer, once, at any later time and from any thread."""
Route = Callable[[Reply], None]
"""Gets a GET or HEAD request's Reply; must return at once."""


def head_size(received: bytes, searched: int = 0) -> int:
    """Return how much of what a client sent is the head to answer, 0 while more of it has to come.

    That is everything up to its empty line; LONGEST_HEAD if none comes; what there is if it cannot become a request.
    searched is how much of it was there at the last look.
    """
    if end := _END_OF_HEAD.search(received, max(0, searched - 2)):
        return min(end.end(), LONGEST_HEAD)
    if len(received) > LONGEST_HEAD:
        return LONGEST_HEAD
    return 0 if _begins_request(received.decode("latin-1")) else len(received)


def head_of(response: Response) -> bytes:
    """Return the head of an answer, from the status line to the empty line; the same bytes object for a while."""
    length = len(response.body)
    return _head(response.status, response.content_type, response.encoding, length, int(time.time()))


class Exchange(BaseHTTPRequestHandler):
    """Parses one request's head, and has the route of its path answer."""

    protocol_version = "HTTP/1.1"

    def __init__(self, head: bytes) -> None:
        """Take as much of a request as head_size() says."""
        # Not super().__init__(): it would read from a socket and answer before it returns.
        self._head = head
        self.command, self.path, self.request_version = "", "", ""
        self.may_still_send = False
        """Whether more can come from the client though its head is complete: closing at once could lose the answer."""
        self._takes_gzip = False

    def ask(self, routes: Mapping[str, Route], reply: Reply) -> None:
        """Have the route answer, now or later; anything without a route gets its error now."""
        self._reply = reply
        if not self.parse_request():
            return
        route = routes.get(self.path)
        if route is None:
            self.send_error(HTTPStatus.NOT_FOUND)
        elif self.command not in ("GET", "HEAD"):
            self.send_error(HTTPStatus.METHOD_NOT_ALLOWED)
        else:
            route(partial(_reply_packed, reply) if self._takes_gzip else reply)

    def parse_request(self) -> bool:
        """Read the head; answer 4xx and return False if it breaks RFC 9112."""
        head = self._head.decode("latin-1")
        lines = head.split("\n")
        self.requestline, *fields = (line.removesuffix("\r") for line in lines[:-2] or lines)
        request = _REQUEST_LINE.fullmatch(self.requestline)
        if request is None and not (len(lines) == 1 and _begins_request(head)):
            return self._malformed("malformed request line")
        if request is None or len(lines) < 3 or lines[-2:] not in (["", ""], ["\r", ""]):
            self.may_still_send = True
            self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {LONGEST_HEAD} bytes")
            return False
        self.command, target = request.groups()
        self.path = _path(target)
        if not self.path:
            return self._malformed("malformed request target")
        return self._parse_fields(fields)

    def _parse_fields(self, fields: Sequence[str]) -> bool:
        hosts = 0
        for line in fields:
            field = _FIELD_LINE.fullmatch(line)
            if field is None:
                return self._malformed("malformed header field")
            name = field[1].lower()
            if name == "host":
                hosts += 1
            elif name == "content-length":
                length = field[2].strip(" \t")
                if not re.fullmatch("[0-9]+", length):
                    return self._malformed("malformed Content-Length")
                self.may_still_send |= length.strip("0") != ""
            elif name == "accept-encoding":
                self._takes_gzip |= re.search(_TAKES_GZIP, field[2], re.IGNORECASE) is not None
            elif name in ("transfer-encoding", "expect"):
                self.may_still_send = True
        if hosts > 1 or (hosts == 0 and not self.requestline.endswith("HTTP/1.0")):
            return self._malformed("not exactly one Host")
        return True

    def _malformed(self, what: str) -> bool:
        logging.getLogger(__name__).log(
            _MALFORMED, "Malformed request", {"reason": what, "request": self.requestline}
        )
        self.may_still_send = True  # nor is whatever follows understood
        self.send_error(HTTPStatus.BAD_REQUEST, what)
        return False

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with an error of HTTP itself, as plain text."""
        status = HTTPStatus(code)
        self._reply(Response(status, ": ".join(filter(None, (status.phrase, message, explain))).encode()))

    def date_time_string(self, timestamp: float | None = None) -> str:
        """Return a moment (default: now) as HTTP writes it; English, as this program sets no locale."""
        return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(timestamp))


def _path(target: str) -> str:
    """Return a request target's path, decoded; empty if there is none."""
    if match := re.match("https?://[^/?#]+", target, re.IGNORECASE):
        target = target[match.end() :]
        target = target if target.startswith("/") else "/" + target
    if not target.startswith("/") and target != "*":
        return ""
    path = target.partition("?")[0].partition("#")[0]
    if "%" in path or not path.isascii():  # loads urllib.parse if that is needed
        return urllib.parse.unquote_to_bytes(path.encode("latin-1")).decode(errors="surrogateescape")
    return path


def _begins_request(text: str) -> bool:
    """Tell whether text can be the beginning of a request, as far as its first line says."""
    line, complete, _ = text.partition("\n")
    if complete:
        return _REQUEST_LINE.fullmatch(line.removesuffix("\r")) is not None
    return re.fullmatch(_REQUEST_LINE_BEGUN, line) is not None


def _reply_packed(reply: Reply, response: Response) -> None:
    if response.may_pack:
        response = response._replace(body=_packed(response.body), encoding="gzip")
    reply(response)


@lru_cache(maxsize=1)
def _packed(body: bytes) -> bytes:
    """Pack a body by gzip, once for all who get it."""
    from zlib import compressobj  # not the module gzip, which imports many others

    packer = compressobj(wbits=_WINDOW, memLevel=_MEMORY)
    return packer.compress(body) + packer.flush()


@lru_cache(maxsize=8)
def _head(status: int, content_type: str, encoding: str, length: int, second: int) -> bytes:
    """Write the head of an answer; most answers within a second have the same one."""
    writer, written = Exchange(b""), BytesIO()
    writer.wfile = written
    writer.send_response_only(status)
    writer.send_header("Date", writer.date_time_string(second))
    writer.send_header("Content-Type", content_type)
    writer.send_header("X-Content-Type-Options", "nosniff")  # the text can be a driver's
    writer.send_header("Content-Length", str(length))
    if encoding:
        writer.send_header("Content-Encoding", encoding)
        writer.send_header("Vary", "Accept-Encoding")
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        writer.send_header("Allow", "GET, HEAD")
    writer.send_header("Connection", "close")
    writer.end_headers()
    return written.getvalue()
