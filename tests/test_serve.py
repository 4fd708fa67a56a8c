"""The program serving, as its users see it: a real process, a real driver, HTTP and signals."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peers
import program
import pytest
from denying import denying
from fake_driver import CODES, FakeDriver
from test_exchange import FINE, MALFORMED, NO_HTTP1, read_answer

from livenessprobe import __version__, config
from livenessprobe.serve import run_or_end

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conftest import ProbeFactory
    from fake_driver import Behaviour

GET = FINE["HTTP/1.1"]
MALICE = 'a\nE1123 03:29:05.528510 9037 x.py:1] "forged"\r\x1b[31m\u2028\u202e\0"\\ ü'
PRINTABLE = r'a\nE1123 03:29:05.528510 9037 x.py:1] "forged"\r\x1b[31m\u2028\u202e\x00"\ ü'

NO_ANSWER = "rpc error: code = DeadlineExceeded desc = no answer to /csi.v1.Identity/Probe in time"


def statuses(probe: program.Probe) -> list[int]:
    return [probe.get(path).status for path in ("/healthz", "/readyz", "/livez")]


# ---- verdicts


@program.BOTH
def test_each_path_for_each_outcome(
    driver: FakeDriver, probe_factory: ProbeFactory, socket_path: Path
) -> None:
    flags = [f"--csi-address={socket_path}", "--http-endpoint=127.0.0.1:0", "--connection-timeout=500ms"]
    patient, hasty = (probe_factory(*flags, f"--probe-timeout={timeout}") for timeout in ("20s", "500ms"))
    cases: list[tuple[Behaviour, str, list[int]]] = [
        ("unset", "ok", [200, 200, 200]),
        ("ready", "ok", [200, 200, 200]),
        ("not-ready", "driver responded but is not ready", [500, 500, 200]),
        ("error", "rpc error: code = FailedPrecondition desc = no disk", [500, 500, 500]),
        ("hang", NO_ANSWER, [500, 500, 500]),
        ("slow", "ok", [200, 200, 200]),
    ]
    for behaviour, text, expected in cases:
        driver.set(behaviour, code="FAILED_PRECONDITION", message="no disk", after=0.05)
        probe = hasty if behaviour == "hang" else patient
        for path, status in zip(("/healthz", "/readyz", "/livez"), expected, strict=True):
            answer = probe.get(path)
            assert (answer.status, answer.text) == (status, text)
            assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
            assert answer.headers["Content-Length"] == str(len(text))
            assert answer.headers["Connection"] == "close"
            head = probe.get(path, "HEAD")
            assert (head.status, head.body) == (status, b"")
            assert head.headers["Content-Length"] == str(len(text))

    driver.stop()
    assert statuses(patient) == [500] * 3
    assert patient.get().text == f"cannot connect to {driver.target}: no such file or directory"


@pytest.mark.parametrize("path", ["/healthz", "/livez", "/readyz", "/metrics", "/statusz", "/flagz"])
def test_paths_take_get_and_head_alone(driver: FakeDriver, probe: program.Probe, path: str) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
        answer = probe.get(path, method)
        assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
    assert probe.get(path + "?verbose=1").status == 200
    assert probe.get(path + "/").status == 404
    assert probe.get(path.upper()).status == 404
    # None of the refused requests caused a check.
    assert driver.seen().probes == (path.endswith(("healthz", "livez", "readyz")))


def _fields(page: str) -> dict[str, str]:
    """What a page for people says, by the label before the colon."""
    return {
        name: value for name, colon, value in (line.partition(": ") for line in page.splitlines()) if colon
    }


@program.BOTH
def test_statusz_tells_what_the_answers_and_the_log_tell(driver: FakeDriver, probe: program.Probe) -> None:
    probe.wait_for_log("Learnt the CSI driver's name")
    before = _fields(probe.get("/statusz").text)
    assert before["Driver address"] == driver.target
    assert before["Driver name"] == "fake.csi.k8s.io"
    assert before["Paths"] == "/healthz /livez /readyz /statusz /flagz /metrics"
    assert before["Last verdict"].startswith("none yet")
    assert driver.seen().probes == 0

    texts = ["ok"]
    assert probe.get().text == "ok"
    for message in ("no disk", "no net"):
        driver.set("error", message=message)
        texts += [probe.get().text for _ in range(2)][:1]
    answer = probe.get("/statusz")
    page = _fields(answer.text)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert page["Binary version"] == __version__
    assert re.fullmatch(r"[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d UTC \d{4}", page["Started"])
    assert page["Last verdict"] == f"failed: {texts[-1]}"
    assert re.search(r", \d hr \d\d min \d\d sec ago, took \d\.\d{3} s$", page["Last check"])
    changes = answer.text.partition("Last changes, the newest first:\n")[2].splitlines()
    assert [line.partition("  ")[2].partition(": ")[2] for line in changes] == texts[::-1]
    # As many changes as in the log, whose lines may come later than the answer.
    probe.wait_for_log('"CSI driver is not healthy".*no net')
    log = [line for line in probe.log_lines if '"CSI driver is ' in line]
    assert len(log) == len(changes)
    # Even within the same second, it has what the answer had.
    driver.set("unset")
    assert probe.get().text == "ok"
    assert _fields(probe.get("/statusz").text)["Last verdict"] == "healthy: ok"
    assert driver.seen().probes == 6


@program.BOTH
def test_flagz_lists_every_flag_with_its_value(probe: program.Probe, socket_path: Path) -> None:
    flags = dict(line.split("=", 1) for line in probe.get("/flagz").text.splitlines() if "=" in line)

    assert flags.keys() == {flag.name for flag in config.FLAGS}
    assert list(flags) == sorted(flags)
    assert flags["csi-address"] == str(socket_path)
    assert flags["probe-timeout"] == "3s"
    assert flags["statusz"] == "true"


@program.BOTH
def test_pages_for_people_can_be_turned_off(probe_factory: ProbeFactory) -> None:
    probe = probe_factory("--csi-address=/nowhere", "--http-endpoint=127.0.0.1:0", "--statusz=false")
    for path in ("/statusz", "/flagz"):
        assert probe.get(path).status == 404
    assert "statusz" not in probe.log_lines[0]


def test_pages_for_people_are_where_health_is(probe_factory: ProbeFactory) -> None:
    probe = probe_factory(
        "--csi-address=/nowhere", "--health-port=0", "--metrics-address=127.0.0.1:0", listeners=2
    )
    assert [[probe.get(path, listener=n).status for path in ("/statusz", "/flagz")] for n in (0, 1)] == [
        [200, 200],
        [404, 404],
    ]
    assert _fields(probe.get("/statusz").text)["Paths"] == "/healthz /livez /readyz /statusz /flagz"


def test_foreign_text_arrives_printable_and_short(driver: FakeDriver, probe: program.Probe) -> None:
    driver.set("error", message=MALICE)
    assert probe.get().text == f"rpc error: code = Internal desc = {PRINTABLE}"
    line = probe.wait_for_log("CSI driver is not healthy").string
    assert line.endswith(f'err="rpc error: code = Internal desc = {MALICE_QUOTED}"')

    driver.set("error", message="x" * 900_000)
    answer = probe.get()
    assert len(answer.body) <= 4096
    assert answer.text.endswith("... (cut, 900034 bytes in all)")
    assert len(probe.wait_for_log("xxxx").string) < 5000
    assert len(probe.log_lines) <= 4  # serving, the name, and two failures


MALICE_QUOTED = PRINTABLE.replace('"', r"\"").replace("\\ ü", "\\\\ ü")


@pytest.mark.parametrize("peer", ["forbidden", "forbidden_folder"])
def test_forbidden_socket(probe_factory: ProbeFactory, socket_path: Path, peer: str) -> None:
    user = program.unprivileged()
    args = [f"--csi-address={socket_path}", "--http-endpoint=127.0.0.1:0", "--probe-timeout=30s"]
    with getattr(peers, peer)(socket_path):
        probe = probe_factory(*args, user=user)
        for _ in range(2):
            answer = probe.get()
            assert answer.status == 500
            assert answer.text.startswith(
                f"cannot connect to {socket_path}: permission denied (this program is uid "
                f"{os.geteuid() if user is None else user}, "
            )
            assert "SELinux" in answer.text
            assert answer.seconds < 15


# ---- time


@pytest.mark.parametrize(
    "trouble", ["missing", "stale", "full queue", "silent", "hang", "stopped", "descriptors"]
)
def test_the_answer_is_out_before_the_probe_timeout(socket_path: Path, trouble: str) -> None:
    with contextlib.ExitStack() as stack:
        not_there: dict[str, peers.Peer] = {
            "missing": lambda path: contextlib.nullcontext(),
            "stale": peers.stale_socket,
            "full queue": peers.never_accepting,
            "silent": peers.silent,
        }
        if trouble in ("hang", "stopped", "descriptors"):
            driver = stack.enter_context(FakeDriver(socket_path))
            driver.set("hang")
            if trouble == "stopped":
                driver.pause()
            elif trouble == "descriptors":
                driver.exhaust_descriptors()
        else:
            stack.enter_context(not_there[trouble](socket_path))
        args = [f"--csi-address={socket_path}", "--http-endpoint=127.0.0.1:0", "--probe-timeout=800ms"]
        shortest = [60.0, 60.0]
        for _ in range(10):
            with program.Probe(args) as probe:
                # The first has to wait until the program has started, and is still answered in time.
                answers = [probe.get() for _ in range(2)]
            assert [answer.status for answer in answers] == [500, 500]
            assert answers[1].seconds > 0.5
            shortest = [min(best, answer.seconds) for best, answer in zip(shortest, answers, strict=True)]
            if max(shortest) < 0.8:
                return  # else once more: a machine that stalls for 50 ms is not our defect
        pytest.fail(f"the answers took {shortest} seconds or more")


@pytest.mark.parametrize(
    ("connection_timeout", "shortest", "longest"), [("200ms", 0.2, 10), ("0", 0, 10), ("60s", 0.7, 10)]
)
def test_retrying_ends_with_the_smaller_of_both_timeouts(
    probe_factory: ProbeFactory, socket_path: Path, connection_timeout: str, shortest: float, longest: float
) -> None:
    timeout = "800ms" if connection_timeout == "60s" else "20s"
    probe = probe_factory(
        f"--csi-address={socket_path}",
        "--http-endpoint=127.0.0.1:0",
        f"--probe-timeout={timeout}",
        f"--connection-timeout={connection_timeout}",
    )
    probe.get()  # it may have had to wait for the start, and then its answer comes sooner
    for peer in (contextlib.nullcontext(), peers.stale_socket(socket_path)):
        with peer:
            answer = probe.get()
            assert answer.status == 500
            assert shortest <= answer.seconds < longest


@pytest.mark.parametrize("peer", [peers.regular_file, peers.directory, peers.junk, peers.http1])
def test_what_does_not_heal_is_answered_at_once(
    probe_factory: ProbeFactory, socket_path: Path, peer: peers.Peer
) -> None:
    probe = probe_factory(
        f"--csi-address={socket_path}", "--http-endpoint=127.0.0.1:0", "--probe-timeout=60s"
    )
    with peer(socket_path):
        for _ in range(2):
            answer = probe.get(timeout=20)
            assert answer.status == 500
            assert re.search("not a socket|the peer does not speak HTTP/2", answer.text)


def test_a_late_driver_is_found_within_the_check(probe_factory: ProbeFactory, socket_path: Path) -> None:
    probe = probe_factory(
        f"--csi-address={socket_path}", "--http-endpoint=127.0.0.1:0", "--probe-timeout=60s"
    )
    for obstacle in (contextlib.nullcontext(), peers.stale_socket(socket_path)):
        with ThreadPoolExecutor() as pool, FakeDriver(socket_path) as driver:
            driver.stop()
            with obstacle:
                answer = pool.submit(probe.get)
                # Seen by the server once this one, which came later, has been answered.
                assert probe.get("/nothing").status == 404
                assert not answer.done()
            driver.start()
            assert answer.result().status == 200


# ---- a driver that comes and goes


def test_a_drivers_life(probe: program.Probe, socket_path: Path) -> None:

    def becomes(status: int, text: str) -> None:
        answer = probe.get()
        assert (answer.status, text in answer.text) == (status, True), answer.text

    becomes(500, "no such file or directory")
    with FakeDriver(socket_path) as driver:
        becomes(200, "ok")
        driver.kill()
        becomes(500, "connection refused")
        driver.start()
        becomes(200, "ok")
        driver.pause()
        becomes(500, "DeadlineExceeded")
        becomes(500, "takes connections, but nobody there answers")
        driver.resume()
        becomes(200, "ok")
        # Its old connections would still work.
        driver.exhaust_descriptors()
        becomes(500, "DeadlineExceeded")
        driver.release_descriptors()
        becomes(200, "ok")
        driver.unlink()
        becomes(500, "no such file or directory")
        with FakeDriver(socket_path, name="other.csi.k8s.io") as other:
            other.set("error", message="I am another")
            becomes(500, "I am another")
            probe.wait_for_log('driver="other.csi.k8s.io"')
            other.restart()
            becomes(500, "I am another")
        becomes(500, "connection refused")


def test_a_stopped_driver_that_is_killed_and_comes_back_is_healthy_in_that_very_check(
    probe_factory: ProbeFactory, socket_path: Path
) -> None:
    probe = probe_factory(
        f"--csi-address={socket_path}", "--http-endpoint=127.0.0.1:0", "--probe-timeout=20s", "-v=5"
    )
    with FakeDriver(socket_path) as driver, ThreadPoolExecutor() as clients:
        probe.wait_for_log('driver="fake.csi.k8s.io"')
        driver.pause()
        seen = len(probe.log_lines)
        answer = clients.submit(probe.get)
        probe.wait_for_log('"Calling the CSI driver" method="/csi.v1.Identity/Probe"', after=seen)
        driver.kill()
        driver.start()
        assert (answer.result().status, answer.result().text) == (200, "ok")


@pytest.mark.parametrize("scheme", ["", "dns:///"])
def test_tcp_driver(probe_factory: ProbeFactory, scheme: str) -> None:
    with FakeDriver("127.0.0.1:0") as driver:
        address = scheme + driver.address
        probe = probe_factory(
            f"--csi-address={address}",
            "--http-endpoint=127.0.0.1:0",
            "--connection-timeout=1s",
            "--probe-timeout=20s",
        )
        assert probe.get().text == "ok"
        probe.wait_for_log('driver="fake.csi.k8s.io"')
        driver.set("not-ready")
        assert statuses(probe) == [500, 500, 200]
    answer = probe.get()
    assert answer.status == 500
    assert answer.text.startswith(f"cannot connect to {address}: connection refused")


# ---- a new connection each time, and no other


def test_a_driver_that_serves_old_connections_alone_is_never_healthy(
    driver: FakeDriver, probe_factory: ProbeFactory
) -> None:
    """Even in a row of quick checks, and whoever else asks in between."""
    probe = probe_factory(
        f"--csi-address={driver.target}", "--http-endpoint=127.0.0.1:0", "--probe-timeout=2s"
    )
    for _ in range(50):
        assert probe.get().status == 200
    driver.exhaust_descriptors()
    for _ in range(8):
        assert probe.get().status == 500
    driver.release_descriptors()
    driver.wait_until(lambda seen: seen.connections == 0)
    assert probe.get().status == 200


def test_a_driver_with_one_connection_at_a_time_is_healthy_in_a_row_of_quick_checks(
    driver: FakeDriver, folder: Path, probe_factory: ProbeFactory
) -> None:
    between = folder / "between.sock"
    with peers.relay(between, driver.target, at_a_time=1) as connections:
        probe = probe_factory(
            f"--csi-address={between}", "--http-endpoint=127.0.0.1:0", "--probe-timeout=10s"
        )
        probe.wait_for_log("Learnt the CSI driver's name")
        for _ in range(100):
            assert probe.get().status == 200
        driver.wait_until(lambda seen: seen.connections == 0)
    assert len(connections) == driver.seen().probes + driver.seen().infos


# ---- sharing


def test_requests_share_the_check_in_flight_and_no_other(driver: FakeDriver, probe: program.Probe) -> None:
    driver.set("hang")
    clients = [probe.connect() for _ in range(50)]
    for number, client in enumerate(clients):
        client.sendall(b"GET /%s HTTP/1.0\r\n\r\n" % (b"healthz", b"livez", b"readyz")[number % 3])
    driver.wait(probing=1)
    probe.catch_up()
    driver.set("not-ready")
    for number, client in enumerate(clients):
        answer = read_answer(client.recv(65536))
        assert answer.status == (500, 200, 500)[number % 3]
        assert answer.body == b"driver responded but is not ready"
        client.close()
    assert driver.seen().probes == 1

    driver.set("unset")
    assert probe.get().status == 200
    seen = driver.seen()
    assert (seen.probes, seen.most_probing) == (2, 1)


def test_abandoned_requests_do_not_pile_up(driver: FakeDriver, probe_factory: ProbeFactory) -> None:
    probe = probe_factory(
        f"--csi-address={driver.target}", "--http-endpoint=127.0.0.1:0", "--probe-timeout=60s"
    )
    assert probe.get().status == 200
    probe.wait_for_log("Learnt the CSI driver's name")
    driver.wait_until(lambda seen: seen.connections == 0)
    descriptors, threads = probe.descriptors(), probe.threads()
    driver.set("hang")
    for _ in range(200):
        with probe.connect() as client:
            client.sendall(GET)
    driver.wait(probing=1)
    probe.catch_up()
    assert probe.threads() < threads + 20
    seen = driver.seen()
    assert (seen.probes, seen.most_probing, seen.connections) == (2, 1, 1)

    driver.set("unset")
    assert probe.get().status == 200
    driver.wait_until(lambda seen: seen.connections == 0)
    assert probe.descriptors() < descriptors + 20
    assert driver.seen().most_probing == 1


# ---- hostile clients


def test_malformed_requests_are_refused_and_not_logged(probe: program.Probe) -> None:
    for name, (head, status) in MALFORMED.items():
        assert read_answer(probe.raw(head)).status == status, name
    assert probe.get("/nothing").status == 404
    assert len(probe.log_lines) == 1


@pytest.mark.parametrize("sent", NO_HTTP1.values(), ids=NO_HTTP1)
def test_clients_of_other_protocols_are_refused_at_once(probe: program.Probe, sent: bytes) -> None:
    """Like a kubelet's probe with `scheme: HTTPS`: without an answer it would conclude that we are too slow."""
    assert program.best_of(3, lambda: _seconds_to_400(probe, sent)) < 1


