"""web.py with real sockets in this process: its limits, one by one, and what broken clients can do to it."""

from __future__ import annotations

import contextlib
import errno
import http.client
import logging
import os
import queue
import re
import resource
import select
import socket
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING

import program
import pytest
from test_exchange import FINE, MALFORMED, NO_HTTP1, read_answer

from livenessprobe import web
from livenessprobe.config import ConfigError, parse
from livenessprobe.connection import Connection, Undelivered
from livenessprobe.exchange import LONGEST_HEAD, Response
from livenessprobe.listening import Listener, listen
from livenessprobe.web import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from livenessprobe.exchange import Reply, Route

GET = FINE["HTTP/1.1"]
PATIENCE = 20.0


def ok(reply: Reply) -> None:
    reply(Response(200, b"ok"))


class Serving:
    """A server on its thread, and clients of it."""

    def __init__(self, server: Server, *listeners: Listener) -> None:
        self.server = server
        self.ports = [listener.port for listener in listeners]
        self.drain_seconds = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._clients = contextlib.ExitStack()

    def _run(self) -> None:
        self.server.run()
        self.server.drain(self.drain_seconds)
        self.server.close()

    def connect(self, sent: bytes = b"") -> socket.socket:
        """A connection over which `sent` was sent; closed at the end of the test at the latest."""
        client = socket.create_connection(("127.0.0.1", self.ports[0]), PATIENCE)
        self._clients.enter_context(client)
        client.sendall(sent)
        return client

    def connect_narrow(self, sent: bytes) -> socket.socket:
        """Like connect(), for a client whose kernel takes a few kB and no more until they are read."""
        client = self._clients.enter_context(socket.socket())
        client.settimeout(PATIENCE)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        client.connect(("127.0.0.1", self.ports[0]))
        client.sendall(sent)
        return client

    def get(self, sent: bytes = GET) -> int:
        return read_answer(read_all(self.connect(sent))).status

    def catch_up(self) -> None:
        """Waits until the server has read all that was sent to it before; see program.Probe.catch_up()."""
        for _ in range(2):
            assert self.get() == 200

    def stop(self) -> None:
        self.server.stop()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def close(self) -> None:
        """Stops, and does not wait for answers that are still to come."""
        for _ in range(2):
            self.server.stop()
        self._thread.join(PATIENCE)
        self._clients.close()
        assert not self._thread.is_alive()


def read_all(client: socket.socket) -> bytes:
    """All that comes until the server closes, even by a reset."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := client.recv(65536):
            received += data
    return received


def received_until_reset(client: socket.socket) -> int:
    """How many bytes come before the connection is reset, not closed."""
    received = 0
    try:
        while data := client.recv(65536):
            received += len(data)
    except ConnectionResetError:
        return received
    pytest.fail("it was closed")


class Clock:
    """Stands still until it is set forward: nothing that happens before is due to time passing."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@contextlib.contextmanager
def serving(
    routes: Mapping[str, Route],
    most: int = web.MOST_CONNECTIONS,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Serving]:
    """Serves the routes on a free port, with at most this many connections."""
    listener = Listener("127.0.0.1", 0, routes)
    serving = Serving(Server(listener, most=most, clock=clock), listener)
    try:
        yield serving
    finally:
        serving.close()


@pytest.fixture
def healthy() -> Iterator[Serving]:
    with serving({"/healthz": ok}, clock=Clock()) as running:
        yield running


@pytest.fixture
def errors() -> Iterator[list[tuple[str, object]]]:
    """What web.py logs as errors: the message and the values."""
    records: list[tuple[str, object]] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: records.append((record.msg, record.args))  # type: ignore[method-assign]
    logger = logging.getLogger("livenessprobe.web")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


# ---- requests


@pytest.mark.parametrize("head", FINE.values(), ids=FINE)
def test_fine(healthy: Serving, head: bytes) -> None:
    assert healthy.get(head) == 200


@pytest.mark.parametrize(("head", "status"), MALFORMED.values(), ids=MALFORMED)
def test_malformed(healthy: Serving, head: bytes, status: int) -> None:
    assert healthy.get(head) == status
    assert healthy.get() == 200


@pytest.mark.parametrize("sent", NO_HTTP1.values(), ids=NO_HTTP1)
def test_what_cannot_become_a_request_is_answered_at_once(sent: bytes) -> None:
    """Such clients send no empty line, but wait."""
    with serving({"/healthz": ok}, clock=Clock()) as running:
        assert running.get(sent) == 400
        for cut in range(1, len(sent)):
            client = running.connect(sent[:cut])
            with contextlib.suppress(ConnectionError):
                client.sendall(sent[cut:])
            assert read_answer(read_all(client)).status == 400


def test_heads_arrive_in_pieces(healthy: Serving) -> None:
    for head in (FINE["HTTP/1.1"], FINE["mixed line ends"], b"\r\n\n\r\n" + FINE["line feeds alone"]):
        client = healthy.connect()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in head:
            client.sendall(bytes([byte]))

        assert read_answer(read_all(client)).status == 200


@pytest.mark.parametrize("end", [b"\r\n\r\n", b"\n\n", b"\n\r\n"])
@pytest.mark.parametrize("at", range(1, 4))
def test_ends_of_heads_arrive_in_pieces(healthy: Serving, end: bytes, at: int) -> None:
    head = b"GET /healthz HTTP/1.0" + end
    client = healthy.connect(head[:-at])
    healthy.catch_up()
    client.sendall(head[-at:])

    assert read_answer(read_all(client)).status == 200


