"""Sharing of checks, with real threads."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import TYPE_CHECKING

import pytest

from livenessprobe.checks import Checked, Checks
from livenessprobe.health import HEALTHY, NOT_READY, Outcome, Verdict
from livenessprobe.stopping import Stop

if TYPE_CHECKING:
    from collections.abc import Callable

MISSING = Verdict(Outcome.UNREACHABLE, "no such file or directory", "cannot connect", may_heal=True)


class Gate:
    """A check that reports its beginning and is told when to end, each through a queue."""

    def __init__(self) -> None:
        self.begun: Queue[None] = Queue()
        self.verdicts: Queue[Verdict | Exception] = Queue()
        self.count = 0

    def __call__(self, asked: float) -> Verdict:
        self.count += 1
        self.asked = asked
        self.begun.put(None)
        verdict = self.verdicts.get(timeout=10)
        if isinstance(verdict, Exception):
            raise verdict
        return verdict


class Running:
    """Checks on a thread of their own, until the `with` ends."""

    def __init__(
        self,
        check: Callable[[float], Verdict],
        *observers: Callable[[Checked], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stop = Stop()
        self._checks = Checks(self.stop, clock)
        self.ask = self._checks.ask
        self.thread = threading.Thread(target=self._checks.run, args=(check, *observers), daemon=True)

    def __enter__(self) -> Running:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(10)
        assert not self.thread.is_alive()


def test_without_a_thread_it_checks_when_told_to_if_somebody_waits() -> None:
    asked, seen, answers = list[float](), list[Checked](), list[Verdict]()
    checks = Checks(Stop(), lambda: 5.0)

    def check(moment: float) -> Verdict:
        asked.append(moment)
        return MISSING

    checks.run_once(check, seen.append)
    assert not asked
    for _ in range(3):
        checks.ask(answers.append)
    for _ in range(2):
        checks.run_once(check, seen.append)
    assert (asked, seen, answers) == ([5.0], [Checked(MISSING, 3, 5.0)], [MISSING] * 3)


def test_requests_during_a_check_share_its_verdict() -> None:
    gate, seen, answers = Gate(), Queue[Checked](), Queue[Verdict]()
    with Running(gate, seen.put, clock=lambda: 5.0) as checks, ThreadPoolExecutor(16) as pool:
        checks.ask(answers.put)
        gate.begun.get(timeout=10)
        list(pool.map(lambda _: checks.ask(answers.put), range(99)))
        assert answers.empty()
        gate.verdicts.put(NOT_READY)

        assert [answers.get(timeout=10) for _ in range(100)] == [NOT_READY] * 100
        assert seen.get(timeout=10) == Checked(NOT_READY, 100, 5.0)
    assert gate.count == 1


def test_a_request_after_the_end_gets_a_check_of_its_own() -> None:
    gate, answers = Gate(), Queue[Verdict]()
    with Running(gate) as checks:
        for verdict in (HEALTHY, MISSING, NOT_READY):
            gate.verdicts.put(verdict)
            checks.ask(answers.put)
            assert answers.get(timeout=10) is verdict
    assert gate.count == 3


def test_a_request_from_within_an_answer_gets_a_new_check() -> None:
    gate, answers = Gate(), Queue[Verdict]()
    with Running(gate) as checks:
        gate.verdicts.put(HEALTHY)
        gate.verdicts.put(MISSING)
        checks.ask(lambda _: checks.ask(answers.put))
        assert answers.get(timeout=10) is MISSING


def test_a_check_is_told_when_its_first_request_came() -> None:
    gate, answers, now = Gate(), Queue[Verdict](), [5.0]
    with Running(gate, clock=lambda: now[0]) as checks:
        for first in (5.0, 7.0):
            now[0] = first
            checks.ask(answers.put)
            gate.begun.get(timeout=10)
            now[0] = first + 1
            checks.ask(answers.put)
            gate.verdicts.put(HEALTHY)
            assert [answers.get(timeout=10) for _ in range(2)] == [HEALTHY] * 2
            assert gate.asked == first


def test_of_several_requests_the_first_counts() -> None:
    gate, answers, now = Gate(), Queue[Verdict](), [5.0]
    checks = Running(gate, clock=lambda: now[0])
    for now[0] in (5.0, 7.0, 9.0):
        checks.ask(answers.put)
    gate.verdicts.put(HEALTHY)
    with checks:
        assert [answers.get(timeout=10) for _ in range(3)] == [HEALTHY] * 3
    assert (gate.asked, gate.count) == (5.0, 1)


def test_no_check_without_a_request() -> None:
    gate = Gate()
    with Running(gate):
        pass
    assert gate.count == 0


def test_an_exception_in_the_check_is_a_verdict_and_the_next_check_goes_on() -> None:
    gate, answers = Gate(), Queue[Verdict]()
    with Running(gate) as checks:
        gate.verdicts.put(RuntimeError("broken"))
        gate.verdicts.put(HEALTHY)
        checks.ask(answers.put)
        broken = answers.get(timeout=10)
        checks.ask(answers.put)
        assert answers.get(timeout=10) is HEALTHY

    assert (broken.outcome, broken.reason) == (Outcome.FAILED, "Internal")
    assert "RuntimeError('broken')" in broken.text


def test_every_observer_sees_every_check_before_the_answers() -> None:
    gate, order = Gate(), Queue[object]()
    observers = [lambda seen: order.put(("first", seen)), lambda seen: order.put(("second", seen))]
    with Running(gate, *observers, clock=lambda: 5.0) as checks:
        gate.verdicts.put(HEALTHY)
        checks.ask(order.put)
        seen = Checked(HEALTHY, 1, 5.0)
        assert [order.get(timeout=10) for _ in range(3)] == [("first", seen), ("second", seen), HEALTHY]


def test_a_broken_observer_keeps_nobody_from_the_answer() -> None:
    answers = Queue[Verdict]()

    def broken(_: Checked) -> None:
        raise RuntimeError("broken")

    stop = Stop()
    checks = Checks(stop, time.monotonic)
    checks.ask(answers.put)
    stop.set()  # or else this thread waits for more, should the observer not be called
    with pytest.raises(RuntimeError):
        checks.run(lambda _: HEALTHY, broken)
    assert answers.get_nowait() is HEALTHY


def test_a_stop_answers_the_check_in_flight_and_refuses_later_requests() -> None:
    gate, answers = Gate(), Queue[Verdict]()
    with Running(gate) as checks:
        checks.ask(answers.put)
        gate.begun.get(timeout=10)
        checks.stop.set()
        late: list[Verdict] = []
        checks.ask(late.append)
        assert [verdict.reason for verdict in late] == ["Canceled"]
        assert checks.thread.is_alive()
        gate.verdicts.put(HEALTHY)
        assert answers.get(timeout=10) is HEALTHY
    assert gate.count == 1
    assert [verdict.text for verdict in late] == [
        "rpc error: code = Canceled desc = the liveness probe is stopping"
    ]


def test_under_load_every_request_is_answered_once_and_never_two_checks_at_a_time() -> None:
    under_way, counts = threading.Lock(), Queue[int]()

    def exclusive(_: float) -> Verdict:
        assert under_way.acquire(blocking=False)
        time.sleep(0.0005)  # in which a second check would be noticed
        under_way.release()
        return HEALTHY

    answers = Queue[Verdict]()
    with Running(exclusive, lambda seen: counts.put(seen.answers)) as checks, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: checks.ask(answers.put), range(2000)))
        assert [answers.get(timeout=10) for _ in range(2000)] == [HEALTHY] * 2000
    assert answers.empty()
    assert sum(counts.get_nowait() for _ in range(counts.qsize())) == 2000


def test_a_stop_before_the_first_check_is_one_too() -> None:
    checks = Running(lambda _: HEALTHY)
    checks.stop.set()
    answers: list[Verdict] = []
    checks.ask(answers.append)
    assert [verdict.reason for verdict in answers] == ["Canceled"]
    with checks:
        pass


def test_who_asked_before_a_stop_is_answered_by_a_check() -> None:
    checks = Running(lambda _: NOT_READY)
    answers = Queue[Verdict]()
    checks.ask(answers.put)
    checks.stop.set()
    with checks:
        assert answers.get(timeout=10) is NOT_READY
