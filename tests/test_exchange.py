"""exchange.py: heads of requests in, bytes of answers out, read by the standard library's own HTTP client."""

from __future__ import annotations

import gzip
import io
import logging
from email.utils import parsedate_to_datetime
from http.client import HTTPResponse
from typing import TYPE_CHECKING, NamedTuple

import pytest

from livenessprobe.exchange import LONGEST_HEAD, Exchange, Response, head_of, head_size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from email.message import Message

    from livenessprobe.exchange import Reply

HOST = b"Host: x\r\n"

# What clients of other protocols begin with. They wait for an answer, and send nothing that looks like the end of a head.
NO_HTTP1: dict[str, bytes] = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "PROXY": b"PROXY TCP4 192.0.2.1 192.0.2.2 40000 9808\r\n",
    "PROXY, version 2": b"\r\n\r\n\0\r\nQUIT\n",
    "SSH": b"SSH-2.0-OpenSSH_9.2p1\r\n",
    "a line of junk": b"help me\n",
    "junk without a line": b"\x80",
    "a version that is none": b"GET /healthz HTTP/2",
}

# What a server must refuse: each with its status.
MALFORMED: dict[str, tuple[bytes, int]] = {
    "junk": (b"\xff\xfe\x00\x01\r\n\r\n", 400),
    **{name: (sent, 400) for name, sent in NO_HTTP1.items()},
    "one word": (b"GET\r\n\r\n", 400),
    "two carriage returns": (b"GET /healthz HTTP/1.1\r\r\n" + HOST + b"\r\n", 400),
    "HTTP/0.9": (b"GET /healthz\r\n\r\n", 400),
    "four words": (b"GET /healthz x HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "two spaces": (b"GET  /healthz HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "tab": (b"GET\t/healthz\tHTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "space first": (b" GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "no method": (b" /healthz HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "bad method": (b"G(ET /healthz HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "no target": (b"GET HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "relative target": (b"GET healthz HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "other scheme": (b"GET ftp://x/healthz HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "no authority": (b"GET http:///healthz HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "control character in the target": (b"GET /health\x7fz HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "NUL in the target": (b"GET /healthz\0 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "CONNECT": (b"CONNECT x:1 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "lower case protocol": (b"GET /healthz http/1.1\r\n" + HOST + b"\r\n", 400),
    "other protocol": (b"GET /healthz RTSP/1.0\r\n" + HOST + b"\r\n", 400),
    "HTTP/1": (b"GET /healthz HTTP/1\r\n" + HOST + b"\r\n", 400),
    "HTTP/1.10": (b"GET /healthz HTTP/1.10\r\n" + HOST + b"\r\n", 400),
    "HTTP/11.1": (b"GET /healthz HTTP/11.1\r\n" + HOST + b"\r\n", 400),
    "HTTP/3": (b"GET /healthz HTTP/3.0\r\n" + HOST + b"\r\n", 400),
    "HTTP/-1.1": (b"GET /healthz HTTP/-1.1\r\n" + HOST + b"\r\n", 400),
    "other digits": ("GET /healthz HTTP/1.\u0661\r\n".encode() + HOST + b"\r\n", 400),
    "protocol, then more": (b"GET /healthz HTTP/1.1 x\r\n" + HOST + b"\r\n", 400),
    "carriage return within": (b"GET /healthz HTTP/1.1\rx\r\n" + HOST + b"\r\n", 400),
    "no Host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET /healthz HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
    "two Hosts, HTTP/1.0": (b"GET /healthz HTTP/1.0\r\n" + HOST + HOST + b"\r\n", 400),
    "no colon": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"junk\r\n\r\n", 400),
    "no field name": (b"GET /healthz HTTP/1.1\r\n" + HOST + b": x\r\n\r\n", 400),
    "space before the colon": (b"GET /healthz HTTP/1.1\r\nHost : x\r\n\r\n", 400),
    "space in a field name": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"a b: c\r\n\r\n", 400),
    "folded field": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"A: b\r\n c\r\n\r\n", 400),
    "first field folded": (b"GET /healthz HTTP/1.1\r\n x: y\r\n" + HOST + b"\r\n", 400),
    "NUL in a field": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"A: \0\r\n\r\n", 400),
    "DEL in a field": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"A: \x7f\r\n\r\n", 400),
    "two carriage returns after a field": (b"GET /healthz HTTP/1.1\r\nHost: x\r\r\n\r\n", 400),
    "two carriage returns at the end": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\r\n\r\n", 400),
    "carriage return in a field": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"A: b\rC: d\r\n\r\n", 400),
    "escape in a field": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"A: \x1b[31m\r\n\r\n", 400),
    "negative length": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n", 400),
    "length and a letter": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: 5X\r\n\r\n", 400),
    "no length": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"Content-Length:\r\n\r\n", 400),
    "length and a no-break space": (b"GET / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\xa0\r\n\r\n", 400),
    "two lengths in one": (b"GET / HTTP/1.1\r\n" + HOST + b"Content-Length: 5, 5\r\n\r\n", 400),
    "other digits in a length": (b"GET / HTTP/1.1\r\n" + HOST + b"Content-Length: \xb2\r\n\r\n", 400),
    "length in words": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: one\r\n\r\n", 400),
    "long line of junk": (b"GET /healthz" + b" a" * LONGEST_HEAD + b"\r\n" + HOST + b"\r\n", 400),
    "head too long": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"A: " + b"a" * LONGEST_HEAD + b"\r\n\r\n", 431),
    "target too long": (b"GET /" + b"a" * LONGEST_HEAD + b" HTTP/1.1\r\n" + HOST + b"\r\n", 431),
    "too many fields": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"A:b\r\n" * 4000 + b"\r\n", 431),
}

