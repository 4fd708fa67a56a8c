"""A Docker engine for tests: images that are built once for all tests, containers that end with theirs."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import image
import image_budget
import this_run
from program import Response

if TYPE_CHECKING:
    from collections.abc import Iterator

# By this label, everything that tests make can be told from everything else.
MARK = f"livenessprobe.test={this_run.name()}"
PORT = 9808

# The least privilege a pod can give a container; runAsUser and the rest come on top.
HARDENED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--pids-limit=64")


def docker(*arguments: str | Path, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run a command of Docker's client that may fail."""
    return subprocess.run(
        [image.DOCKER, *arguments],
        capture_output=True,
        check=False,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=timeout,
    )


def must(*arguments: str | Path, timeout: float = 300.0) -> str:
    """Run a command of Docker's client that may not fail; return its output."""
    done = docker(*arguments, timeout=timeout)
    assert done.returncode == 0, f"docker {arguments}: {done.stderr}"
    return done.stdout.strip()


def missing() -> str:
    """Why there is no engine to test in; empty if there is one."""
    try:
        done = docker("version", "--format", "{{.Server.Version}}")
    except FileNotFoundError:
        return f"there is no {image.DOCKER} here"
    return "" if done.returncode == 0 else f"Docker does not answer: {done.stderr.strip()}"


def remove_all() -> None:
    """Remove everything that this run's tests made, including what a test could not remove."""
    if missing():
        return
    for things, remove in {
        "ps --all --quiet": "rm --force --volumes",
        "volume ls --quiet": "volume rm --force",
        "image ls --quiet": "rmi --force",
    }.items():
        if found := must(*things.split(), f"--filter=label={MARK}").split():
            docker(*remove.split(), *sorted(set(found)))


class Container:
    """A container that was created; `start` it."""

    def __init__(self, number: str) -> None:
        self.id = number
        self.started = 0.0
        """By the monotonic clock, just before Docker was asked to start it."""

    def start(self) -> Container:
        self.started = time.monotonic()
        must("start", self.id)
        return self

    def forget(self) -> None:
        """Have the kernel drop the image's files from memory, as on a node where it never ran; as root."""
        image_budget.forget(self.inspect()["GraphDriver"]["Data"]["LowerDir"])

    def inspect(self) -> dict[str, Any]:
        return dict(json.loads(must("inspect", self.id))[0])

    @property
    def address(self) -> str:
        """The address of the network it has or shares."""
        data = self.inspect()
        if (mode := data["HostConfig"]["NetworkMode"]).startswith("container:"):
            return Container(mode.partition(":")[2]).address
        return str(data["NetworkSettings"]["Networks"]["bridge"]["IPAddress"])

    @property
    def pid(self) -> int:
        return int(self.inspect()["State"]["Pid"])

    @property
    def exit_code(self) -> int:
        state = self.inspect()["State"]
        assert not state["Running"], "it still runs"
        return int(state["ExitCode"])

    def log(self) -> str:
        done = docker("logs", self.id)
        return done.stdout + done.stderr

    def stop(self) -> float:
        """Have it end the way Docker does; return the seconds that took."""
        begin = time.monotonic()
        must("stop", "--time=10", self.id)
        return time.monotonic() - begin

    def kill(self, signal: str = "KILL") -> None:
        must("kill", f"--signal={signal}", self.id)

    def wait_for_log(self, pattern: str, timeout: float = 60.0) -> re.Match[str]:
        end = time.monotonic() + timeout
        while (found := re.search(pattern, self.log())) is None:
            assert time.monotonic() < end, f"nothing in the log matches {pattern!r}:\n{self.log()}"
            time.sleep(0.02)
        return found

    def get(
        self, path: str = "/healthz", port: int = PORT, timeout: float = 60.0, host: str = ""
    ) -> Response:
        """One request on a connection of its own."""
        begin = time.monotonic()
        connection = http.client.HTTPConnection(host or self.address, port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request("GET", path)
            with connection.getresponse() as response:
                body = response.read()
            return Response(response.status, response.headers, body, time.monotonic() - begin)

    def wait_until_healthy(self, timeout: float = 60.0) -> float:
        """Ask until it is healthy; return the moment, by the monotonic clock."""
        address, end = self.address, time.monotonic() + timeout
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.get(host=address).status == 200:
                    return time.monotonic()
            assert time.monotonic() < end, f"not healthy within {timeout} s:\n{self.log()}"
            time.sleep(0.005)

    def connect(self, port: int = PORT, host: str = "") -> socket.socket:
        return socket.create_connection((host or self.address, port), 60.0)

    # ---- its control group, of version 1 or 2

    def memory(self) -> dict[str, int]:
        """What the kernel counts: `failures` is how often it had to make room, `kills` how often it could not."""
        folder = self._group("memory")
        if (folder / "memory.max").exists():
            events = _numbers(folder / "memory.events")
            return {
                "limit": int((folder / "memory.max").read_text()),
                "swap": int((folder / "memory.swap.max").read_text()),
                "usage": int((folder / "memory.current").read_text()),
                "anonymous": _numbers(folder / "memory.stat")["anon"],
                "refaults": _numbers(folder / "memory.stat")["workingset_refault_file"],
                "kills": events["oom_kill"],
            }
        statistics = _numbers(folder / "memory.stat")
        limit = int((folder / "memory.limit_in_bytes").read_text())
        both = folder / "memory.memsw.limit_in_bytes"
        return {
            "limit": limit,
            "swap": int(both.read_text()) - limit if both.exists() else 0,
            "usage": int((folder / "memory.usage_in_bytes").read_text()),
            "anonymous": statistics["rss"],
            "refaults": statistics.get("workingset_refault", statistics.get("pgmajfault", 0)),
            "kills": _numbers(folder / "memory.oom_control")["oom_kill"],
        }

    def _group(self, controller: str) -> Path:
        root = Path("/sys/fs/cgroup")
        for line in Path(f"/proc/{self.pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                return root / controller / path.lstrip("/")
            if not controllers and (root / path.lstrip("/") / "memory.max").exists():
                return root / path.lstrip("/")
        raise AssertionError(f"no {controller} controller")


def _numbers(file: Path) -> dict[str, int]:
    return {line.split()[0]: int(line.split()[1]) for line in file.read_text().splitlines()}


@contextlib.contextmanager
def created(*arguments: str | Path) -> Iterator[Container]:
    """A container with these arguments of `docker create`; it is removed at the end."""
    container = Container(must("create", f"--label={MARK}", *arguments))
    try:
        yield container
    finally:
        must("rm", "--force", "--volumes", container.id)


@contextlib.contextmanager
def volume() -> Iterator[str]:
    """An empty volume."""
    name = must("volume", "create", f"--label={MARK}")
    try:
        yield name
    finally:
        must("volume", "rm", "--force", name)
