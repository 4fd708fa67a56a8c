"""What demo and play share: the example driver, which they start, steer and kill, and a request to the probe."""

from __future__ import annotations

import http.client
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

DRIVER = Path(__file__).with_name("driver.py")


class Driver:
    """The example driver as a process: `with Driver(socket) as driver: driver.start()`; leaving kills it."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def runs(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Returns once it listens."""
        command = [sys.executable, str(DRIVER), "--socket", str(self.socket)]
        # In a session of its own: what is typed at the terminal, such as ^C, is meant for us.
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._process.stdout
        self._process.stdout.readline()

    def kill(self) -> None:
        """Leaves its socket behind, as a crash does."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def tell(self, state: str) -> None:
        # By renaming: the driver must not read a half-written file.
        file = Path(f"{self.socket}.state")
        written = file.with_suffix(".new")
        written.write_text(state + "\n")
        written.replace(file)


class Answer(NamedTuple):
    """What a request got, and how long it took."""

    status: int
    text: str
    seconds: float


def get(address: str, path: str) -> Answer:
    """One request over a connection of its own, as the kubelet makes it."""
    begin = time.monotonic()
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.request("GET", path)
        with connection.getresponse() as response:
            return Answer(response.status, response.read().decode(), time.monotonic() - begin)
    finally:
        connection.close()