def test_head_of_16_kib_at_most(healthy: Serving) -> None:
    longest = FINE["longest head"]
    assert healthy.get(longest) == 200
    assert healthy.get(longest.replace(b"A: ", b"A: a")) == 431
    assert healthy.get(b"a" * (LONGEST_HEAD + 1)) == 431


def test_endless_heads_end() -> None:
    with serving({"/healthz": ok}) as running:
        client = running.connect()
        # Far more than both sides' buffers hold: the server has to end this.
        with pytest.raises(ConnectionError):
            client.sendall(b"x" * 65_536_000)
        assert read_answer(read_all(client)).status == 431


def test_half_closed_clients_get_their_answer(healthy: Serving) -> None:
    client = healthy.connect(GET)
    client.shutdown(socket.SHUT_WR)

    assert read_answer(read_all(client)).status == 200


def test_one_request_for_each_connection(healthy: Serving) -> None:
    assert healthy.get(GET * 3) == 200  # read_answer() makes sure that there is only one


def test_what_comes_while_a_request_waits_is_no_request() -> None:
    replies: queue.Queue[Reply] = queue.Queue()
    with serving({"/healthz": ok, "/later": replies.put}, clock=Clock()) as running:
        client = running.connect(b"GET /later HTTP/1.0\r\n")
        running.catch_up()  # and now it waits for more of it
        client.sendall(b"\r\n")
        reply = replies.get(timeout=PATIENCE)
        client.sendall(b"GET /later HTTP/1.0\r\n\r\n")
        running.catch_up()
        reply(Response(200, b"at last"))

        assert read_answer(read_all(client)).body == b"at last"
        assert replies.empty()


@pytest.mark.parametrize("size", [1, 1000, 50_000_000])
def test_bodies_are_not_read_and_the_answer_arrives(healthy: Serving, size: int) -> None:
    client = healthy.connect(b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size)
    answer = b""
    # Like a careful client: sends while it may, and looks for an answer meanwhile.
    left = size
    with contextlib.suppress(ConnectionError):
        while True:
            readable, writable, _ = select.select([client], [client] if left else [], [], PATIENCE)
            assert readable or writable
            if readable:
                data = client.recv(65536)
                answer += data
                if not data:
                    break
            elif writable:
                left -= client.send(b"x" * min(left, 65536))

    assert read_answer(answer).status == 405


