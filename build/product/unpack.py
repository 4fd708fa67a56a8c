"""Unpacks the packed file at its first start; build/here/pyz.py puts this into the archive beside start.py."""

import fcntl
import importlib.util
import os
import py_compile
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress

PACKED = "site-packages"


def unpack(archive: str, folder: str, check: Callable[[str], None]) -> None:
    """Unpack the archive into this folder, which appears whole and at once, whoever else is doing the same.

    Raises OSError where that can't be done, or where `check` does so for the folder that it makes.
    """
    part = f"{folder}.part-{os.geteuid()}"
    umask = os.umask(0o022)  # who else may use the folder must be able to read it
    handle = opened(part)
    try:
        check(part)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.isdir(folder):  # another start was at it and has finished
            with suppress(OSError):
                os.rmdir(part)
            return
        try:
            fill(part, archive)
            compile_all(part, folder)
            write_out(part)
            os.rename(part, folder)
        except BaseException:
            # The content alone: a start that waits for the lock goes on with this very folder.
            shutil.rmtree(os.path.join(part, PACKED), ignore_errors=True)
            raise
    finally:
        os.close(handle)
        os.umask(umask)


def opened(part: str) -> int:
    """A handle of the folder in which to work; it may be there, from a start that is at it now or was killed at it."""
    while True:
        with suppress(FileExistsError):
            os.mkdir(part)
        with suppress(FileNotFoundError):  # when another start has just given it its final name
            return os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def fill(part: str, archive: str) -> None:
    """Copy what is packed into the folder."""
    try:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(part, [name for name in packed.namelist() if name.startswith(PACKED)])
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        sys.exit(f"livenessprobe: {archive} is damaged ({error}): copy it here again")


def compile_all(part: str, folder: str) -> None:
    """Compile it, since not every user that may run it may write there: else each of their starts would compile."""
    for path, _, names in os.walk(part):
        for name in names:
            if name.endswith(".py"):
                source = os.path.join(path, name)
                # Without docstrings, but for ours: a dataclass that has none loads a module to compose one.
                ours = os.path.basename(path) == "livenessprobe"
                py_compile.compile(
                    source,
                    cfile=importlib.util.cache_from_source(source, optimization=""),
                    dfile=folder + source.removeprefix(part),
                    optimize=0 if ours else 2,
                    # Times of files get lost where an image is made of them.
                    invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
                    quiet=2,
                )


def write_out(part: str) -> None:
    """Have it on the disk before it gets its name: a host that loses power must not keep a folder of empty files."""
    for path, _, names in os.walk(part):
        for name in [".", *names]:
            if not name.endswith(".py"):  # not read, since there is a compiled one
                handle = os.open(os.path.join(path, name), os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
