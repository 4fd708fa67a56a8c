"""What all processes of one run of the tests share: a name, a folder, and what is made once for all of them.

The first process makes the folder, in .cache, and removes it at its end; pytest's workers inherit its path.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CACHE = Path(__file__).resolve().parents[2] / ".cache"
VARIABLE = "LIVENESSPROBE_TEST_RUN"


def begin() -> bool:
    """Make the folder, unless there is one; return whether this process is the one that is to `end` the run."""
    if VARIABLE in os.environ:
        return False
    CACHE.mkdir(exist_ok=True)
    os.environ[VARIABLE] = tempfile.mkdtemp(prefix="run-", dir=CACHE)
    return True


def end() -> None:
    """Remove the folder."""
    shutil.rmtree(os.environ.pop(VARIABLE))


def folder() -> Path:
    return Path(os.environ[VARIABLE])


def name() -> str:
    """A name by which what this run's tests make elsewhere can be told from what other runs make."""
    return folder().name.removeprefix("run-")


@contextlib.contextmanager
def locked(what: str) -> Iterator[None]:
    """No other process of this run is in there at the same time."""
    with (folder() / f"{what}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def made_once(what: str, make: Callable[[Path], None]) -> Path:
    """A folder that is filled by whoever asks first; the others wait for that."""
    made = folder() / what
    with locked(what):
        if not made.exists():
            # Only a whole folder has this name.
            new = Path(tempfile.mkdtemp(dir=folder()))
            make(new)
            new.rename(made)
    return made
