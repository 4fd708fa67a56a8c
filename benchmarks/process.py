"""What the kernel says about another process: CPU time, memory, threads, wake-ups, descriptors."""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Memory:
    """In MiB."""

    resident: float
    anonymous: float
    proportional: float
    """Pages shared with other processes count in parts (PSS)."""
    peak: float


def cpu_seconds(pid: int) -> float:
    """To the nanosecond, unlike /proc/PID/stat's ticks of 10 ms, and including threads that have ended."""
    return time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid(3) makes of a pid


def memory(pid: int) -> Memory:
    status = _fields(f"/proc/{pid}/status")
    return Memory(
        resident=status["VmRSS"] / 1024,
        anonymous=status["RssAnon"] / 1024,
        proportional=_fields(f"/proc/{pid}/smaps_rollup")["Pss"] / 1024,
        peak=status["VmHWM"] / 1024,
    )


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def wake_ups(pid: int) -> dict[str, int]:
    """How often each thread went to sleep by itself, by thread id."""
    counts = {}
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):  # it has just ended
            counts[thread] = _fields(f"/proc/{pid}/task/{thread}/status")["voluntary_ctxt_switches"]
    return counts


def _fields(file: str) -> dict[str, int]:
    """The lines of the form `Name: 123 kB`."""
    fields = {}
    for line in Path(file).read_text().splitlines():
        name, _, value = line.partition(":")
        first = value.split(maxsplit=1)[:1]
        if first and first[0].isdigit():
            fields[name] = int(first[0])
    return fields
