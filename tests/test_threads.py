"""Starting a thread; test_faults.py has a program to which the system grants none, with real denials."""

from __future__ import annotations

import _thread
import sys
import threading
import time

import pytest
from test_writer import no_thread_to_be_had

from livenessprobe import threads


def test_the_work_is_done_on_a_thread_that_does_not_keep_the_program() -> None:
    seen: list[threading.Thread] = []
    done = threading.Event()

    def work() -> None:
        seen.append(threading.current_thread())
        done.set()

    threads.start(work)
    assert done.wait(10)
    assert seen[0] is not threading.current_thread()
    assert seen[0].daemon


def test_one_that_does_not_begin_is_given_up_and_does_nothing_when_it_does() -> None:
    done: list[str] = []
    before, interval = _thread._count(), sys.getswitchinterval()
    sys.setswitchinterval(1000)  # no other thread runs before this one waits
    try:
        with pytest.raises(threads.Denied, match=r"^a new thread does not begin: "):
            threads.start(lambda: done.append("the work"), patience=0)
    finally:
        sys.setswitchinterval(interval)
    end = time.monotonic() + 20
    while _thread._count() > before:
        assert time.monotonic() < end
        time.sleep(0.001)
    assert not done


@pytest.mark.parametrize("given_up", [False, True])
def test_a_thread_begins_unless_it_was_given_up(given_up: bool) -> None:
    done: list[str] = []
    begun, turn = threading.Event(), threading.Lock()
    if given_up:
        turn.acquire()
    arguments = (lambda: done.append("the work"), begun, turn)
    thread = threading.Thread(target=threads.begin, args=arguments, daemon=True)
    thread.start()
    thread.join(20)

    assert not thread.is_alive()
    assert (done, begun.is_set()) == (([], False) if given_up else (["the work"], True))


def test_a_thread_that_begins_at_the_last_moment_is_not_given_up() -> None:
    ended: list[str] = []
    begun, turn = threading.Event(), threading.Lock()
    turn.acquire()  # by the thread, which has not said so yet

    def wait() -> None:
        threads.await_begun(begun, turn, 0)
        ended.append("without an error")

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(20)

    assert ended == ["without an error"]


def test_a_thread_is_traced_as_those_of_threading_are() -> None:
    seen: list[object] = []
    before = threading.gettrace()

    def trace(*_: object) -> None:
        """Wants no line of any function."""

    def run() -> None:
        threading.settrace(trace)
        threads.begin(lambda: seen.append(sys.gettrace()), threading.Event(), threading.Lock())

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
        thread.join(20)
    finally:
        threading.settrace(before)

    assert seen == [trace]


def test_where_none_is_to_be_had_it_says_which_limits_there_are() -> None:
    seen = r"(pids limit \w+, in use \d+, )*ulimit -u \w+, ulimit -v \w+, seccomp \w+"
    with no_thread_to_be_had(), pytest.raises(threads.Denied, match=rf"^can't .*; seen from here: {seen}$"):
        threads.start(lambda: None)
