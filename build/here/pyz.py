"""Packs the program and what it needs into one file, by shiv, for this or another Python and machine.

The same sources give the same bytes, wherever and whenever they are packed.

    python build/here/pyz.py [--python-version 3.13] [--platform linux/arm64] bin/livenessprobe
"""

import argparse
import ast
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PRODUCT = HERE.parent / "product"
PACKAGE = ROOT / "livenessprobe"
LOCK = HERE / "requirements.lock"

PLATFORMS = {"linux/amd64": "x86_64", "linux/arm64": "aarch64"}

# What nothing that is packed imports or opens: certificates for TLS, sources and types of compiled modules, bridges
# to other frameworks. Of *.dist-info, METADATA and the licences stay.
UNREACHED = re.compile(
    r"^bin/|/roots\.pem$|\.(pyi|cc|h)$|/py\.typed$"
    r"|\.dist-info/(RECORD|WHEEL|INSTALLER|REQUESTED|top_level\.txt)$"
    r"|^grpc/(beta|framework)/|^prometheus_client/(aiohttp|bridge|django|twisted)/"
    r"|^google/protobuf/(compiler|testdata|util)/|_benchmark\.py$|/testing_refleaks\.py$"
)

# Python would run the archive behind any first line, but which Python? This looks for one, in the system's own places
# first, and cuts it off from the host's modules and settings (-I -S, which start it 2 ms sooner, too). To ask a Python
# whether it fits takes as long as a start, so none is asked: start.py finds out, and where it does not fit comes back here
# with what was tried so far, under this very process id. But a script, and what only PATH knows, may be a shim of a version
# manager, which exists whether or not there is a Python behind it. That one is asked what it starts.
#
# In the locale C, Python takes all text for UTF-8 as well and loads no tables. An archive that was cut short Python takes
# for a script; all it says about that one is the unknown encoding in the second line.
HEADER = """#!/bin/sh
# coding: livenessprobe-is-damaged--copy-it-here-again
# livenessprobe {release} for CPython {version} on Linux {machine}. An archive follows, which Python unpacks and runs.
case " $*" in *" -once"* | *" --once"*) ;; *) trap 'exit 0' INT TERM ;; esac
export LC_ALL=C
fail() {{ echo "livenessprobe: $1" >&2; exit 1; }}
tried=
case $LIVENESSPROBE_TRIED in "$$ "*) tried=${{LIVENESSPROBE_TRIED#* }} ;; esac
try() {{
    python=$1 line='#!'
    shift
    [ -x "$python" ] || return
    case ", $tried" in *", $python ("*) return ;; esac
    case $python in /usr/bin/* | /usr/local/bin/*) read -r line <"$python" ;; esac 2>/dev/null
    real=$python
    case $line in '#!'*) real=$("$python" -ISc 'import sys; print(sys.executable)' 2>/dev/null) ;; esac
    [ -x "$real" ] && exec "$real" -IS -X tried="$tried${{tried:+, }}$python" "$0" "$@"
    tried="$tried${{tried:+, }}$python (does not start)"
}}
if [ "$LIVENESSPROBE_PYTHON" ]; then
    python=$(command -v "$LIVENESSPROBE_PYTHON") || fail "LIVENESSPROBE_PYTHON=$LIVENESSPROBE_PYTHON: there is no such program"
    exec "$python" -IS "$0" "$@"
fi
for name in {names}; do
    try "/usr/bin/$name" "$@"
    try "/usr/local/bin/$name" "$@"
    try "$(command -v "$name")" "$@"
done
fail "no Python here fits${{tried:+: $tried}}. Install CPython {version} (apt-get install python3), or set LIVENESSPROBE_PYTHON to the path of one"
"""


def run(command: str, *paths: str | Path, **environment: str) -> None:
    """Run a module of this Python."""
    subprocess.run([sys.executable, "-m", *command.split(), *paths], env=os.environ | environment, check=True)


