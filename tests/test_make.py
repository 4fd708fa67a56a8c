"""What `make` does before it does anything: the machine's gaps in one line, and locks that hold everything by hash."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PINNED = re.compile(
    r"^([a-z0-9-]+)==(\S+)(?: ; ([^\\\n]+?))?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE
)


def locked(name: str) -> dict[str, set[str]]:
    """The versions of each distribution in a lock file."""
    text = (ROOT / "build" / "here" / name).read_text()
    assert PINNED.sub("", text).strip().startswith("#")
    assert PINNED.sub("", text).strip().count("\n") == 0, "something that is not held by a hash"
    versions: dict[str, set[str]] = {}
    for distribution, version, *_ in PINNED.findall(text):
        versions.setdefault(distribution, set()).add(version)
    return versions


def test_locks_hold_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    packed = locked("requirements.lock")
    built, tested = locked("requirements-build.lock"), locked("requirements-test.lock")

    assert packed.items() <= built.items() <= tested.items()
    for versions, wanted in [
        (packed, project["project"]["dependencies"]),
        (built, groups["build"]),
        (tested, groups["test"]),
    ]:
        # A group that another one includes is no requirement of its own.
        for requirement in (Requirement(each) for each in wanted if isinstance(each, str)):
            assert all(map(requirement.specifier.contains, versions[requirement.name])), requirement


def fake_python(folder: Path, body: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (None, "there is no {0} here: apt-get install python3 python3-venv"),
        (
            'case "$*" in *version_info*) exit 1;; *) echo Python 3.9.2;; esac',
            "Python 3.9.2 is too old, 3.10 is needed: ",
        ),
        (
            'case "$*" in *ensurepip*) exit 1;; esac',
            "{0} has no module venv with pip: apt-get install python3-venv",
        ),
    ],
)
def test_what_the_machine_lacks_is_named_with_its_package(folder: Path, body: str | None, line: str) -> None:
    python = fake_python(folder, body) if body else folder / "python"
    (folder / "build" / "here").mkdir(parents=True)
    command = [
        "make",
        "--no-print-directory",
        "-f",
        str(ROOT / "Makefile"),
        "-C",
        str(folder),
        f"PYTHON={python}",
    ]
    (folder / "build" / "here" / "venv.sh").symlink_to(ROOT / "build" / "here" / "venv.sh")
    (folder / "build" / "here" / "requirements-test.lock").touch()

    # As from a shell, though `make test` may run this.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run([*command, ".venv/done"], capture_output=True, check=False, env=env, text=True)

    told, made = done.stderr.splitlines()
    assert told.startswith("livenessprobe: " + line.format(python))
    assert made.startswith("make: ***")
    assert not (folder / ".venv").exists()


def test_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    shown = subprocess.run(
        ["make", "-C", ROOT, "--no-print-directory"], capture_output=True, check=True, text=True
    ).stdout

    assert [line.split()[0] for line in shown.splitlines()] == targets