def _seconds_to_400(probe: program.Probe, sent: bytes) -> float:
    begin = time.monotonic()
    with probe.connect() as client:
        client.sendall(sent)
        assert client.recv(12) == b"HTTP/1.1 400"
        return time.monotonic() - begin


def test_a_tls_client_is_told_that_this_is_http(probe: program.Probe) -> None:
    context = ssl.create_default_context()
    with probe.connect() as client, pytest.raises(ssl.SSLError, match="WRONG_VERSION_NUMBER"):
        context.wrap_socket(client, server_hostname="localhost")


def test_malformed_requests_are_logged_at_level_4(probe_factory: ProbeFactory, socket_path: Path) -> None:
    probe = probe_factory(f"--csi-address={socket_path}", "--http-endpoint=127.0.0.1:0", "-v=4")
    probe.raw(b"GET \x1b[31m\nI1123 forged\n\n")
    line = probe.wait_for_log('"Malformed request"').string
    assert line.endswith(r'reason="malformed request line" request="GET \x1b[31m"')


def test_hundreds_of_half_open_connections(driver: FakeDriver, probe: program.Probe) -> None:
    program.allow_descriptors(2600)
    assert probe.get().status == 200
    memory = probe.memory()
    with contextlib.ExitStack() as stack:
        for number in range(2500):
            client = stack.enter_context(probe.connect())
            if number % 2:
                # The program has already given some of them up.
                with contextlib.suppress(ConnectionError):
                    client.sendall(b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 2000)
            if number % 500 == 499:
                answer = probe.get()
                assert answer.status == 200
                assert answer.seconds < 1
        assert probe.memory() - memory < 8 * 1024 * 1024
        assert probe.threads() < 20
        assert probe.descriptors() < 2100
    assert probe.get().status == 200


