"""Starting a thread; test_faults.py has the cases in which the system grants none, with real denials."""

from __future__ import annotations

import threading

from livenessprobe import threads


def test_the_work_is_done_on_a_thread_that_does_not_keep_the_program() -> None:
    seen: list[threading.Thread] = []
    done = threading.Event()

    def work() -> None:
        seen.append(threading.current_thread())
        done.set()

    threads.start("some name", work)
    assert done.wait(10)
    assert (seen[0].name, seen[0].daemon) == ("some name", True)
