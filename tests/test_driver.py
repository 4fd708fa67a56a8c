"""driver.py against real gRPC servers and hostile peers on real sockets, in this process."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import peers
import program
import pytest
from fake_driver import CODES, UNDECODABLE, FakeDriver, plugin_info

from livenessprobe import health
from livenessprobe.driver import GET_PLUGIN_INFO, LONGEST_NAME, PROBE, Driver
from livenessprobe.health import HEALTHY, NOT_READY, Outcome, Verdict

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fake_driver import Behaviour

# Longer than anything here takes; what is to end sooner ends by itself.
PATIENCE = 20.0
# For what must run into its deadline.
BRIEF = 0.4

GO_NAMES = {
    "CANCELLED": "Canceled",
    "UNKNOWN": "Unknown",
    "INVALID_ARGUMENT": "InvalidArgument",
    "DEADLINE_EXCEEDED": "DeadlineExceeded",
    "NOT_FOUND": "NotFound",
    "ALREADY_EXISTS": "AlreadyExists",
    "PERMISSION_DENIED": "PermissionDenied",
    "UNAUTHENTICATED": "Unauthenticated",
    "RESOURCE_EXHAUSTED": "ResourceExhausted",
    "FAILED_PRECONDITION": "FailedPrecondition",
    "ABORTED": "Aborted",
    "UNIMPLEMENTED": "Unimplemented",
    "OUT_OF_RANGE": "OutOfRange",
    "INTERNAL": "Internal",
    "UNAVAILABLE": "Unavailable",
    "DATA_LOSS": "DataLoss",
}


@pytest.fixture
def calls() -> list[tuple[str, str]]:
    """The method and code of each call the client made."""
    return []


@pytest.fixture
def client(socket_path: Path, calls: list[tuple[str, str]]) -> Iterator[Driver]:
    """Our side of the connection."""
    client = Driver(
        str(socket_path), str(socket_path), lambda method, code, seconds: calls.append((method, code))
    )
    yield client
    client.close()


@pytest.fixture(params=[False, True], ids=["alone", "in a burst"])
def attempt(request: pytest.FixtureRequest, client: Driver) -> Iterator[Callable[[float], Verdict]]:
    """One attempt, which keeps its channel for the next one, or not: nobody can tell from the verdict."""
    yield partial(client.attempt, keep=request.param)
    client.rest()


@contextlib.contextmanager
def in_background(work: Callable[[], Verdict]) -> Iterator[list[Verdict]]:
    """Runs the work beside the body; what it returned is in the list afterwards."""
    results: list[Verdict] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    try:
        yield results
    finally:
        thread.join()


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """File modes bind, even where the tests are run by root."""
    user = os.geteuid()
    os.seteuid(program.unprivileged() or user)
    try:
        yield
    finally:
        os.seteuid(user)


# ---- a driver that answers


@pytest.mark.parametrize(
    ("behaviour", "verdict"), [("unset", HEALTHY), ("ready", HEALTHY), ("not-ready", NOT_READY)]
)
def test_replies(
    driver: FakeDriver, client: Driver, calls: list[tuple[str, str]], behaviour: Behaviour, verdict: Verdict
) -> None:
    driver.set(behaviour)

    assert client.attempt(PATIENCE) == verdict
    assert calls == [(PROBE, "OK")]


def test_every_error_code_has_its_name_in_go_and_the_drivers_words(
    driver: FakeDriver, client: Driver, calls: list[tuple[str, str]]
) -> None:
    assert set(CODES) == set(GO_NAMES)
    for code, name in GO_NAMES.items():
        driver.set("error", code=code, message=f"disk {code} is gone")

        assert client.attempt(PATIENCE) == Verdict(
            Outcome.FAILED, name, f"rpc error: code = {name} desc = disk {code} is gone"
        )
    assert calls == [(PROBE, name) for name in GO_NAMES.values()]


@pytest.mark.parametrize("data", UNDECODABLE.values(), ids=UNDECODABLE)
def test_undecodable_replies(driver: FakeDriver, client: Driver, data: bytes) -> None:
    driver.set("raw", data=data)

    verdict = client.attempt(PATIENCE)
    assert (verdict.outcome, verdict.reason) == (Outcome.FAILED, "Internal")
    assert verdict.text.startswith("rpc error: code = Internal desc = cannot decode the reply: ")


@pytest.mark.parametrize("behaviour", ["unimplemented", "no-service"])
def test_unimplemented(driver: FakeDriver, client: Driver, behaviour: Behaviour) -> None:
    driver.set(behaviour)

    verdict = client.attempt(PATIENCE)
    assert verdict.text.startswith("rpc error: code = Unimplemented desc = ")
    assert verdict.outcome is Outcome.FAILED


def test_slow_answers_count(driver: FakeDriver, client: Driver) -> None:
    driver.set("slow", after=0.5)
    begin = time.monotonic()

    assert client.attempt(PATIENCE) == HEALTHY
    assert time.monotonic() - begin >= 0.5


def test_no_answer_in_time_has_the_same_words_each_time(
    driver: FakeDriver, client: Driver, calls: list[tuple[str, str]]
) -> None:
    driver.set("hang")
    # The second attempt looks first whether anybody is there, which takes some of its time.
    for _ in range(3):
        begin = time.monotonic()

        assert client.attempt(BRIEF) == health.failed("DeadlineExceeded", f"no answer to {PROBE} in time")
        assert time.monotonic() - begin >= BRIEF * 0.9
    assert calls == [(PROBE, "DeadlineExceeded")] * 3

    driver.set("unset")
    assert client.attempt(PATIENCE) == HEALTHY


@pytest.mark.parametrize("code", ["DEADLINE_EXCEEDED", "UNAVAILABLE"])
@pytest.mark.parametrize(
    "message",
    [
        "no answer",
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.1:1: Connection refused",
        "errors resolving backend:1: Domain name not found",
        "DNS resolution failed for backend:1",
    ],
)
def test_a_drivers_own_trouble_with_a_backend_is_no_failed_connection(
    driver: FakeDriver, client: Driver, code: str, message: str
) -> None:
    driver.set("error", code=code, message=message)
    for _ in range(2):
        assert client.attempt(PATIENCE) == health.failed(GO_NAMES[code], message)


def test_long_error_texts_are_cut(driver: FakeDriver, client: Driver) -> None:
    driver.set("error", message="é" * 150_000)

    text = client.attempt(PATIENCE).text
    assert text.startswith("rpc error: code = Internal desc = éééé")
    assert text.endswith("(cut, 300034 bytes in all)")
    assert len(text.encode()) <= 4096


def test_megabytes_of_error_text_are_not_taken(driver: FakeDriver, client: Driver) -> None:
    """Several times their size would not fit into the memory of a small container."""
    driver.set("error", message="x" * 15_000_000)

    verdict = client.attempt(PATIENCE)
    assert (verdict.outcome, verdict.reason) == (Outcome.FAILED, "ResourceExhausted")
    assert "metadata size exceeds" in verdict.text


def test_each_attempt_has_a_connection_of_its_own_and_ends_it(driver: FakeDriver, client: Driver) -> None:
    driver.set("hang")
    with in_background(lambda: client.attempt(PATIENCE)), in_background(lambda: client.attempt(PATIENCE)):
        assert driver.wait(probing=2).connections == 2
        driver.set("unset")

    assert driver.wait_until(lambda seen: seen.connections == 0).probes == 2


# ---- nobody there, or not a driver

REASONS: dict[str, tuple[peers.Peer, str, bool]] = {
    "missing": (lambda path: contextlib.nullcontext(), "no such file or directory", True),
    "stale": (peers.stale_socket, "connection refused", True),
    "full queue": (
        peers.never_accepting,
        "its queue of connections is full: stopped, hung, or overloaded",
        True,
    ),
    "regular file": (peers.regular_file, "not a socket", False),
    "directory": (peers.directory, "not a socket", False),
    "datagram socket": (peers.datagram_socket, "protocol wrong type for socket", False),
    "closing at once": (
        peers.closing_at_once,
        "the peer does not speak HTTP/2 (it closed the connection after 0 bytes)",
        False,
    ),
    "HTTP/1.1": (peers.http1, "the peer does not speak HTTP/2 (it began with b'HTTP/1.1 ')", False),
    "junk": (
        peers.junk,
        r"the peer does not speak HTTP/2 (it began with b'\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8\xf7')",
        False,
    ),
}


@pytest.mark.parametrize(("peer", "reason", "may_heal"), REASONS.values(), ids=REASONS)
def test_no_connection_names_address_and_reason_at_once(
    client: Driver,
    calls: list[tuple[str, str]],
    socket_path: Path,
    peer: peers.Peer,
    reason: str,
    may_heal: bool,
) -> None:
    with peer(socket_path):
        begin = time.monotonic()
        verdicts = [client.attempt(PATIENCE) for _ in range(3)]
        seconds = time.monotonic() - begin

    for verdict in verdicts:
        assert verdict.text == f"cannot connect to {socket_path}: {reason}"
        assert (verdict.outcome, verdict.may_heal) == (Outcome.UNREACHABLE, may_heal)
    assert seconds < PATIENCE / 2
    assert not calls


@pytest.mark.parametrize(
    ("peer", "detail"),
    [
        (peers.forbidden, "the socket belongs to uid {}, mode 0000"),
        (peers.forbidden_folder, "it may not enter the folder"),
    ],
)
def test_forbidden_sockets(client: Driver, socket_path: Path, peer: peers.Peer, detail: str) -> None:
    user = program.unprivileged() or os.geteuid()
    with peer(socket_path):
        for _ in range(2):
            with unprivileged():
                verdict = client.attempt(PATIENCE)

            assert verdict.text == (
                f"cannot connect to {socket_path}: permission denied (this program is uid {user}, "
                f"{detail.format(os.geteuid())}; where these fit, SELinux denies it)"
            )
            assert (verdict.outcome, verdict.may_heal) == (Outcome.UNREACHABLE, False)


def test_silent_peers_are_told_from_slow_answers(client: Driver, socket_path: Path) -> None:
    with peers.silent(socket_path):
        verdicts = [client.attempt(BRIEF) for _ in range(2)]

    assert [verdict.reason for verdict in verdicts] == ["DeadlineExceeded"] * 2
    assert f"{socket_path} takes connections, but nobody there answers" in verdicts[1].text


@pytest.mark.parametrize("name", peers.POOR_HTTP2)
def test_too_little_http2_fails_the_call(client: Driver, socket_path: Path, name: str) -> None:
    with peers.POOR_HTTP2[name](socket_path):
        for _ in range(2):
            verdict = client.attempt(BRIEF)

            assert verdict.outcome is Outcome.FAILED
            assert verdict.reason == ("DeadlineExceeded" if "silent" in name else "Unavailable")
            assert verdict.text.startswith(f"rpc error: code = {verdict.reason} desc = ")


def test_out_of_file_descriptors_ourselves(client: Driver, socket_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        # By a channel; and as that did not reach the driver, by a plain connection, which is tried first from now on.
        verdicts = [client.attempt(PATIENCE) for _ in range(2)]
        name = client.name(PATIENCE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    text = f"cannot connect to {socket_path}: too many open files in the liveness probe itself"
    assert [verdict.text for verdict in verdicts] == [text] * 2
    assert name == ("", "")


# ---- a driver that comes and goes


def test_late_killed_restarted(attempt: Callable[[float], Verdict], socket_path: Path) -> None:
    late = FakeDriver(socket_path)
    assert attempt(PATIENCE).text.endswith("no such file or directory")
    with late:
        assert attempt(PATIENCE) == HEALTHY
        late.kill()
        assert attempt(PATIENCE).text.endswith("connection refused")
        late.start()
        assert attempt(PATIENCE) == HEALTHY
        late.stop()
        assert attempt(PATIENCE).text.endswith("no such file or directory")


def test_unlinked_and_replaced_socket(
    driver: FakeDriver, client: Driver, attempt: Callable[[float], Verdict], socket_path: Path
) -> None:
    assert attempt(PATIENCE) == HEALTHY
    driver.unlink()
    assert attempt(PATIENCE).text.endswith("no such file or directory")

    with FakeDriver(socket_path, name="other.csi.k8s.io") as other:
        other.set("not-ready")
        assert attempt(PATIENCE) == NOT_READY
        assert client.name(PATIENCE) == ("other.csi.k8s.io", "")


def test_stopped_process(driver: FakeDriver, attempt: Callable[[float], Verdict]) -> None:
    assert attempt(PATIENCE) == HEALTHY
    driver.pause()
    for _ in range(2):
        assert attempt(BRIEF).reason == "DeadlineExceeded"
    driver.resume()
    assert attempt(PATIENCE) == HEALTHY


def test_out_of_file_descriptors(driver: FakeDriver, attempt: Callable[[float], Verdict]) -> None:
    assert attempt(PATIENCE) == HEALTHY
    driver.exhaust_descriptors()
    for _ in range(2):
        assert attempt(BRIEF).reason == "DeadlineExceeded"
    driver.release_descriptors()
    assert attempt(PATIENCE) == HEALTHY


def test_a_socket_replaced_while_the_old_driver_lives(
    driver: FakeDriver, attempt: Callable[[float], Verdict], socket_path: Path
) -> None:
    assert attempt(PATIENCE) == HEALTHY
    driver.unlink()
    with FakeDriver(socket_path) as other:
        other.set("not-ready")
        assert attempt(PATIENCE) == NOT_READY


# ---- one attempt after another


def test_a_kept_channel_is_used_until_a_rest(driver: FakeDriver, client: Driver) -> None:
    for _ in range(3):
        assert client.attempt(PATIENCE, keep=True) == HEALTHY
        driver.wait_until(lambda seen: seen.connections == 1)
    client.rest()
    assert driver.wait_until(lambda seen: seen.connections == 0).probes == 3

    assert client.attempt(PATIENCE, keep=True) == HEALTHY
    assert client.attempt(PATIENCE) == HEALTHY
    assert driver.wait_until(lambda seen: seen.connections == 0).probes == 5


def test_each_call_over_a_kept_channel_follows_a_new_connection(folder: Path, driver: FakeDriver) -> None:
    between = folder / "between.sock"
    with peers.relay(between, driver.target) as connections:
        client = Driver(str(between), str(between))
        for _ in range(3):
            assert client.attempt(PATIENCE, keep=True) == HEALTHY
        assert len(connections) == 3
        client.rest()


def test_after_a_failure_nothing_is_kept(driver: FakeDriver, client: Driver) -> None:
    assert client.attempt(PATIENCE, keep=True) == HEALTHY
    driver.set("error", code="INTERNAL", message="disk is gone")
    assert client.attempt(PATIENCE, keep=True).reason == "Internal"
    assert driver.wait_until(lambda seen: seen.connections == 0).probes == 2


def test_unavailable_over_a_kept_channel_is_asked_again_over_a_new_one(
    driver: FakeDriver, client: Driver, calls: list[tuple[str, str]]
) -> None:
    """The connection may have broken for reasons of its own."""
    assert client.attempt(PATIENCE, keep=True) == HEALTHY
    driver.set("error", code="UNAVAILABLE", message="no backend")
    assert client.attempt(PATIENCE, keep=True).text == "rpc error: code = Unavailable desc = no backend"
    assert calls == [(PROBE, "OK"), (PROBE, "Unavailable"), (PROBE, "Unavailable")]


def test_nothing_is_kept_for_another_target_than_a_unix_socket() -> None:
    with FakeDriver("127.0.0.1:0") as driver:
        client = Driver(driver.address, None)
        assert client.attempt(PATIENCE, keep=True) == HEALTHY
        driver.wait_until(lambda seen: seen.connections == 0)


def test_paths_with_characters_of_addresses(driver: FakeDriver, folder: Path) -> None:
    path = folder / "a b%20?#é"
    client = Driver(str(path), str(path))
    assert client.attempt(PATIENCE).text == f"cannot connect to {path}: no such file or directory"
    path.symlink_to(driver.target)
    assert client.attempt(PATIENCE) == HEALTHY
    assert client.name(PATIENCE) == ("fake.csi.k8s.io", "")


# ---- TCP


@pytest.mark.parametrize("scheme", ["", "dns:///", "ipv4:"])
def test_tcp(scheme: str) -> None:
    with FakeDriver("127.0.0.1:0") as driver:
        client = Driver(scheme + driver.address, None)
        assert client.attempt(PATIENCE) == HEALTHY
        assert client.name(PATIENCE) == ("fake.csi.k8s.io", "")
        driver.set("error", message="no disk")
        assert client.attempt(PATIENCE) == health.failed("Internal", "no disk")

    address = scheme + f"127.0.0.1:{program.free_port()}"
    verdict = Driver(address, None).attempt(PATIENCE)
    assert verdict.text.startswith(f"cannot connect to {address}: connection refused (")
    assert (verdict.outcome, verdict.reason) == (Outcome.UNREACHABLE, "connection refused")
    assert verdict.may_heal


def test_tcp_peer_that_does_not_speak_http2() -> None:
    with program.Probe(["--csi-address=/nowhere", "--http-endpoint=127.0.0.1:0"]) as http1:
        client = Driver(http1.addresses[0], None)
        for _ in range(2):
            verdict = client.attempt(PATIENCE)
            assert verdict.text == f"cannot connect to {http1.addresses[0]}: the peer does not speak HTTP/2"
            assert (verdict.outcome, verdict.may_heal) == (Outcome.UNREACHABLE, False)


def test_names_that_do_not_resolve() -> None:
    verdict = Driver("dns:///livenessprobe.invalid:1", None).attempt(PATIENCE)

    assert verdict.outcome is Outcome.UNREACHABLE
    assert verdict.text.startswith("cannot connect to dns:///livenessprobe.invalid:1: no connection (")


# ---- name and identity


def test_name(driver: FakeDriver, client: Driver, calls: list[tuple[str, str]]) -> None:
    assert client.name(PATIENCE) == ("fake.csi.k8s.io", "")
    assert calls == [(GET_PLUGIN_INFO, "OK")]


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (plugin_info(""), f"the name has 0 characters, not 1 to {LONGEST_NAME}"),
        (plugin_info("x" * 256), f"the name has 256 characters, not 1 to {LONGEST_NAME}"),
        (b"\xff\xff\xff", "cannot decode the reply: "),
    ],
)
def test_names_that_are_none(driver: FakeDriver, client: Driver, reply: bytes, problem: str) -> None:
    driver.set("raw", method="GetPluginInfo", data=reply)

    name, said = client.name(PATIENCE)
    assert name == ""
    assert said.startswith(problem)


def test_name_fails(driver: FakeDriver, client: Driver) -> None:
    driver.set("error", method="GetPluginInfo", message="not today")
    assert client.name(PATIENCE) == ("", "rpc error: code = Internal desc = not today")
    driver.set("hang", method="GetPluginInfo")
    assert client.name(BRIEF) == (
        "",
        f"rpc error: code = DeadlineExceeded desc = no answer to {GET_PLUGIN_INFO} in time",
    )


def test_name_without_connection_is_no_news(client: Driver) -> None:
    assert client.name(PATIENCE) == ("", "")


def test_identity_tells_drivers_apart(client: Driver, socket_path: Path) -> None:
    first = FakeDriver(socket_path)
    nobody = client.identity()
    with first:
        one = client.identity()
        client.attempt(PATIENCE)
        assert client.identity() == one != nobody
        first.unlink()
        with FakeDriver(socket_path):
            other = client.identity()
            assert other not in (one, nobody)


def test_identity_tells_what_was_behind_a_tcp_port_before_an_outage() -> None:
    with FakeDriver("127.0.0.1:0") as driver:
        client = Driver(driver.address, None)
        before = client.identity()
        assert client.attempt(PATIENCE) == HEALTHY
        assert client.identity() == before
        driver.set("hang")
        client.attempt(BRIEF)
        assert client.identity() != before


# ---- close

STOPPING = health.failed("Canceled", "the liveness probe is stopping")


def test_close_ends_a_call(driver: FakeDriver, client: Driver) -> None:
    driver.set("hang")
    with in_background(lambda: client.attempt(PATIENCE * 10)) as verdicts:
        driver.wait(probing=1)
        client.close()

    assert verdicts == [STOPPING]
    driver.wait_until(lambda seen: seen.probing == 0)


def test_close_ends_a_look_at_who_is_there(client: Driver, socket_path: Path) -> None:
    greeted = threading.Event()

    def stay_silent(connection: socket.socket) -> None:
        while connection.recv(1024):
            greeted.set()

    with peers.talking(stay_silent, socket_path):
        client.attempt(BRIEF)  # not reached: from now on a plain connection is tried first
        greeted.clear()
        with in_background(lambda: client.attempt(PATIENCE * 10)) as verdicts:
            assert greeted.wait(PATIENCE)
            client.close()

    assert verdicts == [STOPPING]


def test_nothing_begins_after_close(driver: FakeDriver, client: Driver) -> None:
    client.close()

    assert client.attempt(PATIENCE) == STOPPING
    assert driver.seen().probes == 0
