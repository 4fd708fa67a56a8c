"""Unpacks the packed file, at its first start; in the archive beside start.py, which says where.

There is one file for the code of each group of modules, and one for each piece of machine code: whole or not there at
all, even after a loss of power, whoever else is doing the same at this moment. What few need, such as gRPC for targets
other than unix sockets, is unpacked when it is first imported.
"""

import contextlib
import fcntl
import io
import marshal
import os
import re
import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

PACKED = "site-packages/"
CORES = "cores.tar.xz"
GRPC_CORE, PROTOBUF_CORE = "grpc._cython.cygrpc", "google._upb._message"

# What every start reads from packages of which it reads nothing else.
FIRST = re.compile(
    r"(livenessprobe|hpack)(\.|$)|grpc\._grpcio_metadata$|google(\._upb|\.protobuf(\.internal|\.pyext)?)?$"
    r"|google\.protobuf\.(descriptor|descriptor_pool|message|message_factory|reflection|runtime_version"
    r"|symbol_database|wrappers_pb2|pyext\.cpp_message)$"
    r"|google\.protobuf\.internal\.(api_implementation|builder|enum_type_wrapper|python_edition_defaults)$"
)
CHUNK_BYTES = 1 << 18
START_BYTES = 1 << 14  # start.py is shorter than that
ROOM_BYTES = 4 << 20  # where there is less, whatever fails may fail for that


class Damaged(ImportError):
    """The archive is damaged."""


UNUSED_SECONDS, LEFT_SECONDS = 30 * 86400, 3600


def unpack(
    archive: str,
    root: str,
    build: str,
    tag: str,
    opened: Callable[[str], int],
    whole: Callable[[int, str], int | None],
) -> None:
    """Make this build's folder in the root, with what every start reads; raises OSError if that is impossible."""
    umask = os.umask(0o022)  # others who may use the folder must be able to read it
    try:
        os.makedirs(root, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.join(root, build))
        folder = opened(root)
        try:
            remove_old(root, build)
            core = machine_code_files(archive, build)[PROTOBUF_CORE]
            if core and whole(folder, core) is None:
                write(folder, core, machine_code(archive, build, core))
            if whole(folder, tag) is None:
                write(folder, tag, [modules_file(archive, build, "")])
            sync(root)
        finally:
            os.close(folder)
    except Damaged as error:
        sys.exit(f"livenessprobe: {error}")
    finally:
        os.umask(umask)


def write(folder: int, name: str, content: Iterable[bytes]) -> None:
    """Write a file that ends with its checksum, and give it its name once all is on the disk."""
    part = f".{name}.{os.urandom(4).hex()}"
    try:
        with open(part, "xb", opener=lambda path, flags: os.open(path, flags, 0o644, dir_fd=folder)) as file:
            total = 1
            for chunk in content:
                file.write(chunk)
                total = zlib.adler32(chunk, total)
            file.write(total.to_bytes(4, "little"))
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part, dir_fd=folder)
        raise
    os.fsync(folder)


def sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- what is in the archive


@contextlib.contextmanager
def packed(archive: str, build: str) -> Iterator[zipfile.ZipFile]:
    """The archive, for reading; raises Damaged if it is, or if by now it is no longer this build's."""
    from lzma import LZMAError
    from tarfile import TarError

    problem = ""
    try:
        with zipfile.ZipFile(archive) as file:
            yield file
    # RuntimeError where it counts as encrypted, or as compressed in another way
    except (zipfile.BadZipFile, zlib.error, LZMAError, TarError, EOFError, KeyError, RuntimeError) as error:
        bytearray(ROOM_BYTES)  # a MemoryError, if that is why
        problem = f"is damaged ({error}): copy it here again"
    # Another build is put here by renaming it, or by writing it from the beginning: all that was read before is of one build.
    with open(archive, "rb") as start:
        if build.encode() not in start.read(START_BYTES):
            problem = "was replaced while it started: start it again"
    if problem:
        raise Damaged(f"{archive} {problem}")


