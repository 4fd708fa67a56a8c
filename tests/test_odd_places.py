"""Starts in odd places, under odd limits, with odd variables: a check says what it always says."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from test_pyz import Host, in_namespace

if TYPE_CHECKING:
    from pathlib import Path

    from fake_driver import FakeDriver

# What a shell does before the file takes its place.
PLACES = {
    "no mode for new files": "umask 0777",
    "a small stack": "ulimit -s 64",
    "an endless stack": "ulimit -s unlimited",
    "32 MiB of addresses": "ulimit -v 32768",
    "12 descriptors": "ulimit -n 12",
    "no file may grow": "ulimit -f 0",
    "one second of CPU": "ulimit -t 1",
    "signals ignored": "trap '' HUP INT QUIT PIPE ALRM TERM CHLD USR1",
    "a folder of the kernel's": "cd /proc/self",
    "10,000 variables": "i=0; while [ $i -lt 10000 ]; do export V$i=some_value; i=$((i + 1)); done",
    "a large variable": "V=$(head -c 120000 /dev/zero | tr '\\0' x); export V",
    "a variable that is no UTF-8": "V=$(printf '\\377\\376'); export V LANG=$V",
    "a time zone that is none": "export TZ=garbage",
    "a far time zone": "export TZ=X+167:59:59",
    "a locale that is none": "export LC_ALL=xx_XX.nope LANGUAGE=xx",
    "what a shell heeds": "export IFS=/ CDPATH=/ ENV=/nope PS4='$(id)' SHELLOPTS=errexit:nounset",
    "what the first lines set": "export tried=x python=x line='#!' real=x start=x name=x",
    "nothing on PATH": "export PATH=",
    "no standard input": "exec <&-",
}
# The same in mounts of its own.
MOUNTS = {
    "no processes to be seen": "mount -t tmpfs none /proc",
    "no devices": "mount -t tmpfs none /dev",
    "no devices and no standard input": "mount -t tmpfs none /dev; exec <&-",
    "nothing in /etc, /run, /sys and /var": "for name in etc run sys var; do mount -t tmpfs none /$name; done",
}


@pytest.fixture
def host(folder: Path, driver: FakeDriver) -> Host:
    """One where the file is unpacked."""
    host = Host(folder)
    host.checks(driver)
    return host


@pytest.mark.parametrize("place", PLACES)
def test_it_checks(host: Host, driver: FakeDriver, place: str) -> None:
    host.checks(driver, before=["/bin/sh", "-c", f'{PLACES[place]}; exec "$0" "$@"'])


@pytest.mark.parametrize("place", MOUNTS)
def test_it_checks_in_mounts_of_its_own(host: Host, driver: FakeDriver, place: str) -> None:
    host.checks(driver, before=in_namespace(MOUNTS[place]))


@pytest.mark.parametrize("shell", ["sh", "bash", "sh -eu"])
def test_a_shell_may_be_named(host: Host, driver: FakeDriver, shell: str) -> None:
    host.checks(driver, before=shell.split())


@pytest.mark.parametrize("name", [b"a b\n$(id)'\"\\*", b"\xff\xfe", b"-c"])
def test_the_file_may_have_any_name(host: Host, driver: FakeDriver, folder: Path, name: bytes) -> None:
    file = os.fsencode(folder) + b"/" + name
    os.link(host.file, file)

    done = subprocess.run(
        [b"./" + name, "--once", f"--csi-address={driver.address}"],
        capture_output=True,
        check=False,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "SHIV_ROOT": str(host.cache)},
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, b"ok\n", b"")


def test_the_folder_it_is_started_in_may_be_gone(host: Host, driver: FakeDriver, folder: Path) -> None:
    """The shell has a word to say about that."""
    for root, code in ((str(host.cache), 0), ("nowhere", 1)):
        gone = 'cd "$(mktemp -d)" && rmdir "$PWD"; exec "$0" "$@"'
        done = host.start(
            host.file,
            "--once",
            f"--csi-address={driver.address}",
            before=["/bin/sh", "-c", gone],
            env={"PATH": os.environ["PATH"], "SHIV_ROOT": root},
        )

        assert done.returncode == code
        assert "Traceback" not in done.stderr
        assert done.stdout == ("ok\n" if not code else "")
        assert not code or "cannot unpack into nowhere (No such file or directory)" in done.stderr
