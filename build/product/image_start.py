"""How the program starts in the image, with little memory in mind; build/builder/rootfs.py puts this into it, compiled.

A memory limit counts the pages of the files, too. The kernel reads them ahead, as much as it likes (on some nodes 8 MiB
for a single page that is missing), and what it reads pushes out what is needed. With swap off, a container near its
limit then does nothing but read the same pages again.
"""

import _thread
import os
import time
from contextlib import suppress

from livenessprobe.__main__ import main as program

# Of cgroup version 2 and 1, as a container sees its own.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
TIGHT_BYTES = 48 * 1024 * 1024
LARGE_FILE_BYTES = 1024 * 1024
ROUNDS, PAUSE_SECONDS = 20, 0.03  # loading what a check needs takes about as long


def main() -> None:
    """Run the program."""
    if memory_is_tight():
        with suppress(RuntimeError):  # the system grants no thread
            _thread.start_new_thread(forget_pages, ())
    program()


def memory_is_tight() -> bool:
    """Whether there is a limit, near what the program takes."""
    for path in LIMITS:
        try:
            with open(path) as file:
                return int(file.read()) <= TIGHT_BYTES
        except (OSError, ValueError):  # no such version, or "max"
            continue
    return False


def forget_pages() -> None:
    """While the program loads: have the kernel forget what it has read of the large files for nothing."""
    for _ in range(ROUNDS):
        time.sleep(PAUSE_SECONDS)
        files = set()
        with suppress(OSError), open("/proc/self/maps") as maps:
            files = {line.split()[-1] for line in maps if " /usr/" in line}
        for name in files:
            with suppress(OSError), open(name, "rb", 0) as file:
                if os.fstat(file.fileno()).st_size >= LARGE_FILE_BYTES:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # spares what is in use
