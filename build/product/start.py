"""How the packed file starts; build/here/pyz.py puts this into the archive as __main__.py.

It checks that this Python can load what is packed, finds the folder where that is unpacked (by unpack.py, at the
first start) and calls the program. Python 2.7 can parse it, since it must tell an old Python what is wrong. And it
imports next to nothing: with the folder in place, a start is counted in milliseconds.
"""

import os
import sys

# What is packed; build/here/pyz.py writes these three lines anew.
BUILD = "livenessprobe_0"
PYTHON = (3, 11)
MACHINE = "x86_64"

# shiv's own switches but for SHIV_ROOT. A service named "shiv" gives each pod of its namespace others that begin so.
SWITCHES = (
    "COMPILE_PYC COMPILE_WORKERS CONSOLE_SCRIPT ENTRY_POINT EXTEND_PYTHONPATH FORCE_EXTRACT INTERPRETER MODULE"
    " PREPEND_PYTHONPATH"
).split()
DOCKER_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}
ADVICE = (
    "set SHIV_ROOT to a folder you can write to, with 30 MB free, on a file system that is not mounted noexec"
)


def fail(text):
    sys.stderr.write("livenessprobe: " + text + "\n")
    sys.exit(1)


def misfit():
    """Say what is wrong with this Python and what to do, or None if it can load the packed extension modules.

    Where the first lines of the file chose this one, they get to choose again.
    """
    needed = ".cpython-{0}{1}-{2}-linux-gnu.so".format(PYTHON[0], PYTHON[1], MACHINE)
    try:
        # The names it looks for tell a Python's kind, version, build flags, machine and C library at once.
        from _imp import extension_suffixes
    except ImportError:  # Python 2
        loads = ".so"
    else:
        if needed in extension_suffixes():
            return None
        loads = extension_suffixes()[0]
    fitting = "{0}.{1}".format(*PYTHON)
    version = "{0}.{1}".format(*sys.version_info)
    machine = os.uname()[4]
    tried = getattr(sys, "_xoptions", {}).get("tried")
    if tried and machine == MACHINE:
        why = "Python " + version if version != fitting else "loads " + loads
        os.environ["LIVENESSPROBE_TRIED"] = "{0} {1} ({2})".format(os.getpid(), tried, why)
        os.execv("/bin/sh", ["/bin/sh", sys.path[0]] + sys.argv[1:])  # noqa: S606 - the same file, anew
    ways = []
    if machine == MACHINE and version != fitting:
        ways.append("run it with python" + fitting)
    if sys.version_info >= (3, 10) and machine in DOCKER_NAMES and (version, machine) != (fitting, MACHINE):
        target = "PYTHON_VERSION={0} PLATFORM=linux/{1}".format(version, DOCKER_NAMES[machine])
        ways.append("build one that fits: make livenessprobe " + target)
    return "packed for CPython {0} on {1} ({2}), but {3} is Python {4} on {5} ({6}): {7}".format(
        fitting,
        MACHINE,
        needed,
        sys.executable or "this",
        version,
        machine,
        loads,
        ", or ".join(ways) or "run it with a Python that loads such modules",
    )


def roots():
    """Where the cache may be, best first; the last is private: of use only if nobody else can write there."""
    private = "shiv-{0}".format(os.geteuid())
    chosen = os.environ.get("SHIV_ROOT")
    if chosen:
        chosen = os.path.abspath(os.path.expanduser(chosen))
        return [chosen, os.path.join(chosen, private)]
    fallback = os.path.join(os.environ.get("TMPDIR") or "/tmp", private)  # noqa: S108
    # Without HOME this asks the password file, which may not know the user of a container.
    home = os.path.expanduser("~")
    return [os.path.join(home, ".shiv"), fallback] if os.path.isabs(home) else [fallback]


def check(folder):
    """Raise OSError unless code in this folder can run, and only this user or root can have put it there."""
    status = os.lstat(folder)
    is_folder = status.st_mode & 0o170000 == 0o040000
    if not is_folder or status.st_mode & 0o002 or status.st_uid not in (0, os.geteuid()):
        raise OSError(0, "another user may have written there")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise OSError(0, "no permission to read it")
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise OSError(0, "mounted noexec")


def unpacked(archive):
    """The folder where the archive is unpacked: where it has been before, else where it can be now."""
    problems = {}
    places = roots()
    for now in (False, True):
        for root in places:
            if root in problems:
                continue
            folder = os.path.join(root, BUILD)
            try:
                if now:
                    os.makedirs(root, 0o755, True)
                if root == places[-1]:
                    check(root)
                if now:
                    from unpack import unpack

                    unpack(archive, folder, check)
                check(folder)
            except OSError as error:
                if now or not isinstance(error, FileNotFoundError):
                    problems[root] = error.strerror
            else:
                return folder
    reasons = ", nor into ".join("{0} ({1})".format(root, problems[root]) for root in places)
    return fail("cannot unpack into {0}: {1}".format(reasons, ADVICE))


def main():
    wrong = misfit()
    if wrong:
        fail(wrong)
    # Until the program has its handlers: to unpack takes a moment, and Python's own end for SIGINT is a traceback.
    from _signal import SIG_BLOCK, SIGINT, SIGTERM, pthread_sigmask

    pthread_sigmask(SIG_BLOCK, (SIGTERM, SIGINT))
    archive = sys.path[0]
    for name in SWITCHES:
        if "SHIV_" + name in os.environ:
            from _bootstrap import bootstrap

            return bootstrap()
    packed = os.path.join(unpacked(archive), "site-packages")
    # Of this host nothing but the standard library: what else is installed could shadow what is packed.
    library = os.path.dirname(os.__file__)
    sys.path[:] = [packed, library] + [path for path in sys.path if os.path.basename(path) == "lib-dynload"]
    sys.modules.pop("google", None)  # made by .pth files of some packages that share this name

    from livenessprobe.__main__ import main as program

    return program()


main()