def test_an_unread_body_does_not_reset_the_connection(healthy: Serving) -> None:
    """If it did, the answer could be lost on the way, or by systems other than Linux."""
    client = healthy.connect(b"POST / HTTP/1.0\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000)
    answer = b""
    while data := client.recv(65536):  # raises for a reset
        answer += data

    assert read_answer(answer).status == 404


def test_who_sends_all_before_reading_gets_the_answer_too() -> None:
    with serving({"/healthz": ok}) as running:
        client = running.connect()
        with contextlib.suppress(ConnectionError):  # when its time to leave is over
            client.sendall(b"POST / HTTP/1.0\r\nContent-Length: 50000000\r\n\r\n" + b"x" * 50_000_000)

        assert read_answer(read_all(client)).status == 404


def test_no_continue_is_sent_for_a_body_nobody_reads(healthy: Serving) -> None:
    client = http.client.HTTPConnection("127.0.0.1", healthy.ports[0], timeout=PATIENCE)
    client.putrequest("POST", "/healthz")
    client.putheader("Content-Length", "1000")
    client.putheader("Expect", "100-continue")
    client.endheaders()
    with client.getresponse() as response:
        assert response.status == 405
    client.close()


def test_a_defect_in_a_route_is_logged_and_answered(errors: list[tuple[str, object]]) -> None:
    def defect(reply: Reply) -> None:
        raise RuntimeError("oh")

    with serving({"/defect": defect, "/healthz": ok}) as running:
        assert running.get(b"GET /defect HTTP/1.0\r\n\r\n") == 500
        assert running.get() == 200
    assert errors == [("Cannot answer a request", {"err": "RuntimeError('oh')", "path": "/defect"})]


# ---- many, slow and vanishing clients


def reset(client: socket.socket) -> None:
    """Closes with a reset instead of an end."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
@pytest.mark.parametrize("sent", [b"", b"GET /hea", GET, b"POST / HTTP/1.0\r\nContent-Length: 9\r\n\r\n"])
def test_clients_may_leave_at_any_moment(
    healthy: Serving, leave: Callable[[socket.socket], None], sent: bytes
) -> None:
    for _ in range(100):
        leave(healthy.connect(sent))

    assert healthy.get() == 200


def wait_until(reached: Callable[[], bool]) -> None:
    """Waits for a state of the server of which nothing outside tells."""
    end = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < end


def test_those_who_left_are_forgotten_at_once() -> None:
    body = bytes(range(256)) * 100
    large = {"/large": lambda reply: reply(Response(200, body))}
    with serving({"/healthz": ok, **large}, clock=Clock()) as running:
        for leave in (socket.socket.close, reset):
            half_open = running.connect(b"GET /hea")
            assert running.get() == 200
            assert running.server._reading
            leave(half_open)
            wait_until(lambda: not running.server._reading)

        with running.connect_narrow(b"GET /large HTTP/1.0\r\n\r\n") as reading:
            assert reading.recv(1, socket.MSG_PEEK)
            assert running.get() == 200  # so the kernel has all of it, and the client not yet
            assert read_answer(read_all(reading)).body == body
        wait_until(lambda: not running.server._leaving)


@pytest.mark.parametrize("more", [b"x", b""])
def test_who_goes_on_before_it_has_the_answer_is_awaited(more: bytes) -> None:
    """Sends more, or ends its side: to close now would lose the answer, or leave it to the kernel, uncounted."""
    body = bytes(range(256)) * 100
    large = {"/large": lambda reply: reply(Response(200, body))}
    with serving({"/healthz": ok, **large}, clock=Clock()) as running:
        reading = running.connect_narrow(b"GET /large HTTP/1.0\r\n\r\n")
        assert reading.recv(1, socket.MSG_PEEK)
        assert running.get() == 200  # so the kernel has all of it, and the client not yet
        if more:
            reading.sendall(more)
        else:
            reading.shutdown(socket.SHUT_WR)
        running.catch_up()

        assert running.server._leaving
        assert read_answer(read_all(reading)).body == body


def test_an_empty_line_alone_is_taken_from_before_a_request(healthy: Serving) -> None:
    assert healthy.get(b"\r\n\nXGET /healthz HTTP/1.0\r\n\r\n") == 405


def test_a_server_leaves_no_descriptor_and_any_number_of_stops_does_not_block() -> None:
    before = os.listdir("/proc/self/fd")
    turns: list[None] = []
    listener = Listener("127.0.0.1", 0, {})
    server = Server(listener)

    def stop() -> None:
        for _ in range(100_000):
            server.stop()

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    server.run(lambda: turns.append(None))
    server.close()
    assert len(turns) == 1
    assert os.listdir("/proc/self/fd") == before


def test_while_nothing_happens_it_does_nothing() -> None:
    turns: list[None] = []
    listener = Listener("127.0.0.1", 0, {"/healthz": ok})
    server = Server(listener)
    thread = threading.Thread(target=server.run, args=(lambda: turns.append(None),), daemon=True)
    thread.start()
    with socket.create_connection(("127.0.0.1", listener.port), PATIENCE) as client:
        client.sendall(GET)
        assert read_answer(read_all(client)).status == 200
        server.wake_up.write(b"\0")
        assert not select.select([listener], [], [], 0.5)[0]
        assert len(turns) < 20
    server.stop()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    server.close()


def test_clients_may_leave_while_they_wait() -> None:
    replies: queue.Queue[Reply] = queue.Queue()
    with serving({"/healthz": ok, "/later": replies.put}) as running:
        asked = []
        for leave in (socket.socket.close, reset):
            client = running.connect(b"GET /later HTTP/1.0\r\n\r\n")
            asked.append(replies.get(timeout=PATIENCE))
            leave(client)
        for reply in asked:
            reply(Response(200, b"x" * 1_000_000))

        assert running.get() == 200


@pytest.mark.parametrize("sent", [b"", b"\r\n" * 100, b"GET /healthz HTTP/1.1\r\nHost:"])
def test_the_oldest_half_open_connection_is_evicted(sent: bytes) -> None:
    with serving({"/healthz": ok}, most=10, clock=Clock()) as running:
        clients = [running.connect(sent) for _ in range(9)]
        running.catch_up()  # whose bytes are unread would be reset
        clients.append(running.connect(sent))
        assert running.get() == 200
        assert _ended(clients) == clients[:1]

        clients += [running.connect(sent) for _ in range(5)]
        assert running.get() == 200
        assert _ended(clients) == clients[:6]
        assert [client.recv(1) for client in clients[:6]] == [b""] * 6  # ended, and not reset
        # The others can go on.
        clients[-1].sendall(GET if not sent.strip() else b"x\r\n\r\n")
        assert read_answer(read_all(clients[-1])).status == 200


def _ended(clients: list[socket.socket]) -> list[socket.socket]:
    """Those whose connection was closed; in the order given."""
    return select.select(clients, [], [], 0)[0]


def test_those_with_their_answer_are_evicted_after_those_who_have_not_asked() -> None:
    with serving({"/healthz": ok}, most=8, clock=Clock()) as running:
        leaving = []
        for _ in range(8):  # one by one: with all of them waiting, it would accept no more for a while
            leaving.append(running.connect(b"POST / HTTP/1.0\r\nContent-Length: 9\r\n\r\n"))
            assert read_answer(read_all(leaving[-1])).status == 404
        assert running.get() == 200
        assert not _may_send(leaving[0])
        half_open = running.connect()
        assert running.get() == 200
        assert _ended([half_open])
        assert all(map(_may_send, leaving[1:]))


def test_heads_together_have_a_limit() -> None:
    head = b"GET /healthz HTTP/1.0\r\nA: " + b"a" * (LONGEST_HEAD - 100)
    with serving({"/healthz": ok}) as running:
        clients = [running.connect(head) for _ in range(web.MOST_HEAD_BYTES // len(head) + 2)]
        for client in clients[:2]:
            assert read_all(client) == b""
        for client in (clients[2], clients[-1]):
            client.sendall(b"\r\n\r\n")
            assert read_answer(read_all(client)).status == 200


def test_heads_together_may_have_2_mib() -> None:
    head = b"GET /healthz HTTP/1.0\r\nA: "
    head += b"a" * (LONGEST_HEAD - len(head))
    with serving({"/healthz": ok}, clock=Clock()) as running:
        clients = [running.connect(head) for _ in range(128)]
        wait_until(lambda: running.server._head_bytes == 2 * 1024 * 1024)
        assert running.get() == 200
        assert not _ended(clients)
        running.connect(b"G")
        running.catch_up()
        assert _ended(clients) == clients[:1]


def test_the_limits_are_those_that_the_documentation_names() -> None:
    assert (web.HEAD_SECONDS, web.MOST_CONNECTIONS, LONGEST_HEAD) == (5, 2048, 16 * 1024)
    assert (web.MOST_HEAD_BYTES, web.MOST_UNDELIVERED_BYTES) == (2 * 1024 * 1024, 1024 * 1024)


def test_those_who_wait_for_an_answer_keep_their_place() -> None:
    replies: queue.Queue[Reply] = queue.Queue()
    with serving({"/healthz": ok, "/later": replies.put}, most=10) as running:
        waiting = [running.connect(b"GET /later HTTP/1.0\r\n\r\n") for _ in range(9)]
        asked = [replies.get(timeout=PATIENCE) for _ in waiting]
        for _ in range(20):
            running.connect()
        assert running.get() == 200
        for reply in asked:
            reply(Response(200, b"at last"))
        for client in waiting:
            assert read_answer(read_all(client)).body == b"at last"


# ---- bytes that go out


def test_an_answer_that_many_get_counts_once() -> None:
    """Two clients of one body are within the budget; two bodies of that size are not."""
    body = b"x" * 500_000
    bodies = {"/one": lambda: body, "/other": lambda: bytes(bytearray(body))}

    def large(path: str) -> Route:
        return lambda reply: reply(Response(200, bodies[path]()))

    with serving({path: large(path) for path in bodies} | {"/healthz": ok}, clock=Clock()) as running:
        clients = [running.connect_narrow(b"GET /one HTTP/1.0\r\n\r\n") for _ in range(2)]
        assert running.get() == 200
        for client in clients:
            assert read_answer(read_all(client)).body == body
        older = running.connect_narrow(b"GET /other HTTP/1.0\r\n\r\n")
        assert older.recv(1, socket.MSG_PEEK)
        newer = running.connect_narrow(b"GET /other HTTP/1.0\r\n\r\n")
        assert running.get() == 200
        assert received_until_reset(older) < len(body)
        assert read_answer(read_all(newer)).body == body


@pytest.mark.parametrize("ending", [False, True], ids=["reading later", "ending its side first"])
def test_answers_that_the_kernel_keeps_count_too(ending: bool) -> None:
    """It keeps them for a client that does not read, even after a close."""
    body = bytes(range(256)) * 40

    with serving(
        {"/some": lambda reply: reply(Response(200, body)), "/healthz": ok}, clock=Clock()
    ) as running:
        clients = [running.connect_narrow(b"GET /some HTTP/1.0\r\n\r\n") for _ in range(200)]
        for client in clients if ending else ():
            with contextlib.suppress(OSError):  # evicted already
                client.shutdown(socket.SHUT_WR)
        assert running.get() == 200
        whole = [answer.endswith(body) for answer in map(read_all, clients)]
        assert all(whole[-50:]), "the newest are not evicted"
        # A client's own kernel takes some of it, which is not counted.
        assert sum(whole) < 1.5 * web.MOST_UNDELIVERED_BYTES / len(body)


def test_connections_that_stay_after_their_answer_count_too() -> None:
    """For example, of clients that announced a body, and neither send it nor close."""
    most = web.MOST_UNDELIVERED_BYTES // 4096
    with serving({"/healthz": ok}, clock=Clock()) as running:
        clients = []
        for _ in range(most + 20):
            clients.append(running.connect(b"POST / HTTP/1.0\r\nContent-Length: 9\r\n\r\n"))
            assert read_answer(read_all(clients[-1])).status == 404
        assert running.get() == 200
        assert [_may_send(client) for client in clients] == [False] * 20 + [True] * most


def test_an_evicted_connection_is_asked_in_vain() -> None:
    """This happens if one event of a turn evicts the connection of the next event."""
    with (
        contextlib.closing(Listener("127.0.0.1", 0, {})) as listener,
        socket.create_connection(("127.0.0.1", listener.port)),
    ):
        listener.socket.setblocking(True)
        connection = Connection(listener.socket.accept()[0], {}, 0.0)
        connection.client.close()
        assert (connection.unread(), connection.in_kernel()) == (b"", 0)


def test_who_ends_its_side_first_gets_all_of_an_answer() -> None:
    body = bytes(range(256)) * 200
    replies: queue.Queue[Reply] = queue.Queue()
    with serving({"/later": replies.put, "/healthz": ok}, clock=Clock()) as running:
        clients = [running.connect_narrow(b"GET /later HTTP/1.0\r\n\r\n") for _ in range(2)]
        clients[0].shutdown(socket.SHUT_WR)
        for _ in clients:
            replies.get(timeout=PATIENCE)(Response(200, body))
        assert running.get() == 200
        clients[1].shutdown(socket.SHUT_WR)
        assert running.get() == 200
        for client in clients:
            assert read_answer(read_all(client)).body == body


def test_a_large_answer_to_a_route_that_took_long_arrives_whole() -> None:
    """The time to read the answer begins with the answer."""
    clock = Clock()
    replies: queue.Queue[Reply] = queue.Queue()
    body = bytes(range(256)) * 20_000
    with serving({"/later": replies.put, "/healthz": ok}, clock=clock) as running:
        client = running.connect(b"GET /later HTTP/1.0\r\n\r\n")
        reply = replies.get(timeout=PATIENCE)
        clock.now += 3600
        reply(Response(200, body))
        assert running.get() == 200
        assert read_answer(read_all(client)).body == body


def test_a_head_is_answered_without_the_body(healthy: Serving) -> None:
    assert read_answer(read_all(healthy.connect(b"HEAD /healthz HTTP/1.0\r\n\r\n")), "HEAD").body == b""


# ---- bytes that come in


def test_more_that_come_at_once_than_are_accepted_in_a_turn() -> None:
    held, release = threading.Event(), threading.Event()

    def hold(reply: Reply) -> None:
        held.set()
        assert release.wait(PATIENCE)
        ok(reply)

    with serving({"/healthz": ok, "/hold": hold}) as running:
        holding = running.connect(b"GET /hold HTTP/1.0\r\n\r\n")
        assert held.wait(PATIENCE)
        clients = [running.connect(GET) for _ in range(200)]
        release.set()
        for client in (holding, *clients):
            assert read_answer(read_all(client)).body == b"ok"


def test_when_all_wait_others_are_served_once_there_is_room() -> None:
    replies: queue.Queue[Reply] = queue.Queue()
    with serving({"/healthz": ok, "/later": replies.put}, most=8) as running:
        waiting = [running.connect(b"GET /later HTTP/1.0\r\n\r\n") for _ in range(8)]
        asked = [replies.get(timeout=PATIENCE) for _ in waiting]
        late = [running.connect(GET) for _ in range(20)]
        assert not select.select(late, [], [], 0.2)[0]
        for reply in asked:
            reply(Response(200, b"at last"))
        for client in waiting:
            assert read_answer(read_all(client)).body == b"at last"
        for client in late:
            assert read_answer(read_all(client)).status == 200


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
def test_those_who_left_while_they_waited_give_way(leave: Callable[[socket.socket], None]) -> None:
    replies: queue.Queue[Reply] = queue.Queue()
    with serving({"/healthz": ok, "/later": replies.put}, most=8) as running:
        staying = running.connect(b"GET /later HTTP/1.0\r\n\r\n")
        reply = replies.get(timeout=PATIENCE)
        for _ in range(40):
            leave(running.connect(b"GET /later HTTP/1.0\r\n\r\n"))
        assert running.get() == 200
        while not replies.empty():
            replies.get_nowait()(Response(200, b"too late"))
        assert running.get() == 200
        reply(Response(200, b"at last"))
        assert read_answer(read_all(staying)).body == b"at last"


def test_heads_may_take_5_seconds_and_clients_2_to_leave() -> None:
    clock = Clock()
    with serving({"/healthz": ok}, clock=clock) as running:
        half_open = running.connect(b"GET /healthz HTTP/1.0\r\n")
        leaving = running.connect(b"POST / HTTP/1.0\r\nContent-Length: 9\r\n\r\n")
        assert read_answer(read_all(leaving)).status == 404
        for clock.now, leaves, ends in (
            (1.99, False, False),
            (2.0, True, False),
            (4.99, True, False),
            (5.0, True, True),
        ):
            running.catch_up()  # and with that, the others have had their turn
            assert (not _may_send(leaving), bool(_ended([half_open]))) == (leaves, ends)


def test_at_least_8_connections_are_served_however_few_there_may_be() -> None:
    with serving({"/healthz": ok}, most=1, clock=Clock()) as running:
        clients = [running.connect() for _ in range(7)]
        assert running.get() == 200
        assert not _ended(clients)
        clients.append(running.connect())
        assert running.get() == 200
        assert _ended(clients) == clients[:1]


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_descriptors_are_left_for_the_rest_of_the_program(beyond: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard - 48
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
    try:
        with serving({"/healthz": ok}, most=most + beyond) as running:
            assert running.server._most == min(most, most + beyond)
            assert running.get() == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_room_it_looks_for_some_after_a_tenth_of_a_second() -> None:
    replies: queue.Queue[Reply] = queue.Queue()
    clock = Clock()
    with serving({"/healthz": ok, "/later": replies.put}, most=8, clock=clock) as running:
        waiting = [running.connect(b"GET /later HTTP/1.0\r\n\r\n") for _ in range(8)]
        asked = [replies.get(timeout=PATIENCE) for _ in waiting]
        late = running.connect(GET)
        for clock.now in (0.0, 1.0, 2.0):
            # Until it has looked in vain.
            wait_until(lambda: (running.server._accept_at or 0.0) > clock.now)
        for reply in asked:
            ok(reply)
        for client in waiting:
            assert read_answer(read_all(client)).body == b"ok"
        clock.now = 2.09
        assert not select.select([late], [], [], 0.3)[0]
        clock.now = 2.1
        assert read_answer(read_all(late)).body == b"ok"


def test_what_is_answered_between_two_turns_does_not_wait_for_an_event() -> None:
    """As when the server's own thread also checks."""
    replies: list[Reply] = []

    def answer_all() -> None:
        while replies:
            ok(replies.pop())

    listener = Listener("127.0.0.1", 0, {"/later": replies.append})
    server = Server(listener)
    thread = threading.Thread(target=server.run, args=(answer_all,), daemon=True)
    thread.start()

    def seconds() -> float:
        begin = time.monotonic()
        with socket.create_connection(("127.0.0.1", listener.port), PATIENCE) as client:
            client.sendall(b"GET /later HTTP/1.0\r\n\r\n")
            assert read_answer(read_all(client)).body == b"ok"
        return time.monotonic() - begin

    assert program.best_of(5, seconds, 0.5) < 0.5
    server.stop()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    server.close()


def test_slow_heads_are_given_up() -> None:
    with serving({"/healthz": ok}) as running:
        begin = time.monotonic()
        slow = [running.connect(sent) for sent in (b"", b"GET /healthz HTTP/1.1\r\n", b"\r\n", b"a" * 1000)]
        dribbling = running.connect(b"GET /healthz HTTP/1.0\r\nA: ")
        with contextlib.suppress(ConnectionError):
            while not select.select([dribbling], [], [], 0.1)[0]:
                assert time.monotonic() < begin + PATIENCE
                dribbling.sendall(b"a")

        for client in [*slow, dribbling]:
            assert read_all(client) == b""
        assert time.monotonic() - begin >= web.HEAD_SECONDS - 0.1
        assert running.get() == 200


def test_who_never_reads_the_answer_is_given_up() -> None:
    with serving(
        {"/healthz": ok, "/large": lambda reply: reply(Response(200, b"x" * 50_000_000))}
    ) as running:
        begin = time.monotonic()
        client = running.connect(b"GET /large HTTP/1.0\r\n\r\n")
        assert client.recv(1, socket.MSG_PEEK)
        assert running.get() == 200
        wait_until(lambda: not running.server._leaving)
        assert time.monotonic() - begin >= web.LEAVE_SECONDS - 0.1
        # Our kernel does not keep what its kernel has not received.
        assert 0 < received_until_reset(client) < 50_000_000


def test_who_never_closes_is_given_up() -> None:
    with serving({"/healthz": ok}) as running:
        begin = time.monotonic()
        client = running.connect(b"POST /healthz HTTP/1.0\r\nContent-Length: 9\r\n\r\n")
        # The answer ends at once, the connection only later.
        assert read_answer(read_all(client)).status == 405
        while _may_send(client):
            assert time.monotonic() < begin + PATIENCE
            time.sleep(0.05)
        assert time.monotonic() - begin >= web.LEAVE_SECONDS - 0.1


def _may_send(client: socket.socket) -> bool:
    try:
        for _ in range(2):  # if the server has closed, it refuses the first, and then we know
            client.sendall(b"x")
    except ConnectionError:
        return False
    return True


def test_slow_readers_get_all_of_a_large_answer() -> None:
    def large(reply: Reply) -> None:
        reply(Response(200, bytes(range(256)) * 40_000))

    with serving({"/large": large}, clock=Clock()) as running:
        client = running.connect(b"GET /large HTTP/1.0\r\n\r\n")
        assert read_answer(read_all(client)).body == bytes(range(256)) * 40_000


def test_without_descriptors_half_open_connections_are_evicted(errors: list[tuple[str, object]]) -> None:
    clock = Clock()
    with serving({"/healthz": ok}, clock=clock) as running, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", running.ports[0])
        half_open = [running.connect() for _ in range(3)]
        running.get()
        # Our ends exist already: the limit applies to the whole process.
        clients = [stack.enter_context(socket.socket()) for _ in range(3)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            for client in clients:
                client.settimeout(PATIENCE)
                client.connect(address)
                client.sendall(GET)
                # Makes room at the cost of a half-open one, and accepts at the next turn only if that helps.
                assert read_all(half_open.pop(0)) == b""
            # Nobody left to evict.
            last = stack.enter_context(contextlib.closing(clients[-1]))
            before = time.process_time()
            assert not select.select([last], [], [], 0.4)[0]
            assert time.process_time() - before < 0.2, "it tries again and again meanwhile"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        clock.now += 1
        for client in clients:
            assert read_answer(read_all(client)).status == 200
    assert errors == [
        ("Cannot accept connections", {"err": "too many open files; seen from here: ulimit -n 3"}),
    ]


class Memory:
    """A clock that runs out of memory once, when a given function asks it for the time."""

    def __init__(self) -> None:
        self.short_in = ""

    def __call__(self) -> float:
        if sys._getframe(1).f_code.co_name == self.short_in:
            self.short_in = ""
            raise MemoryError
        return 0.0


def test_out_of_memory_the_oldest_is_evicted_and_the_server_goes_on(
    errors: list[tuple[str, dict[str, str]]],
) -> None:
    memory = Memory()
    with serving({"/healthz": ok}, clock=memory) as running:
        half_open = running.connect()
        assert running.get() == 200  # by now it is accepted
        memory.short_in = "_accept"
        assert running.get() == 200
        assert read_all(half_open) == b""
    [(message, values)] = errors
    assert message == "Cannot accept connections"
    assert values["err"].startswith("out of memory; seen from here: ")


def test_what_there_was_no_memory_to_tell_is_told_the_next_time(
    errors: list[tuple[str, dict[str, str]]],
) -> None:
    memory, attempts = Memory(), list[str]()

    def short_of_memory(record: logging.LogRecord) -> bool:
        attempts.append(record.msg)
        if len(attempts) == 1:
            raise MemoryError
        return True

    logger = logging.getLogger(web.__name__)
    logger.addFilter(short_of_memory)
    try:
        with serving({"/healthz": ok}, clock=memory) as running:
            for _ in range(3):
                half_open = running.connect()
                assert running.get() == 200  # by now it is accepted
                memory.short_in = "_accept"
                assert running.get() == 200
                assert read_all(half_open) == b""
    finally:
        logger.removeFilter(short_of_memory)
    assert len(attempts) == 2
    assert [message for message, _ in errors] == ["Cannot accept connections"]


def test_out_of_memory_for_its_answer_a_connection_is_dropped(errors: list[tuple[str, object]]) -> None:
    memory = Memory()

    def short_of_memory(reply: Reply) -> None:
        memory.short_in = "_answer"
        ok(reply)

    with serving({"/healthz": short_of_memory, "/readyz": ok}, clock=memory) as running:
        client = running.connect(GET[:-2])
        assert running.get(GET.replace(b"healthz", b"readyz")) == 200  # by now the other one is accepted
        client.sendall(GET[-2:])
        assert read_all(client) == b""
        assert running.get(GET.replace(b"healthz", b"readyz")) == 200
    assert len(errors) == 1


def test_out_of_memory_with_nobody_to_evict_ends_the_server() -> None:
    ended: list[type[BaseException]] = []

    def run() -> None:
        try:
            server.run()
        except MemoryError as error:
            ended.append(type(error))

    memory = Memory()
    listener = Listener("127.0.0.1", 0, {})
    server = Server(listener, clock=memory)
    with contextlib.closing(listener), socket.create_connection(("127.0.0.1", listener.port), PATIENCE):
        memory.short_in = "_accept"
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert ended == [MemoryError]
    server.close()


def test_that_there_are_no_descriptors_is_told_once_a_minute(errors: list[tuple[str, object]]) -> None:
    clock = Clock()
    with serving({"/healthz": ok}, clock=clock) as running, socket.socket() as client:
        running.get()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            client.settimeout(PATIENCE)
            client.connect(("127.0.0.1", running.ports[0]))
            client.sendall(GET)
            for clock.now, again in ((0.0, 0.5), (59.5, 60.0), (60.0, 60.5), (119.5, 120.0), (120.0, 120.5)):
                wait_until(lambda: (running.server._accept_at or 0.0) > clock.now)
                wait_until(lambda: len(errors) > clock.now // 60)  # it pauses before it says why
                assert running.server._accept_at == again
                assert len(errors) == clock.now // 60 + 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        clock.now = 180.0
        assert read_answer(read_all(client)).status == 200


def test_a_low_soft_limit_of_descriptors_is_raised() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(web.MOST_CONNECTIONS + web._RESERVED_DESCRIPTORS, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted // 2, hard))
    try:
        for _ in range(2):
            with serving({"/healthz": ok}) as running:
                assert running.get() == 200
                assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("sent", range(9))
def test_what_was_not_sent_of_an_answer_is_its_end(sent: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(ours, {}, 0.0)
        connection.answer = (b"head", b"body")
        connection.sent = sent
        assert b"".join(connection.unsent()) == b"headbody"[sent:]


def test_a_body_counts_once_until_the_last_who_gets_it_is_done() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        one, other = (Connection(ours, {}, 0.0) for _ in range(2))
        undelivered, body = Undelivered(), bytes(1000)
        for connection, in_kernel, kept, expected in (
            (one, 10, body, 1010),
            (other, 20, body, 1030),
            (one, 5, body, 1025),
            (one, 0, b"", 1020),
            (other, 7, b"", 7),
            (other, 0, b"", 0),
        ):
            undelivered.count(connection, in_kernel, kept)
            assert undelivered.bytes == expected
        assert not undelivered._clients, "a body is remembered"


# ---- listening


def test_the_kernel_keeps_little_for_a_connection_and_not_for_long() -> None:
    with (
        contextlib.closing(Listener("127.0.0.1", 0, {})) as listener,
        socket.create_connection(("127.0.0.1", listener.port), PATIENCE),
    ):
        listener.socket.setblocking(True)
        with listener.socket.accept()[0] as client:
            # The kernel doubles what it is asked for.
            assert client.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 128 * 1024
            assert client.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * 2304
            assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 5000


def reachable(listener: Listener) -> dict[str, bool]:
    """Whether somebody listens on the port at each family's loopback address."""
    found = {}
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family) as client:
            found[host] = client.connect_ex((host, listener.port)) == 0
    return found


needs_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="IPv6 is off here")


@needs_ipv6
@pytest.mark.parametrize(
    ("host", "shown", "both"),
    [
        ("", "[::]", {"127.0.0.1": True, "::1": True}),
        ("0.0.0.0", "[::]", {"127.0.0.1": True, "::1": True}),
        ("::", "[::]", {"127.0.0.1": True, "::1": True}),
        ("127.0.0.1", "127.0.0.1", {"127.0.0.1": True, "::1": False}),
        ("localhost", "127.0.0.1", {"127.0.0.1": True, "::1": False}),
        ("::1", "[::1]", {"127.0.0.1": False, "::1": True}),
    ],
)
def test_addresses(host: str, shown: str, both: dict[str, bool]) -> None:
    with contextlib.closing(Listener(host, 0, {})) as listener:
        assert listener.address == f"{shown}:{listener.port}"
        assert reachable(listener) == both


def test_the_port_asked_for() -> None:
    port = program.free_port()
    with contextlib.closing(Listener("127.0.0.1", port, {})) as listener:
        assert listener.port == port
        descriptors = os.listdir("/proc/self/fd")
        for host in ("127.0.0.1", ""):
            with pytest.raises(OSError, match="in use") as caught:
                Listener(host, port, {})
            assert caught.value.errno == errno.EADDRINUSE
            assert os.listdir("/proc/self/fd") == descriptors


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--http-endpoint=127.0.0.1:0"], ["127.0.0.1"]),
        (["--health-port=0", "--metrics-address=127.0.0.2:0"], ["[::]", "127.0.0.2"]),
        (["--health-port=0"], ["[::]"]),
    ],
)
@needs_ipv6
def test_listening_where_the_flags_say(arguments: list[str], shown: list[str]) -> None:
    before = time.monotonic()
    listeners = listen(parse(arguments))
    after = time.monotonic()
    addresses = [listener.address.rpartition(":")[0] for listener in listeners]
    for listener in listeners:
        listener.close()

    assert addresses == shown
    assert all(before <= listener.since <= after for listener in listeners)


def test_where_it_cannot_listen_the_flag_is_named() -> None:
    with contextlib.closing(Listener("127.0.0.1", 0, {})) as taken:
        for value, reason in (
            (f"127.0.0.1:{taken.port}", "cannot listen: address already in use"),
            ("livenessprobe.invalid:0", "cannot resolve the host: name or service not known"),
            (f"{'x' * 64}.invalid:0", "cannot listen: .*label.*"),
        ):
            with pytest.raises(ConfigError) as refused:
                listen(parse([f"--http-endpoint={value}"]))
            assert (refused.value.flag, refused.value.value) == ("http-endpoint", value)
            assert re.fullmatch(reason, refused.value.reason)


@needs_ipv6
def test_a_port_in_use_in_one_family_is_in_use() -> None:
    """Otherwise half of a probe's clients would find somebody else."""
    with (
        socket.create_server(("::1", 0), family=socket.AF_INET6) as taken,
        pytest.raises(OSError, match="in use"),
    ):
        Listener("", taken.getsockname()[1], {})


def test_a_port_is_free_again_at_once() -> None:
    with serving({"/healthz": ok}) as running:
        assert running.get() == 200
    Listener("127.0.0.1", running.ports[0], {}).close()


@pytest.mark.parametrize(
    ("host", "error"), [("192.0.2.1", errno.EADDRNOTAVAIL), ("livenessprobe.invalid", socket.EAI_NONAME)]
)
def test_addresses_that_are_not_ours(host: str, error: int) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its number says which
        Listener(host, 0, {})
    assert caught.value.errno == error


def test_several_listeners_have_routes_of_their_own() -> None:
    listeners = [Listener("127.0.0.1", 0, {path: ok}) for path in ("/a", "/b")]
    running = Serving(Server(*listeners), *listeners)
    statuses = {}
    for port in running.ports:
        for path in ("/a", "/b"):
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            client.request("GET", path)
            with client.getresponse() as response:
                statuses[running.ports.index(port), path] = response.status
            client.close()
    running.close()

    assert statuses == {(0, "/a"): 200, (0, "/b"): 404, (1, "/a"): 404, (1, "/b"): 200}


# ---- stopping


def test_stop_drops_who_has_not_asked_and_answers_who_has() -> None:
    replies: queue.Queue[Reply] = queue.Queue()
    with serving({"/later": replies.put}, clock=Clock()) as running:
        running.drain_seconds = PATIENCE
        silent, half_open = running.connect(), running.connect(b"GET /later")
        waiting = running.connect(b"GET /later HTTP/1.0\r\n\r\n")
        reply = replies.get(timeout=PATIENCE)
        running.server.stop()
        for client in (silent, half_open):
            assert read_all(client) == b""
        with socket.socket() as late:
            assert late.connect_ex(("127.0.0.1", running.ports[0])) == errno.ECONNREFUSED
        reply(Response(200, b"at last"))
        assert read_answer(read_all(waiting)).body == b"at last"
        running.stop()  # which waits for the thread


def test_stop_answers_whose_request_has_come_by_then() -> None:
    """Even if none of it was read."""

    def stop(reply: Reply) -> None:
        accepted.sendall(b"GET /ok HTTP/1.0\r\n\r\n")
        queued.append(running.connect(b"GET /ok HTTP/1.0\r\n\r\n"))
        running.server.stop()
        reply(Response(200, b"stopping"))

    queued: list[socket.socket] = []
    with serving({"/ok": ok, "/stop": stop}) as running:
        running.drain_seconds = PATIENCE
        accepted = running.connect()
        assert running.get(b"GET /ok HTTP/1.0\r\n\r\n") == 200
        assert running.get(b"GET /stop HTTP/1.0\r\n\r\n") == 200
        for client in (accepted, *queued):
            assert read_answer(read_all(client)).body == b"ok"


@pytest.mark.parametrize("attempt", range(3))  # on a busy machine the server may accept again before it stops
def test_stop_while_there_is_no_room_answers_who_waits(attempt: int) -> None:
    replies: queue.Queue[Reply] = queue.Queue()
    with serving({"/later": replies.put}, most=8) as running:
        running.drain_seconds = PATIENCE
        clients = [running.connect(b"GET /later HTTP/1.0\r\n\r\n") for _ in range(8)]
        asked = [replies.get(timeout=PATIENCE) for _ in clients]
        running.connect(b"GET /later HTTP/1.0\r\n\r\n")
        wait_until(lambda: not running.server._accepting)
        running.server.stop()
        # The first to ask is not the first to have connected.
        for reply in asked:
            ok(reply)
        for client in clients:
            assert read_answer(read_all(client)).body == b"ok"


def test_draining_ends_in_time_and_drops_who_still_waits() -> None:
    asked = threading.Event()

    with serving({"/never": lambda reply: asked.set()}) as running:
        running.drain_seconds = 0.1
        waiting = running.connect(b"GET /never HTTP/1.0\r\n\r\n")
        assert asked.wait(PATIENCE)
        running.stop()
        assert read_all(waiting) == b""


def test_a_second_stop_ends_draining() -> None:
    asked = threading.Event()

    with serving({"/never": lambda reply: asked.set()}) as running:
        running.drain_seconds = 1000.0
        waiting = running.connect(b"GET /never HTTP/1.0\r\n\r\n")
        assert asked.wait(PATIENCE)
        running.server.stop()
        running.stop()
        assert read_all(waiting) == b""


def test_answers_and_stops_after_the_end_are_lost_quietly() -> None:
    replies: queue.Queue[Reply] = queue.Queue()
    with serving({"/later": replies.put}) as running:
        client = running.connect(b"GET /later HTTP/1.0\r\n\r\n")
        reply = replies.get(timeout=PATIENCE)
        running.stop()
        assert read_all(client) == b""
    reply(Response(200, b"too late"))
    running.server.stop()
