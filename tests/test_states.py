"""Random lives of the built file's driver and clients: each verdict is the one that a simple model gives.

The model is `Lives.verdict()` and what the rules write into its fields; after every rule both it and the program are
asked. A driver that answers may be late on a busy machine, so the test asks again after a missed deadline; a driver that
does not answer must never be taken for one that does. Late answers are counted, and must be few in the end.
"""

from __future__ import annotations

import contextlib
import functools
import re
import socket
import struct
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import peers
import program
import pytest
from fake_driver import CODES, FakeDriver
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_driver import GO_NAMES
from test_exchange import FINE, MALFORMED
from torture import Tally, assert_well_formed, effort, in_part, under_torture

from livenessprobe.quoting import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fake_driver import Behaviour

STEPS = 15
# That may run at the same time.
PARTS = 2
# Short, since each step costs this much while a driver does not answer.
PROBE_TIMEOUT = 0.3
# For anything that may take time on a slow machine.
PATIENCE = 20.0
GET = FINE["HTTP/1.1"]

# The most the program may hold, whatever happens; it begins with 18 MiB, 4 threads, 7 descriptors. In MiB.
MOST_MEMORY = 48
MOST_THREADS = 4
MOST_DESCRIPTORS = 32  # beyond those of the clients that are there
MOST_ORPHANS = 2


class Verdict(NamedTuple):
    """What the model says about a check."""

    kind: str
    text: str
    """A pattern."""
    healthy: bool = False
    alive: bool = False
    answers: bool = False
    """Whether whoever is there says or does something, which on a slow machine may be too late."""


def unreachable(reason: str, answers: bool = False) -> Verdict:
    return Verdict("unreachable", f"cannot connect to .*: {reason}", answers=answers)


HEALTHY = Verdict("healthy", "ok", healthy=True, alive=True, answers=True)
NOT_READY = Verdict("not ready", "driver responded but is not ready", alive=True, answers=True)
NO_ANSWER = Verdict("no answer", "rpc error: code = DeadlineExceeded desc = .*")
NO_HTTP2 = unreachable("the peer does not speak HTTP/2.*", answers=True)
CLOSED = unreachable("(closed by the peer|connection reset)", answers=True)
KINDS = ("healthy", "not ready", "an error", "no answer", "unreachable")

# What may be in the driver's place without being one.
OTHERS: dict[str, tuple[peers.Peer, Verdict]] = {
    "file": (peers.regular_file, unreachable("not a socket")),
    "folder": (peers.directory, unreachable("not a socket")),
    "datagram socket": (peers.datagram_socket, unreachable("protocol wrong type for socket")),
    "full queue": (peers.never_accepting, unreachable("its queue of connections is full.*")),
    "silent peer": (peers.silent, NO_ANSWER),
    "junk": (peers.junk, NO_HTTP2),
    "HTTP/1.1": (peers.http1, NO_HTTP2),
    "closing peer": (peers.closing_at_once, CLOSED),
}


def counted_rule(**drawn: Any) -> Callable[[Callable[..., None]], Any]:
    """A rule; the tally counts how often it was followed."""

    ruled: Callable[..., Any] = rule(**drawn)

    def made_of(step: Callable[..., None]) -> Any:
        @functools.wraps(step)
        def counting(self: Lives, *values: Any, **named: Any) -> None:
            self.tally.add(f"rules: {step.__name__}")
            step(self, *values, **named)

        return ruled(counting)

    return made_of


