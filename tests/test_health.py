"""The rules of a check, with a clock that tests move; sharing, with real threads; changes worth a line."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import FrozenInstanceError
from queue import Queue
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from livenessprobe.health import (
    HANG_SECONDS,
    HEALTHY,
    NOT_READY,
    RETRY_SECONDS,
    Change,
    Checked,
    Checks,
    History,
    Outcome,
    Patience,
    Verdict,
    check,
    failed,
    one_shot,
    served,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MISSING = Verdict(Outcome.UNREACHABLE, "no such file or directory", "cannot connect", may_heal=True)
FORBIDDEN = Verdict(Outcome.UNREACHABLE, "permission denied", "cannot connect")

# ---- verdicts


def test_texts_of_the_contract() -> None:
    assert HEALTHY.text == "ok"
    assert NOT_READY.text == "driver responded but is not ready"
    assert failed("Internal", "disk gone").text == "rpc error: code = Internal desc = disk gone"


def test_a_failure_keeps_its_code_as_the_reason_and_at_most_4_kib_of_its_message() -> None:
    verdict = failed("DataLoss", "é" * 1_000_000)

    assert (verdict.outcome, verdict.reason) == (Outcome.FAILED, "DataLoss")
    assert len(verdict.text.encode()) <= 4096
    assert verdict.text.startswith("rpc error: code = DataLoss desc = éé")
    assert "cut" in verdict.text[-40:]


def test_values_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        HEALTHY.text = "no"  # type: ignore[misc]


# ---- patience


@given(st.floats(0, 1e6), st.floats(0.001, 1e6))
def test_a_served_answer_is_out_before_the_probe_timeout(connection: float, probe: float) -> None:
    patience = served(connection, probe)

    assert patience.total <= probe - min(0.05, probe / 4) < probe
    assert patience.answer == patience.total
    assert patience.connect == min(connection, patience.total)


def test_50_ms_are_kept_in_hand() -> None:
    assert served(30, 3).total == pytest.approx(2.95)
    assert served(30, 0.1).total == pytest.approx(0.075)


def test_one_shot_waits_for_the_socket_and_then_for_the_answer() -> None:
    assert one_shot(30, 3) == Patience(connect=30, answer=3, total=33)


# ---- check


class World:
    """Time and a driver: an attempt takes `cost` seconds and finds what `found` says of its time."""

    def __init__(self, found: Callable[[float], Verdict], cost: float = 0.0, stop_at: float = 1e9) -> None:
        self.now = 1000.0
        self._found, self._cost, self._stop_at = found, cost, stop_at
        self.attempts: list[tuple[float, float]] = []  # when, with how much time
        self.waited_for: list[Verdict] = []

    def attempt(self, timeout: float) -> Verdict:
        self.attempts.append((self.now - 1000, timeout))
        self.now += self._cost
        return self._found(self.now - 1000)

    def pause(self, seconds: float) -> bool:
        assert seconds > 0
        self.now += seconds
        return self.now - 1000 >= self._stop_at

    def check(self, patience: Patience) -> Verdict:
        return check(self.attempt, patience, 1000.0, lambda: self.now, self.pause, self.waited_for.append)


@pytest.mark.parametrize("verdict", [HEALTHY, NOT_READY, FORBIDDEN, failed("Internal", "x")])
def test_what_does_not_heal_by_waiting_is_answered_at_once(verdict: Verdict) -> None:
    world = World(lambda _: verdict)

    assert world.check(served(30, 3)) is verdict
    assert world.attempts[0] == pytest.approx((0, 2.95))
    assert len(world.attempts) == 1
    assert not world.waited_for


@pytest.mark.parametrize(
    ("connection", "probe", "end"),
    [(30, 3, 2.9), (1, 3, 1), (0, 3, 0), (0.25, 3, 0.25), (30, 0.2, 0.1), (30, 0.04, 0)],
)
def test_a_missing_socket_is_retried_until_the_smaller_time(connection: float, probe: float, end: float) -> None:  # fmt: skip
    world = World(lambda _: MISSING)

    assert world.check(served(connection, probe)) is MISSING
    assert world.now - 1000 == pytest.approx(end)
    times = [at for at, _ in world.attempts]
    assert times[:-1] == pytest.approx([i * RETRY_SECONDS for i in range(len(times) - 1)])
    assert times[-1] == pytest.approx(end)
    assert world.waited_for == [MISSING] * (len(times) - 1)


@pytest.mark.parametrize("cost", [0.0, 0.01, 0.3, 1.0])
def test_no_attempt_has_less_time_than_the_one_before_took(cost: float) -> None:
    """It would find that its time is over, and hide the reason."""
    world = World(lambda _: MISSING, cost)

    assert world.check(served(30, 3)) is MISSING
    assert len(world.attempts) > 1
    assert all(timeout >= max(cost, 0.05) - 1e-6 for _, timeout in world.attempts)


def test_retries_come_about_every_100_ms() -> None:
    assert pytest.approx(0.1) == RETRY_SECONDS


def test_a_late_driver_is_found_and_gets_what_time_is_left() -> None:
    world = World(lambda now: HEALTHY if now > 1 else MISSING)

    assert world.check(served(30, 3)) is HEALTHY
    assert 1 < world.now - 1000 <= 1 + 2 * RETRY_SECONDS
    assert all(timeout == pytest.approx(2.95 - at) for at, timeout in world.attempts)


def test_one_shot_gives_a_late_driver_the_whole_probe_timeout() -> None:
    world = World(lambda now: HEALTHY if now > 20 else MISSING)

    assert world.check(one_shot(30, 3)) is HEALTHY
    assert world.attempts[-1][1] == pytest.approx(3)


@given(st.floats(0, 5), st.floats(0.01, 5), st.floats(0, 0.5))
def test_a_check_never_takes_longer_than_its_patience(connection: float, probe: float, cost: float) -> None:
    patience = served(connection, probe)
    world = World(lambda _: MISSING, cost=cost)

    world.check(patience)

    assert all(at <= patience.connect + 1e-6 for at, _ in world.attempts)
    assert all(at + timeout <= patience.total + 1e-6 for at, timeout in world.attempts)


def test_time_counts_from_when_somebody_began_to_wait() -> None:
    world = World(lambda _: MISSING)
    world.now += 2.0

    assert world.check(served(30, 3)) is MISSING
    assert world.attempts[0] == pytest.approx((2.0, 0.95))
    assert world.now - 1000 == pytest.approx(2.9)


def test_stopping_ends_the_wait() -> None:
    world = World(lambda _: MISSING, stop_at=0.2)

    assert world.check(served(30, 3)) is MISSING
    assert len(world.attempts) == 2


def test_nobody_needs_to_hear_of_the_waiting() -> None:
    answers = iter([MISSING, HEALTHY])

    assert check(lambda _: next(answers), served(30, 3), 0.0, lambda: 0.0, lambda _: False) is HEALTHY


# ---- Checks


class Gate:
    """A check whose beginning is told and whose end is given, each through a queue."""

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


@contextmanager
def running(checks: Checks) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=checks.run)
    thread.start()
    try:
        yield thread
    finally:
        checks.close()
        thread.join(10)
        assert not thread.is_alive()


def test_requests_during_a_check_share_its_verdict() -> None:
    gate, seen, answers = Gate(), Queue[Checked](), Queue[Verdict]()
    checks = Checks(gate, lambda: 5.0, seen.put)
    with running(checks), ThreadPoolExecutor(16) as pool:
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
    checks = Checks(gate, time.monotonic)
    with running(checks):
        for verdict in (HEALTHY, MISSING, NOT_READY):
            gate.verdicts.put(verdict)
            checks.ask(answers.put)
            assert answers.get(timeout=10) is verdict
    assert gate.count == 3


def test_a_request_from_within_an_answer_gets_a_new_check() -> None:
    gate, answers = Gate(), Queue[Verdict]()
    checks = Checks(gate, time.monotonic)
    with running(checks):
        gate.verdicts.put(HEALTHY)
        gate.verdicts.put(MISSING)
        checks.ask(lambda _: checks.ask(answers.put))
        assert answers.get(timeout=10) is MISSING


def test_a_check_is_told_when_its_first_request_came() -> None:
    gate, answers, now = Gate(), Queue[Verdict](), [5.0]
    checks = Checks(gate, lambda: now[0])
    with running(checks):
        for first in (5.0, 7.0):
            now[0] = first
            checks.ask(answers.put)
            gate.begun.get(timeout=10)
            now[0] = first + 1
            checks.ask(answers.put)
            gate.verdicts.put(HEALTHY)
            assert [answers.get(timeout=10) for _ in range(2)] == [HEALTHY] * 2
            assert gate.asked == first


def test_checks_that_follow_one_another_are_a_burst_which_ends_with_a_rest() -> None:
    now, bursts, answers, rests = [0.0], list[bool](), Queue[Verdict](), Queue[threading.Thread]()

    def note(_: float) -> Verdict:
        bursts.append(checks.in_burst)
        return HEALTHY

    checks = Checks(note, lambda: now[0], rest=lambda: rests.put(threading.current_thread()))
    with running(checks) as thread:
        for at in (1.0, 2.0, 2.05, 2.1):
            now[0] = at
            checks.ask(answers.put)
            answers.get(timeout=10)
        assert rests.get(timeout=10) is thread
        now[0] = 3.0
        checks.ask(answers.put)
        answers.get(timeout=10)
    assert bursts == [False, False, True, True, False]


def test_no_rest_without_a_burst() -> None:
    now, answers, rests = [0.0], Queue[Verdict](), Queue[None]()
    checks = Checks(lambda _: HEALTHY, lambda: now[0], rest=lambda: rests.put(None))
    with running(checks):
        for at in (1.0, 2.0, 3.0):
            now[0] = at
            checks.ask(answers.put)
            answers.get(timeout=10)
    assert rests.empty()


def test_a_check_hangs_that_is_far_over_its_time_and_was_so_before() -> None:
    gate, answers, now = Gate(), Queue[Verdict](), [5.0]
    checks = Checks(gate, lambda: now[0])

    def hangs(at: float) -> bool:
        now[0] = at
        return checks.hangs(3.0)

    with running(checks):
        assert not hangs(5000)
        for begin in (1e4, 2e4):
            now[0] = begin
            checks.ask(answers.put)
            gate.begun.get(timeout=10)
            assert not hangs(begin + 3 + HANG_SECONDS - 1)
            # The whole process may have been stopped until now: the check needs a moment to end.
            assert not hangs(begin + 1000)
            assert not hangs(begin + 1000 + HANG_SECONDS - 1)
            assert hangs(begin + 1000 + HANG_SECONDS)
            gate.verdicts.put(HEALTHY)
            assert answers.get(timeout=10) is HEALTHY
            assert not hangs(begin + 2000)


def test_no_check_without_a_request() -> None:
    gate = Gate()
    with running(Checks(gate, time.monotonic)):
        pass
    assert gate.count == 0


def test_an_exception_in_the_check_is_a_verdict_and_the_next_check_goes_on() -> None:
    gate, answers = Gate(), Queue[Verdict]()
    checks = Checks(gate, time.monotonic)
    with running(checks):
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
    checks = Checks(
        gate,
        lambda: 5.0,
        lambda seen: order.put(("first", seen)),
        lambda seen: order.put(("second", seen)),
    )
    with running(checks):
        gate.verdicts.put(HEALTHY)
        checks.ask(order.put)
        seen = Checked(HEALTHY, 1, 5.0)
        assert [order.get(timeout=10) for _ in range(3)] == [("first", seen), ("second", seen), HEALTHY]


def test_a_broken_observer_keeps_nobody_from_the_answer() -> None:
    answers = Queue[Verdict]()

    def broken(_: Checked) -> None:
        raise RuntimeError("broken")

    checks = Checks(lambda _: HEALTHY, time.monotonic, broken)
    checks.ask(answers.put)
    with pytest.raises(RuntimeError):
        checks.run()
    assert answers.get_nowait() is HEALTHY


def test_close_answers_the_check_in_flight_and_refuses_later_requests() -> None:
    gate, answers = Gate(), Queue[Verdict]()
    checks = Checks(gate, time.monotonic)
    with running(checks) as thread:
        checks.ask(answers.put)
        gate.begun.get(timeout=10)
        checks.close()
        late: list[Verdict] = []
        checks.ask(late.append)
        assert [verdict.reason for verdict in late] == ["Canceled"]
        assert thread.is_alive()
        gate.verdicts.put(HEALTHY)
        assert answers.get(timeout=10) is HEALTHY
        thread.join(10)
        assert not thread.is_alive()
    assert gate.count == 1


def test_under_load_every_request_is_answered_once_and_never_two_checks_at_a_time() -> None:
    under_way, counts = threading.Lock(), Queue[int]()

    def exclusive(_: float) -> Verdict:
        assert under_way.acquire(blocking=False)
        under_way.release()
        return HEALTHY

    answers = Queue[Verdict]()
    checks = Checks(exclusive, time.monotonic, lambda seen: counts.put(seen.answers))
    with running(checks), ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: checks.ask(answers.put), range(2000)))
        assert [answers.get(timeout=10) for _ in range(2000)] == [HEALTHY] * 2000
    assert answers.empty()
    assert sum(counts.get_nowait() for _ in range(counts.qsize())) == 2000


# ---- History


def feed(*events: tuple[float, Verdict]) -> list[Change | None]:
    history = History()
    return [history.add(verdict, now, now) for now, verdict in events]


def test_the_first_verdict_is_a_change() -> None:
    assert feed((5, HEALTHY)) == [Change(HEALTHY, 0, 0.0)]
    assert feed((5, MISSING)) == [Change(MISSING, 1, 0.0)]


def test_the_same_again_is_none() -> None:
    assert feed((0, HEALTHY), (2, HEALTHY), (1e6, HEALTHY))[1:] == [None, None]
    assert feed((0, MISSING), (2, MISSING), (9.9, MISSING))[1:] == [None, None]


def test_another_state_or_reason_is_a_change() -> None:
    internal, again = failed("Internal", "x"), failed("Internal", "x")
    assert feed((0, HEALTHY), (2, NOT_READY), (4, MISSING), (6, internal), (8, again), (10, FORBIDDEN)) == [
        Change(HEALTHY, 0, 0.0),
        Change(NOT_READY, 1, 0.0),
        Change(MISSING, 2, 2.0),
        Change(internal, 3, 4.0),
        None,
        Change(FORBIDDEN, 5, 8.0),
    ]


def test_recovery_says_how_many_and_how_long() -> None:
    changes = feed(
        (0, HEALTHY), (10, MISSING), (12, MISSING), (14, NOT_READY), (17.5, HEALTHY), (20, MISSING)
    )

    assert changes[4:] == [Change(HEALTHY, 3, 7.5), Change(MISSING, 1, 0.0)]


def test_it_lasts_from_when_the_first_failure_was_asked_for() -> None:
    history = History()

    assert history.add(MISSING, 10.0, 12.75) == Change(MISSING, 1, 2.75)
    assert history.add(HEALTHY, 14.0, 14.5) == Change(HEALTHY, 1, 4.5)


def test_texts_that_vary_with_each_check_do_not_flood_the_log() -> None:
    changes = feed(*((now, failed("Internal", f"request {now} failed")) for now in range(0, 200, 2)))
    said = [change for change in changes if change]

    assert [change.repeated for change in said[:6]] == [False] * 5 + [True]
    assert len(said) == 5 + 4  # at 8, then reminders 10, 20, 40, 80 s apart
    assert said[-1].verdict.text.endswith(f"request {(said[-1].failures - 1) * 2} failed")
    assert feed((0, MISSING), (2, failed("Internal", "x")), (4, MISSING))[2] == Change(MISSING, 3, 4.0)


def test_another_reason_is_said_at_once_even_after_texts_that_vary_and_then_so_are_its_texts() -> None:
    def row(code: str, start: int) -> list[tuple[float, Verdict]]:
        return [(float(now), failed(code, f"request {now}")) for now in range(start, start + 8)]

    changes = feed(*row("Internal", 0), *row("Aborted", 8), *row("Internal", 16))

    assert [bool(change) and not change.repeated for change in changes if change] == [True] * 15
    assert [bool(change) for change in changes] == ([True] * 5 + [False] * 3) * 3


def test_reminders_come_at_growing_intervals_up_to_an_hour() -> None:
    history = History()
    changes = [(now, history.add(MISSING, float(now), float(now))) for now in range(0, 30_000, 2)]
    reminders = [(now, change) for now, change in changes if change][1:]

    assert all(c.repeated and c.failures == now // 2 + 1 and c.seconds == now for now, c in reminders)
    times = [now for now, _ in reminders]
    assert times[:4] == [10, 30, 70, 150]
    gaps = [b - a for a, b in zip([0, *times], times, strict=False)]
    assert gaps == sorted(gaps)
    assert gaps[-2:] == [3600, 3600]


def test_a_change_starts_the_intervals_anew() -> None:
    other = failed("Internal", "x")
    changes = feed((0, MISSING), (10, MISSING), (12, other), (21, other), (22, other))

    assert [bool(change and change.repeated) for change in changes] == [False, True, False, False, True]


@given(st.lists(st.tuples(st.floats(0.1, 1000), st.sampled_from([HEALTHY, NOT_READY, MISSING])), max_size=50))
def test_history_counts_right(steps: list[tuple[float, Verdict]]) -> None:
    history, now, failures, since, last = History(), 0.0, 0, 0.0, None
    for step, verdict in steps:
        now += step
        change = history.add(verdict, now - 0.05, now)
        if verdict is not HEALTHY:
            since = now - 0.05 if not failures else since
            failures += 1
        if verdict is not last:
            assert change is not None
        if change is not None:
            assert (change.verdict, change.failures) == (verdict, failures)
            assert change.seconds == pytest.approx(now - since if failures else 0.0)
            assert change.repeated == (verdict is last)
        if verdict is HEALTHY:
            failures = 0
        last = verdict
