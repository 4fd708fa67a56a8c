"""One fact, kept once: everyone who looks, waits or is in the middle of something learns of it."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from livenessprobe.stopping import Stop


def test_it_is_set_once_and_for_all() -> None:
    stop = Stop()
    assert not stop.is_set()
    for _ in range(2):
        stop.set()
        assert stop.is_set()
        assert stop.wait(10)


def test_a_wait_ends_in_time_or_with_the_stop() -> None:
    stop, ended = Stop(), list[bool]()
    thread = threading.Thread(target=lambda: ended.append(stop.wait(0.01)), daemon=True)
    thread.start()
    thread.join(10)
    assert ended == [False]
    begin = time.monotonic()
    threading.Timer(0.05, stop.set).start()
    assert stop.wait(20)
    assert time.monotonic() - begin < 10


def test_a_wait_may_be_longer_than_any_clock() -> None:
    stop, ended = Stop(), list[bool]()
    thread = threading.Thread(target=lambda: ended.append(stop.wait(1e12)), daemon=True)
    thread.start()
    stop.set()
    thread.join(10)
    assert ended == [True]


def test_many_may_wait() -> None:
    stop = Stop()
    waiting = [threading.Thread(target=stop.wait, args=(20,), daemon=True) for _ in range(20)]
    for thread in waiting:
        thread.start()
    stop.set()
    stop.set()
    for thread in waiting:
        thread.join(10)
        assert not thread.is_alive()


def test_a_signal_s_handler_may_set_it_at_any_moment_of_a_wait() -> None:
    """Waiting for a lock that the interrupted wait holds would never end."""
    before = signal.signal(signal.SIGALRM, lambda *_: stop.set())
    try:
        for round_ in range(500):
            stop = Stop()
            signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + round_))
            for _ in range(1000):
                if stop.wait(1e-5 if round_ % 2 else 1e-3):
                    break
            assert stop.wait(10)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_what_is_under_way_is_interrupted_and_nothing_else() -> None:
    stop, interrupted = Stop(), list[str]()
    with stop.interrupting(lambda: interrupted.append("past")):
        pass
    with (
        stop.interrupting(lambda: interrupted.append("one")),
        stop.interrupting(lambda: interrupted.append("two")),
    ):
        assert not interrupted
        stop.set()
        assert interrupted == ["one", "two"]


def test_what_begins_after_the_stop_is_interrupted_at_once() -> None:
    stop, interrupted = Stop(), list[str]()
    stop.set()
    with stop.interrupting(lambda: interrupted.append("late")):
        assert interrupted == ["late"]
    assert interrupted == ["late"]


def test_an_interrupt_finds_the_stop_set() -> None:
    stop, found = Stop(), list[bool]()
    with stop.interrupting(lambda: found.append(stop.is_set())):
        stop.set()
    assert found == [True]


def test_an_error_in_the_body_is_not_held_back_and_its_interrupt_goes() -> None:
    stop, interrupted = Stop(), list[str]()
    with pytest.raises(OSError, match="broken"), stop.interrupting(lambda: interrupted.append("past")):
        raise OSError("broken")
    stop.set()
    assert not interrupted


def test_at_whatever_moment_it_comes_an_interrupt_is_called() -> None:
    for round_ in range(2000):
        stop, interrupted = Stop(), threading.Event()
        setter = threading.Thread(target=stop.set, daemon=True)
        setter.start()
        for _ in range(round_ % 50):
            pass
        with stop.interrupting(interrupted.set):
            assert interrupted.wait(10)
        setter.join(10)
        assert not setter.is_alive()
