"""Starting a thread, or saying which limits may be in the way: Python only says that it could not, or waits for ever."""

import _thread
import sys
import threading
from collections.abc import Callable


class Denied(Exception):
    """The system grants no thread; its text says which limits there are."""

    def __str__(self) -> str:
        from livenessprobe import limits

        return (
            f"{self.args[0]}: a limit on processes (the container's, the pod's, the user's) or on memory is reached, or a seccomp"
            f" profile does not know clone3; seen from here: {', '.join(limits.of_threads())}"
        )


def start(work: Callable[[], None], patience: float = 5.0) -> None:
    """Do the work on a thread that the program's end does not wait for; raises Denied if the system grants none.

    Not by threading.Thread, whose start() waits until the thread says that it has begun: one for which there is no more
    memory then never does. This waits for so many seconds; a thread that begins later does nothing.
    """
    begun, turn = threading.Event(), threading.Lock()
    try:
        _thread.start_new_thread(begin, (work, begun, turn))
    except RuntimeError as error:
        raise Denied(str(error)) from None
    await_begun(begun, turn, patience)


def await_begun(begun: threading.Event, turn: threading.Lock, patience: float) -> None:
    """Wait until a thread has begun; if it takes too long, take its turn and raise Denied, unless it took that just now."""
    if not begun.wait(patience) and turn.acquire(blocking=False):
        raise Denied("a new thread does not begin")


def begin(work: Callable[[], None], begun: threading.Event, turn: threading.Lock) -> None:
    """Do the work, unless whoever started this thread took its turn and gave up."""
    if turn.acquire(blocking=False):
        begun.set()
        sys.settrace(threading.gettrace())  # as threading.Thread does, for what measures or debugs
        work()
