"""A host with another Debian or another architecture: a folder with its packages, in which chroot starts programs."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import debs
import pyz

if TYPE_CHECKING:
    from collections.abc import Iterator

# Instead of the machine's own settings: only what was fetched for this host, from this Debian release.
SETTINGS = """
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Sandbox::User "root";
Acquire::Languages "none";
Dir::Cache "{folder}/cache";
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "-";
Dir::State::lists "{folder}/lists";
Dir::State::status "{folder}/status";
"""


def emulator(architecture: str) -> Path | None:
    """What runs this architecture's programs here; None if nothing is needed. Fails if it is missing."""
    machine = pyz.PLATFORMS[f"linux/{architecture}"]
    if machine == platform.machine():
        return None
    found = shutil.which(f"qemu-{machine}-static")
    if found is None:
        raise FileNotFoundError("there is no emulator here: apt-get install qemu-user-static")
    return Path(found)


def missing(architecture: str) -> str:
    """Why there cannot be such a host; empty if there can."""
    lacking = [command for command in ("apt-get", "dpkg-deb", "chroot") if not shutil.which(command)]
    if lacking:
        return f"there is no {lacking[0]} here"
    try:
        emulator(architecture)
    except FileNotFoundError as error:
        return str(error)
    return "" if os.geteuid() == 0 else "only root can enter another root"


def mirror() -> str:
    """Where this machine's apt gets Debian from."""
    targets = ["apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)"]
    wanted = ["Created-By: Packages", "Origin: Debian"]
    lines = subprocess.run([*targets, *wanted], capture_output=True, check=True, text=True).stdout.split("\n")
    return next(uri for codename, _, uri in (line.partition(" ") for line in lines) if "-" not in codename)


class DebianHost:
    """The host, with a CPython of this version."""

    def __init__(self, folder: Path, release: str, python: str, architecture: str) -> None:
        self.folder = folder
        self._python, self._emulator = f"/usr/bin/python{python}", emulator(architecture)
        (folder / "lists" / "partial").mkdir(parents=True)
        (folder / "status").touch()
        (folder / "sources.list").write_text(f"deb {mirror()} {release} main\n")
        settings = folder / "apt.conf"
        settings.write_text(SETTINGS.format(architecture=architecture, folder=folder))
        os.environ["APT_CONFIG"] = str(settings)
        try:
            subprocess.run(["apt-get", "--quiet=2", "update"], check=True)
            # What every host has, a shell and the interpreter; and the only library that the wheels take from a host.
            packages = [
                "base-files",
                "dash",
                f"python{python}-minimal",
                f"libpython{python}-stdlib",
                "libstdc++6",
            ]
            self.root = debs.fetch(packages, architecture, folder).folder
        finally:
            del os.environ["APT_CONFIG"]
        # gRPC wants to read it; a file will do, since not everyone may make a device.
        (self.root / "dev" / "urandom").write_bytes(os.urandom(65536))
        if self._emulator:
            shutil.copy(self._emulator, self.root / "emulator")

    def take_compiled(self, other: DebianHost) -> None:
        """Take Python's own modules as another host has compiled them, since an emulator takes ten seconds for that."""
        for folder in (other.root / "usr" / "lib").rglob("__pycache__"):
            shutil.copytree(folder, self.root / folder.relative_to(other.root))

    def run(self, file: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a packed file that was copied there, to its end."""
        # An emulator cannot start a script, so it starts what the script would.
        command = ["/emulator", self._python, "-IS", file] if self._emulator else [file]
        return subprocess.run(
            ["chroot", self.root, *command, *arguments],
            capture_output=True,
            check=False,
            env={"LC_ALL": "C", "PATH": "/usr/bin:/usr/sbin", "SHIV_ROOT": "/cache"},
            text=True,
            timeout=300,
        )


@contextlib.contextmanager
def debian_host(release: str, python: str, architecture: str) -> Iterator[DebianHost]:
    # Not a fixture's folder: there are sockets in it, and their paths may have 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="lp", dir="/tmp") as folder:
        yield DebianHost(Path(folder), release, python, architecture)
