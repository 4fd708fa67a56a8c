"""Runs the program from its unpacked folder; build/here/pyz.py puts this into the archive, unpack.py compiles it there.

Each group of modules is read from one file, each piece of machine code from a file of its own; unpack.py makes each of
them when it is first needed. All are reached through a handle of the folder that start.py has checked, so nobody can
exchange it.
"""

import marshal
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from types import ModuleType
from zipimport import zipimporter

Read = Callable[[int, int], bytes]
"""Reads this many bytes, from this place on."""


class Packed:
    """Finds and loads what is packed, for the import system."""

    def __init__(
        self, archive: str, folder: int, path: str, tag: str, whole: Callable[[int, str], int | None]
    ) -> None:
        self._archive, self._folder, self._path, self._tag, self._whole = archive, folder, path, tag, whole
        self._build = os.path.basename(path)
        self._known: dict[str, tuple[str, bool]] = {}
        self._machine_code: dict[str, str] = {}
        self._groups: dict[str, tuple[dict[str, tuple[int, int]], Read, int]] = {}

    def add(self, group: str, read: Read, start: int = 0) -> None:
        """Take in the modules of a group's unpacked file; the first group's also lists everything that is packed."""
        size = int.from_bytes(read(4, start), "little")
        index = marshal.loads(read(size, start + 4))
        self._groups[group] = index["modules"], read, start + 4 + size
        self._known.update(index.get("known", ()))
        self._machine_code.update(index.get("machine code", ()))

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        if name in self._machine_code:
            file = self._unpacked_machine_code(name)
            return ModuleSpec(name, ExtensionFileLoader(name, file), origin=file)
        if name not in self._known:
            return None
        return ModuleSpec(name, self, is_package=self._known[name][1])  # type: ignore[arg-type]  # importlib.abc takes 5 ms

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave this to the import system."""

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        group = self._known[name][0]
        if group not in self._groups:
            self._load(group)
        modules, read, start = self._groups[group]
        offset, size = modules[name]
        exec(marshal.loads(read(size, start + offset)), vars(module))

    def _load(self, group: str) -> None:
        name = f"{self._tag}.{group}"
        file = self._whole(self._folder, name)
        if file is not None:
            self.add(group, lambda size, start: os.pread(file, size, start))
            return
        unpack = self._unpack()
        content = unpack.modules_file(self._archive, self._build, group)
        with suppress(OSError):  # this start has it, and the next one will unpack it again
            unpack.write(self._folder, name, [content])
        self.add(group, lambda size, start: content[start : start + size])

    def _unpacked_machine_code(self, module: str) -> str:
        name = self._machine_code[module]
        if not name:
            raise ImportError(f"no compiled {module} is packed for this Python")
        file = self._whole(self._folder, name)
        if file is not None:
            os.close(file)
        else:
            unpack = self._unpack()
            try:
                content = unpack.machine_code(self._archive, self._build, name)
                unpack.write(self._folder, name, content)
            except OSError as error:
                raise ImportError(f"cannot unpack {name} into {self._path}: {error.strerror}") from None
        held = f"/proc/self/fd/{self._folder}"
        return os.path.join(held if os.path.isdir(held) else self._path, name)

    def _unpack(self) -> ModuleType:
        importer = zipimporter(self._archive)
        unpack = ModuleType("unpack")
        exec(importer.get_code("unpack"), vars(unpack))
        return unpack


def run(
    archive: str,
    folder: int,
    path: str,
    tag: str,
    file: int,
    start: int,
    whole: Callable[[int, str], int | None],
) -> None:
    """Run the program. Of this host it sees only the standard library: anything else could hide its own modules."""
    packed = Packed(archive, folder, path, tag, whole)
    packed.add("", lambda size, at: os.pread(file, size, at), start)
    sys.meta_path.insert(0, packed)
    library = os.path.dirname(os.__file__)
    sys.path[:] = [library, *(each for each in sys.path if os.path.basename(each) == "lib-dynload")]

    from livenessprobe.__main__ import main

    main()