class Lives(RuleBasedStateMachine):
    """One run of the program, beside drivers that come and go at one address."""

    tally = Tally()

    def __init__(self) -> None:
        super().__init__()
        self.ends = contextlib.ExitStack()
        folder = self.ends.enter_context(tempfile.TemporaryDirectory(prefix="lp", dir="/tmp"))
        self.path = Path(folder, "csi.sock")
        self.driver: FakeDriver | None = None  # the one that listens at the path
        self.orphans: list[FakeDriver] = []  # those that did, and lost the path to others
        self.other: str | None = None  # of OTHERS
        self.other_ends = self.ends.enter_context(contextlib.ExitStack())
        self.stale = False
        self.answer = HEALTHY
        self.stopped = self.exhausted = self.given_up = False
        self.clients: list[socket.socket] = []
        self.tally.add("sequences")

    # ---- the model

    def verdict(self) -> Verdict:
        if self.other:
            return OTHERS[self.other][1]
        if self.driver:
            return NO_ANSWER if self.stopped or self.exhausted else self.answer
        if self.stale:
            return unreachable("connection refused")
        return unreachable("no such file or directory")

    # ---- the driver

    @precondition(lambda self: not self.driver)
    @counted_rule()
    def start(self) -> None:
        self.leave_place()
        self.driver = FakeDriver(self.path).start()
        self.stale = self.stopped = self.exhausted = self.given_up = False
        self.answer = HEALTHY

    @precondition(lambda self: self.obeys())
    @counted_rule(behaviour=st.sampled_from(["not-ready", "unset", "ready"]))
    def reply(self, behaviour: Behaviour) -> None:
        assert self.driver
        self.driver.set(behaviour)
        self.answer = NOT_READY if behaviour == "not-ready" else HEALTHY

    @precondition(lambda self: self.obeys())
    @counted_rule(for_good=st.booleans())
    def hang(self, for_good: bool) -> None:
        assert self.driver
        self.driver.set("hang")
        self.answer = NO_ANSWER
        self.mend(for_good, lambda: self.reply("unset"))

    @precondition(lambda self: self.obeys())
    @counted_rule(code=st.sampled_from(CODES), message=st.text(max_size=100))
    def fail(self, code: str, message: str) -> None:
        assert self.driver
        self.driver.set("error", code=code, message=message)
        said = re.escape(printable(message))
        self.answer = Verdict("an error", f"rpc error: code = {GO_NAMES[code]} desc = {said}", answers=True)

    @precondition(lambda self: self.obeys())
    @counted_rule(after=st.sampled_from([0.02, 0.1, 30.0]))
    def be_slow(self, after: float) -> None:
        assert self.driver
        self.driver.set("unset", after=after)
        self.answer = NO_ANSWER if after > PROBE_TIMEOUT else HEALTHY

    @precondition(lambda self: self.driver and not self.stopped)
    @counted_rule(for_good=st.booleans())
    def stop(self, for_good: bool) -> None:
        assert self.driver
        self.driver.pause()
        self.stopped = True
        self.mend(for_good, self.go_on)

    @precondition(lambda self: self.stopped)
    @counted_rule()
    def go_on(self) -> None:
        assert self.driver
        self.driver.resume()
        self.stopped = False

    @precondition(lambda self: self.obeys() and not self.exhausted)
    @counted_rule(for_good=st.booleans())
    def run_out_of_descriptors(self, for_good: bool) -> None:
        assert self.driver
        self.driver.exhaust_descriptors()
        self.exhausted = True
        self.mend(for_good, self.find_descriptors)

    @precondition(lambda self: self.exhausted)
    @counted_rule()
    def find_descriptors(self) -> None:
        assert self.driver
        self.driver.release_descriptors()
        self.exhausted = False

    @precondition(lambda self: self.driver)
    @counted_rule(for_good=st.booleans())
    def kill(self, for_good: bool) -> None:
        assert self.driver
        self.driver.kill()
        self.lose_driver()
        self.stale = True
        self.mend(for_good, self.start)

    @precondition(lambda self: self.obeys())
    @counted_rule(for_good=st.booleans())
    def end(self, for_good: bool) -> None:
        assert self.driver
        self.driver.stop()
        self.lose_driver()
        self.mend(for_good, self.start)

    @precondition(lambda self: self.driver)
    @counted_rule(for_good=st.booleans())
    def unlink(self, for_good: bool) -> None:
        assert self.driver
        self.driver.unlink()
        self.orphan_driver()
        self.mend(for_good, self.start)

    @precondition(lambda self: self.driver)
    @counted_rule()
    def replace(self) -> None:
        self.orphan_driver()
        self.start()

    # ---- what else is in its place

    @precondition(lambda self: not self.driver and not self.other)
    @counted_rule()
    def leave_stale_socket(self) -> None:
        if not self.stale:
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(str(self.path))
        self.stale = True

    @precondition(lambda self: not self.driver and not self.other)
    @counted_rule(other=st.sampled_from(sorted(OTHERS)), for_good=st.booleans())
    def take_place(self, other: str, for_good: bool) -> None:
        self.path.unlink(missing_ok=True)
        self.stale = False
        self.other_ends.enter_context(OTHERS[other][0](self.path))
        self.other = other
        self.mend(for_good, self.start)

    @precondition(lambda self: self.other)
    @counted_rule()
    def leave_place(self) -> None:
        self.other_ends.close()
        self.other = None

    # ---- clients

    @counted_rule(
        path=st.sampled_from(["/healthz", "/readyz", "/livez"]), method=st.sampled_from(["GET", "HEAD"])
    )
    def ask(self, path: str, method: str) -> None:
        self.check(path, method)

    @counted_rule(number=st.integers(2, 30), path=st.sampled_from(["/healthz", "/livez"]))
    def ask_together(self, number: int, path: str) -> None:
        with ThreadPoolExecutor(number) as pool:
            list(pool.map(self.check, [path] * number))
        if self.obeys():
            assert self.driver
            # The end of an abandoned call and the beginning of the next may overtake each other.
            assert self.driver.seen().most_probing <= (2 if self.given_up else 1)

    @counted_rule(
        number=st.integers(1, 5),
        sent=st.sampled_from([b"", b"G", GET[:-2], GET, *(head for head, _ in MALFORMED.values())])
        | st.binary(max_size=200),
        leave=st.sampled_from(["never", "at once", "by reset", "after the answer"]),
    )
    def disturb(self, number: int, sent: bytes, leave: str) -> None:
        for _ in range(number):
            client = self.probe.connect()
            # If it is refused before all was sent, the rest is not taken.
            with contextlib.suppress(ConnectionError):
                client.sendall(sent)
            if leave == "never":
                self.clients.append(client)
                continue
            if leave == "by reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif leave == "after the answer":
                with contextlib.suppress(ConnectionError):
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(65536):
                        pass
            client.close()

    @precondition(lambda self: self.clients)
    @counted_rule()
    def leave(self) -> None:
        while self.clients:
            self.clients.pop().close()

    # ---- what always holds

    @initialize(form=st.sampled_from(["text", "json"]), verbosity=st.sampled_from([0, 5]), late=st.booleans())
    def begin(self, form: str, verbosity: int, late: bool) -> None:
        flags = [f"--csi-address={self.path}", "--http-endpoint=127.0.0.1:0", "--connection-timeout=50ms"]
        flags += [f"--probe-timeout={PROBE_TIMEOUT}s", f"--logging-format={form}", f"-v={verbosity}"]
        self.probe = self.ends.enter_context(program.Probe(flags))
        if not late:
            self.start()

    @invariant()
    def verdict_is_the_models(self) -> None:
        self.tally.add("steps")
        # All paths, if that takes no time.
        for path in ("/readyz", "/livez", "/healthz") if self.verdict().answers else ("/healthz",):
            self.check(path)
        assert f"\ncsi_liveness_up {float(self.verdict().healthy)}\n" in self.probe.get("/metrics").text

    @invariant()
    def nothing_grows(self) -> None:
        memory, threads = self.probe.memory() >> 20, self.probe.threads()
        # A closed connection stays for a moment, and nothing tells when it is gone.
        self.wait_until(lambda: self.probe.descriptors() <= MOST_DESCRIPTORS + len(self.clients))
        self.tally.add("most MiB resident", memory)
        self.tally.add("most threads", threads)
        self.tally.add("most descriptors beside clients", self.probe.descriptors() - len(self.clients))
        assert memory <= MOST_MEMORY
        assert threads <= MOST_THREADS

    @invariant()
    def log_is_well_formed(self) -> None:
        assert_well_formed(self.probe.log_lines)
        assert not self.probe.output_lines

    def teardown(self) -> None:
        # The probe first, beside whatever the driver is doing: it must end cleanly all the same.
        self.ends.callback(self.kill_drivers)
        self.ends.callback(self.leave)
        self.ends.close()

    # ---- inside

    def mend(self, for_good: bool, how: Callable[[], None]) -> None:
        """Ends a trouble that should not last, once it was seen; otherwise most of a life would be trouble."""
        if not for_good:
            self.check()
            how()

    def obeys(self) -> bool:
        """Whether there is a driver that takes commands."""
        return self.driver is not None and not self.stopped

    def lose_driver(self) -> None:
        self.driver, self.stopped, self.exhausted = None, False, False

    def orphan_driver(self) -> None:
        assert self.driver
        self.orphans.append(self.driver)
        if len(self.orphans) > MOST_ORPHANS:
            self.orphans.pop(0).kill()
        self.lose_driver()

    def kill_drivers(self) -> None:
        for driver in [*self.orphans, *filter(None, [self.driver])]:
            driver.kill()

    def check(self, path: str = "/healthz", method: str = "GET") -> None:
        """Asks until the answer is the model's; any other is accepted only if it may be due to lateness."""
        expected = self.verdict()
        status = 200 if (expected.alive if path == "/livez" else expected.healthy) else 500
        end = time.monotonic() + PATIENCE
        pids = [each.pid for each in (self.probe, self.driver) if each]
        while True:
            response, took = program.asked(lambda: self.probe.get(path, method), *pids)
            self.tally.add("checks")
            self.tally.add(f"checks: {expected.kind}")
            self.tally.add(f"answers after the timeout: {expected.kind}", took > PROBE_TIMEOUT)
            assert response.seconds < PATIENCE
            text, bodiless = response.text, method == "HEAD"
            if response.status == status and (bodiless or re.fullmatch(expected.text, text)):
                self.given_up |= not expected.answers
                break
            missed = response.status == 500 and (bodiless or re.fullmatch(NO_ANSWER.text, text))
            told = f"{method} {path}: {response.status} {text!r} instead of {status} {expected.text!r}"
            assert expected.answers, told
            assert missed, told
            assert time.monotonic() < end, told
            self.tally.add("missed deadlines", took > PROBE_TIMEOUT / 2)
            self.given_up = True
        assert response.text.isprintable()
        assert bodiless or int(response.headers["Content-Length"]) == len(response.body)

    def wait_until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < end
            time.sleep(0.01)


