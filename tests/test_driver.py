"""driver.py: what it makes of whatever a call says; then with real drivers, by both ways to call."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest
from fake_driver import CODES, UNDECODABLE, FakeDriver, plugin_info

from livenessprobe import health
from livenessprobe.driver import GET_PLUGIN_INFO, LONGEST_NAME, PROBE, Driver, way_to
from livenessprobe.grpc_call import GrpcCall
from livenessprobe.health import HEALTHY, NOT_READY, Outcome, Verdict
from livenessprobe.rpc import Reply, Unreachable
from livenessprobe.unix_call import UnixCall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fake_driver import Behaviour

# Longer than anything here takes; whatever should end sooner ends by itself.
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

ADDRESS = "unix:///csi/csi.sock"


def soon(seconds: float = PATIENCE) -> float:
    return time.monotonic() + seconds


# ---- over a call that the test answers


class Calls:
    """A way to call that says what the test tells it, and notes what it is asked."""

    def __init__(self, *said: Reply | Exception) -> None:
        self.asked: list[tuple[str, bytes, float]] = []
        self.observed: list[tuple[str, str]] = []
        self.closed = False
        self._said = [*said]

    def __call__(self, method: str, request: bytes, deadline: float) -> Reply:
        self.asked.append((method, request, deadline))
        said = self._said.pop(0)
        if isinstance(said, Exception):
            raise said
        return said

    def close(self) -> None:
        self.closed = True

    def driver(self, path: Path | None = None) -> Driver:
        def observe(method: str, code: str, seconds: float) -> None:
            assert 0 <= seconds < PATIENCE
            self.observed.append((method, code))

        return Driver(ADDRESS, str(path) if path else None, self, observe)


def ok(payload: bytes) -> Reply:
    return Reply("OK", "", payload)


@pytest.mark.parametrize(
    ("payload", "verdict"),
    [
        (b"", HEALTHY),
        (b"\n\x02\x08\x01", HEALTHY),
        (b"\n\0", NOT_READY),
        (b"\n\x02\x08\0", NOT_READY),
        (b"\x12\x02ok", HEALTHY),  # a field of a later specification
    ],
    ids=["unset", "true", "false, as it is sent", "false, written out", "unknown field"],
)
def test_a_reply_is_a_verdict(payload: bytes, verdict: Verdict) -> None:
    calls = Calls(ok(payload))

    assert calls.driver().attempt(7.5) == verdict
    assert calls.asked == [(PROBE, b"", 7.5)]
    assert calls.observed == [(PROBE, "OK")]


def test_a_failed_call_keeps_its_code_and_its_words() -> None:
    calls = Calls(Reply("Code(404)", "no disk", None))

    assert calls.driver().attempt(soon()) == Verdict(
        Outcome.FAILED, "Code(404)", "rpc error: code = Code(404) desc = no disk"
    )
    assert calls.observed == [(PROBE, "Code(404)")]


@pytest.mark.parametrize("data", UNDECODABLE.values(), ids=UNDECODABLE)
def test_a_reply_that_cannot_be_decoded_is_a_failure(data: bytes) -> None:
    verdict = Calls(ok(data)).driver().attempt(soon())

    assert (verdict.outcome, verdict.reason) == (Outcome.FAILED, "Internal")
    assert verdict.text.startswith("rpc error: code = Internal desc = cannot decode the reply: ")


@pytest.mark.parametrize("may_heal", [False, True])
def test_no_connection_names_the_address_and_is_no_call(may_heal: bool) -> None:
    calls = Calls(Unreachable("permission denied", " (uid 7)", may_heal=may_heal))

    assert calls.driver().attempt(soon()) == Verdict(
        Outcome.UNREACHABLE,
        "permission denied",
        f"cannot connect to {ADDRESS}: permission denied (uid 7)",
        may_heal,
    )
    assert not calls.observed


def test_a_name_is_what_the_driver_says() -> None:
    calls = Calls(ok(plugin_info("disk.csi.k8s.io")))

    assert calls.driver().name(7.5) == ("disk.csi.k8s.io", "")
    assert calls.asked == [(GET_PLUGIN_INFO, b"", 7.5)]
    assert calls.observed == [(GET_PLUGIN_INFO, "OK")]


@pytest.mark.parametrize("length", [1, LONGEST_NAME])
def test_names_may_be_short_or_long(length: int) -> None:
    assert Calls(ok(plugin_info("x" * length))).driver().name(soon()) == ("x" * length, "")


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (ok(plugin_info("")), f"the name has 0 characters, not 1 to {LONGEST_NAME}"),
        (ok(plugin_info("x" * 256)), f"the name has 256 characters, not 1 to {LONGEST_NAME}"),
        (Reply("Internal", "not today", None), "rpc error: code = Internal desc = not today"),
        (Unreachable("no such file or directory", may_heal=True), ""),
    ],
)
def test_a_name_that_is_none_has_a_reason_but_for_want_of_a_connection(
    said: Reply | Unreachable, problem: str
) -> None:
    assert Calls(said).driver().name(soon()) == ("", problem)


def test_out_of_memory_for_a_call_there_is_no_connection() -> None:
    driver = Calls(MemoryError(), MemoryError()).driver()
    verdict = driver.attempt(soon())
    text = f"cannot connect to {ADDRESS}: out of memory in the liveness probe itself"
    assert (verdict.outcome, verdict.reason, verdict.text) == (Outcome.UNREACHABLE, "out of memory", text)
    assert driver.name(soon()) == ("", "")


def test_a_name_that_cannot_be_decoded() -> None:
    name, problem = Calls(ok(b"\xff\xff\xff")).driver().name(soon())

    assert name == ""
    assert problem.startswith("cannot decode the reply: ")


@pytest.mark.parametrize("outage", [Unreachable("gone"), Reply("DeadlineExceeded", "no answer", None)])
def test_after_an_outage_another_driver_may_be_there(outage: Reply | Unreachable) -> None:
    driver = Calls(ok(b""), Reply("Internal", "", None), ok(b""), outage, outage, ok(b"")).driver()
    before = driver.identity()
    for _ in range(3):
        driver.attempt(soon())
        assert driver.identity() == before
    driver.attempt(soon())
    during = driver.identity()
    assert during != before
    for _ in range(2):
        driver.attempt(soon())
        assert driver.identity() == during


def test_an_outage_may_come_before_the_first_answer() -> None:
    """It may have told its name by then."""
    driver = Calls(Unreachable("gone")).driver()
    before = driver.identity()
    driver.attempt(soon())
    assert driver.identity() != before


def test_at_another_socket_another_driver_may_be_there(socket_path: Path) -> None:
    driver = Calls().driver(socket_path)
    seen = [driver.identity()]
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(socket_path))
            seen.append(driver.identity())
            assert driver.identity() == seen[-1]
        time.sleep(0.02)  # a file system's clock may advance in steps as long as this
        socket_path.unlink()
    assert len(set(seen)) == 3
    assert driver.identity() == seen[0]


def test_close_closes_the_way_to_call() -> None:
    calls = Calls()
    calls.driver().close()
    assert calls.closed


def test_level_5_shows_call_and_reply(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO - 5, "livenessprobe.driver")
    Calls(Reply("Internal", "no disk", None)).driver().attempt(soon())

    asked, replied = caplog.records
    assert (asked.levelno, asked.msg) == (logging.INFO - 5, "Calling the CSI driver")
    assert isinstance(asked.args, dict)
    assert (asked.args["method"], str(asked.args["timeout"])[:2]) in [(PROBE, "19"), (PROBE, "20")]
    assert (replied.levelno, replied.msg) == (logging.INFO - 5, "The CSI driver replied")
    assert isinstance(replied.args, dict)
    assert {"method": PROBE, "code": "Internal", "message": "no disk"}.items() <= replied.args.items()
    assert 0 <= replied.args["seconds"] < 1


def test_seconds_are_shown_to_the_microsecond(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO - 5, "livenessprobe.driver")
    calls = Calls(*[ok(b"")] * 50)
    for _ in range(50):
        calls.driver().attempt(soon())

    shown = [
        line.args["seconds"]
        for line in caplog.records
        if isinstance(line.args, dict) and "seconds" in line.args
    ]
    assert len(shown) == 50
    assert all(isinstance(seconds, float) and seconds == round(seconds, 6) for seconds in shown)


# ---- with real drivers, by both ways to call


def test_the_way_is_that_of_the_address(socket_path: Path) -> None:
    assert isinstance(way_to(f"unix://{socket_path}", str(socket_path)), UnixCall)
    assert isinstance(way_to("dns:///localhost:1", None), GrpcCall)


def client_of(driver: FakeDriver) -> Driver:
    path = driver.target if driver.target.startswith("/") else None
    return Driver(driver.address, path, way_to(driver.address, path))


@pytest.fixture(params=["unix", "tcp"])
def there(request: pytest.FixtureRequest, socket_path: Path) -> Iterator[tuple[FakeDriver, Driver]]:
    """A driver, and our side of the connection."""
    with FakeDriver(socket_path if request.param == "unix" else "127.0.0.1:0") as driver:
        client = client_of(driver)
        yield driver, client
        client.close()


@contextlib.contextmanager
def in_background(work: Callable[[], Verdict]) -> Iterator[list[Verdict]]:
    """Runs the work on a thread while the body runs; afterwards, what it returned is in the list."""
    results: list[Verdict] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    try:
        yield results
    finally:
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("behaviour", "verdict"), [("unset", HEALTHY), ("ready", HEALTHY), ("not-ready", NOT_READY)]
)
def test_replies(there: tuple[FakeDriver, Driver], behaviour: Behaviour, verdict: Verdict) -> None:
    driver, client = there
    driver.set(behaviour)
    assert client.attempt(soon()) == verdict
    assert client.name(soon()) == ("fake.csi.k8s.io", "")


def test_every_error_code_has_its_name_in_go_and_the_drivers_words(there: tuple[FakeDriver, Driver]) -> None:
    driver, client = there
    assert set(CODES) == set(GO_NAMES)
    for code, name in GO_NAMES.items():
        driver.set("error", code=code, message=f"disk {code} is gone: größer 100 %41")
        assert client.attempt(soon()) == health.failed(name, f"disk {code} is gone: größer 100 %41")


@pytest.mark.parametrize("behaviour", ["unimplemented", "no-service"])
def test_unimplemented(there: tuple[FakeDriver, Driver], behaviour: Behaviour) -> None:
    driver, client = there
    driver.set(behaviour)
    verdict = client.attempt(soon())
    assert verdict.text.startswith("rpc error: code = Unimplemented desc = ")
    assert verdict.outcome is Outcome.FAILED


def test_slow_answers_count(there: tuple[FakeDriver, Driver]) -> None:
    driver, client = there
    driver.set("slow", after=0.5)
    begin = time.monotonic()
    assert client.attempt(soon()) == HEALTHY
    assert time.monotonic() - begin >= 0.5


def test_no_answer_in_time_has_the_same_words_each_time(there: tuple[FakeDriver, Driver]) -> None:
    driver, client = there
    driver.set("hang")
    for _ in range(3):
        begin = time.monotonic()
        assert client.attempt(soon(BRIEF)) == health.failed(
            "DeadlineExceeded", f"no answer to {PROBE} in time"
        )
        assert BRIEF * 0.9 <= time.monotonic() - begin < BRIEF + PATIENCE / 2
    driver.set("unset")
    assert client.attempt(soon()) == HEALTHY


@pytest.mark.parametrize("code", ["DEADLINE_EXCEEDED", "UNAVAILABLE"])
def test_a_drivers_own_trouble_with_a_backend_is_a_failed_call(
    there: tuple[FakeDriver, Driver], code: str
) -> None:
    driver, client = there
    driver.set("error", code=code, message="no answer from backend")
    assert client.attempt(soon()) == health.failed(GO_NAMES[code], "no answer from backend")


def test_long_error_texts_are_cut(there: tuple[FakeDriver, Driver]) -> None:
    driver, client = there
    driver.set("error", message="é" * 150_000)
    text = client.attempt(soon()).text
    assert text.startswith("rpc error: code = Internal desc = éééé")
    assert text.endswith("(cut, 300034 bytes in all)")
    assert len(text.encode()) <= 4096


def test_megabytes_of_error_text_are_not_taken(there: tuple[FakeDriver, Driver]) -> None:
    """Several times their size would not fit into the memory of a small container."""
    driver, client = there
    driver.set("error", message="x" * 15_000_000)
    verdict = client.attempt(soon())
    assert (verdict.outcome, verdict.reason) == (Outcome.FAILED, "ResourceExhausted")


def test_a_reply_of_more_than_64_kib_is_not_taken(there: tuple[FakeDriver, Driver]) -> None:
    driver, client = there
    driver.set("raw", data=b"\x12" + b"\xfe\xff\x03" + bytes(65534))  # a field of a later specification
    verdict = client.attempt(soon())
    assert (verdict.outcome, verdict.reason) == (Outcome.FAILED, "ResourceExhausted")
    driver.set("raw", data=b"\x12" + b"\xfc\xff\x03" + bytes(65532))
    assert client.attempt(soon()) == HEALTHY


def test_each_attempt_has_a_connection_of_its_own_and_ends_it(there: tuple[FakeDriver, Driver]) -> None:
    driver, client = there
    driver.set("hang")
    with in_background(lambda: client.attempt(soon())), in_background(lambda: client.attempt(soon())):
        driver.wait_until(lambda seen: seen.probing == seen.connections == 2)
        driver.set("unset")
    assert driver.wait_until(lambda seen: seen.connections == 0).probes == 2


def test_a_driver_comes_and_goes(there: tuple[FakeDriver, Driver]) -> None:
    driver, client = there

    def becomes(reason: str, seconds: float = PATIENCE) -> None:
        assert client.attempt(soon(seconds)).reason == reason

    becomes("OK")
    driver.pause()
    becomes("DeadlineExceeded", BRIEF)
    driver.resume()
    becomes("OK")
    driver.exhaust_descriptors()
    for _ in range(2):
        becomes("DeadlineExceeded", BRIEF)
    driver.release_descriptors()
    becomes("OK")
    driver.kill()
    becomes("connection refused")


def test_a_socket_that_is_late_stale_and_replaced(socket_path: Path) -> None:
    first = FakeDriver(socket_path)
    client = client_of(first)

    def fails(reason: str) -> None:
        assert client.attempt(soon()).text == f"cannot connect to {socket_path}: {reason}"

    fails("no such file or directory")
    with first:
        assert client.attempt(soon()) == HEALTHY
        first.kill()
        fails("connection refused")
        first.start()
        assert client.attempt(soon()) == HEALTHY
        # The old driver lives, but its socket has gone.
        first.unlink()
        fails("no such file or directory")
        with FakeDriver(socket_path, name="other.csi.k8s.io") as other:
            other.set("not-ready")
            assert client.attempt(soon()) == NOT_READY
            assert client.name(soon()) == ("other.csi.k8s.io", "")
            other.stop()
        fails("no such file or directory")


def test_close_ends_a_call_and_lets_none_begin(there: tuple[FakeDriver, Driver]) -> None:
    driver, client = there
    driver.set("hang")
    stopping = health.failed("Canceled", "the liveness probe is stopping")
    with in_background(lambda: client.attempt(soon(PATIENCE * 10))) as verdicts:
        driver.wait(probing=1)
        client.close()
    assert verdicts == [stopping]
    driver.wait_until(lambda seen: seen.probing == 0)

    driver.set("unset")
    assert client.attempt(soon()) == stopping
    assert driver.seen().probes == 1
