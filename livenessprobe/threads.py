"""Starting a thread, or saying which limits may be in the way: Python only says that it could not."""

import threading
from collections.abc import Callable

from livenessprobe import limits


class Denied(Exception):
    """The system grants no thread."""


def start(name: str, work: Callable[[], None]) -> None:
    """Do the work on a thread that the program's end does not wait for; raises Denied if the system grants none."""
    try:
        threading.Thread(target=work, name=name, daemon=True).start()
    except RuntimeError as error:
        raise Denied(
            f"{error}: a limit on processes (the container's, the pod's, the user's) or on memory is reached, or a seccomp"
            f" profile does not know clone3; seen from here: {', '.join(limits.of_threads())}"
        ) from None
