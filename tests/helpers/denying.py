"""Runs a command for which the kernel denies a system call, as an engine's seccomp profile does."""

from __future__ import annotations

import errno
import platform
import sys

# Of x86-64 and arm64.
NUMBERS = {
    "accept4": (288, 242),
    "clone3": (435, 435),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, 22),  # arm64 has only epoll_pwait
    "eventfd2": (290, 19),
    "faccessat2": (439, 439),
    "fstatfs": (138, 44),
    "ioctl": (16, 29),
    "pipe2": (293, 59),
    "prlimit64": (302, 261),
    "setsockopt": (54, 208),
    "socket": (41, 198),
    "socketpair": (53, 199),
}
# Arguments: the number of the call and of the error, and which of its arguments must have which value (-1: all calls).
_LAUNCHER = """
import ctypes, os, struct, sys
call, error, argument, value = map(int, sys.argv[1:5])
deny, allow = (0x06, 0, 0, 0x00050000 | error), (0x06, 0, 0, 0x7FFF0000)
of_value = [(0x20, 0, 0, 16 + 8 * argument), (0x15, 0, 1, value)] if argument >= 0 else []
code = [(0x20, 0, 0, 0), (0x15, 0, len(of_value) + 1, call), *of_value, deny, allow]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
prctl = ctypes.CDLL(None).prctl
assert prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert prctl(22, 2, struct.pack("HP", len(code) // 8, ctypes.addressof(code))) == 0  # PR_SET_SECCOMP
os.execvp(sys.argv[5], sys.argv[5:])
"""


def denying(call: str, error: int = errno.EPERM, *, argument: int = -1, value: int = 0) -> list[str]:
    """What to put before a command; argument and value restrict it to calls that have this value there."""
    number = NUMBERS[call][platform.machine() == "aarch64"]
    # Without what site-packages do at each start, such as measuring coverage, which the command itself does again.
    return [sys.executable, "-IS", "-c", _LAUNCHER, *map(str, (number, error, argument, value))]
