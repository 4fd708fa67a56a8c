"""How the program starts in the image; build/builder/rootfs.py puts this into it, compiled.

gRPC's compiled part, 16 MB, stays compressed there: a driver on a unix socket never needs it. If it is needed, it is
unpacked into memory, since nothing in the image is writable.
"""

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ExtensionFileLoader, ModuleSpec

CORE = "grpc._cython.cygrpc"
CORES = "cores.tar.xz"
TAR_HEAD_BYTES, CHUNK_BYTES = 512, 1 << 18


class CoreFinder:
    """Finds gRPC's compiled part, for the import system."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG004
        if name != CORE:
            return None
        file = f"/proc/self/fd/{unpacked(os.path.join(os.path.dirname(__file__), CORES))}"
        return ModuleSpec(name, ExtensionFileLoader(name, file), origin=file)


def unpacked(archive: str) -> int:
    """A handle of a file in memory with what this archive holds."""
    import lzma

    try:
        handle = os.memfd_create("cygrpc")
        with lzma.open(archive) as packed, open(handle, "wb", closefd=False) as file:
            packed.read(TAR_HEAD_BYTES)
            while chunk := packed.read(CHUNK_BYTES):
                file.write(chunk)
    except OSError as error:
        raise ImportError(f"cannot unpack {CORE} into memory: {error.strerror}") from None
    return handle


def main() -> None:
    """Run the program."""
    sys.meta_path.append(CoreFinder)
    from livenessprobe.__main__ import main as program

    program()
