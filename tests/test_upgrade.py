"""Two builds on one host: at the same moment, one in the other's place, one that cleans up while the other starts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path, PosixPath
from typing import TYPE_CHECKING

import program
import pytest
import pyz
import unpack
from test_pyz import FILE, Host

from livenessprobe import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fake_driver import FakeDriver

NEWER = "99.0.0"
# The ways in which one file takes another's place.
WAYS = {"renamed": "mv", "written over": "cp"}


@pytest.fixture
def host(folder: Path) -> Host:
    return Host(folder)


@pytest.fixture
def newer(folder: Path) -> Path:
    """The file of another build, with another version, and longer first lines and start."""
    with zipfile.ZipFile(FILE) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    first_lines, _, _ = FILE.read_bytes().partition(b"PK\3\4")
    version = "site-packages/livenessprobe/__init__.py"
    for name, pattern, line in (
        (version, rb"__version__ = .*", f'__version__ = "{NEWER}"'),
        (pyz.START, rb"BUILD = .*", f"BUILD = {'livenessprobe_' + 'f' * 16!r}  # it is newer"),
    ):
        files[name], changed = re.subn(b"(?m)^" + pattern + b"$", line.encode(), files[name])
        assert changed == 1
    file = folder / "newer"
    pyz.write(files, first_lines.replace(b"tried=\n", b"tried= # it is newer\n", 1), file)
    file.chmod(0o755)
    return file


def version_of(done: subprocess.CompletedProcess[str]) -> str:
    """The version that a start printed."""
    found = re.fullmatch(r"livenessprobe (\S+) \(.*\)\n", done.stdout)
    assert found, done
    assert (done.returncode, done.stderr) == (0, "")
    return found[1]


def start_all(files: list[Path], env: Mapping[str, str]) -> list[str]:
    """Start them at the same moment; return their versions."""
    starts = [
        subprocess.Popen(
            [file, "--version"], env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for file in files
    ]
    ends = [start.communicate(timeout=60) for start in starts]
    return [
        version_of(subprocess.CompletedProcess(start.args, start.returncode, *end))
        for start, end in zip(starts, ends, strict=True)
    ]


def test_both_start_at_the_same_moment(host: Host, newer: Path) -> None:
    env = {"PATH": os.environ["PATH"], "SHIV_ROOT": str(host.cache)}
    for files in ([host.file, newer] * 3, [newer, host.file] * 3):
        assert start_all(files, env) == [NEWER if file == newer else __version__ for file in files]
        assert len(list(host.cache.iterdir())) == 2
        shutil.rmtree(host.cache)


def test_one_cleans_up_while_the_other_starts(host: Host, newer: Path) -> None:
    """Whatever one of them removes just then, the other has what it needs."""
    env = {"PATH": os.environ["PATH"], "SHIV_ROOT": str(host.cache)}
    for older, cleaner in ((host.file, newer), (newer, host.file)) * 3:
        start_all([older], env)
        for path in sorted(host.cache.rglob("*"), reverse=True):
            os.utime(path, (0, time.time() - 31 * 86400))

        files = [cleaner, older, older, cleaner, older]

        assert start_all(files, env) == [NEWER if file == newer else __version__ for file in files]
        shutil.rmtree(host.cache)


class RemovedMeanwhile(PosixPath):
    """A folder that others remove and make anew, just before we remove it."""

    def lstat(self) -> os.stat_result:
        """What is there by now."""
        self.rename(self.with_name("removed"))
        self.mkdir()
        return super().lstat()


def test_a_folder_that_was_made_anew_is_not_removed(folder: Path) -> None:
    build = RemovedMeanwhile(folder / "livenessprobe_0")
    build.mkdir()

    unpack.remove(build)

    assert sorted(path.name for path in folder.iterdir()) == ["livenessprobe_0", "removed"]


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_replaced_before_python_reads_it_starts_as_the_newer(
    host: Host, newer: Path, folder: Path, way: str
) -> None:
    python = folder / "python"
    python.write_text(f'#!/bin/sh\n{WAYS[way]} {newer} {host.file}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)

    done = host.start(env={"LIVENESSPROBE_PYTHON": str(python), "SHIV_ROOT": str(host.cache)})

    assert version_of(done) == NEWER


# As the file's first lines start it; but then a command is run before the start goes on.
REPLACED = """
import subprocess, sys
start = open(sys.argv[1], "rb").read().split(b"PK\\3\\4")[1][37:]
subprocess.run(sys.argv.pop(2), shell=True, check=True)
exec(start)
"""


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_replaced_while_it_unpacks_leaves_no_mixture(
    host: Host, newer: Path, folder: Path, way: str
) -> None:
    """Otherwise, after going back to the older build, the newer one would start under its name."""
    older = folder / "older"
    shutil.copy(host.file, older)
    before = [sys.executable, "-IS", "-c", REPLACED]

    done = host.start(host.file, f"{WAYS[way]} {newer} {host.file}", "--version", before=before)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"livenessprobe: {host.file} was replaced while it started: start it again\n"
    assert version_of(host.start(older)) == __version__
    assert version_of(host.start(host.file)) == NEWER


def test_a_program_whose_file_is_replaced_goes_on(host: Host, newer: Path, driver: FakeDriver) -> None:
    args = [f"--csi-address={driver.target}", "--http-endpoint=127.0.0.1:0"]
    with program.Probe(args, command=[str(host.file)], env={"SHIV_ROOT": str(host.cache)}) as probe:
        assert probe.get().text == "ok"
        shutil.copy(newer, host.file)

        assert version_of(host.start(host.file)) == NEWER
        assert probe.get().text == "ok"
        assert f'version="{__version__}"' in probe.get("/metrics").text
