"""One HTTP request and its answer, in memory: no sockets, no waiting. Strict in what it takes, as a target of junk.

Every connection serves one request: an answer says `Connection: close`, and nothing of a request's body is read.
"""

import logging
import re
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BytesIO

LONGEST_HEAD = 16 * 1024  # bytes

_MALFORMED = logging.INFO - 4  # verbosity 4
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, 5.6.2
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([^\x00-\x20\x7f]+) HTTP/1\.[0-9]")
# Blanks around the value are its own: an optional part before it takes quadratic time where a line is refused.
_FIELD_LINE = re.compile(rf"({_TOKEN}):([^\x00-\x08\x0a-\x1f\x7f]*)")


@dataclass(frozen=True, slots=True)
class Response:
    """What a route answers."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


Reply = Callable[[Response], None]
"""Takes the answer, once, at any later time and from any thread."""
Route = Callable[[Reply], None]
"""Gets a GET or HEAD request's Reply; must return at once."""


class Exchange(BaseHTTPRequestHandler):
    """Parses one request's head, asks the route of its path, and hands the answer's bytes to `send`."""

    protocol_version = "HTTP/1.1"

    def __init__(self, head: bytes, routes: Mapping[str, Route], send: Callable[[bytes], None]) -> None:
        """Take the request up to its empty line (or LONGEST_HEAD bytes of it, where there is none)."""
        # Not super().__init__(): it would read from a socket and answer before it returns.
        self.rfile, self._answer = BytesIO(head), BytesIO()
        self.wfile = self._answer
        self.requestline, self.command, self.path, self.request_version = "", "", "", ""
        self.has_body = False
        """Whether the client may still be sending when the answer is out."""
        self._routes, self._send = routes, send

    def handle(self) -> None:
        """Answer, now or once the route does."""
        if not self.parse_request():
            return
        route = self._routes.get(self.path)
        if route is None:
            self.send_error(HTTPStatus.NOT_FOUND)
        elif self.command not in ("GET", "HEAD"):
            self.send_error(HTTPStatus.METHOD_NOT_ALLOWED)
        else:
            route(self.reply)

    def parse_request(self) -> bool:
        """Read the head; answer 4xx and return False where it breaks RFC 9112."""
        lines = self.rfile.read().decode("latin-1").split("\n")
        if len(lines) < 3 or lines[-2:] not in (["", ""], ["\r", ""]):
            self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {LONGEST_HEAD} bytes")
            return False
        self.requestline, *fields = (line.removesuffix("\r") for line in lines[:-2])
        request = _REQUEST_LINE.fullmatch(self.requestline)
        if request is None:
            return self._malformed("malformed request line")
        self.command, target = request.groups()
        if match := re.match("https?://[^/?#]+", target, re.IGNORECASE):
            target = target[match.end() :] or "/"
        if not target.startswith("/") and target != "*":
            return self._malformed("malformed request target")
        path = re.split("[?#]", target, maxsplit=1)[0]
        self.path = urllib.parse.unquote(path) if "%" in path else path  # loads it where that is needed
        hosts = 0
        for line in fields:
            field = _FIELD_LINE.fullmatch(line)
            if field is None:
                return self._malformed("malformed header field")
            name, value = field[1].lower(), field[2].strip(" \t")
            hosts += name == "host"
            if name == "content-length":
                if not re.fullmatch("[0-9]+", value):
                    return self._malformed("malformed Content-Length")
                self.has_body |= int(value[:9]) > 0
            self.has_body |= name in ("transfer-encoding", "expect")
        if hosts > 1 or (hosts == 0 and not self.requestline.endswith("HTTP/1.0")):
            return self._malformed("not exactly one Host")
        return True

    def _malformed(self, what: str) -> bool:
        logging.getLogger(__name__).log(
            _MALFORMED, "Malformed request", {"reason": what, "request": self.requestline}
        )
        self.has_body = True  # whatever follows is not understood either
        self.send_error(HTTPStatus.BAD_REQUEST, what)
        return False

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with an error of HTTP itself, as plain text."""
        status = HTTPStatus(code)
        self.reply(Response(status, ": ".join(filter(None, (status.phrase, message, explain))).encode()))

    def reply(self, response: Response) -> None:
        """Hand over the bytes of the answer."""
        self.send_response_only(response.status)
        self.send_header("Date", self.date_time_string())
        self.send_header("Content-Type", response.content_type)
        self.send_header("X-Content-Type-Options", "nosniff")  # the text can be a driver's
        self.send_header("Content-Length", str(len(response.body)))
        if response.status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)
        self._send(self._answer.getvalue())

    def date_time_string(self, timestamp: float | None = None) -> str:
        """Return a moment (default: now) as HTTP writes it; English, as this program sets no locale."""
        return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(timestamp))
