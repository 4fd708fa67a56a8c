"""Packs the program and what it needs into one file, by shiv, for every CPython of this or another machine.

The same sources give the same bytes, wherever and whenever they are packed. What comes from other projects is fetched and
compressed once per lock file, by kept.py.

    python build/here/pyz.py [--python-version 3.13] [--platform linux/arm64] bin/livenessprobe
"""

import argparse
import ast
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import kept

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PRODUCT = HERE.parent / "product"
PACKAGE = ROOT / "livenessprobe"

# gRPC has compiled parts for these; for unix sockets, which need none, newer ones will do as well.
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
NEWEST = "3.99"

PLATFORMS = {"linux/amd64": "x86_64", "linux/arm64": "aarch64"}

START = "__main__.py"

# Python would run the archive behind any first line, but which Python? This looks for one, in the system's own places
# first, and cuts it off from the host's modules and settings (-I -S, which also start it 2 ms sooner). Asking a Python
# whether it fits takes as long as a start, so none is asked: start.py finds out and, if it does not fit, comes back here
# with what was tried so far, under the same process id. But a script in /usr/local/bin, and anything found only along PATH,
# may be a version manager's shim, which exists whether or not there is a Python behind it. That one is asked what it starts;
# so is one that the shell thinks it may not run: an old seccomp profile answers its question, faccessat2, with EPERM.
#
# In the C locale, Python also takes all text for UTF-8, and loads no tables. An archive that was cut short is a script to
# Python, and all it says about it is that the encoding in the second line is unknown: so that says what is wrong.
#
# The file may be replaced, or still be copied, while it starts. So the braces: a shell runs all of what is between, or
# nothing. And Python looks for the start itself, which is the archive's first entry, behind its name and before the next
# signature: these lines may be another build's by then. Signals are held back first of all, in a Python that can do that:
# for reading and compiling the start takes it another 4 ms, in which SIGINT would be a traceback.
HEADER = """#!/bin/sh
# coding: livenessprobe-is-damaged--copy-it-here-again
{{ # livenessprobe {release} for CPython {version} on Linux {machine}. An archive follows, which Python unpacks and runs.
case " $*" in *" -once"* | *" --once"*) ;; *) trap 'exit 0' INT TERM ;; esac
export LC_ALL=C
fail() {{ echo "livenessprobe: $1" >&2; exit 1; }}
start='
try: from _signal import *; pthread_sigmask(SIG_BLOCK, (SIGINT, SIGTERM))
except ImportError: pass
import sys; f = open(sys.argv[1], "rb"); s = f.read(16384).split(b"PK\\3\\4"); s[2:] or sys.exit("livenessprobe: " + sys.argv[1] + " is damaged: copy it here again"); f.close(); exec(s[1][{start}:])'
tried=
case ${{LIVENESSPROBE_TRIED-}} in "$$ "*) tried=${{LIVENESSPROBE_TRIED#* }} ;; esac
try() {{
    python=$1 line='#!'
    shift
    [ -e "$python" ] || return
    case ", $tried" in *", $python ("*) return ;; esac
    [ -x "$python" ] && case $python in
        /usr/bin/*) line= ;;
        /usr/local/bin/*) {{ read -r line <"$python"; }} 2>/dev/null ;;
    esac
    real=$python
    case $line in '#!'*) real=$("$python" -ISc 'import sys; print(sys.executable)' 2>/dev/null) ;; esac
    [ -e "$real" ] && exec "$real" -IS -X tried="$tried${{tried:+, }}$python" -c "$start" "$0" "$@"
    tried="$tried${{tried:+, }}$python (does not start)"
}}
if [ "${{LIVENESSPROBE_PYTHON-}}" ]; then
    python=$(command -v "$LIVENESSPROBE_PYTHON") || fail "LIVENESSPROBE_PYTHON=$LIVENESSPROBE_PYTHON: there is no such program"
    exec "$python" -IS -c "$start" "$0" "$@"
fi
for name in {names}; do
    try "/usr/bin/$name" "$@"
    try "/usr/local/bin/$name" "$@"
    try "$(command -v "$name")" "$@"
done
fail "no Python here fits${{tried:+: $tried}}. Install CPython {version} (apt-get install python3), or set LIVENESSPROBE_PYTHON to the path of one"
}}
"""
BEFORE_START = 26 + len(START)  # in its entry, behind the signature