# Odd, but right all the same.
FINE: dict[str, bytes] = {
    "HTTP/1.1": b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n",
    "HTTP/1.0": b"GET /healthz HTTP/1.0\r\n\r\n",
    "HTTP/1.0 with Host": b"GET /healthz HTTP/1.0\r\n" + HOST + b"\r\n",
    "HTTP/1.2": b"GET /healthz HTTP/1.2\r\n" + HOST + b"\r\n",
    "line feeds alone": b"GET /healthz HTTP/1.1\nHost: x\n\n",
    "another end of a head after it": b"GET /healthz HTTP/1.1\nHost: x\n\n\r\n\r\n",
    "mixed line ends": b"GET /healthz HTTP/1.1\r\nHost: x\n\r\n",
    "query": b"GET /healthz?verbose=1&a=/b?c HTTP/1.1\r\n" + HOST + b"\r\n",
    "empty query": b"GET /healthz? HTTP/1.1\r\n" + HOST + b"\r\n",
    "fragment": b"GET /healthz#top HTTP/1.1\r\n" + HOST + b"\r\n",
    "percent-encoding": b"GET /%68ealth%7A HTTP/1.1\r\n" + HOST + b"\r\n",
    "absolute form": b"GET http://other:80/healthz?a HTTP/1.1\r\n" + HOST + b"\r\n",
    "absolute form in capitals": b"GET HTTPS://OTHER/healthz HTTP/1.1\r\n" + HOST + b"\r\n",
    "empty Host": b"GET /healthz HTTP/1.1\r\nHost:\r\n\r\n",
    "host in capitals": b"GET /healthz HTTP/1.1\r\nHOST:x\r\n\r\n",
    "space around a value": b"GET /healthz HTTP/1.1\r\nHost:  \t x \t\r\n\r\n",
    "empty value": b"GET /healthz HTTP/1.1\r\n" + HOST + b"A:\r\n\r\n",
    "Latin-1 value": b"GET /healthz HTTP/1.1\r\n" + HOST + b"A: \xe9\r\n\r\n",
    "odd field name": b"GET /healthz HTTP/1.1\r\n" + HOST + b"!#$%&'*+.^_`|~-: x\r\n\r\n",
    "kept alive": b"GET /healthz HTTP/1.1\r\n" + HOST + b"Connection: keep-alive\r\n\r\n",
    "upgrade": b"GET /healthz HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    "expectation": b"GET /healthz HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\n\r\n",
    "length": b"GET /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\n",
    "length with zeros": b"GET /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: 0000000005 \r\n\r\n",
    "body with the head": b"GET /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nhello",
    "longest head": b"GET /healthz HTTP/1.0\r\nA: " + b"a" * (LONGEST_HEAD - 30) + b"\r\n\r\n",
}


class Answer(NamedTuple):
    status: int
    headers: Message
    body: bytes


