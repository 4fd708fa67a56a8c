"""The processes of a measurement, each a context manager: the fast driver, and a program whose cost is measured."""

from __future__ import annotations

import contextlib
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import kubelet
from programs import environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from programs import Program

HERE = Path(__file__).resolve().parent
START_SECONDS = 20.0
_POLL_SECONDS = 0.0005


class Seen(NamedTuple):
    """Calls of Probe since the last question: all, and the most at one time."""

    probes: int
    most_at_once: int


class Driver:
    """fast_driver.py in a process of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Driver:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Returns once it takes connections; healthy at first."""
        self.path.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-IS", str(HERE / "fast_driver.py"), str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            self._hear()
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """Leaves the socket's file behind, like a driver that crashes."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def set(self, behaviour: str) -> None:
        """healthy, failing, hung, or `slow SECONDS`."""
        self._say(behaviour)

    def seen(self) -> Seen:
        probes, most_at_once = self._say("seen").split()
        return Seen(int(probes), int(most_at_once))

    def _say(self, command: str) -> str:
        assert self._process.stdin
        self._process.stdin.write(command.encode() + b"\n")
        self._process.stdin.flush()
        return self._hear()

    def _hear(self) -> str:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], START_SECONDS)[0]:
            raise RuntimeError("the bench's driver does not answer")
        if not (line := self._process.stdout.readline()):
            raise RuntimeError("the bench's driver has ended")
        return line.decode()


class Running:
    """A program that serves; entering returns after its first `ok`."""

    listening: float
    """Seconds from before its start."""
    first_ok: float

    def __init__(
        self, program: Program, driver: Driver, *arguments: str, variables: Mapping[str, str] | None = None
    ) -> None:
        self.program = program
        self.port = free_port()
        self._command = [
            *program.command,
            f"--csi-address={driver.path}",
            f"--health-port={self.port}",
            *arguments,
        ]
        self._environment = environment({**program.variables, **(variables or {})})

    def __enter__(self) -> Running:
        self._log = tempfile.TemporaryFile()
        begin = time.perf_counter()
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
        )
        try:
            self._await_ok(begin)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(3.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def get(self) -> kubelet.Answer:
        return kubelet.get(self.port)

    def _await_ok(self, begin: float) -> None:
        self.listening = 0.0
        while time.perf_counter() < begin + START_SECONDS and self._process.poll() is None:
            try:
                connection = kubelet.connect(self.port)
            except ConnectionRefusedError:
                time.sleep(_POLL_SECONDS)
                continue
            self.listening = self.listening or time.perf_counter() - begin
            with connection, contextlib.suppress(ConnectionError):
                if (answer := kubelet.ask(connection, begin)).status == 200:
                    self.first_ok = answer.seconds
                    return
            time.sleep(_POLL_SECONDS)
        self._log.seek(0)
        log = self._log.read()[-2000:].decode(errors="replace")
        raise RuntimeError(f"no ok from {shlex.join(self._command)}, which logged:\n{log}")


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for one run, gone afterwards, like all processes, even if a signal ends the run."""
    signal.signal(signal.SIGTERM, _end)
    try:
        # A socket's path has to be short.
        with tempfile.TemporaryDirectory(prefix="bench", dir="/tmp") as folder:
            yield Path(folder)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(*_: object) -> NoReturn:
    sys.exit(143)
