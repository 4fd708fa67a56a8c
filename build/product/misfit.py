"""Says why this Python does not fit; in the archive beside start.py and, like it, parsed by Python 2.7."""

import os
import sys

DOCKER_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}


def misfit(archive, pythons, machine):
    """Say what is wrong and what to do; if the file's first lines chose this Python, they get to choose again."""
    version = "{0}.{1}".format(*sys.version_info)
    implementation = getattr(sys, "implementation", None)
    kind = "CPython" if implementation is None or implementation.name == "cpython" else implementation.name
    here = os.uname()[4]
    tried = getattr(sys, "_xoptions", {}).get("tried")
    if tried and machine == here:
        why = "{0} {1}".format(kind, version)
        os.environ["LIVENESSPROBE_TRIED"] = "{0} {1} ({2})".format(os.getpid(), tried, why)
        os.execv("/bin/sh", ["/bin/sh", archive] + sys.argv[1:])  # noqa: S606 - the same file, anew
    first, last = ["{0}.{1}".format(*python) for python in pythons]
    fitting = first if first == last else first + " or newer"
    ways = []
    if machine == here:
        ways.append("run it with python" + first)
    if sys.version_info >= (3, 10) and here in DOCKER_NAMES:
        narrowed = "PYTHON_VERSION={0} ".format(version) if first == last else ""
        target = "{0}PLATFORM=linux/{1}".format(narrowed, DOCKER_NAMES[here])
        ways.append("build one that fits: make livenessprobe " + target)
    return "packed for CPython {0} on {1}, but {2} is {3} {4} on {5}: {6}".format(
        fitting,
        machine,
        sys.executable or "this",
        kind,
        version,
        here,
        ", or ".join(ways) or "run it with a CPython of its machine",
    )
