"""`make load`: storms of requests on a slow driver, and a flood of half-open connections. Exits 1 if one does harm."""

from __future__ import annotations

import argparse
import contextlib
import resource
import sys
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

import kubelet
import process
import programs
import report
import rig

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from kubelet import Answer

WARM_UP_CHECKS = 200
STORMS = (400, 2_000)
DRIVER_SECONDS = (
    2.0  # for a Probe; below the default of --probe-timeout, which is also the kubelets' patience
)
STORM_SECONDS = 3.0
HALF_OPEN = 2_000
NEW_A_SECOND = 200
MOST_HELD = HALF_OPEN + 6 * NEW_A_SECOND  # by then the program has given the oldest up
REQUESTS_A_SECOND = 10
FLOOD_SECONDS = 0.5
MOST_GROWTH_MIB = 8.0
HEAD = ["load", "requests", "ok", "p50 ms", "p99 ms", "slowest", "allowed", "probes", "at once", "MiB", ""]


def flood(port: int, seconds: float) -> list[Answer]:
    """Hold connections half-open, and keep opening more; return the answers to the proper requests among them."""
    answers: list[Answer] = []
    held: deque[socket.socket] = deque()
    try:
        for _ in range(HALF_OPEN):
            held.append(_half_open(port, len(held)))
        begin = time.perf_counter()
        for number in range(round(seconds * NEW_A_SECOND)):
            held.append(_half_open(port, number))
            if len(held) > MOST_HELD:
                held.popleft().close()
            if number % (NEW_A_SECOND // REQUESTS_A_SECOND) == 0:
                answers.append(kubelet.get(port))
                time.sleep(max(0.0, begin + number / NEW_A_SECOND - time.perf_counter()))
    finally:
        for connection in held:
            connection.close()
    return answers


def _half_open(port: int, number: int) -> socket.socket:
    """A connection on which some part of a request was sent."""
    connection = kubelet.connect(port)
    with contextlib.suppress(ConnectionError):  # it was evicted already
        connection.sendall((b"", b"\r\n", b"GET /heal", kubelet.REQUEST[:-2])[number % 4])
    return connection


def allow_descriptors(wanted: int) -> None:
    """Allow this process that many connections; raises ValueError if the system does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Load:
    """How a program stood up to one load."""

    def __init__(
        self, name: str, allowed: float, behaviour: str, running: rig.Running, driver: rig.Driver
    ) -> None:
        self._name, self._allowed, self._behaviour = name, allowed, behaviour
        self._running, self._driver = running, driver

    def run(self, load: Callable[[], Sequence[Answer]]) -> None:
        for _ in range(WARM_UP_CHECKS):
            self._running.get()
        before = process.memory(self._running.pid).resident
        self._driver.set(self._behaviour)
        self._driver.seen()
        self._answers = load()
        self._seen = self._driver.seen()
        self._driver.set("healthy")
        self._growth = process.memory(self._running.pid).peak - before
        self._seconds = sorted(answer.seconds for answer in self._answers)
        self._ok = sum(answer.status == 200 for answer in self._answers)

    def good(self) -> bool:
        return (
            self._ok == len(self._answers)
            and self._seconds[-1] < self._allowed
            and self._seen.most_at_once == 1
            and self._growth < MOST_GROWTH_MIB
        )

    def cells(self) -> list[str]:
        """A line of the table."""
        times = [self._seconds[len(self._seconds) * percent // 100] for percent in (50, 99)]
        return [
            self._name,
            f"{len(self._answers):,}",
            f"{self._ok:,}",
            *(f"{seconds * 1e3:,.1f}" for seconds in (*times, self._seconds[-1], self._allowed)),
            f"{self._seen.probes:,}",
            str(self._seen.most_at_once),
            f"{self._growth:.1f}",
            "ok" if self.good() else "over",
        ]


def main() -> None:
    arguments = _arguments()
    allow_descriptors(MOST_HELD + 100)
    loads = []
    slow = f"slow {DRIVER_SECONDS}"
    with rig.scratch() as folder, rig.Driver(folder / "csi.sock") as driver:
        (program,) = programs.chosen(folder, arguments.program, "")
        for line in programs.machine([program]):
            print(line, flush=True)
        for requests in STORMS:
            with rig.Running(program, driver) as running:  # each load finds the same memory
                loads.append(Load(f"storm of {requests:,}", STORM_SECONDS, slow, running, driver))
                loads[-1].run(partial(kubelet.storm, running.port, requests))
        with rig.Running(program, driver) as running:
            loads.append(Load("flood", FLOOD_SECONDS, "healthy", running, driver))
            loads[-1].run(partial(flood, running.port, arguments.seconds))
    print()
    print("\n".join(report.align([HEAD, *(load.cells() for load in loads)], left=1)))
    print(
        f"\nStorm: all at once, the driver takes {DRIVER_SECONDS:g} s. Flood: {HALF_OPEN:,} half-open connections and"
        f" {NEW_A_SECOND} new ones a second for {arguments.seconds:g} s,\nproper requests meanwhile. MiB: the most that"
        f" resident memory grew; {MOST_GROWTH_MIB:g} is allowed, and one probe at a time."
    )
    sys.exit(not all(load.good() for load in loads))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="load", description="Put storms and a flood of clients on the program."
    )
    parser.add_argument("--program", default="bin/livenessprobe", help="a command with the program's flags")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the flood lasts; default: 60")
    arguments = parser.parse_args()
    if not arguments.seconds > 0:
        parser.error(f"--seconds={arguments.seconds:g}: must be more than 0")
    return arguments


if __name__ == "__main__":
    main()
