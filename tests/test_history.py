"""The changes in a row of verdicts, and which of them are worth a line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from livenessprobe.health import HEALTHY, NOT_READY, Outcome, Verdict, failed
from livenessprobe.history import Change, History

MISSING = Verdict(Outcome.UNREACHABLE, "no such file or directory", "cannot connect", may_heal=True)
FORBIDDEN = Verdict(Outcome.UNREACHABLE, "permission denied", "cannot connect")


def feed(*events: tuple[float, Verdict]) -> list[Change | None]:
    history = History()
    return [history.add(verdict, now, now) for now, verdict in events]


def test_the_first_verdict_is_a_change() -> None:
    assert feed((5, HEALTHY)) == [Change(5, HEALTHY, 0, 0.0)]
    assert feed((5, MISSING)) == [Change(5, MISSING, 1, 0.0)]


def test_the_same_again_is_none() -> None:
    assert feed((0, HEALTHY), (2, HEALTHY), (1e6, HEALTHY))[1:] == [None, None]
    assert feed((0, MISSING), (2, MISSING), (9.9, MISSING))[1:] == [None, None]


def test_another_state_or_reason_is_a_change() -> None:
    internal, again = failed("Internal", "x"), failed("Internal", "x")
    assert feed((0, HEALTHY), (2, NOT_READY), (4, MISSING), (6, internal), (8, again), (10, FORBIDDEN)) == [
        Change(0, HEALTHY, 0, 0.0),
        Change(2, NOT_READY, 1, 0.0),
        Change(4, MISSING, 2, 2.0),
        Change(6, internal, 3, 4.0),
        None,
        Change(10, FORBIDDEN, 5, 8.0),
    ]


def test_recovery_says_how_many_and_how_long() -> None:
    changes = feed(
        (0, HEALTHY), (10, MISSING), (12, MISSING), (14, NOT_READY), (17.5, HEALTHY), (20, MISSING)
    )

    assert changes[4:] == [Change(17.5, HEALTHY, 3, 7.5), Change(20, MISSING, 1, 0.0)]


def test_it_lasts_from_when_the_first_failure_was_asked_for() -> None:
    history = History()

    assert history.add(MISSING, 10.0, 12.75) == Change(12.75, MISSING, 1, 2.75)
    assert history.add(HEALTHY, 14.0, 14.5) == Change(14.5, HEALTHY, 1, 4.5)


def test_texts_that_vary_with_each_check_do_not_flood_the_log() -> None:
    changes = feed(*((now, failed("Internal", f"request {now} failed")) for now in range(0, 200, 2)))
    said = [change for change in changes if change]

    assert [change.repeated for change in said[:6]] == [False] * 5 + [True]
    assert len(said) == 5 + 4  # at 8, then reminders 10, 20, 40, 80 s apart
    assert said[-1].verdict.text.endswith(f"request {(said[-1].failures - 1) * 2} failed")
    assert feed((0, MISSING), (2, failed("Internal", "x")), (4, MISSING))[2] == Change(4, MISSING, 3, 4.0)


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
            assert (change.at, change.verdict, change.failures) == (now, verdict, failures)
            assert change.seconds == pytest.approx(now - since if failures else 0.0)
            assert change.repeated == (verdict is last)
        if verdict is HEALTHY:
            failures = 0
        last = verdict


def test_the_last_16_changes_are_kept_without_reminders() -> None:
    history = History()
    events = [(0, HEALTHY), (2, MISSING), (12, MISSING)]
    events += [(now, HEALTHY if now % 2 else MISSING) for now in range(13, 40)]
    found = [history.add(verdict, now, now) for now, verdict in events[:3]]
    assert history.seen
    assert list(history.seen.changes) == found[:2]
    assert found[2]

    found += [history.add(verdict, now, now) for now, verdict in events[3:]]
    assert list(history.seen.changes) == found[-16:]


def test_the_last_verdict_is_kept_with_its_moments() -> None:
    assert History().seen is None
    history = History()
    for asked, found in ((1.0, 1.5), (2.0, 2.25)):
        history.add(MISSING, asked, found)
        assert history.seen
        assert (history.seen.verdict, history.seen.asked, history.seen.found) == (MISSING, asked, found)
