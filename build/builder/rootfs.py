"""Puts the image's root file system together: the packed program, the parts of Debian it can reach, and nothing else.

    python3.13 rootfs.py --architecture arm64 livenessprobe /rootfs

Makes two folders there, each a layer of the image: `base`, which stays the same for as long as Debian's packages and
the libraries do, and `program`, which is small. Runs in the image that Dockerfile.distroless builds in. Nothing of
the target's is run, so the target may be another machine.
"""

import argparse
import hashlib
import os
import py_compile
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import contents
import debs
import reach
from contents import INTERPRETER, LIBRARY, PACKAGE, PAYLOAD, PYTHON
from elftools.elf.elffile import ELFFile
from image_start import CORE, CORES


class Root:
    """The file system in the making."""

    def __init__(self, tree: debs.Tree, payload: Path, output: Path, triplet: str) -> None:
        self.tree, self.payload, self.triplet = tree, payload, triplet
        self.base, self.program = output / "base", output / "program"
        self.packages: dict[str, debs.Package] = {}

    # ---- Python

    def add_modules(self) -> None:
        """The modules that can be reached, compiled, and the C libraries of those that are machine code."""
        places = {
            self.payload: PAYLOAD,
            self.tree.folder / LIBRARY: LIBRARY,
            self.tree.folder / LIBRARY / "lib-dynload": f"{LIBRARY}/lib-dynload",
        }
        suffixes = [f".cpython-{PYTHON[6:].replace('.', '')}-{self.triplet}.so", ".abi3.so"]
        search = reach.Search(list(places), suffixes)
        for name in contents.UNUSED:
            if search.find(name) is None:
                sys.exit(f"{name} is said to be unused, but there is no such module")
        program = [f"{PACKAGE}.{file.stem}" for file in (self.payload / PACKAGE).glob("*.py")]
        modules = reach.reached(
            search, program + contents.BUILT_IN, contents.COMPILED, contents.UNUSED, self._postponed()
        )
        for name, file in sorted(modules.items()):
            if file.is_file():  # not a namespace package
                place = next(each for each in file.parents if each in places)
                self._add_module(name, file, f"{places[place]}/{file.relative_to(place)}")

    def _add_module(self, name: str, file: Path, path: str) -> None:
        layer = self.program if name.partition(".")[0] == PACKAGE else self.base
        if path in self.tree.owners:
            self._use(path)
        if name == CORE:
            copy(self.payload.parent / CORES, layer / PAYLOAD / CORES)
            self.add_libraries(file)
        elif file.suffix == ".py":
            compile_module(file, layer / f"{path}c", f"/{path}")
        else:
            copy(file, layer / path)
            self.add_libraries(file)

    def _postponed(self) -> list[str]:
        sys.path.insert(0, str(self.payload))
        from livenessprobe.postponed import UNUSED, UNUSED_SERVING

        return [*UNUSED, *UNUSED_SERVING]

    # ---- Debian

    def add(self, path: str) -> Path:
        """A file of Debian's, with the links that lead to it; returns where it is unpacked."""
        for step in self.tree.resolve(path):
            self._use(step)
            copy(self.tree.folder / step, self.base / step)
        return self.tree.folder / step

    def _use(self, path: str) -> None:
        package = self.tree.owners[path]
        self.packages[package.name] = package

    def add_program(self, path: str) -> None:
        """An executable, and everything the dynamic linker loads for it."""
        binary = self.add(path)
        with binary.open("rb") as file:
            self.add(next(ELFFile(file).iter_segments("PT_INTERP")).get_interp_name().lstrip("/"))
        self.add_libraries(binary)

    def add_libraries(self, binary: Path) -> None:
        """The libraries that a binary is linked with, and so on."""
        with binary.open("rb") as file:
            names = [
                tag.needed for tag in ELFFile(file).get_section_by_name(".dynamic").iter_tags("DT_NEEDED")
            ]
        for name in names:
            path = f"usr/lib/{self.triplet}/{name}"
            if not self.tree.has(path):
                sys.exit(f"{binary} needs {name}, which none of the packages has")
            if not os.path.lexists(self.base / path):
                self.add_libraries(self.add(path))

    def add_licences(self) -> None:
        """The copyright of each package and the licences it refers to, which can bring in another package."""
        done: set[str] = set()
        while left := sorted(self.packages.keys() - done):
            for name in left:
                text = self.add(f"usr/share/doc/{name}/copyright").read_text(errors="replace")
                for licence in re.findall(r"/(usr/share/common-licenses/[\w.+-]*\w)", text):
                    if self.tree.has(licence):
                        self.add(licence)
            done.update(left)

    def add_status(self) -> None:
        """What dpkg would say is installed, where vulnerability scanners look in an image without dpkg."""
        sums: dict[str, list[str]] = {name: [] for name in self.packages}
        for path in files_below(self.base):
            if path in self.tree.owners and not (self.base / path).is_symlink():
                digest = hashlib.md5((self.base / path).read_bytes(), usedforsecurity=False).hexdigest()
                sums[self.tree.owners[path].name].append(f"{digest}  {path}\n")
        for name, package in self.packages.items():
            write(self.base / "var/lib/dpkg/status.d" / name, package.control)
            write(self.base / "var/lib/dpkg/status.d" / f"{name}.md5sums", "".join(sums[name]))

    # ---- the rest

    def add_metadata(self) -> None:
        """Names, versions and licences of the Python packages."""
        for folder in self.payload.glob("*.dist-info"):
            for path in files_below(folder):
                copy(folder / path, self.base / PAYLOAD / folder.name / path)
        copy(self.payload / PACKAGE / "LICENSE", self.program / PAYLOAD / PACKAGE / "LICENSE")

    def add_own_files(self) -> None:
        for path, text in contents.FILES.items():
            write(self.base / path, text)
        main = Path(__file__).with_name("image_start.py")
        compile_module(main, self.program / PAYLOAD / "image_start.pyc", f"/{PAYLOAD}/{main.name}")
        start = self.program / "livenessprobe"
        write(start, contents.START)
        start.chmod(0o755)


