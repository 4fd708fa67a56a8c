"""What is said where no thread is to be had; that none is to be had is in test_faults.py, with real denials."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from livenessprobe import threads

if TYPE_CHECKING:
    from pathlib import Path


def test_the_work_is_done_on_a_thread_that_does_not_keep_the_program() -> None:
    seen: list[threading.Thread] = []
    done = threading.Event()

    def work() -> None:
        seen.append(threading.current_thread())
        done.set()

    threads.start("some name", work)
    assert done.wait(10)
    assert (seen[0].name, seen[0].daemon) == ("some name", True)


@pytest.mark.parametrize("group", ["", "pids"])
@pytest.mark.parametrize(("mode", "said"), [("0", "seccomp off"), ("1", "seccomp on"), ("2", "seccomp on")])
def test_limits_are_said_as_they_are_seen(folder: Path, group: str, mode: str, said: str) -> None:
    files = {f"sys/fs/cgroup/{group}/pids.max": "512\n", f"sys/fs/cgroup/{group}/pids.current": "511\n"}
    for name, text in {**files, "proc/self/status": f"Name:\tx\nSeccomp:\t{mode}\nThreads:\t1\n"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    pids, user, seccomp = threads.limits(f"{folder}/")
    assert (pids, seccomp) == ("pids limit 512, in use 511", said)
    assert user.startswith("ulimit -u ")


def test_limits_are_said_of_this_machine() -> None:
    *_, user, seccomp = threads.limits()
    assert user.removeprefix("ulimit -u ") == "unlimited" or int(user.removeprefix("ulimit -u ")) > 0
    assert seccomp in ("seccomp on", "seccomp off")
