"""The rules of a check, with a clock that tests move."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from livenessprobe.health import (
    HEALTHY,
    NOT_READY,
    RETRY_SECONDS,
    Outcome,
    Patience,
    Verdict,
    check,
    failed,
    one_shot,
    served,
)

if TYPE_CHECKING:
    from collections.abc import Callable

MISSING = Verdict(Outcome.UNREACHABLE, "no such file or directory", "cannot connect", may_heal=True)
FORBIDDEN = Verdict(Outcome.UNREACHABLE, "permission denied", "cannot connect")

# ---- verdicts


def test_texts_of_the_contract() -> None:
    assert (HEALTHY.text, HEALTHY.reason) == ("ok", "OK")
    assert NOT_READY.reason == "not ready"
    assert NOT_READY.text == "driver responded but is not ready"
    assert failed("Internal", "disk gone").text == "rpc error: code = Internal desc = disk gone"


def test_outcomes_of_the_contract() -> None:
    assert [outcome.value for outcome in Outcome] == ["healthy", "not_ready", "failed", "unreachable"]


def test_a_failure_keeps_its_code_as_the_reason_and_at_most_4_kib_of_its_message() -> None:
    verdict = failed("DataLoss", "é" * 1_000_000)

    assert (verdict.outcome, verdict.reason) == (Outcome.FAILED, "DataLoss")
    assert len(verdict.text.encode()) <= 4096
    assert verdict.text.startswith("rpc error: code = DataLoss desc = éé")
    assert "cut" in verdict.text[-40:]


def test_values_are_frozen() -> None:
    with pytest.raises(AttributeError):
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
    """Time and a driver: an attempt takes `cost` seconds and finds what `found` gives for that time."""

    def __init__(self, found: Callable[[float], Verdict], cost: float = 0.0, stop_at: float = 1e9) -> None:
        self.now = 1000.0
        self._found, self._cost, self._stop_at = found, cost, stop_at
        self.attempts: list[tuple[float, float]] = []  # when, with how much time
        self.waited_for: list[Verdict] = []

    def attempt(self, deadline: float) -> Verdict:
        self.attempts.append((self.now - 1000, deadline - self.now))
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
    """It would only run out of time, and hide the reason."""
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
