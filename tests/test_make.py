"""What `make` does before anything else: it says in one line what the machine lacks, and pins everything by hash."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import program
import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.unmeasured

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
# The Python that made our environment.
BASE = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
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
        # A group that another one includes is not a requirement of its own.
        for requirement in (Requirement(each) for each in wanted if isinstance(each, str)):
            assert all(map(requirement.specifier.contains, versions[requirement.name])), requirement


@pytest.fixture(scope="module")
def shared() -> None:
    """What is made once for all tests of this file."""


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="there are no workers: --numprocesses=2")
def test_tests_that_share_a_fixture_run_on_one_worker(shared: None, request: pytest.FixtureRequest) -> None:
    # This is how pytest-xdist marks them.
    assert request.node.nodeid.endswith("@tests/test_make.py")


def fake_python(folder: Path, body: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def fill(
    folder: Path, *variables: str, lock: str = "", user: int | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Have make fill the environment of a project in this folder, as from a shell, though `make test` may run this."""
    here = folder / "build" / "here"
    here.mkdir(parents=True, exist_ok=True)
    # Copies, since another user may not enter this checkout's folder.
    for path in (ROOT / "build" / "here" / "venv.sh", ROOT / "Makefile"):
        shutil.copy(path, here)
    (here / "requirements-build.lock").write_text(lock)
    command = ["make", "--no-print-directory", f"--file={here / 'Makefile'}", f"--directory={folder}"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        [*command, *variables, ".venv/requirements-build.lock"],
        capture_output=True,
        check=False,
        env=inherited | environment,
        text=True,
        user=user,
    )


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

    done = fill(folder, f"PYTHON={python}")

    told, made = done.stderr.splitlines()
    assert told.startswith("livenessprobe: " + line.format(python))
    assert made.startswith("make: ***")
    assert not (folder / ".venv").exists()


class Filled(NamedTuple):
    """An environment that make has filled, in a folder that one test at a time may change, and what make said."""

    folder: Path
    said: list[str]


@pytest.fixture(scope="module")
def filled() -> Iterator[Filled]:
    with tempfile.TemporaryDirectory(prefix="lp", dir="/tmp") as name:
        yield Filled(Path(name), fill(Path(name), f"PYTHON={BASE}").stdout.splitlines())


def test_an_environment_is_filled_once_and_made_anew_for_another_python(filled: Filled) -> None:
    folder = filled.folder
    again, same = fill(folder), fill(folder, f"PYTHON={BASE}")
    assert filled.said == [
        f"Making .venv with Python {platform.python_version()}",
        "Installing into .venv what it takes to build it and to run the demo: 15 MB to fetch",
    ]
    assert (again.stdout, same.stdout) == ("", "")
    mark = folder / ".venv" / "mark"
    mark.touch()

    changed = fill(folder, lock="# nothing\n")
    assert changed.stdout.splitlines() == filled.said[1:]
    assert mark.exists()

    # Its Python is gone; the one that is asked for is in an environment itself.
    (folder / ".venv" / "bin" / "python").unlink()
    (folder / ".venv" / "bin" / "python").symlink_to(folder / "gone")
    assert fill(folder, f"PYTHON={sys.executable}").stdout.splitlines() == filled.said
    assert not mark.exists()


def test_no_network_is_one_line(filled: Filled) -> None:
    # There is no proxy there.
    nobody = f"http://127.0.0.1:{program.free_port()}"
    lock = f"click==8.5.1 --hash=sha256:{'0' * 64}\n"

    done = fill(
        filled.folder,
        f"PYTHON={BASE}",
        lock=lock,
        PIP_PROXY=nobody,
        PIP_CONFIG_FILE=os.devnull,
        PIP_RETRIES="1",
        PIP_INDEX_URL=f"{nobody}/simple",
    )

    told, made = done.stderr.splitlines()
    assert told == "livenessprobe: no network here, or no package index that answers: .venv cannot be filled"
    assert made.startswith("make: ***")


@pytest.mark.parametrize("owned", [".venv", "bin"])
def test_folders_of_another_user_are_one_line(folder: Path, owned: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    (folder / owned).mkdir()

    done = fill(folder, f"PYTHON={sys.executable}", user=65534)

    told, made = done.stderr.splitlines()
    assert told == (
        f"livenessprobe: {owned} belongs to root, and nobody may not write there: be that user, or remove it"
    )
    assert made.startswith("make: ***")


def test_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    shown = subprocess.run(
        ["make", "-C", ROOT, "--no-print-directory"], capture_output=True, check=True, text=True
    ).stdout

    assert [line.split()[0] for line in shown.splitlines()] == targets
