"""Starting a thread; and if there is none to be had, saying which limits there are: Python only says that it could not."""

import re
import resource
import threading
from collections.abc import Callable
from contextlib import suppress


class Denied(Exception):
    """The system grants no thread."""


def start(name: str, work: Callable[[], None]) -> None:
    """Do the work on a thread that the program's end does not wait for; raises Denied if there is none to be had."""
    try:
        threading.Thread(target=work, name=name, daemon=True).start()
    except RuntimeError as error:
        raise Denied(
            f"{error}: a limit of processes (the container's, the pod's, the user's) is reached, or a seccomp profile"
            f" does not know clone3; seen from here: {', '.join(limits())}"
        ) from None


def limits(root: str = "/") -> list[str]:
    """Say what can be seen, from where the program runs, of the limits that may deny a thread."""
    seen = []
    for group in ("", "pids/"):  # version 2 and 1; the pod's own group cannot be seen in a container
        with suppress(OSError):
            most, now = (
                _read(f"{root}sys/fs/cgroup/{group}pids.{name}").strip() for name in ("max", "current")
            )
            seen.append(f"pids limit {most}, in use {now}")
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    seen.append(f"ulimit -u {'unlimited' if soft == resource.RLIM_INFINITY else soft}")
    confined = re.search(r"^Seccomp:\t[12]", _read(f"{root}proc/self/status"), re.MULTILINE)
    seen.append(f"seccomp {'on' if confined else 'off'}")
    return seen


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()