@program.BOTH
def test_few_descriptors_are_enough(socket_path: Path, driver: FakeDriver, command: Sequence[str]) -> None:
    """As under `ulimit -n 64`: idle clients cannot use up what a check needs."""
    limited = ["sh", "-c", 'ulimit -n 64 && exec "$@"', "sh", *command]
    args = [f"--csi-address={socket_path}", "--http-endpoint=127.0.0.1:0", "--probe-timeout=10s"]
    with program.Probe(args, command=limited) as probe, contextlib.ExitStack() as idle:
        for _ in range(100):
            idle.enter_context(probe.connect())
        for _ in range(5):
            assert probe.get().status == 200
        assert probe.descriptors() <= 64
        assert not [line for line in probe.log_lines if line.startswith("E")]


def test_clients_that_never_read_the_metrics(driver: FakeDriver, probe: program.Probe) -> None:
    assert probe.get().status == 200
    probe.wait_for_log("Learnt the CSI driver's name")
    driver.wait_until(lambda seen: seen.connections == 0)
    descriptors = probe.descriptors()
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            client.connect(probe.address())
            client.sendall(GET.replace(b"/healthz", b"/metrics"))
        assert probe.get("/metrics").status == 200
        end = time.monotonic() + 20
        while probe.descriptors() > descriptors:
            assert time.monotonic() < end
            time.sleep(0.05)