def collect(packages: Path, kept_packages: Path) -> None:
    """Lay out all that shiv is to pack, and nothing else."""
    shutil.copytree(kept_packages, packages)
    shutil.copytree(PACKAGE, packages / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyi"))
    shutil.copy(ROOT / "LICENSE", packages / PACKAGE.name)


def shiv(packages: Path, output: Path) -> None:
    """Have shiv pack it."""
    command = "shiv --entry-point livenessprobe.__main__:main --reproducible --site-packages"
    subprocess.run(
        [sys.executable, "-m", *command.split(), packages, "--output-file", output],
        env=os.environ | {"SOURCE_DATE_EPOCH": "315532800"},
        check=True,
    )


def start_file(build: str, versions: Sequence[str], machine: str) -> bytes:
    """start.py with its three lines that say what is packed."""
    source = (PRODUCT / "start.py").read_text()
    newest = versions[0] if len(versions) == 1 else NEWEST
    pythons = tuple(tuple(map(int, version.split("."))) for version in (versions[0], newest))
    for name, value in {"BUILD": build, "PYTHONS": pythons, "MACHINE": machine}.items():
        source, changed = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}", source)
        assert changed == 1, name
    return source.encode()


def header(versions: Sequence[str], machine: str) -> bytes:
    """The first lines."""
    return HEADER.format(
        release=release(),
        version=" to ".join(dict.fromkeys((versions[0], versions[-1]))),
        machine=machine,
        names=f"python{versions[0]} python3"
        if len(versions) == 1
        else " ".join(["python3", *(f"python{version}" for version in reversed(versions))]),
        start=BEFORE_START,
    ).encode()


def repack(made: Path, cores: Path, versions: Sequence[str], machine: str, target: Path) -> None:
    """Take shiv's archive, sorted, with our start instead of shiv's, and without anything that differs between two builds."""
    with zipfile.ZipFile(made) as archive:
        files = {
            name: archive.read(name) for name in archive.namelist() if not name.startswith("_bootstrap/")
        }
    files |= {name: (PRODUCT / name).read_bytes() for name in ("misfit.py", "packed.py", "unpack.py")}
    files |= {name: (cores / name).read_bytes() for name in ("cores.tar.xz", "cores.txt")}
    files[START] = (PRODUCT / "start.py").read_bytes()
    content = hashlib.sha256()
    for name in sorted(files):
        content.update(f"{name} {len(files[name])}\n".encode() + files[name])
    files[START] = start_file(f"livenessprobe_{content.hexdigest()[:16]}", versions, machine)

    write(files, header(versions, machine), target)


def write(files: Mapping[str, bytes], first_lines: bytes, target: Path) -> None:
    """Make the archive of these files."""
    with target.open("wb") as packed:
        packed.write(first_lines)
        with zipfile.ZipFile(packed, "w") as archive:
            for name in sorted(files):
                entry = zipfile.ZipInfo(name)  # of 1 January 1980
                entry.external_attr = 0o100644 << 16
                # The first lines read the start as it is, and nothing makes the compressed cores smaller.
                stored = name in (START, "cores.tar.xz")
                archive.writestr(
                    entry, files[name], zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED, 9
                )


def release() -> str:
    return str(ast.literal_eval((PACKAGE / "__init__.py").read_text().partition("__version__ =")[2].strip()))


def build(versions: Sequence[str], machine: str, output: Path) -> None:
    """Pack for some Pythons and a machine."""
    output.parent.mkdir(parents=True, exist_ok=True)
    fetched = kept.folder_for(versions, machine)
    # A file that is being run can't be written to, but it can be replaced.
    new = output.with_name(f"{output.name}.new")
    with tempfile.TemporaryDirectory() as folder:
        packages, made = Path(folder, "packages"), Path(folder, "made")
        collect(packages, fetched / "packages")
        shiv(packages, made)
        repack(made, fetched, versions, machine, new)
    new.chmod(0o755)
    new.replace(output)


def python_version(text: str) -> str:
    if not re.fullmatch(r"3\.\d\d", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 3.10 or 3.13")
    return text


def main() -> None:
    """Pack what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python-version", type=python_version, metavar="3.N", help="for this one alone")
    parser.add_argument("--platform", choices=PLATFORMS, help="instead of this machine's")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    machine = PLATFORMS[options.platform] if options.platform else platform.machine()
    build([options.python_version] if options.python_version else PYTHONS, machine, options.output)


if __name__ == "__main__":
    main()
