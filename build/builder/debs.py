"""Debian packages for this machine or another: fetched, and unpacked without running anything in them.

Runs in the image that the Dockerfile builds in, with the lists that `apt-get update` has fetched there.
"""

import io
import os
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A package."""

    name: str
    control: str
    """What dpkg has about it in its database."""


@dataclass(frozen=True)
class Tree:
    """The files of packages, unpacked into one folder. Paths are relative to it."""

    folder: Path
    owners: dict[str, Package] = field(default_factory=dict)
    """The package that each file, link and folder belongs to."""

    def unpack(self, archive: Path) -> None:
        """Add a package's files."""
        control = _output("dpkg-deb", "--field", archive).decode()
        package = Package(_output("dpkg-deb", "--field", archive, "Package").decode().strip(), control)
        with tarfile.open(fileobj=io.BytesIO(_output("dpkg-deb", "--fsys-tarfile", archive))) as files:
            self.owners.update({os.path.normpath(name): package for name in files.getnames()})
            # Debian 12's own Python knows no filters, and needs none; newer ones want to be told.
            files.extraction_filter = getattr(tarfile, "tar_filter", None)
            files.extractall(self.folder)  # noqa: S202 - packages of Debian's

    def resolve(self, path: str) -> list[str]:
        """Everything that a path needs to lead to a file: the links on the way, and the file itself."""
        parts = path.split("/")
        for length in range(1, len(parts) + 1):
            link = "/".join(parts[:length])
            if (self.folder / link).is_symlink():
                target = (self.folder / link).readlink()
                onward = os.path.join("/", os.path.dirname(link), target, *parts[length:])
                return [link, *self.resolve(os.path.normpath(onward).lstrip("/"))]
        return [path]

    def has(self, path: str) -> bool:
        """Whether a path leads to a file."""
        return (self.folder / self.resolve(path)[-1]).is_file()


def fetch(names: Sequence[str], architecture: str, folder: Path) -> Tree:
    """Download these packages and all that they depend on, and unpack them below this folder."""
    nothing, archives, tree = folder / "nothing", folder / "archives", Tree(folder / "tree")
    nothing.touch()
    (archives / "partial").mkdir(parents=True)
    options = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Sandbox::User": "root",
        "Dir::Cache::archives": archives,
        "Dir::State::status": nothing,  # as if nothing were installed
    }
    subprocess.run(
        ["apt-get", "--quiet=2", "--yes", "--no-install-recommends", "--download-only"]
        + [f"--option={name}={value}" for name, value in options.items()]
        + ["install", *names],
        check=True,
    )
    for archive in sorted(archives.glob("*.deb")):
        tree.unpack(archive)
    return tree


def _output(*command: str | Path) -> bytes:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
