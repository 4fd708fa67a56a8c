"""What the system denies, in words: its errors do not say which limit was reached, so name those that can be seen."""

import errno
import os
import re
import resource
from contextlib import suppress

_DENIED = (errno.EPERM, errno.EACCES, errno.ENOSYS)
_EXHAUSTED = (errno.EMFILE, errno.ENFILE)
_ROOMLESS = (errno.ENOMEM, errno.ENOBUFS)


def denial(error: BaseException | None, root: str = "/") -> str:
    """Say which limit or profile an error comes from; empty if it comes from none."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _ROOMLESS):
        return "out of memory" + _seen(of_memory(root))
    if not isinstance(error, OSError):
        return ""
    words = os.strerror(error.errno or 0).lower()
    if error.errno in _EXHAUSTED:
        return words + _seen(_soft("n", resource.RLIMIT_NOFILE))
    if error.errno in _DENIED:
        return f"{words}: a seccomp profile or a security module denies {_call(error)}"
    return ""


def of_threads(root: str = "/") -> list[str]:
    """Name the limits that may deny a thread, as far as they can be seen from where the program runs."""
    seen = []
    for group in ("", "pids/"):  # cgroup v2, v1; the pod's own group cannot be seen in a container
        with suppress(OSError):
            most, now = (
                _read(f"{root}sys/fs/cgroup/{group}pids.{name}").strip() for name in ("max", "current")
            )
            seen.append(f"pids limit {most}, in use {now}")
    seen += [*_soft("u", resource.RLIMIT_NPROC), *_soft("v", resource.RLIMIT_AS)]
    with suppress(OSError):
        confined = re.search(r"^Seccomp:\t[12]", _read(f"{root}proc/self/status"), re.MULTILINE)
        seen.append(f"seccomp {'on' if confined else 'off'}")
    return seen


def of_memory(root: str) -> list[str]:
    """Name the limits on memory, as far as they can be seen from where the program runs."""
    seen = []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, MemoryError):
            seen.append(f"memory limit {_read(f'{root}sys/fs/cgroup/{name}').strip()}")
    return [*seen, *_soft("v", resource.RLIMIT_AS)]


def _seen(limits: list[str]) -> str:
    return f"; seen from here: {', '.join(limits)}"


def _soft(option: str, limit: int) -> list[str]:
    """Show a limit of the process as a shell's ulimit does; nothing if even that is denied."""
    with suppress(OSError):
        soft, _ = resource.getrlimit(limit)
        in_kib = soft // 1024 if limit == resource.RLIMIT_AS else soft
        return [f"ulimit -{option} {'unlimited' if soft == resource.RLIM_INFINITY else in_kib}"]
    return []


def _call(error: BaseException) -> str:
    """Say where an error was raised: in which function, called by which line of ours."""
    where, line = "a call", ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        folder, name = os.path.split(code.co_filename)
        where = code.co_name
        if folder == os.path.dirname(_call.__code__.co_filename):
            line = f" ({name}:{trace.tb_lineno})"
        trace = trace.tb_next
    return where + line


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()