def modules(names: Iterable[str]) -> dict[str, str]:
    """Each module's path in the archive; empty for a package without code."""
    found = {}
    for name in names:
        if name.startswith(PACKED) and name.endswith(".py"):
            module = name.removeprefix(PACKED).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            found[module] = name
    for module in [*found, GRPC_CORE, PROTOBUF_CORE]:
        for end in re.finditer(r"\.", module):
            found.setdefault(module[: end.start()], "")
    return found


def group(module: str) -> str:
    """The group that this module is unpacked with; the first group's name is empty."""
    return "" if FIRST.match(module) else module.partition(".")[0]


def modules_file(archive: str, build: str, wanted: str) -> bytes:
    """The content of the file with a group's modules: an index, then their code."""
    places: dict[str, tuple[int, int]] = {}
    code = io.BytesIO()
    with packed(archive, build) as file:
        found = modules(file.namelist())
        for module, name in found.items():
            if group(module) == wanted:
                source = file.read(name) if name else b""
                start = code.tell()
                code.write(marshal.dumps(compile(source, name, "exec", 0, True, 2)))  # without docstrings
                places[module] = start, code.tell() - start
        first = b""
        index: dict[str, object] = {"modules": places}
        if not wanted:
            known = {
                module: (group(module), not name or name.endswith("/__init__.py"))
                for module, name in found.items()
            }
            index |= {"known": known, "machine code": dict(machine_code_files(archive, build))}
            first = sized(marshal.dumps(compile(file.read("packed.py"), "packed.py", "exec", 0, True, 2)))
    return first + sized(marshal.dumps(index)) + code.getvalue()


def sized(content: bytes) -> bytes:
    return len(content).to_bytes(4, "little") + content


def machine_code_files(archive: str, build: str) -> dict[str, str]:
    """The file of each module that is machine code; empty if none fits this Python."""
    with packed(archive, build) as file:
        cores = file.read("cores.txt").decode().split()
    protobuf = (
        "_message.abi3.so"
        if {".abi3.so"} & {*EXTENSION_SUFFIXES} and "musl" not in EXTENSION_SUFFIXES[0]
        else ""
    )
    grpc = "cygrpc" + EXTENSION_SUFFIXES[0]
    return {PROTOBUF_CORE: protobuf, GRPC_CORE: grpc if grpc in cores else ""}


def machine_code(archive: str, build: str, name: str) -> Iterator[bytes]:
    """The content of a file of machine code, in pieces: a small container has no room for all of it at once."""
    with packed(archive, build) as file:
        if not name.startswith("cygrpc"):
            yield file.read(f"{PACKED}google/_upb/{name}")
            return
        import tarfile

        # One after another: they are nearly the same, so each but the first takes little.
        with file.open(CORES) as stream, tarfile.open(fileobj=stream, mode="r|xz") as cores:
            for member in cores:
                if member.name == name:
                    core = cores.extractfile(member)
                    assert core
                    while chunk := core.read(CHUNK_BYTES):
                        yield chunk
                    return


# ---- what others left behind


def remove_old(root: str, build: str) -> None:
    """Remove other builds' folders that no process has used for 30 days, and what killed starts left behind."""
    now = time.time()
    for folder in Path(root).glob("livenessprobe_*"):
        with contextlib.suppress(OSError):
            if folder.name == build:
                for part in folder.glob(".*"):
                    if part.lstat().st_mtime < now - LEFT_SECONDS:
                        part.unlink()
            elif newest(folder) < now - UNUSED_SECONDS:
                remove(folder)


def newest(folder: Path) -> float:
    """When it was last used: once a day, start.py notes that in a file's time stamp."""
    return max(path.lstat().st_mtime for path in [folder, *folder.iterdir()])


def remove(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        ours = os.fstat(handle).st_uid == os.geteuid()
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Before we had the lock, another start may have removed it, and one of its own build made it anew.
        if ours and os.path.samestat(os.fstat(handle), folder.lstat()):
            shutil.rmtree(folder)
    finally:
        os.close(handle)
