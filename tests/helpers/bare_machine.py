"""A newcomer's machine: Debian as debootstrap makes it, with what README's one apt-get line names, and both its commands.

    python3 tests/helpers/bare_machine.py bookworm trixie                  as root
    python3 tests/helpers/bare_machine.py bookworm:user trixie:root        half of it

On each release `make demo` and `make test` must pass, of a clone of what is committed here: as a user who may open 1,024
files, and as root. What this machine has set for pip and apt, and its certificates, are carried in. All runs in namespaces
of its own, with which its processes and mounts end, whatever happens here.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import debian_host

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
# 70 MB of packages are the budget. Pages of the index come on top: here 5 MB for each of six look-ups of grpcio, since its
# mirror does not compress them.
MOST_FETCHED_MB = 70 + 30
USER = 1000
USERS = {"user": (USER, "/home/newcomer"), "root": (0, "/root")}
CARRIED = (
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/apt/apt.conf.d",
    "/etc/pip.conf",
    "/etc/xdg/pip",
    "/etc/ssl/certs/ca-certificates.crt",
)
# What pip, and what it asks over TLS, reads of the environment.
VARIABLES = re.compile("PIP_.*|SSL_CERT_.*|.*_CA_BUNDLE|(?i:https?_proxy|no_proxy)")

# As the machine's own process 1 has them.
ENTER = """
set -eu
mount --make-rprivate /
mount -t proc proc "$1/proc"
mount --rbind /sys "$1/sys"
mount --rbind /dev "$1/dev"
mount -t tmpfs -o mode=1777 tmp "$1/tmp"
root=$1 user=$2
shift 2
ulimit -n 1024
# Not by exec: this shell is process 1, which has to wait for all whose parent has ended.
chroot --userspec="$user" "$root" "$@" || exit $?
"""


def packages() -> list[str]:
    """What README says to install."""
    readme = (ROOT / "README.md").read_text()
    [line] = re.findall(r"(?m)^(?:sudo )?apt-get install (.*)$", readme)
    return [word for word in line.split() if not word.startswith("-")]


class BareMachine:
    """A folder with the release's files."""

    def __init__(self, folder: Path, release: str) -> None:
        self.release = release
        self.root = folder / release
        with (folder / f"{release}.log").open("w+") as log:
            made = subprocess.run(
                [
                    *("debootstrap", "--variant=minbase", f"--include={','.join(packages())}"),
                    *(release, self.root, debian_host.mirror()),
                ],
                check=False,
                stdout=log,
                stderr=log,
            )
            log.seek(0)
            if made.returncode:
                sys.exit(f"bare_machine: debootstrap has failed:\n{log.read()[-2000:]}")
        subprocess.run(
            ["chroot", self.root, "useradd", "--create-home", f"--uid={USER}", "newcomer"], check=True
        )
        for path in map(Path, CARRIED):
            there = self.root / path.relative_to("/")
            if path.is_dir():
                shutil.copytree(path, there, dirs_exist_ok=True, ignore_dangling_symlinks=True)
            elif path.exists():
                there.parent.mkdir(parents=True, exist_ok=True)
                there.unlink(missing_ok=True)  # it may be a link to what is not there
                shutil.copy(path, there)

    def clone(self, home: str, owner: int) -> None:
        there = self.root / home.lstrip("/")
        settings = Path.home() / ".config" / "pip"
        if settings.exists():
            shutil.copytree(settings, there / ".config" / "pip")
        clone = ["git", "-c", "safe.directory=*", "clone", "--quiet", "--no-local"]
        subprocess.run([*clone, ROOT, there / "clone"], check=True)
        subprocess.run(["chown", "--recursive", f"{owner}:{owner}", there], check=True)

    def run(self, user: int, home: str, command: str) -> int:
        """Run a command in the clone, which prints what it has to say."""
        kept = {name: value for name, value in os.environ.items() if VARIABLES.fullmatch(name)}
        environment = {"HOME": home, "LANG": "C.UTF-8", "PATH": "/usr/bin:/usr/sbin:/bin:/sbin"} | kept
        inside = ["sh", "-c", f"cd {home}/clone && exec {command}"]
        unshare = ["setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--ipc", "--fork"]
        return subprocess.run(
            [*unshare, "--kill-child", "sh", "-c", ENTER, "sh", self.root, f"{user}:{user}", *inside],
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
        ).returncode


def received_mb() -> float:
    """What this machine has received over the network, which beside other work is more than what a run fetches."""
    routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()]
    outside = next(route[0] for route in routes if route[1] == "00000000")
    return int(Path(f"/sys/class/net/{outside}/statistics/rx_bytes").read_text()) / 1e6


@contextlib.contextmanager
def bare_machine(release: str) -> Iterator[BareMachine]:
    folder = Path(tempfile.mkdtemp(prefix="lp-bare-"))
    try:
        yield BareMachine(folder, release)
    finally:
        shutil.rmtree(folder)


def main() -> None:
    # So that nothing is left then either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for release, _, who in (word.partition(":") for word in sys.argv[1:]):
        begin = time.monotonic()
        with bare_machine(release) as machine:
            print(f"bare {release}: made in {time.monotonic() - begin:.0f} s", flush=True)
            for name, (user, home) in USERS.items():
                if who in ("", name):
                    try_both(machine, name, user, home)


def try_both(machine: BareMachine, name: str, user: int, home: str) -> None:
    """Clone, and run both commands; exits if one fails."""
    machine.clone(home, user)
    for command in ("make demo", "make test"):
        begin, before = time.monotonic(), received_mb()
        code = machine.run(user, home, command)
        fetched = received_mb() - before
        taken = f"{time.monotonic() - begin:.0f} s, {fetched:.0f} MB"
        print(f"bare {machine.release}: {command} as {name}: exit code {code}, {taken}", flush=True)
        if code:
            sys.exit(1)
        if command == "make demo" and fetched > MOST_FETCHED_MB and "CI" in os.environ:
            sys.exit(f"bare_machine: make demo may fetch {MOST_FETCHED_MB} MB, the index's pages included")


if __name__ == "__main__":
    main()
