"""What is said about limits; test_faults.py and test_serve.py hold, with real denials, that the program survives them."""

from __future__ import annotations

import errno
import re
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import program
import pytest
from denying import denying

from livenessprobe import health, limits

if TYPE_CHECKING:
    from pathlib import Path


def lay(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return f"{folder}/"


@pytest.mark.parametrize("group", ["", "pids/"])
@pytest.mark.parametrize(("mode", "said"), [("0", "seccomp off"), ("1", "seccomp on"), ("2", "seccomp on")])
def test_limits_of_threads_are_said_as_they_are_seen(folder: Path, group: str, mode: str, said: str) -> None:
    files = {f"sys/fs/cgroup/{group}pids.max": "512\n", f"sys/fs/cgroup/{group}pids.current": "511\n"}
    status = {"proc/self/status": f"Name:\tx\nSeccomp:\t{mode}\nThreads:\t1\n"}

    pids, user, memory, seccomp = limits.of_threads(lay(folder, files | status))
    assert (pids, seccomp) == ("pids limit 512, in use 511", said)
    assert re.fullmatch(r"ulimit -u (unlimited|\d+)", user)
    assert re.fullmatch(r"ulimit -v (unlimited|\d+)", memory)


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_limits_of_memory_are_said_as_they_are_seen(folder: Path, name: str) -> None:
    group, own = limits.of_memory(lay(folder, {f"sys/fs/cgroup/{name}": "33554432\n"}))
    assert group == "memory limit 33554432"
    assert re.fullmatch(r"ulimit -v (unlimited|\d+)", own)


def test_what_cannot_be_seen_is_left_out(folder: Path) -> None:
    assert [said.split()[0] for said in limits.of_threads(f"{folder}/")] == ["ulimit", "ulimit"]
    assert [said.split()[0] for said in limits.of_memory(f"{folder}/")] == ["ulimit"]


def test_limits_that_may_not_be_asked_for_are_left_out() -> None:
    script = "from livenessprobe import limits; print(*limits.of_threads())"
    command = [*denying("prlimit64"), sys.executable, "-c", script]
    said = subprocess.run(command, capture_output=True, check=True, cwd=program.ROOT, text=True).stdout

    assert "seccomp on" in said
    assert "ulimit" not in said


def test_limits_are_said_of_this_machine() -> None:
    assert limits.of_threads()[-1] in ("seccomp on", "seccomp off")


def test_a_limit_of_memory_is_said_in_kib_as_by_a_shell() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**40, hard))
    try:
        assert limits.of_memory("/")[-1] == "ulimit -v 1073741824"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), r"out of memory; seen from here: .*ulimit -v \w+"),
        (OSError(errno.ENOMEM, ""), r"out of memory; seen from here: .*ulimit -v \w+"),
        (OSError(errno.ENOBUFS, ""), r"out of memory; seen from here: .*ulimit -v \w+"),
        (OSError(errno.EMFILE, ""), r"too many open files; seen from here: ulimit -n \w+"),
        (OSError(errno.ENFILE, ""), r"too many open files in system; seen from here: ulimit -n \w+"),
        (OSError(errno.EPERM, ""), "operation not permitted: a seccomp profile or a security module denies a call"),
        (OSError(errno.ENOSYS, ""), "function not implemented: a seccomp profile or a security module denies a call"),
        (OSError(errno.ENOENT, ""), ""),
        (OSError("without a number"), ""),
        (ValueError(), ""),
    ],
)  # fmt: skip
def test_an_error_is_said_with_the_limit_it_comes_from(error: Exception, said: str) -> None:
    assert re.fullmatch(said, limits.denial(error))


def test_all_limits_of_memory_are_said_where_there_is_none_left(folder: Path) -> None:
    root = lay(folder, {"sys/fs/cgroup/memory.max": "33554432\n"})
    said = r"out of memory; seen from here: memory limit 33554432, ulimit -v \w+"
    assert re.fullmatch(said, limits.denial(MemoryError(), root))


def test_the_limit_of_descriptors_is_said_as_it_is() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert limits.denial(OSError(errno.EMFILE, "")).endswith(f": ulimit -n {soft}")


def test_an_error_is_said_with_where_it_was_raised() -> None:
    def some_call() -> None:
        raise PermissionError(errno.EPERM, "")

    with pytest.raises(PermissionError) as raised:
        some_call()
    assert limits.denial(raised.value).endswith(" denies some_call")


def test_an_error_is_said_with_the_line_of_ours_that_made_the_call() -> None:
    def some_call(_: float) -> health.Verdict:
        raise PermissionError(errno.EPERM, "")

    with pytest.raises(PermissionError) as raised:
        health.check(some_call, health.one_shot(1, 1), 0.0, lambda: 0.0, lambda _: False)
    assert re.search(r" denies some_call \(health\.py:\d+\)$", limits.denial(raised.value))