# Each rule, and each trouble both for a moment and until something is done about it; at first the driver is healthy.
ONE_LIFE: list[tuple[str, tuple[Any, ...]]] = [
    ("ask", ("/readyz", "HEAD")),
    ("reply", ("not-ready",)),
    ("ask_together", (10, "/healthz")),
    ("reply", ("ready",)),
    ("be_slow", (0.1,)),
    ("ask_together", (10, "/livez")),
    ("fail", ("INTERNAL", "no disk")),
    ("be_slow", (30.0,)),
    ("replace", ()),
    ("disturb", (3, GET, "never")),
    ("disturb", (3, GET[:-2], "by reset")),
    ("hang", (False,)),
    ("hang", (True,)),
    ("leave", ()),
    ("reply", ("unset",)),
    ("ask", ("/livez", "HEAD")),
    ("fail", ("CANCELLED", '\n"')),
    ("replace", ()),
    ("stop", (False,)),
    ("stop", (True,)),
    ("go_on", ()),
    ("run_out_of_descriptors", (False,)),
    ("run_out_of_descriptors", (True,)),
    ("find_descriptors", ()),
    ("kill", (False,)),
    ("kill", (True,)),
    ("start", ()),
    ("end", (False,)),
    ("end", (True,)),
    ("leave_stale_socket", ()),
    ("start", ()),
    ("end", (True,)),
    ("take_place", ("full queue", False)),
    ("unlink", (False,)),
    ("unlink", (True,)),
    ("leave_stale_socket", ()),
    *(
        (step, arguments)
        for other in OTHERS
        for step, arguments in (("take_place", (other, True)), ("leave_place", ()))
    ),
    ("start", ()),
]


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Iterator[Tally]:
    Lives.tally = Tally()
    yield Lives.tally
    for name, value in Lives.tally.figures.items():
        record_property(name, value)