def download(packages: Path, version: str, machine: str) -> None:
    """Install the locked wheels for a Python and machine, neither of which needs to be at hand."""
    run(
        "pip install -qq --disable-pip-version-check --no-compile --no-deps --require-hashes --only-binary=:all:"
        f" --implementation=cp --python-version={version}"
        f" --abi=cp{version.replace('.', '')} --abi=abi3 --abi=none"
        f" --platform=manylinux2014_{machine} --platform=manylinux_2_17_{machine} --requirement",
        LOCK,
        "--target",
        packages,
        # Files are chosen by their hashes: what this machine prefers could only get in the way.
        PIP_CONSTRAINT=os.devnull,
        PIP_USER="0",
    )


def collect(packages: Path, version: str, machine: str) -> None:
    """Lay out all that is to be packed, and nothing else."""
    download(packages, version, machine)
    shutil.copytree(PACKAGE, packages / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyi"))
    shutil.copy(ROOT / "LICENSE", packages / PACKAGE.name)
    for path in packages.rglob("*"):
        if path.is_file() and UNREACHED.search(path.relative_to(packages).as_posix()):
            path.unlink()


def shiv(packages: Path, output: Path) -> None:
    """Have shiv pack it."""
    run(
        "shiv --entry-point livenessprobe.__main__:main --reproducible --site-packages",
        packages,
        "--output-file",
        output,
        SOURCE_DATE_EPOCH="315532800",
    )


def start_file(build: str, version: str, machine: str) -> bytes:
    """start.py with its three lines that say what is packed."""
    source = (PRODUCT / "start.py").read_text()
    python = tuple(map(int, version.split(".")))
    for name, value in {"BUILD": build, "PYTHON": python, "MACHINE": machine}.items():
        source, changed = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}", source)
        assert changed == 1, name
    return source.encode()


def repack(made: Path, version: str, machine: str) -> bytes:
    """Take shiv's archive, with our start in place of shiv's, sorted, without anything that differs between two builds."""
    with zipfile.ZipFile(made) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    build = "livenessprobe_" + json.loads(files["environment.json"])["build_id"]
    files["__main__.py"] = start_file(build, version, machine)
    files["unpack.py"] = (PRODUCT / "unpack.py").read_bytes()

    packed = io.BytesIO()
    header = HEADER.format(
        release=release(), version=version, machine=machine, names=f"python{version} python3"
    )
    packed.write(header.encode())
    with zipfile.ZipFile(packed, "w") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name)  # of 1 January 1980
            entry.external_attr = 0o100644 << 16
            # What every start reads is not worth loading zlib for.
            stored = name == "__main__.py"
            archive.writestr(entry, files[name], zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED, 9)
    return packed.getvalue()


def release() -> str:
    return str(ast.literal_eval((PACKAGE / "__init__.py").read_text().partition("__version__ =")[2].strip()))


def build(version: str, machine: str, output: Path) -> None:
    """Pack for a Python version and machine."""
    with tempfile.TemporaryDirectory() as folder:
        packages, made = Path(folder, "packages"), Path(folder, "made")
        collect(packages, version, machine)
        shiv(packages, made)
        packed = repack(made, version, machine)
    output.parent.mkdir(parents=True, exist_ok=True)
    # A file that is being run can't be written to, but it can be replaced.
    new = output.with_name(f"{output.name}.new")
    new.write_bytes(packed)
    new.chmod(0o755)
    new.replace(output)


def python_version(text: str) -> str:
    if not re.fullmatch(r"3\.\d\d", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 3.10 or 3.13")
    return text


def main() -> None:
    """Pack what the command line asks for."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--python-version", type=python_version, default=here, metavar="3.N", help=f"not {here}"
    )
    parser.add_argument("--platform", choices=PLATFORMS, help="not that of this machine")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    machine = PLATFORMS[options.platform] if options.platform else platform.machine()
    build(options.python_version, machine, options.output)


if __name__ == "__main__":
    main()
