"""The program under test as a real process: start it, ask it over HTTP, read its log, measure it, stop it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import http.client
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import load
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from email.message import Message

ROOT = Path(__file__).resolve().parents[2]
# The same program from the sources, for what the file cannot do, such as measuring coverage.
MODULE = (sys.executable, "-m", "livenessprobe")


def built(user: int | None = None) -> tuple[str, ...]:
    """The command to test: `bin/livenessprobe`, or what the variable LIVENESSPROBE says.

    Another user may not be able to enter the folder of this checkout, and gets a copy of the file elsewhere.
    """
    if chosen := os.environ.get("LIVENESSPROBE"):
        return tuple(shlex.split(chosen))
    if user is not None:
        return (_public_copy(),)
    return (str(ROOT / "bin" / "livenessprobe"),)


# Most tests run the built file alone; a few that together reach every line also run the sources, where that is measured.
BOTH = pytest.mark.parametrize("command", [built(), MODULE], ids=["file", "sources"], indirect=True)


@functools.cache
def _public_copy() -> str:
    folder = tempfile.mkdtemp(prefix="lp")
    atexit.register(shutil.rmtree, folder)
    Path(folder).chmod(0o755)
    return str(shutil.copy2(ROOT / "bin" / "livenessprobe", folder))


def unprivileged() -> int | None:
    """A user whom file modes bind: nobody for root, None (stay who we are) for all others."""
    return 65534 if os.geteuid() == 0 else None


def waited_for_processors(*pids: int) -> float:
    """Seconds that all threads of these processes waited for a processor: so much of a time is due to other work."""
    nanoseconds = 0
    for file in (file for pid in pids for file in Path(f"/proc/{pid}/task").glob("*/schedstat")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            nanoseconds += int(file.read_text().split()[1])
    return nanoseconds / 1e9


def asked(ask: Callable[[], Response], *pids: int) -> tuple[Response, float]:
    """A response, and the seconds it took without those for which threads of these processes, or of ours, had no processor."""
    pids = (os.getpid(), *pids)
    waited = waited_for_processors(*pids)
    response = ask()
    return response, response.seconds - max(0.0, waited_for_processors(*pids) - waited)


def free_port() -> int:
    """A TCP port nobody listens on, for flags that do not take 0.

    Not one of those that the kernel gives to whoever takes any: before it is used here, it could be somebody else's.
    """
    while True:
        port = random.randrange(10_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def run_once(
    args: Sequence[str],
    *,
    command: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    user: int | None = None,
    timeout: float = 120.0,
) -> subprocess.CompletedProcess[str]:
    """Runs the program to its end: for --once, --version or flags it refuses."""
    return subprocess.run(
        [*(command or built(user)), *args],
        capture_output=True,
        check=False,
        cwd=ROOT,
        env=_environment(env, user),
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=timeout,
        user=user,
    )


def best_of(tries: int, measure: Callable[[], float], enough: float = 1.0) -> float:
    """The first time below `enough`, or the last one, in seconds: a machine that is busy now and then fails no test."""
    for _ in range(tries):
        if (seconds := measure()) < enough:
            break
    return seconds


class Response(NamedTuple):
    """An answer of the program, and how long it took from before the connect until the last byte."""

    status: int
    headers: Message
    body: bytes
    seconds: float

    @property
    def text(self) -> str:
        return self.body.decode()


def allow_descriptors(wanted: int) -> None:
    """Let the test itself open this many files; skip it if the system does not allow it."""
    try:
        load.allow_descriptors(wanted)
    except ValueError:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        pytest.skip(f"no more than {most} files may be open here (ulimit -n), {wanted} are needed")


class Probe:
    """The program serving: `with Probe(["--csi-address=…", "--http-endpoint=127.0.0.1:0"]) as probe: …`.

    Entering waits until the log has reported `listeners` addresses (0: does not wait). Leaving stops the program if
    the test has not, and expects exit code 0 and a log without a traceback.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        command: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        user: int | None = None,
        listeners: int = 1,
    ) -> None:
        self.addresses: list[str] = []  # of the listeners, as logged: health first, then metrics
        self.log_lines: list[str] = []  # standard error
        self.output_lines: list[str] = []  # standard output
        self._args = [*(command or built(user)), *args]
        self._env, self._user, self._listeners = env, user, listeners
        self._news = threading.Condition()
        self._open_streams = 2

    def __enter__(self) -> Probe:
        self.process = subprocess.Popen(
            self._args,
            cwd=ROOT,
            encoding="utf-8",
            env=_environment(self._env, self._user),
            errors="backslashreplace",
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            user=self._user,
        )
        assert self.process.stderr
        assert self.process.stdout
        self._readers = [
            threading.Thread(target=self._collect, args=(self.process.stderr, self.log_lines)),
            threading.Thread(target=self._collect, args=(self.process.stdout, self.output_lines)),
        ]
        for reader in self._readers:
            reader.start()
        try:
            seen = 0
            while len(self.addresses) < self._listeners:
                found, seen = self._find(r'\bServing\b.*?\baddress"?[=:]"([^"]*)"', 60.0, seen)
                self.addresses.append(found[1])
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            code = self.stop() if self.process.poll() is None else 0
        finally:
            self._end()
        # Only if the test has not failed already: this could be a consequence.
        if kind is None:
            assert code == 0, self._told(f"exit code {code} after SIGTERM")
            assert not any(line.startswith("Traceback") for line in self.log_lines), self._told("traceback")

    # ---- HTTP

    def address(self, listener: int = 0) -> tuple[str, int]:
        """Where to connect for a listener; over IPv4 for one on all addresses."""
        host, _, port = self.addresses[listener].rpartition(":")
        host = host.strip("[]")
        return ("127.0.0.1" if host in ("", "::", "0.0.0.0") else host), int(port)

    def connect(self, listener: int = 0, timeout: float = 10.0) -> socket.socket:
        return socket.create_connection(self.address(listener), timeout)

    def get(
        self,
        path: str = "/healthz",
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        *,
        listener: int = 0,
        timeout: float = 30.0,
    ) -> Response:
        """One request on a connection of its own."""
        host, port = self.address(listener)
        begin = time.monotonic()
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
        try:
            connection.request(method, path, headers=dict(headers or {}))
            with connection.getresponse() as response:
                body = response.read()
            return Response(response.status, response.headers, body, time.monotonic() - begin)
        finally:
            connection.close()

    def catch_up(self) -> None:
        """Waits until the program has read all that was sent to it before.

        One answer does not tell: a connection that was accepted before its bytes came is read in the server's next turn,
        and a request that comes with its connection is answered in this one. An answer of a later turn does.
        """
        for _ in range(2):
            assert self.get("/nothing").status == 404

    def raw(self, request: bytes, listener: int = 0, timeout: float = 10.0) -> bytes:
        """Sends bytes, which need not be HTTP, and returns everything that comes until the program closes."""
        received = b""
        with self.connect(listener, timeout) as connection:
            # The program may refuse before it has read everything: what it said can still be read, or is lost.
            with contextlib.suppress(ConnectionError):
                connection.sendall(request)
            with contextlib.suppress(ConnectionError):
                while data := connection.recv(65536):
                    received += data
        return received

    # ---- log

    def wait_for_log(self, pattern: str, timeout: float = 20.0, after: int = 0) -> re.Match[str]:
        """The first line that matches, from the line number `after` on (`len(probe.log_lines)`: new ones)."""
        return self._find(pattern, timeout, after)[0]

    # ---- end

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 20.0) -> int:
        """The exit code; all log lines are there then."""
        code = self.process.wait(timeout)
        for reader in self._readers:
            reader.join()
        return code

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout: float = 5.0) -> int:
        self.send(number)
        return self.wait(timeout)

    # ---- figures, from /proc

    @property
    def pid(self) -> int:
        return self.process.pid

    def memory(self) -> int:
        """Resident bytes."""
        return self._status("VmRSS") * 1024

    def peak_memory(self) -> int:
        """The most resident bytes so far."""
        return self._status("VmHWM") * 1024

    def virtual_memory(self) -> int:
        """Bytes of its address space."""
        return self._status("VmSize") * 1024

    def threads(self) -> int:
        return self._status("Threads")

    def thread_ids(self) -> set[str]:
        """The ids of its threads; that of an ended one is not used again soon."""
        return {task.name for task in Path(f"/proc/{self.pid}/task").iterdir()}

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    # ---- inside

    def _collect(self, stream: IO[str], lines: list[str]) -> None:
        for line in stream:
            with self._news:
                lines.append(line.removesuffix("\n"))
                self._news.notify_all()
        with self._news:
            self._open_streams -= 1
            self._news.notify_all()

    def _find(self, pattern: str, timeout: float, seen: int) -> tuple[re.Match[str], int]:
        """The match, and the number of the line after it."""
        end = time.monotonic() + timeout
        with self._news:
            while True:
                while seen < len(self.log_lines):
                    seen += 1
                    if found := re.search(pattern, self.log_lines[seen - 1]):
                        return found, seen
                if not self._open_streams or not self._news.wait(end - time.monotonic()):
                    raise AssertionError(self._told(f"no log line matches {pattern!r}"))

    def _status(self, field: str) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(text.partition(f"\n{field}:")[2].split()[0])

    def _told(self, what: str) -> str:
        return "\n  ".join([f"{what}: {shlex.join(self._args)} logged", *self.log_lines[-50:]])

    def _end(self) -> None:
        self.process.kill()
        self.wait()
        for stream in (self.process.stderr, self.process.stdout):
            assert stream
            stream.close()


def _environment(more: Mapping[str, str] | None, user: int | None) -> dict[str, str]:
    """Ours and more; without the Python that make has chosen if another user may not be able to start it."""
    hidden = () if user is None else ("LIVENESSPROBE_PYTHON",)
    return {name: value for name, value in os.environ.items() if name not in hidden} | {**(more or {})}
