"""The process: its signals and descriptors at the start, its end; nothing else in the package exits."""

import os
import signal
import sys
from typing import NoReturn

from livenessprobe import postponed


def main() -> NoReturn:
    """Run the program on sys.argv and end the process with its exit code."""
    # Until there are handlers: as PID 1, a signal with the default action would be lost, and elsewhere it would kill.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    _open_standard_descriptors()
    postponed.postpone(postponed.UNUSED)
    # Not before: it imports much of what is postponed.
    from livenessprobe.command import run

    code = run(sys.argv[1:])
    # Not sys.exit(): the interpreter's own end waits for or races with threads that may hang in a call to the driver.
    os._exit(code)


def _open_standard_descriptors() -> None:
    """Make sure that 0 to 2 are open: else a socket would get such a number, and the log would be written into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


if __name__ == "__main__":
    main()
