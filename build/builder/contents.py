"""What goes into the image; and what stays out though it seems to be needed, and why."""

import sys

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
INTERPRETER = f"usr/bin/{PYTHON}"
LIBRARY = f"usr/lib/{PYTHON}"
PAYLOAD = "usr/lib/livenessprobe"
PACKAGE = "livenessprobe"

TRIPLETS = {"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}

# Files are taken from these and all that they depend on; the files decide which packages the image has.
PACKAGES = ["base-files", "libstdc++6", f"lib{PYTHON}-stdlib", f"{PYTHON}-minimal"]

# What the interpreter itself imports, and the codecs that are looked up by name: for its start, for errors, host names,
# paths and logs.
BUILT_IN = [
    *(
        "encodings",
        "encodings.aliases",
        "encodings.ascii",
        "encodings.idna",
        "encodings.latin_1",
        "encodings.utf_8",
    ),
    *("collections.abc", "io", "os", "posixpath", "site", "threading", "traceback", "types", "warnings"),
    # For image_start.py.
    *("importlib.machinery", "lzma"),
]

# What extension modules import, which cannot be read from them.
COMPILED = {
    "grpc._cython.cygrpc": [
        *(
            "asyncio",
            "collections",
            "concurrent.futures",
            "contextvars",
            "copy",
            "enum",
            "errno",
            "functools",
            "grpc",
        ),
        *(
            "grpc._observability",
            "inspect",
            "logging",
            "os",
            "pkgutil",
            "queue",
            "socket",
            "sys",
            "threading",
            "time",
        ),
        *("traceback", "types", "warnings", "weakref"),
    ],
    "google._upb._message": ["collections.abc", "copyreg", "google.protobuf.message", "sys", "warnings"],
}

# Reached only by code that is never called here, and what code that is.
UNUSED = {
    # Self-tests of modules, and the debugger.
    **dict.fromkeys(["_pyrepl", "doctest", "pdb", "pydoc", "test", "unittest"], "developers' tools"),
    # postponed.py keeps grpc from loading its second half.
    **dict.fromkeys(["asyncio", "grpc.aio", "grpc.experimental.aio"], "asynchronous gRPC"),
    # prometheus_client can push and serve over TLS, hashlib can use OpenSSL: megabytes.
    **dict.fromkeys(["_hashlib", "_ssl", "ssl"], "TLS"),
    # postponed.py stands in for what prometheus_client pushes and serves with, and for what http.server parses with.
    **dict.fromkeys(["email.parser", "email.utils", "html", "http.client"], "HTTP by the standard library"),
    **dict.fromkeys(
        ["mimetypes", "urllib.error", "urllib.request", "wsgiref.simple_server"],
        "HTTP by the standard library",
    ),
    # What shutil can pack and unpack, and importlib.resources and pkgutil read.
    **dict.fromkeys(
        ["gzip", "importlib.metadata", "importlib.readers", "importlib.resources", "tarfile", "zipfile"],
        "archives",
    ),
    # Each would bring in C libraries of its own.
    **dict.fromkeys(["_bz2", "bz2"], "archives"),
    **dict.fromkeys(["_curses", "curses", "readline"], "terminals"),
    **dict.fromkeys(["_ctypes", "ctypes"], "foreign functions"),
    **dict.fromkeys(["concurrent.futures.process", "multiprocessing"], "worker processes"),
    # Fallbacks for platforms without the C versions.
    **dict.fromkeys(["_pydatetime", "_pydecimal", "_pyio"], "fallbacks"),
    "statistics": "random's self-test",
}

FILES = {
    "etc/passwd": """\
root:x:0:0:root:/nonexistent:/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin
nonroot:x:65532:65532:nonroot:/nonexistent:/sbin/nologin
""",
    "etc/group": "root:x:0:\nnogroup:x:65534:\nnonroot:x:65532:\n",
    # Without it the C library would ask DNS before /etc/hosts.
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}

# Everything is in place: there is nothing to unpack, no cache to find, and the environment cannot change anything.
START = f"""\
#!/{INTERPRETER} -IS
import _signal
import sys

# As PID 1 it would lose a signal that comes before the program has its handlers.
_signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGTERM, _signal.SIGINT))
sys.path[:] = ["/{PAYLOAD}", "/{LIBRARY}", "/{LIBRARY}/lib-dynload"]
from image_start import main

main()
"""
