"""What the packed file takes from other projects: fetched by the lock file, compressed, and kept in bin/kept.

It is made once for each lock file, set of Pythons and machine: after that, a changed line of ours is packed in seconds.
"""

import hashlib
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import tars

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LOCK = HERE / "requirements.lock"
KEPT = ROOT / "bin" / "kept"
LEFT_SECONDS = 3600

# What nothing that is packed imports or opens: certificates for TLS, sources and types of compiled modules, bridges
# to other frameworks. Of *.dist-info, METADATA and the licences stay.
UNREACHED = re.compile(
    r"^bin/|/roots\.pem$|\.(pyi|cc|h)$|/py\.typed$"
    r"|\.dist-info/(RECORD|WHEEL|INSTALLER|REQUESTED|top_level\.txt)$"
    r"|^grpc/(beta|framework)/|^prometheus_client/(aiohttp|bridge|django|twisted)/"
    r"|^google/protobuf/(compiler|testdata|util)/|_benchmark\.py$|/testing_refleaks\.py$"
)
CORES = "grpc/_cython/cygrpc.*.so"


def download(packages: Path, requirements: Path, version: str, machine: str) -> None:
    """Install locked wheels for a Python and machine, neither of which needs to be at hand."""
    command = (
        "pip install -qq --disable-pip-version-check --no-compile --no-deps --require-hashes --only-binary=:all:"
        f" --implementation=cp --python-version={version}"
        f" --abi=cp{version.replace('.', '')} --abi=abi3 --abi=none"
        f" --platform=manylinux2014_{machine} --platform=manylinux_2_17_{machine}"
    )
    subprocess.run(
        [sys.executable, "-m", *command.split(), "--requirement", requirements, "--target", packages],
        # Files are chosen by their hashes: this machine's preferences could only get in the way.
        env=os.environ | {"PIP_CONSTRAINT": os.devnull, "PIP_USER": "0"},
        check=True,
    )


def folder_for(versions: Sequence[str], machine: str) -> Path:
    """The folder with what comes from other projects for these Pythons and this machine; made if there is none.

    In it are the packages, and gRPC's compiled parts.
    """
    made_of = hashlib.sha256(LOCK.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]
    target = f"{machine}-{versions[0]}-{versions[-1]}"
    folder = KEPT / f"{target}-{made_of}"
    remove_left()
    if not folder.is_dir():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="tmp", dir=KEPT) as name:
            made = Path(name, "made")
            keep(made, versions, machine)
            for old in set(KEPT.glob(f"{target}-*")) - {folder}:
                shutil.rmtree(old, ignore_errors=True)
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another build was quicker
                    raise
    return folder


def remove_left() -> None:
    """Remove what killed builds left; another build may be busy with anything younger than an hour."""
    for left in KEPT.glob("tmp*"):
        with suppress(FileNotFoundError):  # another build has just done so
            if left.stat().st_mtime < time.time() - LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def keep(folder: Path, versions: Sequence[str], machine: str) -> None:
    """Fetch and compress. Of the Pythons after the first one, only gRPC differs."""
    grpc = folder / "grpc.lock"
    folder.mkdir()
    [locked] = re.findall(r"(?m)^grpcio==(?:.*\\\n)*.*\n", LOCK.read_text())
    grpc.write_text(locked)
    folders = [folder / "packages", *(folder / version for version in versions[1:])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for each in [
            pool.submit(download, packages, LOCK if packages is folders[0] else grpc, version, machine)
            for packages, version in zip(folders, versions, strict=True)
        ]:
            each.result()
    cores = [core for packages in reversed(folders) for core in packages.glob(CORES)]
    assert len(cores) == len(versions)
    compress(cores, folder / "cores.tar.xz")
    (folder / "cores.txt").write_text("".join(f"{core.name}\n" for core in cores))
    for path in [*cores, grpc]:
        path.unlink()
    for other in folders[1:]:
        shutil.rmtree(other)
    for path in folders[0].rglob("*"):
        if path.is_file() and UNREACHED.search(path.relative_to(folders[0]).as_posix()):
            path.unlink()


def compress(cores: Sequence[Path], target: Path) -> None:
    """One after the other: they are nearly the same, and the dictionary reaches over the one before.

    A higher preset takes eight times as long and saves a tenth. A single one, as in the image, gets a dictionary that a
    small container has memory for.
    """
    filters: list[dict[str, int]] = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": 32 << 20}]
    if len(cores) == 1:
        x86 = cores[0].read_bytes()[18] == 62  # of elf.h; this Python has no such filter for other machines
        filters = [{"id": lzma.FILTER_X86}] if x86 else []
        filters += [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 20}]
    with (
        lzma.open(target, "wb", format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for core in cores:
            tars.add(archive, core.name, core.read_bytes())
