"""The process: its signals and descriptors at the start, and its end; nothing else in the package exits."""

import gc
import os
import signal
import sys
from typing import NoReturn

# What the bundled libraries would read: their own switches, and what Kubernetes sets for services with such names.
_OF_LIBRARIES = ("GRPC_", "PROMETHEUS_", "PROTOCOL_BUFFERS_", "TEMPORARILY_DISABLE_PROTOBUF_")


def main() -> NoReturn:
    """Run the program on sys.argv and end the process with its exit code."""
    gc.disable()  # until all is loaded: hardly any of that is garbage, and collecting takes a fifteenth of the start
    # Until the handlers are there: without one, a signal is lost on PID 1, and kills any other process.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    # For good: in the background of a terminal (`stty tostop`), writing a line to the log would stop the process.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTOU,))
    _open_standard_descriptors()
    _forget_environment()
    # Not sooner: these imports take time, and what they import reads the environment.
    from livenessprobe import postponed

    postponed.postpone(postponed.UNUSED)
    from livenessprobe.command import run

    code = run(sys.argv[1:])
    # Not sys.exit(): the interpreter's own end waits for, or races with, threads that may hang in a call to the driver.
    os._exit(code)


def _open_standard_descriptors() -> None:
    """Make sure that 0 to 2 are open: otherwise a socket would get such a number, and the log would go into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull if os.access(os.devnull, os.R_OK) else "/", os.O_RDONLY)


def _forget_environment() -> None:
    """Keep the libraries' variables from changing verdicts, metrics or logs, and from ending the program."""
    for name in list(os.environ):
        if name.upper().startswith(_OF_LIBRARIES):
            del os.environ[name]


if __name__ == "__main__":
    main()