STRANGERS = 2000
MOST_GROWTH = 4 * 1024 * 1024


@pytest.mark.parametrize(
    "who", ["send no body", "take it packed, send no body", "take nothing", "wait for a long error"]
)
def test_strangers_who_do_not_read_cost_little(
    driver: FakeDriver, probe_factory: ProbeFactory, socket_path: Path, who: str
) -> None:
    program.allow_descriptors(STRANGERS + 200)
    probe = probe_factory(
        f"--csi-address={socket_path}", "--http-endpoint=127.0.0.1:0", "--probe-timeout=20s"
    )
    for code in CODES:  # the more series, the larger the metrics
        driver.set("error", code=code)
        assert probe.get().status == 500
    assert len(probe.get("/metrics").body) > 30_000
    before = probe.memory()
    for _ in range(3):
        with contextlib.ExitStack() as stack:
            driver.set("hang" if who == "wait for a long error" else "unset", message="\x01" * 5000)
            for _ in range(STRANGERS):
                client = stack.enter_context(socket.socket())
                client.settimeout(10)
                if who == "take nothing":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                client.connect(probe.address())
                with contextlib.suppress(ConnectionError):  # evicted, as it is one of too many
                    client.sendall(REQUESTS[who])
            if who == "wait for a long error":
                driver.set("error", message="\x01" * 5000)
            _, took = program.asked(lambda: probe.get(timeout=60), probe.pid, driver.pid)
            assert took < 5
            assert probe.memory() - before < MOST_GROWTH
    driver.set("unset")
    assert probe.get().status == 200


