"""examples/: the driver, which is told how to behave, and `make play` in a terminal and without one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import program
import pytest
import stage
from program import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = pytest.mark.unmeasured

SCRIPT = (sys.executable, str(ROOT / "examples" / "play.py"))
PLAY = (*SCRIPT, str(ROOT / "bin" / "livenessprobe"))


# ---- the driver


@pytest.fixture
def driver(folder: Path) -> Iterator[stage.Driver]:
    with stage.Driver(folder / "csi.sock") as driver:
        driver.start()
        yield driver


@pytest.mark.parametrize(
    ("state", "code", "line"),
    [
        ("ready", 0, "ok"),
        ("", 0, "ok"),
        ("not-ready", 5, "driver responded but is not ready"),
        ("fail", 4, "rpc error: code = Internal desc = failing, as told"),
        ("fail  the disk is gone", 4, "rpc error: code = Internal desc = the disk is gone"),
        ("hang", 4, "rpc error: code = DeadlineExceeded desc = .*"),
        *(
            (wrong, 4, f"rpc error: code = InvalidArgument desc = .* says '{wrong}': write ready, not-ready, hang, or fail and .*")
            for wrong in ("redy", "Ready", "notready", "failing", "hang on")
        ),
    ],
)  # fmt: skip
def test_the_driver_is_what_it_is_told_to_be(driver: stage.Driver, state: str, code: int, line: str) -> None:
    driver.tell(state)

    done = program.run_once(["--once", f"--csi-address={driver.socket}", "--probe-timeout=3s"])

    assert done.returncode == code
    assert re.fullmatch(line, done.stdout.strip())


# ---- played


class Terminal:
    """`make play` in a terminal of its own, what it has shown so far, and the terminal's settings."""

    def __init__(self, command: Sequence[str]) -> None:
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
        self.shown = ""
        self._news = threading.Condition()
        self._theirs = theirs
        environment = {**os.environ, "TERM": "xterm-256color", "PLAYED_BY": str(os.getpid())}
        # With this terminal as its controlling one, so that ^C is a signal.
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pid in processes_of_plays():  # which have this terminal open, and nobody else to end them
            os.kill(pid, signal.SIGKILL)
        os.close(self._theirs)
        self._reader.join()
        os.close(self.ours)

    def settings(self) -> list[object]:
        return list(termios.tcgetattr(self._theirs))

    def press(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def wait(self, text: str, *, anew: bool = True) -> None:
        with self._news:
            before = len(self.shown) if anew else 0
            assert self._news.wait_for(lambda: text in self.shown[before:], 60), self.shown[-4000:]

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self.ours, 65536):
                with self._news:
                    self.shown += data.decode(errors="replace")
                    self._news.notify_all()


TAKE_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


def processes_of_plays() -> dict[int, str]:
    """The drivers and programs that this test's plays have started, whoever their parents are now, and their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"PLAYED_BY={os.getpid()}\0".encode() in path.read_bytes():
                command = (path.parent / "cmdline").read_bytes().decode()
                found[int(path.parent.name)] = command.replace("\0", " ")
    return found


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal(PLAY) as terminal:
        yield terminal


@pytest.mark.parametrize("end", ["q", "^C", "SIGTERM"])
def test_play_in_a_terminal(terminal: Terminal, end: str) -> None:
    before = terminal.settings()
    terminal.wait("The driver is ")
    assert terminal.settings() != before  # each key takes effect as it is pressed

    for key, texts in {
        "f": ["failing", "rpc error: code = Internal desc = the disk is gone"],
        "n": ["not ready", "driver responded but is not ready"],
        "g": ["gone", "connection refused"],
        "u": ["hung", "rpc error: code = DeadlineExceeded"],
        "xh": ["healthy", "200"],
    }.items():
        terminal.press(key)
        for text in texts:
            terminal.wait(text)
    assert len(processes_of_plays()) == 3

    if end == "SIGTERM":
        terminal.process.terminate()
    else:
        terminal.press({"q": "q", "^C": "\x03"}[end])

    assert terminal.process.wait(30) == (end == "SIGTERM")
    assert terminal.settings() == before
    assert not processes_of_plays()
    # The cursor is back, and so is what was on the screen before.
    for restored in ("\x1b[?25h", "\x1b[?1049l"):
        terminal.wait(restored, anew=False)


def test_play_without_a_terminal() -> None:
    done = subprocess.run(
        PLAY,
        capture_output=True,
        check=False,
        input="n\nf\n\nx\ng\nh",
        text=True,
        timeout=90,
    )

    told = [
        line.partition("; /readyz ")[0] for line in done.stdout.splitlines() if line.startswith("The driver")
    ]
    broken = "rpc error: code = Internal desc = the disk is gone"
    assert told[:3] == [
        "The driver is healthy: /healthz 200 ok; /livez 200 ok",
        "The driver is not ready: /healthz 500 driver responded but is not ready; /livez 200 driver responded but is not ready",
        f"The driver is failing: /healthz 500 {broken}; /livez 500 {broken}",
    ]
    assert re.search("The driver is gone: /healthz 500 cannot connect .*: connection refused", told[3])
    assert told[4:] == told[:1]
    assert (done.returncode, done.stderr) == (0, "")


def test_play_ends_at_q() -> None:
    done = subprocess.run(
        PLAY,
        capture_output=True,
        check=False,
        input="q\nf\n",
        text=True,
        timeout=60,
    )

    assert (done.returncode, "failing" in done.stdout.partition("\nThe driver")[2]) == (0, False)


def test_play_says_why_a_program_has_ended(folder: Path) -> None:
    wrong = folder / "livenessprobe"
    wrong.write_text("#!/bin/sh\necho there is no Python here >&2\nexit 1\n")
    wrong.chmod(0o755)

    done = subprocess.run(
        [*SCRIPT, wrong], capture_output=True, check=False, stdin=subprocess.DEVNULL, text=True, timeout=60
    )

    assert done.returncode == 1
    assert re.fullmatch(
        "there is no Python here\nThis has ended: livenessprobe --csi-address=.*\n", done.stderr
    )