def files_below(folder: Path) -> Iterable[str]:
    """The paths of all files and links below a folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or path.is_file():
            yield str(path.relative_to(folder))


def compile_module(source: Path, target: Path, name: str) -> None:
    """Compile a module, without docstrings, so that it is never checked against its source, which will not be there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(source), str(target), name, True, 2, unchecked)
    target.chmod(0o644)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(target):
        shutil.copy(source, target, follow_symlinks=False)


def write(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def unpack(archive: Path, folder: Path) -> None:
    """Take the packed file apart; gRPC's compiled part is packed by itself."""
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)  # noqa: S202 - of our own making
    with tarfile.open(folder / CORES) as cores:
        [core] = cores.getmembers()
        cores.extract(core, folder / "site-packages/grpc/_cython", filter="data")


def settle(output: Path, seconds: int) -> None:
    """Give everything the same time stamp, and leave no write permission that no package gave."""
    for at, folders, files in os.walk(output):
        for name in [*folders, *files]:
            path = os.path.join(at, name)
            if not os.path.islink(path):
                os.chmod(path, os.stat(path).st_mode & 0o755)
            os.utime(path, (seconds, seconds), follow_symlinks=False)


def main() -> None:
    """Make what the command line asks for."""
    os.umask(0o022)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architecture", choices=contents.TRIPLETS, required=True)
    parser.add_argument("archive", type=Path, help="packed by build/here/pyz.py")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(options.archive, folder / "payload")
        tree = debs.fetch(contents.PACKAGES, options.architecture, folder)
        root = Root(
            tree, folder / "payload/site-packages", options.output, contents.TRIPLETS[options.architecture]
        )
        # By these, scanners know which Debian it is: Trivy by its version alone, Syft and Grype by the other.
        root.add("etc/debian_version")
        root.add("etc/os-release")
        root.add_program(INTERPRETER)
        root.add_modules()
        root.add_metadata()
        root.add_licences()
        root.add_status()
        root.add_own_files()
    settle(options.output, int(os.environ["SOURCE_DATE_EPOCH"]))


if __name__ == "__main__":
    main()