REQUESTS = {
    "send no body": b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
    "take it packed, send no body": b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\nContent-Length: 9\r\n\r\n",
    "take nothing": b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
    "wait for a long error": GET,
}


# ---- listening


def test_it_listens_and_answers_before_there_is_a_driver(probe: program.Probe, socket_path: Path) -> None:
    # As soon as possible after the program has begun to listen.
    assert probe.get("/nothing").status == 404
    assert probe.get().text == f"cannot connect to {socket_path}: no such file or directory"
    assert probe.process.poll() is None
    with FakeDriver(socket_path):
        assert probe.get().status == 200


@pytest.mark.parametrize(
    ("endpoint", "shown"),
    [
        (":{port}", "[::]:{port}"),
        ("0.0.0.0:{port}", "[::]:{port}"),
        ("[::]:{port}", "[::]:{port}"),
        ("[::1]:0", r"[::1]:\d+"),
        ("127.0.0.1:{port}", "127.0.0.1:{port}"),
        ("localhost:0", r"127.0.0.1:\d+"),
        (None, "[::]:{port}"),
    ],
)
@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="IPv6 is off here")
def test_addresses(probe_factory: ProbeFactory, endpoint: str | None, shown: str) -> None:
    port = program.free_port()
    flag = f"--health-port={port}" if endpoint is None else f"--http-endpoint={endpoint.format(port=port)}"
    probe = probe_factory("--csi-address=/nowhere", flag)
    pattern = shown.format(port=port).replace(".", r"\.").replace("[", r"\[")
    assert re.fullmatch(pattern, probe.addresses[0])
    bound = int(probe.addresses[0].rpartition(":")[2])
    everywhere = shown.startswith("[::]")
    for host, expected in (
        ("127.0.0.1", everywhere or shown.startswith("127")),
        ("::1", everywhere or shown.startswith("[::1]")),
    ):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as client:
            assert (client.connect_ex((host, bound)) == 0) == expected


def _may(*command: str) -> bool:
    """Whether what needs privileges works here."""
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run([*command, "true"], check=False, stderr=subprocess.DEVNULL).returncode == 0


HOSTS = (
    *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c"),
    'mount --bind "$0" /etc/hosts && exec "$@"',
)


@pytest.mark.skipif(not _may(*HOSTS, "/etc/hosts"), reason="needs name spaces")
@pytest.mark.parametrize(
    ("hosts", "bound"),
    [
        ("127.0.0.1 probe", "127.0.0.1"),
        ("::1 probe", "[::1]"),
        ("::1 probe\n127.0.0.1 probe", "127.0.0.1"),
        ("127.0.0.1 probe\n::1 probe", "127.0.0.1"),
    ],
)
def test_names_are_bound_on_their_ipv4_address(folder: Path, hosts: str, bound: str) -> None:
    file = folder / "hosts"
    file.write_text(hosts + "\n")
    command = [*HOSTS, str(file), *program.built()]
    with program.Probe(["--csi-address=/nowhere", "--http-endpoint=probe:0"], command=command) as probe:
        assert probe.addresses[0].rpartition(":")[0] == bound


# Runs a command where the only DNS server takes questions and answers none.
MUTE_DNS = (
    *("unshare", "--user", "--map-root-user", "--mount", "--net", sys.executable, "-c"),
    """
import fcntl, os, socket, struct, subprocess, sys
server = socket.socket(type=socket.SOCK_DGRAM)
fcntl.ioctl(server, 0x8914, struct.pack("16sh", b"lo", 1))  # SIOCSIFFLAGS: up
server.bind(("127.0.0.1", 53))
server.set_inheritable(True)
subprocess.run(["mount", "--bind", sys.argv[1], "/etc/resolv.conf"], check=True)
os.execvp(sys.argv[2], sys.argv[2:])
""",
)


@program.BOTH
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.skipif(not _may(*HOSTS, "/etc/hosts"), reason="needs name spaces")
def test_a_signal_ends_it_while_a_name_is_resolved(
    folder: Path, command: Sequence[str], number: signal.Signals
) -> None:
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    args = ["--csi-address=/nowhere", "--http-endpoint=probe.example.org:0"]
    limited = [*MUTE_DNS, str(folder / "resolv.conf"), *command]

    def seconds_to_end() -> float:
        with program.Probe(args, command=limited, listeners=0) as probe:
            end = time.monotonic() + 20
            while not _questions(probe):
                assert time.monotonic() < end
            # Until it has looked for signals, found none, and waits on.
            waits = _waits(probe)
            while _waits(probe) < waits + 3:
                assert time.monotonic() < end
            begin = time.monotonic()
            assert probe.stop(number) == 0
            assert [line for line in probe.log_lines if line.startswith(("W", "E"))] == []
            return time.monotonic() - begin

    assert program.best_of(3, seconds_to_end) < 1


def _waits(probe: program.Probe) -> int:
    """How often its first thread has begun to wait for something."""
    found = re.search(
        r"(?m)^voluntary_ctxt_switches:\s+(\d+)$", Path(f"/proc/{probe.pid}/status").read_text()
    )
    assert found
    return int(found[1])


