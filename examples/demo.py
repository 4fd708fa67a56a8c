"""`make demo`: the built file beside the example driver, as a short play whose every answer is checked.

    python examples/demo.py bin/livenessprobe

Exit code 0 only if each answer was the expected one. Ends by itself, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

import stage

# Anything slower does not count as an answer.
PATIENCE = 20.0


class EndedError(Exception):
    """The program has ended by itself, so the play cannot go on."""


class Demo:
    """The stage: a folder with the driver's socket, the driver, the program, and what was not as expected."""

    def __init__(self, program: str, folder: Path, ends: contextlib.ExitStack) -> None:
        self.program = program
        self.socket = folder / "csi.sock"
        self.driver = ends.enter_context(stage.Driver(self.socket))
        self.wrong: list[str] = []
        self._ends = ends
        self._serving: subprocess.Popen[str] | None = None
        self._log: list[str] = []
        self._log_shown = 0
        self._log_ended = False
        self._logged = threading.Condition()
        self._address = ""

    # ---- the program, serving

    def serve(self) -> subprocess.Popen[str]:
        flags = [f"--csi-address={self.socket}", "--http-endpoint=127.0.0.1:0", "--probe-timeout=1s"]
        print("$", Path(self.program).name, *flags)
        serving = self._serving = self._until_the_end(
            subprocess.Popen([self.program, *flags], stderr=subprocess.PIPE, text=True)
        )
        assert serving.stderr
        threading.Thread(target=self._read_log, args=(serving.stderr,), daemon=True).start()
        self._address = self.expect_log(r'"Serving".* address="([^"]+)"')
        return serving

    def get(self, path: str, status: int, body: str) -> None:
        """One request, whose answer must have this status and match this pattern.

        Its time is shown, not judged: on a busy machine it would say more about the machine.
        """
        try:
            got = stage.get(self._address, path)
        except (OSError, http.client.HTTPException):
            self._must_serve()
            raise
        print(f"  GET {path:<8} -> {got.status} {got.text}   ({got.seconds:.2f} s)")
        self.expect(f"{path} {status} {body}", got.status == status and re.fullmatch(body, got.text))

    def expect_log(self, pattern: str) -> str:
        """The first group of the next log line that matches; prints the line."""
        with self._logged:
            end = time.monotonic() + PATIENCE
            while True:
                for number in range(self._log_shown, len(self._log)):
                    if found := re.search(pattern, self._log[number]):
                        print("  log:", self._log[number])
                        self._log_shown = number + 1
                        return (*found.groups(), "")[0]
                if self._log_ended:
                    self._must_serve()
                if not self._logged.wait(end - time.monotonic()):
                    print(*self._log[self._log_shown :], sep="\n")
                    self.expect(f"a log line with {pattern}", seen=False)
                    return ""

    # ---- the program, once

    def once(self, code: int, line: str, *flags: str) -> None:
        flags = ("--once", *flags)
        command = [self.program, f"--csi-address={self.socket}", "--probe-timeout=1s", *flags]
        run = subprocess.run(command, capture_output=True, check=False, text=True, timeout=PATIENCE)
        print(f"  {' '.join(flags)} -> {run.stdout.strip()}   (exit code {run.returncode})")
        self.expect(
            f"exit code {code}, {line}", run.returncode == code and re.fullmatch(line, run.stdout.strip())
        )

    # ---- the rest

    def expect(self, what: str, seen: object) -> None:
        if not seen:
            print(f"  EXPECTED: {what}")
            self.wrong.append(what)

    def _until_the_end(self, process: subprocess.Popen[str]) -> subprocess.Popen[str]:
        self._ends.enter_context(process)
        self._ends.callback(process.kill)
        return process

    def _read_log(self, stream: IO[str]) -> None:
        for line in stream:
            with self._logged:
                self._log.append(line.rstrip("\n"))
                self._logged.notify_all()
        with self._logged:
            self._log_ended = True
            self._logged.notify_all()

    def _must_serve(self) -> None:
        """Raise EndedError, with its output, if it has ended or is about to."""
        assert self._serving
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._serving.wait(1)
            with self._logged:
                self._logged.wait_for(lambda: self._log_ended, PATIENCE)
            said = "".join(f"\n  {line}" for line in self._log[self._log_shown :]) or " nothing"
            raise EndedError(f"the program has ended, exit code {code}, and said:{said}")


def play(demo: Demo) -> None:
    print("\nThe driver has not started yet; the probe already answers, and says why:")
    serving = demo.serve()
    demo.get("/healthz", 500, ".*no such file or directory.*")

    print("\nThe driver is there and healthy:")
    demo.driver.start()
    demo.get("/healthz", 200, "ok")
    demo.expect_log("driver is healthy")

    print("\nAlive, but still initializing: not ready for work, and no reason to restart it:")
    demo.driver.tell("not-ready")
    demo.get("/healthz", 500, "driver responded but is not ready")
    demo.get("/readyz", 500, "driver responded but is not ready")
    demo.get("/livez", 200, "driver responded but is not ready")

    print("\nFailing:")
    demo.driver.tell("fail the disk is gone")
    demo.get("/healthz", 500, "rpc error: code = Internal desc = the disk is gone")
    demo.expect_log("the disk is gone")

    print("\nHung: the answer comes before the kubelet, whose timeout is often the same, gives up:")
    demo.driver.tell("hang")
    demo.get("/healthz", 500, "rpc error: code = DeadlineExceeded desc = .*")

    print("\nKilled, its socket left behind:")
    demo.driver.tell("ready")
    demo.driver.kill()
    demo.get("/healthz", 500, ".*connection refused.*")

    print("\nAnd back again:")
    demo.driver.start()
    demo.get("/healthz", 200, "ok")
    demo.expect_log("healthy again")

    print("\nStopped by SIGTERM:")
    begin = time.monotonic()
    serving.send_signal(signal.SIGTERM)
    code = serving.wait(5)
    seconds = time.monotonic() - begin
    print(f"  exit code {code} after {seconds:.2f} s")
    demo.expect("exit code 0 within a second", code == 0 and seconds < 1)

    print("\nOne check without a server, for a shell, an exec probe or an init container:")
    demo.once(0, "ok")
    demo.driver.tell("not-ready")
    demo.once(5, "driver responded but is not ready")
    demo.driver.tell("fail the disk is gone")
    demo.once(4, "rpc error: code = Internal desc = the disk is gone")
    demo.driver.kill()
    demo.once(3, ".*connection refused.*", "--connection-timeout=300ms")


def main(program: str) -> int:
    # So that a `kill` also ends what was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="lp", dir="/tmp") as folder, contextlib.ExitStack() as ends:
        demo = Demo(str(Path(program).resolve()), Path(folder), ends)
        try:
            play(demo)
        except EndedError as error:
            print(f"\nThe demo cannot go on: {error}")
            return 1
        except (OSError, http.client.HTTPException, subprocess.SubprocessError) as error:
            demo.expect(f"that it goes on, but: {error!r}", seen=False)
    if demo.wrong:
        print(f"\nNot as expected ({len(demo.wrong)}):", *demo.wrong, sep="\n  ")
        return 1
    print("\nAll as expected.")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/demo.py bin/livenessprobe")
    sys.exit(main(sys.argv[1]))
