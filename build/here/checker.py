"""Packs the check of manifests into one file for any Python from 3.10 on: its modules, the program's own, and PyYAML.

    python build/here/checker.py bin/check-manifest

It is not part of the program, which would carry a YAML parser into every pod for it.
"""

import os
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "deploy" / "migration"
# The program's modules that read a command line.
MODULES = ("__init__", "address", "config", "goflags", "quoting")
# Those of PyYAML that read. Nothing in an archive is compiled, so each module costs every start its compilation.
READS = (
    *("composer", "constructor", "error", "events", "loader"),
    *("nodes", "parser", "reader", "resolver", "scanner", "tokens"),
)
MAIN = """\
import sys

if sys.version_info < (3, 10):
    sys.exit("check-manifest: CPython 3.10 or later is needed, this is " + sys.version.split()[0])
from check_manifest import main

sys.exit(main())
"""


def files() -> Iterator[tuple[str, bytes]]:
    """Return names and contents; of PyYAML, what reads, with its licence and what scanners recognise it by."""
    yield "__main__.py", MAIN.encode()
    for path in CHECK.glob("*.py"):
        yield path.name, path.read_bytes()
    for name in MODULES:
        yield f"livenessprobe/{name}.py", (ROOT / "livenessprobe" / f"{name}.py").read_bytes()
    yield "livenessprobe/LICENSE", (ROOT / "LICENSE").read_bytes()
    # PyYAML's own would load what writes as well.
    yield "yaml/__init__.py", b""
    for name in READS:
        yield f"yaml/{name}.py", Path(yaml.__file__).with_name(f"{name}.py").read_bytes()
    for file in metadata.files("pyyaml") or ():
        if file.name in ("LICENSE", "METADATA"):
            yield file.as_posix(), file.read_binary()


def pack(output: Path) -> None:
    """Write the file; the same bytes from the same sources. Whoever runs it at that moment has the old one."""
    new = output.with_name(f"{output.name}.{os.getpid()}")
    with new.open("wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in sorted(files()):
                entry = zipfile.ZipInfo(name)  # with the default date, in 1980
                entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                archive.writestr(entry, data)
    new.chmod(0o755)
    new.replace(output)


if __name__ == "__main__":
    pack(Path(sys.argv[1]))