def _questions(probe: program.Probe) -> int:
    """Bytes waiting on port 53 in the program's namespace."""
    with contextlib.suppress(FileNotFoundError):
        for line in Path(f"/proc/{probe.pid}/net/udp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(":0035"):
                return int(fields[4].partition(":")[2], 16)
    return 0


@program.BOTH
def test_where_ipv6_is_off_it_listens_on_ipv4(driver: FakeDriver, command: Sequence[str]) -> None:
    args = [f"--csi-address={driver.target}", "--http-endpoint=:0"]
    no_ipv6 = denying("socket", errno.EAFNOSUPPORT, argument=0, value=socket.AF_INET6)
    with program.Probe(args, command=[*no_ipv6, *command]) as probe:
        assert probe.addresses[0].startswith("0.0.0.0:")
        assert probe.get().status == 200


@program.BOTH
@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize(
    "denied",
    [
        {"call": "epoll_create1"},
        {"call": "epoll_ctl"},
        {"call": "epoll_wait"},
        {"call": "eventfd2"},
        {"call": "prlimit64"},
        {"call": "socketpair"},
        # The sizes of buffers, and what the kernel keeps of an answer.
        {"call": "setsockopt", "argument": 2, "value": socket.SO_SNDBUF},
        {"call": "setsockopt", "argument": 2, "value": socket.TCP_USER_TIMEOUT},
        {"call": "ioctl", "argument": 1, "value": 0x5411},
    ],
    ids=[
        "epoll",
        "epoll_ctl",
        "epoll_wait",
        "eventfd",
        "limits",
        "socketpair",
        "SO_SNDBUF",
        "TCP_USER_TIMEOUT",
        "SIOCOUTQ",
    ],
)
def test_it_serves_without_what_is_only_nice_to_have(
    driver: FakeDriver, command: Sequence[str], denied: dict[str, Any], error: int
) -> None:
    args = [f"--csi-address={driver.target}", "--http-endpoint=127.0.0.1:0"]
    with program.Probe(args, command=[*denying(**denied, error=error), *command]) as probe:
        for _ in range(3):
            assert probe.get().text == "ok"
            assert probe.get("/metrics").status == 200
            assert probe.get("/healthz", "POST", {"Content-Length": "5"}).status == 405
        assert probe.stop() == 0
        assert [line for line in probe.log_lines if line.startswith(("W", "E", "F"))] == []


def test_what_it_cannot_do_without_is_named() -> None:
    command = [*denying("pipe2"), *program.MODULE]
    ended = program.run_once(["--csi-address=/nowhere", "--http-endpoint=127.0.0.1:0"], command=command)
    assert ended.returncode == 1
    _, line = ended.stderr.splitlines()
    reason = "cannot serve: pipe2: operation not permitted"
    assert line.endswith(f'"Bad configuration" err="{reason}" flag="http-endpoint" value="127.0.0.1:0"')


def test_where_no_connection_may_be_accepted_it_says_so(driver: FakeDriver) -> None:
    args = [f"--csi-address={driver.target}", "--http-endpoint=127.0.0.1:0"]
    with program.Probe(args, command=[*denying("accept4"), *program.built()]) as probe, probe.connect():
        probe.wait_for_log(
            '"Cannot accept connections" err="operation not permitted: a seccomp profile or a security module'
            r' denies accept \(web\.py:\d+\)"'
        )
        assert probe.stop() == 0


@pytest.mark.parametrize(
    ("args", "flag", "value", "reason"),
    [
        (
            ["--http-endpoint=127.0.0.1:{taken}"],
            "http-endpoint",
            "127.0.0.1:{taken}",
            "address already in use",
        ),
        (["--health-port={taken}"], "health-port", "{taken}", "address already in use"),
        (
            ["--health-port={free}", "--metrics-address=127.0.0.1:{taken}"],
            "metrics-address",
            "127.0.0.1:{taken}",
            "address already in use",
        ),
        (
            ["--health-port={free}", "--metrics-address=:{free}"],
            "metrics-address",
            ":{free}",
            "address already in use",
        ),
        (
            ["--http-endpoint=192.0.2.1:{free}"],
            "http-endpoint",
            "192.0.2.1:{free}",
            "cannot assign requested address",
        ),
        (
            ["--http-endpoint=livenessprobe.invalid:1"],
            "http-endpoint",
            "livenessprobe.invalid:1",
            "",
        ),
        (["--http-endpoint=" + "x" * 64 + ":1"], "http-endpoint", "x" * 64 + ":1", ""),
        (["--http-endpoint=a..b:1"], "http-endpoint", "a..b:1", ""),
    ],
)
def test_addresses_that_cannot_be_had(args: list[str], flag: str, value: str, reason: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ports = {"taken": listener.getsockname()[1], "free": program.free_port()}
        ended = program.run_once(
            ["--csi-address=/nowhere", *(arg.format(**ports) for arg in args)], command=program.MODULE
        )
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    assert f'flag="{flag}" value="{value.format(**ports)}"' in line
    assert re.search(f'"Bad configuration" err="cannot (listen|resolve the host): [^"]*{reason}', line), line


# ---- stopping


@program.BOTH
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "when", ["at once", "idle", "missing", "hanging", "connecting", "half-open", "lingering"]
)
def test_a_signal_ends_it_within_a_second(
    probe_factory: ProbeFactory, socket_path: Path, when: str, number: signal.Signals
) -> None:
    assert program.best_of(3, lambda: _seconds_to_end(probe_factory, socket_path, when, number)) < 1


def _seconds_to_end(
    probe_factory: ProbeFactory, socket_path: Path, when: str, number: signal.Signals
) -> float:
    with contextlib.ExitStack() as stack:
        if when == "connecting":
            stack.enter_context(peers.silent(socket_path))
        elif when not in ("at once", "missing"):
            driver = stack.enter_context(FakeDriver(socket_path))
        probe = probe_factory(
            f"--csi-address={socket_path}", "--http-endpoint=127.0.0.1:0", "--probe-timeout=60s"
        )
        clients: list[socket.socket] = []
        if when in ("idle", "half-open", "lingering"):
            assert probe.get().status == 200
        if when == "hanging":
            driver.set("hang")
        if when == "half-open":
            clients = [stack.enter_context(probe.connect()) for _ in range(300)]
        elif when == "lingering":
            clients = [stack.enter_context(probe.connect())]
            clients[0].sendall(b"POST / HTTP/1.0\r\nContent-Length: 9\r\n\r\n")
            assert clients[0].recv(65536)
        elif when in ("missing", "hanging", "connecting"):
            clients = [stack.enter_context(probe.connect()) for _ in range(5)]
            for client in clients:
                client.sendall(GET)
            probe.catch_up()
        if when == "hanging":
            driver.wait(probing=1)

        begin = time.monotonic()
        assert probe.stop(number) == 0
        seconds = time.monotonic() - begin
        for client in clients:
            client.settimeout(10)
            received = b""
            with contextlib.suppress(ConnectionError):
                while data := client.recv(65536):
                    received += data
            if when in ("missing", "hanging", "connecting"):
                # A whole answer, never half of one.
                answer = read_answer(received)
                assert answer.status == 500
            else:
                assert received == b""
        assert any('"Stopping"' in line for line in probe.log_lines)
        assert not any(line.startswith(("W", "E")) for line in probe.log_lines)
    return seconds


def test_while_stopping_nobody_is_let_in(driver: FakeDriver, probe: program.Probe) -> None:
    assert probe.get().status == 200
    address = probe.address()
    assert probe.stop() == 0
    with socket.socket() as client:
        assert client.connect_ex(address) != 0


def test_further_signals_do_no_harm(driver: FakeDriver, probe_factory: ProbeFactory) -> None:
    driver.set("hang")

    def seconds_to_end() -> float:
        probe = probe_factory(
            f"--csi-address={driver.target}", "--http-endpoint=127.0.0.1:0", "--probe-timeout=60s"
        )
        probes = driver.seen().probes
        with probe.connect() as client:
            client.sendall(GET)
            driver.wait(probes=probes + 1)
            begin = time.monotonic()
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                probe.send(number)
            assert probe.wait() == 0
            return time.monotonic() - begin

    assert program.best_of(3, seconds_to_end) < 1


PID_1 = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


@pytest.mark.skipif(not _may(*PID_1), reason="needs root and unshare")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("behaviour", ["unset", "hang"])
def test_as_pid_1_it_ends_at_once_too(
    driver: FakeDriver, number: signal.Signals, behaviour: Behaviour
) -> None:
    args = [f"--csi-address={driver.target}", "--http-endpoint=127.0.0.1:0", "--probe-timeout=60s"]
    driver.set(behaviour)

    def seconds_to_end() -> float:
        probes = driver.seen().probes
        with program.Probe(args, command=[*PID_1, *program.built()]) as probe, probe.connect() as client:
            assert probe.log_lines[0].split()[2] == "1"  # the process id that klog shows
            client.sendall(GET)
            driver.wait(probes=probes + 1)
            (child,) = Path(f"/proc/{probe.pid}/task/{probe.pid}/children").read_text().split()
            begin = time.monotonic()
            os.kill(int(child), number)
            assert probe.wait() == 0
            seconds = time.monotonic() - begin
            assert client.recv(65536)
        return seconds

    assert program.best_of(3, seconds_to_end) < 1


def test_a_blocked_log_does_not_block_the_probe(driver: FakeDriver, socket_path: Path) -> None:
    """Nobody reads standard error, at the highest verbosity: as when the container runtime hangs."""
    reader, writer = os.pipe()
    port = program.free_port()
    args = [f"--csi-address={socket_path}", f"--http-endpoint=127.0.0.1:{port}", "-v=9"]
    with subprocess.Popen([*program.built(), *args], stderr=writer, env=dict(os.environ)) as process:
        os.close(writer)
        try:
            # The first line says that it listens.
            assert select.select([reader], [], [], 20)[0]
            for _ in range(600):
                with socket.create_connection(("127.0.0.1", port), 20) as client:
                    client.sendall(GET)
                    assert client.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")
        finally:
            process.terminate()
            assert process.wait(5) == 0
            os.close(reader)


# ---- log


def test_healthy_checks_are_silent(driver: FakeDriver, probe_factory: ProbeFactory) -> None:
    probe = probe_factory(f"--csi-address={driver.target}", "--http-endpoint=127.0.0.1:0", "-v=4")
    probe.wait_for_log("Learnt the CSI driver's name")
    for _ in range(20):
        assert probe.get().status == 200
    assert probe.stop() == 0
    messages = [re.sub(r'^[^"]*"([^"]*)".*', r"\1", line) for line in probe.log_lines]
    assert messages == ["Serving", "Learnt the CSI driver's name", "CSI driver is healthy", "Stopping"]


def test_failures_are_logged_once_for_each_reason_and_recovery_says_how_long(
    driver: FakeDriver, probe: program.Probe
) -> None:
    probe.wait_for_log("Learnt the CSI driver's name")
    before = len(probe.log_lines)
    reasons: list[tuple[Behaviour, str]] = [
        ("error", "one"),
        ("error", "two"),
        ("hang", ""),
        ("not-ready", ""),
    ]
    for behaviour, message in reasons:
        driver.set(behaviour, message=message)
        for _ in range(3):
            assert probe.get().status == 500
    driver.set("unset")
    for _ in range(3):
        assert probe.get().status == 200
    recovery = probe.wait_for_log("CSI driver is healthy again")

    lines = probe.log_lines[before:]
    assert [re.sub(r'^(.)[^"]*', r"\1 ", line) for line in lines[:-1]] == [
        'E "CSI driver is not healthy" err="rpc error: code = Internal desc = one"',
        'E "CSI driver is not healthy" err="rpc error: code = Internal desc = two"',
        f'E "CSI driver is not healthy" err="{NO_ANSWER}"',
        'E "CSI driver is not healthy" err="driver responded but is not ready"',
    ]
    assert lines[-1] == recovery.string
    lasted = re.fullmatch(r'I.*"CSI driver is healthy again" failures=12 lasted="([\d.]+)s"', recovery.string)
    assert lasted
    assert float(lasted[1]) > 2  # three checks hung for almost a second


def test_level_5_shows_each_call_and_reply(driver: FakeDriver, probe_factory: ProbeFactory) -> None:
    probe = probe_factory(f"--csi-address={driver.target}", "--http-endpoint=127.0.0.1:0", "-v=5")
    driver.set("error", message=MALICE)
    for _ in range(3):
        probe.get()
    assert probe.stop() == 0
    calls = [
        line for line in probe.log_lines if '"Calling the CSI driver" method="/csi.v1.Identity/Probe"' in line
    ]
    replies = [
        line for line in probe.log_lines if f'code="Internal" message="{MALICE_QUOTED}" seconds=' in line
    ]
    assert (len(calls), len(replies)) == (3, 3)
    header = re.compile(r"[IWE]\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ [a-z_]+\.py:\d+\] \"")
    assert all(header.match(line) for line in probe.log_lines)


def test_json_logs_are_one_object_a_line(driver: FakeDriver, probe_factory: ProbeFactory) -> None:
    driver.set("name", name="forged\n{}.csi.k8s.io")
    probe = probe_factory(
        f"--csi-address={driver.target}", "--http-endpoint=127.0.0.1:0", "-v=5", "--logging-format=json"
    )
    begin = time.time() * 1000 - 60_000
    assert probe.get().status == 200
    driver.set("error", message=MALICE)
    probe.get()
    probe.wait_for_log("Learnt the CSI driver's name")
    assert probe.stop() == 0
    records = [json.loads(line) for line in probe.log_lines]
    for record in records:
        assert begin < record["ts"] < time.time() * 1000
        assert re.fullmatch(r"livenessprobe/[a-z_]+\.py:\d+", record["caller"])
        assert ("err" in record) != ("v" in record)
    failures = [record for record in records if "err" in record]
    assert [record["err"] for record in failures] == [f"rpc error: code = Internal desc = {MALICE}"]
    assert {record["v"] for record in records if "v" in record} == {0, 5}
    assert "forged\n{}.csi.k8s.io" in [record.get("driver") for record in records]


# ---- what is loaded, and when


WAITS_TO_BE_LOADED = """
import importlib, sys
open({fifo!r}).close()
sys.path.remove({folder!r})
for name in [name for name in sys.modules if name.partition(".")[0] == {top!r}]:
    del sys.modules[name]
importlib.import_module({module!r})
"""


@pytest.mark.parametrize("command", [program.MODULE], ids=["sources"], indirect=True)
@pytest.mark.parametrize("module", ["hpack", "google.protobuf", "prometheus_client"])
def test_it_listens_before_it_loads_what_is_costly(
    driver: FakeDriver, probe_factory: ProbeFactory, folder: Path, module: str
) -> None:
    """When imported, each of these waits until the test has connected; and grpc must not be imported at all."""
    fifo, modules = folder / "go", folder / "modules"
    package = modules / module.replace(".", "/")
    package.mkdir(parents=True)
    os.mkfifo(fifo)
    (package / "__init__.py").write_text(
        WAITS_TO_BE_LOADED.format(
            fifo=str(fifo), folder=str(modules), top=module.partition(".")[0], module=module
        )
    )
    (modules / "grpc.py").write_text("raise SystemExit('nobody needs it here')\n")
    path = os.pathsep.join([str(modules), str(program.ROOT)])
    probe = probe_factory(
        f"--csi-address={driver.target}", "--http-endpoint=127.0.0.1:0", env={"PYTHONPATH": path}
    )
    with probe.connect() as client:
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        fifo.write_bytes(b"")  # waits until somebody reads
        assert client.makefile("rb").read().endswith(b"\r\n\r\nok")


@pytest.mark.parametrize("address", ["/nowhere", ""])
def test_once_loads_no_http_server(driver: FakeDriver, address: str) -> None:
    command = (program.MODULE[0], "-X", "importtime", *program.MODULE[1:])
    ended = program.run_once(
        ["--once", "--connection-timeout=0", f"--csi-address={address or driver.target}"], command=command
    )
    names = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert ended.returncode == (3 if address else 0)
    assert "hpack" in names
    assert not names & {"http.server", "socketserver", "prometheus_client", "livenessprobe.web", "grpc"}


def test_what_cannot_be_loaded_ends_it(folder: Path, driver: FakeDriver) -> None:
    """A broken installation is reported and ends the program, rather than leaving a server that never answers."""
    (folder / "hpack.py").write_text("raise ImportError('no such thing')\n")
    path = os.pathsep.join([str(folder), str(program.ROOT)])
    args = [f"--csi-address={driver.target}", "--http-endpoint=127.0.0.1:0"]
    ended = program.run_once(args, command=program.MODULE, env={"PYTHONPATH": path})
    assert ended.returncode == 1
    assert '"Cannot check" err="ImportError(\'no such thing\')"' in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_defect_on_a_thread_ends_the_program() -> None:
    problems: list[str] = []
    ended: list[str] = []

    def broken() -> None:
        raise RuntimeError("broken")

    run_or_end(lambda: None, problems, lambda: ended.append("too early"))
    run_or_end(broken, problems, lambda: ended.append("now"))
    assert (problems, ended) == (["RuntimeError('broken')"], ["now"])
