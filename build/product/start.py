"""How the packed file starts; build/here/pyz.py puts this into the archive as __main__.py.

It checks that this Python fits, finds the folder where this build is unpacked (unpack.py makes it, at the first start),
and hands over to packed.py there. Python 2.7 can parse it, since it must tell an old Python what is wrong. It is
compiled at each start, and a start is a matter of milliseconds: what is seldom needed is in other files.
"""

import os
import sys

# What is packed; build/here/pyz.py writes these lines anew. The second Python is the newest that fits.
BUILD = "livenessprobe_0"
PYTHONS = ((3, 10), (3, 99))
MACHINE = "x86_64"


def fail(text):
    sys.stderr.write("livenessprobe: " + text + "\n")
    sys.exit(1)


def fits():
    return (
        PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]
        and sys.implementation.name == "cpython"
        and os.uname()[4] == MACHINE
    )


def roots():
    """Where the folder may be, best first."""
    private = "shiv-{0}".format(os.geteuid())
    chosen = os.environ.get("SHIV_ROOT")
    if chosen:
        chosen = os.path.expanduser(chosen)
        return [chosen, os.path.join(chosen, private)]
    fallback = os.path.join(os.environ.get("TMPDIR") or "/tmp", private)  # noqa: S108
    # Without HOME this asks the password file, which may not know the user of a container.
    home = os.path.expanduser("~")
    return [os.path.join(home, ".shiv"), fallback] if os.path.isabs(home) else [fallback]


def check_path(root):
    """Raise OSError unless only root and this user can decide what is at this path.

    Everybody may write to the last folder, as to a volume in Kubernetes: what is used in it is held by its handle. The
    owner of "/" counts as root, who is somebody else in a user namespace.
    """
    path = os.path.realpath(root)
    trusted = (0, os.geteuid(), os.lstat("/").st_uid)
    first = True
    while True:
        try:
            status = os.lstat(path)
        except FileNotFoundError:  # it will be made
            status = None
        if status and status.st_uid not in trusted:
            raise OSError(0, "{0} belongs to another user".format(path))
        if status and not first and status.st_mode & 0o022 and not status.st_mode & 0o1000:
            raise OSError(0, "other users can write to {0}".format(path))
        if path == "/":
            return
        path, first = os.path.dirname(path), False


def check(handle):
    """Raise OSError unless only root or this user can write to what this is a handle of."""
    status = os.fstat(handle)
    if status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
        raise OSError(0, "another user may have written there")


def opened(root):
    """A handle of this build's folder there, which keeps it from being removed for as long as it is open."""
    handle = os.open(os.path.join(root, BUILD), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    check(handle)
    try:
        noexec = os.fstatvfs(handle).f_flag & os.ST_NOEXEC
    except OSError:  # a profile denies the question: loading compiled code will tell
        noexec = False
    if noexec:
        raise OSError(0, "mounted noexec")
    from fcntl import LOCK_NB, LOCK_SH, flock

    try:
        flock(handle, LOCK_SH | LOCK_NB)
    except BlockingIOError:  # it is just being removed
        raise FileNotFoundError(2, "removed by another start")
    except OSError:  # not every file system can lock
        pass
    return handle


def whole(folder, name):
    """A handle of a file in the folder; None unless it is there and ends with the checksum of the rest."""
    from zlib import adler32

    try:
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    except OSError:
        return None
    check(handle)
    total, last = 1, b""
    while True:
        data = os.read(handle, 262144)
        if not data:
            break
        data = last + data
        total, last = adler32(data[:-4], total), data[-4:]
    if last == total.to_bytes(4, "little"):
        return handle
    os.close(handle)
    return None


def found(root, name):
    """Handles of the folder and of the file of this name in it, and the folder's path; None if it is not whole."""
    check_path(root)
    folder = opened(root)
    file = whole(folder, name)
    if file is None:
        os.close(folder)
        return None
    return folder, file, os.path.join(root, BUILD)


def unpacker(archive):
    """The code that unpacks, from the archive."""
    sys.path.insert(0, archive)
    try:
        from unpack import unpack
    except MemoryError:
        raise
    except Exception:  # which one depends on where it is damaged
        bytearray(4 << 20)  # a MemoryError, if there is too little for this: then that may be why
        return fail("{0} is damaged: copy it here again".format(archive))
    return unpack


def unpacked(archive, name):
    """What `found` finds in the best place; made if there is none."""
    problems = {}
    places = roots()
    for root in places:
        try:
            place = found(root, name)
        except FileNotFoundError:
            continue
        except OSError as error:
            problems[root] = error.strerror
        else:
            if place:
                return place
    unpack = unpacker(archive)
    for root in places:
        if root not in problems:
            try:
                check_path(root)
                unpack(archive, root, BUILD, name, opened, whole)
                return found(root, name)
            except (MemoryError, OSError) as error:
                problems[root] = getattr(error, "strerror", "out of memory")
    reasons = ", nor into ".join("{0} ({1})".format(root, problems[root]) for root in places)
    return fail(
        "cannot unpack into {0}: set SHIV_ROOT to a folder you can write to, with 30 MB free, on a file system"
        " that is not mounted noexec".format(reasons)
    )


def mark_as_used(file):
    """Once a day, for whoever removes what nobody uses."""
    from time import time

    if time() - os.fstat(file).st_mtime > 86400:
        try:
            os.utime(file)
        except OSError:  # it is another's, or read-only
            pass


def main():
    # The first lines of the file read this from it, which is quicker than running the file as an archive.
    archive = sys.argv[1] if sys.argv[0] == "-c" else sys.path[0]
    if sys.argv[0] == "-c":
        del sys.argv[0]
    if not hasattr(sys, "implementation") or not fits():
        sys.path.insert(0, archive)
        from misfit import misfit

        fail(misfit(archive, PYTHONS, MACHINE))
    # Until the program has its handlers: unpacking takes a moment, and by default SIGINT ends Python with a traceback.
    from _signal import SIG_BLOCK, SIGINT, SIGTERM, pthread_sigmask

    pthread_sigmask(SIG_BLOCK, (SIGTERM, SIGINT))
    for descriptor in range(3):  # or the folder would be taken for one of these
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull if os.access(os.devnull, os.R_OK) else "/", os.O_RDONLY)
    from _frozen_importlib_external import MAGIC_NUMBER
    from marshal import loads

    tag = "{0}-{1}".format(sys.implementation.cache_tag, int.from_bytes(MAGIC_NUMBER[:2], "little"))
    folder, file, path = unpacked(archive, tag)
    mark_as_used(file)
    size = int.from_bytes(os.pread(file, 4, 0), "little")
    packed = {"__name__": "packed"}
    exec(loads(os.pread(file, size, 4)), packed)
    packed["run"](archive, folder, path, tag, file, 4 + size, whole)


try:
    main()
except MemoryError:
    fail("out of memory")