def assert_in_time(tally: Tally) -> None:
    """Any machine makes some answers late; the bounds leave room for that, but not for a habit of being late."""
    figures = tally.figures
    for kind in KINDS:
        assert figures[f"answers after the timeout: {kind}"] <= figures[f"checks: {kind}"] * 0.25 + 3, figures
    assert figures["missed deadlines"] <= figures["checks"] * 0.05 + 3, figures


def assert_each_kind(tally: Tally) -> None:
    """Else the steps would prove little."""
    assert all(tally.figures[f"checks: {kind}"] for kind in KINDS), tally.figures


def test_each_rule_in_one_life(tally: Tally) -> None:
    """Left to chance, some would seldom have their turn."""
    life = Lives()
    try:
        life.begin("text", 0, late=False)
        for step, arguments in ONE_LIFE:
            getattr(life, step)(*arguments)
            life.verdict_is_the_models()
            life.nothing_grows()
            life.log_is_well_formed()
    finally:
        life.teardown()
    assert min(tally.figures[f"rules: {each.function.__name__}"] for each in life.rules) >= 2, tally.figures
    assert_each_kind(tally)
    assert_in_time(tally)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.timeout(900)  # to find the smallest example, once there is one
def test_each_verdict_is_the_models(tally: Tally, part: int) -> None:
    run_state_machine_as_test(
        in_part(part, Lives),
        settings=settings(effort(24 // PARTS), stateful_step_count=STEPS, report_multiple_bugs=False),
    )
    if not under_torture():  # there, a part's lives may well have none of a kind
        assert_each_kind(tally)
    assert_in_time(tally)
