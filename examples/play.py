"""`make play`: the example driver and the probe beside it, live in the terminal; keys break and mend the driver.

    python examples/play.py bin/livenessprobe

Without a terminal it reads the same letters, one per line, and prints a line for each. It ends at q, ^C or the end of its
input, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import tty
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import stage
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator

PATHS = ("/healthz", "/livez", "/readyz")
PERIOD = 0.5  # seconds between two rounds of requests
# By key: what becomes of the driver, and what it is told; nothing if it is killed.
STATES = {
    "h": ("healthy", "ready"),
    "n": ("not ready", "not-ready"),
    "f": ("failing", "fail the disk is gone"),
    "u": ("hung", "hang"),
    "g": ("gone", ""),
}
KEYS = "h healthy   n not ready   f failing   u hung   g gone   q quit"


class Play:
    """The driver, the program, and what it answered last; two threads ask it and read its log, `changes` guards what they see."""

    def __init__(self, program: str, folder: Path, ends: contextlib.ExitStack) -> None:
        self.changes = threading.Condition()
        self.state = ""
        self.answers: dict[str, stage.Answer] = {}
        self.strip: deque[str] = deque(maxlen=60)
        """One colour for each of the last rounds."""
        self.log: deque[str] = deque(maxlen=6)
        self.over = False
        """Whether the program has ended."""
        self._rounds, self._address, self._stop = 0, "", threading.Event()

        self.driver = ends.enter_context(stage.Driver(folder / "csi.sock"))
        self.press("h")
        flags = [f"--csi-address={self.driver.socket}", "--http-endpoint=127.0.0.1:0", "--probe-timeout=1s"]
        self.command = " ".join([Path(program).name, *flags])
        # In a session of its own: ^C is for us.
        self._serving = ends.enter_context(
            subprocess.Popen(
                [program, *flags],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        reading, asking = threading.Thread(target=self._read_log), threading.Thread(target=self._ask)
        reading.start()
        ends.callback(reading.join)
        ends.callback(self._serving.kill)
        with self.changes:
            self.changes.wait_for(lambda: self._address or self.over)
        if not self._address:
            sys.exit("\n".join([*self.log, f"This has ended: {self.command}"]))
        asking.start()
        ends.callback(asking.join)
        ends.callback(self._stop.set)

    def press(self, key: str) -> None:
        """Make the driver what the key says."""
        self.state, told = STATES[key]
        if not told:
            self.driver.kill()
            return
        self.driver.tell(told)
        if not self.driver.runs:
            self.driver.start()

    def settle(self) -> None:
        """Wait for answers to requests that begin from now on."""
        with self.changes:
            after = self._rounds + 2  # one may be under way
            self.changes.wait_for(lambda: self._rounds >= after or self.over)

    def _read_log(self) -> None:
        assert self._serving.stderr
        for line in self._serving.stderr:
            with self.changes:
                self.log.append(line.rstrip("\n"))
                if found := re.search(r'"Serving".* address="([^"]+)"', line):
                    self._address = found[1]
                    self.changes.notify_all()
        with self.changes:
            self.over = True
            self.changes.notify_all()

    def _ask(self) -> None:
        """Ask all paths at once, as two probes of a kubelet do: they share a check."""
        with ThreadPoolExecutor(len(PATHS)) as kubelets:
            while not self.over:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    answers = dict(
                        zip(
                            PATHS,
                            kubelets.map(lambda path: stage.get(self._address, path), PATHS),
                            strict=True,
                        )
                    )
                    with self.changes:
                        self.answers, self._rounds = answers, self._rounds + 1
                        alive = "yellow" if answers["/livez"].status == 200 else "red"
                        self.strip.append("green" if answers["/healthz"].status == 200 else alive)
                        self.changes.notify_all()
                if self._stop.wait(PERIOD):
                    return


def states_typed() -> Iterator[str]:
    """The keys of states, as they are typed, until q or the end of the input; a signal ends it too."""
    # A signal that comes just before a read would only be handled after it.
    signals, wake_up = os.pipe()
    os.set_blocking(wake_up, False)
    signal.set_wakeup_fd(wake_up)
    while True:
        select.select([sys.stdin, signals], [], [])
        for key in (typed := os.read(sys.stdin.fileno(), 64).decode(errors="replace")):
            if key == "q":
                return
            if key in STATES:
                yield key
        if not typed:
            return


# ---- in a terminal


def screen(play: Play) -> Panel:
    """What to show now."""
    table = Table.grid(padding=(0, 2))
    with play.changes:
        for path, answer in play.answers.items():
            style = "bold green" if answer.status == 200 else "bold red"
            table.add_row(path, Text(str(answer.status), style), Text(answer.text), f"{answer.seconds:.2f} s")
        strip = Text.assemble(*(("█", colour) for colour in play.strip))
        log = Text("\n".join(play.log), "dim", no_wrap=True, overflow="ellipsis")
    driver = Text.assemble(
        "The driver is ", (play.state, "bold"), "; the probe has ended" if play.over else ""
    )
    shown = Group(driver, "", table, "", strip, "", log, "", Text(KEYS, "bold"))
    return Panel(shown, title=Text(play.command, no_wrap=True, overflow="ellipsis"))


@contextlib.contextmanager
def keys_at_once() -> Iterator[None]:
    """Have the terminal pass on each key as it is pressed, without showing it; afterwards it is as it was."""
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def live(play: Play) -> None:
    with keys_at_once(), Live(get_renderable=lambda: screen(play), screen=True, refresh_per_second=8):
        for key in states_typed():
            play.press(key)


# ---- without one


def lines(play: Play) -> None:
    print(f"$ {play.command}\nA letter and Enter: {KEYS}")
    show_line(play)
    for key in states_typed():
        play.press(key)
        show_line(play)


def show_line(play: Play) -> None:
    play.settle()
    answers = "; ".join(f"{path} {answer.status} {answer.text}" for path, answer in play.answers.items())
    print(f"The driver is {play.state}: {answers}", flush=True)


def main(program: str) -> None:
    # So that a `kill` or a closed terminal also ends what was started.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    with (
        contextlib.suppress(KeyboardInterrupt),
        tempfile.TemporaryDirectory(prefix="lp", dir="/tmp") as folder,
        contextlib.ExitStack() as ends,
    ):
        play = Play(str(Path(program).resolve()), Path(folder), ends)
        (live if in_terminal else lines)(play)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/play.py bin/livenessprobe")
    main(sys.argv[1])