class Memory:
    """What http.client takes for a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def read_answer(data: bytes, method: str = "GET") -> Answer:
    response = HTTPResponse(Memory(data), method=method)  # type: ignore[arg-type]
    response.begin()
    answer = Answer(response.status, response.headers, response.read())
    rest = data.partition(b"\r\n\r\n")[2]
    assert rest == answer.body, "nothing must follow the answer"
    return answer


def healthz(reply: Reply) -> None:
    reply(Response(500, b"no disk"))


def answer(request: Exchange, response: Response) -> bytes:
    """What a server sends."""
    return head_of(response) + (b"" if request.command == "HEAD" else response.body)


def exchange(head: bytes) -> tuple[Exchange, bytes]:
    replies: list[Response] = []
    exchange = Exchange(head)
    exchange.ask({"/healthz": healthz, "/b/%": healthz, "/bé": healthz}, replies.append)
    (response,) = replies
    return exchange, answer(exchange, response)


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What exchange.py logs, whatever the verbosity that other tests have set."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign,assignment]
    logger = logging.getLogger("livenessprobe.exchange")
    level = logger.level
    logger.setLevel(1)
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize("sent", FINE.values(), ids=FINE)
def test_fine(sent: bytes) -> None:
    size = head_size(sent)
    assert 0 < size <= LONGEST_HEAD
    assert not any(head_size(sent[:end]) for end in range(max(1, size - 100), size))
    status, headers, body = read_answer(exchange(sent[:size])[1])

    assert (status, body) == (500, b"no disk")
    assert headers["Content-Type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize(("sent", "expected"), MALFORMED.values(), ids=MALFORMED)
def test_malformed(sent: bytes, expected: int, logged: list[logging.LogRecord]) -> None:
    sent = sent.lstrip(b"\r\n")
    size = head_size(sent)
    assert 0 < size <= LONGEST_HEAD
    status, _, body = read_answer(exchange(sent[:size])[1])

    assert status == expected
    phrase, _, reason = body.decode().partition(": ")
    if expected == 400:
        assert (phrase, reason in REASONS) == ("Bad Request", True)
        # Verbosity 4, so that a port scan does not fill a log.
        assert [(logging.INFO - record.levelno, record.msg) for record in logged] == [
            (4, "Malformed request")
        ]
        request = sent[:size].decode("latin-1").split("\n")[0].removesuffix("\r")
        assert logged[0].args == {"reason": reason, "request": request}
    else:
        assert (phrase, reason) == ("Request Header Fields Too Large", "more than 16384 bytes")
        assert not logged


REASONS = (
    "malformed Content-Length",
    "malformed header field",
    "malformed request line",
    "malformed request target",
    "not exactly one Host",
)


@pytest.mark.parametrize("missing", [b"\r\n", b"\r\n\r\n", b"\n"])
def test_a_head_without_its_end_is_none(missing: bytes) -> None:
    head = FINE["HTTP/1.1"].removesuffix(missing)

    assert head_size(head) == 0
    assert read_answer(exchange(head)[1]).status == 431


@pytest.mark.parametrize("sent", NO_HTTP1.values(), ids=NO_HTTP1)
def test_what_cannot_become_a_request_is_known_at_once(sent: bytes) -> None:
    """As early as possible, however few bytes come at a time."""
    sent = sent.lstrip(b"\r\n")
    first = next(size for size in range(1, len(sent) + 1) if head_size(sent[:size]))

    line = sent.partition(b"\n")[0]
    assert first <= len(line) + 1
    assert head_size(sent[:first], first - 1) == first
    assert read_answer(exchange(sent[:first])[1]).status == 400


@pytest.mark.parametrize(
    "line", [b"GET /healthz?a=1 HTTP/1.1\r\n", b"!-A~ * HTTP/1.0\n", b"a http://x HTTP/1.9\n"]
)
def test_what_can_become_a_request_is_waited_for(line: bytes) -> None:
    for size in range(len(line) + 1):
        assert head_size(line[:size]) == 0
    for size in range(1, len(line) - 10):
        assert head_size(line[:size] + b"\n") == size + 1


@pytest.mark.parametrize("end", [b"\r\n\r\n", b"\n\r\n", b"\n\n"])
def test_a_head_ends_at_its_first_empty_line_wherever_it_is_cut(end: bytes) -> None:
    head = b"GET /healthz HTTP/1.0" + end
    for rest in (b"", b"hello", b"\n\n", b"\r\n\r\n"):
        for searched in range(len(head)):
            assert head_size(head + rest, searched) == len(head)


def test_the_longest_head_is_as_long_as_may_be() -> None:
    assert len(FINE["longest head"]) == LONGEST_HEAD == 16_384


def test_a_head_that_grows_too_long_is_cut_there() -> None:
    head = FINE["HTTP/1.1"].removesuffix(b"\r\n") + b"A: " + b"a" * LONGEST_HEAD

    assert head_size(head[:LONGEST_HEAD]) == 0
    assert head_size(head[: LONGEST_HEAD + 1]) == LONGEST_HEAD


def test_headers_are_exact() -> None:
    body = b"of this length in no other test, whose head would be the same one"
    sent = head_of(Response(500, body)) + body
    _, headers, _ = read_answer(sent)
    date = headers["Date"]

    assert sent.startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    assert headers.items() == [
        ("Date", date),
        ("Content-Type", "text/plain; charset=utf-8"),
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Length", "65"),
        ("Connection", "close"),
    ]
    assert parsedate_to_datetime(date).strftime("%a, %d %b %Y %H:%M:%S GMT") == date


def test_dates_are_as_http_writes_them() -> None:
    assert exchange(FINE["HTTP/1.1"])[0].date_time_string(784111777) == "Sun, 06 Nov 1994 08:49:37 GMT"


def test_head_is_get_without_the_body() -> None:
    _, get = exchange(FINE["HTTP/1.1"])
    _, head = exchange(FINE["HTTP/1.1"].replace(b"GET", b"HEAD"))

    status, headers, body = read_answer(head, "HEAD")
    assert (status, headers["Content-Length"], body) == (500, "7", b"")
    assert [name for name, _ in headers.items()] == read_answer(get).headers.keys()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "get", "BREW"])
def test_other_methods(method: str) -> None:
    status, headers, body = read_answer(exchange(f"{method} /healthz HTTP/1.0\r\n\r\n".encode())[1])

    assert (status, headers["Allow"], body) == (405, "GET, HEAD", b"Method Not Allowed")


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/healthz/",
        "/Healthz",
        "//healthz",
        "/x/../healthz",
        "*",
        "/%",
        "/%00",
        "/\xff",
        "/%ff",
        "/%c3",
        "/b%c3",
        "http://x",
        "http://x?a=/healthz",
        "http://x#/healthz",
        "http://x//healthz",
        "/?a",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_paths(method: str, target: str) -> None:
    status, headers, body = read_answer(exchange(f"{method} {target} HTTP/1.0\r\n\r\n".encode("latin-1"))[1])

    assert (status, body) == (404, b"Not Found")
    assert "Allow" not in headers


@pytest.mark.parametrize(
    "target", ["/", "/?a", "/#a", "/?#", "/#?", "http://x", "http://x?a", "http://x#a", "http://x/"]
)
def test_a_target_without_a_path_is_the_root(target: str) -> None:
    replies: list[Response] = []
    Exchange(f"GET {target} HTTP/1.0\r\n\r\n".encode()).ask({"/": healthz}, replies.append)

    assert [reply.status for reply in replies] == [500]


def test_nothing_is_known_of_a_request_that_was_not_parsed() -> None:
    """What serves it asks for both, whatever happens."""
    request = Exchange(b"junk")

    assert (request.command, request.path) == ("", "")


@pytest.mark.parametrize("path", [b"/b\xc3\xa9", b"/b%c3%a9", b"/b\xc3%A9"])
def test_paths_are_utf_8(path: bytes) -> None:
    assert read_answer(exchange(b"GET " + path + b" HTTP/1.0\r\n\r\n")[1]).status == 500


def test_a_percent_sign_in_a_path_is_encoded_once() -> None:
    assert read_answer(exchange(b"GET /b/%25 HTTP/1.0\r\n\r\n")[1]).status == 500
    assert read_answer(exchange(b"GET /b/%2525 HTTP/1.0\r\n\r\n")[1]).status == 404


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (b"", False),
        (b"Content-Length: 0\r\n", False),
        (b"A: b\r\nAccept-Encoding: gzip\r\n", False),
        (b"Content-Length: 00000000000000000000\r\n", False),
        (b"Content-Length: 1\r\n", True),
        (b"Content-Length: 05\r\n", True),
        (b"Content-Length: 0000000005\r\n", True),
        (b"Content-Length: " + b"9" * 5000 + b"\r\n", True),
        (b"Content-Length: 1\r\nContent-Length: 0\r\n", True),
        (b"Transfer-Encoding: chunked\r\n", True),
        (b"expect: 100-continue\r\n", True),
        (b"junk\r\n", True),
        (b"A: " + b"a" * LONGEST_HEAD, True),
    ],
)
def test_whether_the_client_may_still_send_is_known(fields: bytes, expected: bool) -> None:
    assert exchange(b"POST /healthz HTTP/1.0\r\n" + fields + b"\r\n")[0].may_still_send is expected


def test_answers_may_come_later() -> None:
    replies: list[Reply] = []
    responses: list[Response] = []
    request = Exchange(FINE["HTTP/1.1"])
    request.ask({"/healthz": replies.append}, responses.append)
    assert not responses

    replies[0](Response(200, b"ok", "text/x"))

    status, headers, body = read_answer(answer(request, responses[0]))
    assert (status, headers["Content-Type"], body) == (200, "text/x", b"ok")


def test_answers_of_one_kind_share_a_head() -> None:
    """Within one second: at least one of a few tries does not cross into the next."""
    assert any(head_of(Response(200, b"ok")) is head_of(Response(200, b"ko")) for _ in range(10))
    for other in (Response(500, b"ok"), Response(200, b"okay"), Response(200, b"ok", "text/x")):
        assert head_of(other) != head_of(Response(200, b"ok"))


@pytest.mark.parametrize(
    ("accepted", "packed"),
    [
        ("gzip", True),
        ("GZIP", True),
        ("deflate, gzip", True),
        ("gzip,deflate", True),
        ("\tgzip ; q=0.5, *;q=0", True),
        ("gzip;q=0.001", True),
        ("gzip;q=1", True),
        ("gzip;q=0, gzip;q=1", True),
        ("", False),
        ("gzip;q=0", False),
        ("gzip; q=0.000 , deflate", False),
        ("identity", False),
        ("*", False),
        ("xgzip", False),
        ("x-gzip", False),
        ("gzipped", False),
        ("deflate gzip", False),
    ],
)
def test_what_may_be_packed_is_for_clients_that_take_it(accepted: str, packed: bool) -> None:
    text = b"csi_liveness_up 1.0\n" * 99
    head = f"GET /metrics HTTP/1.0\r\naccept-encoding:{accepted}\r\n\r\n".encode()

    def ask(response: Response) -> Response:
        replies: list[Response] = []
        Exchange(head).ask({"/metrics": lambda reply: reply(response)}, replies.append)
        (answered,) = replies
        return answered

    _, headers, body = read_answer(answer(Exchange(head), ask(Response(200, text, "text/x", may_pack=True))))
    as_it_is = read_answer(answer(Exchange(head), ask(Response(200, text))))

    assert headers["Content-Type"] == "text/x"
    assert (headers["Content-Encoding"], headers["Vary"]) == (
        ("gzip", "Accept-Encoding") if packed else (None, None)
    )
    assert (gzip.decompress(body) if packed else body) == text
    assert not packed or len(body) < len(text) / 20
    assert (as_it_is.body, as_it_is.headers["Content-Encoding"]) == (text, None)


def test_many_clients_share_what_is_packed() -> None:
    head = b"GET /metrics HTTP/1.0\r\nAccept-Encoding: gzip\r\n\r\n"
    response = Response(200, b"csi_liveness_up 1.0\n" * 99, may_pack=True)
    replies: list[Response] = []
    for _ in range(2):
        Exchange(head).ask({"/metrics": lambda reply: reply(response)}, replies.append)

    assert replies[0].body is replies[1].body


def test_two_lines_of_encodings_count_as_one() -> None:
    head = b"GET /metrics HTTP/1.0\r\nAccept-Encoding: gzip\r\nAccept-Encoding: deflate\r\n\r\n"
    replies: list[Response] = []
    Exchange(head).ask({"/metrics": lambda reply: reply(Response(200, b"", may_pack=True))}, replies.append)

    assert replies[0].encoding == "gzip"
