"""What is measured: each step takes the programs in turns, so that the machine's moods affect all of them alike."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import kubelet
import process
from rig import Running

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from programs import Program
    from rig import Driver

CHECKS_A_BLOCK = 250
BLOCKS_BEFORE_MEMORY = 8  # 2,000 checks
PERIOD_SECONDS = 2.0
PERIODS_A_BLOCK = 4
STORM_REQUESTS = 400
STORM_DELAY_SECONDS = 0.3


@dataclass
class Figures:
    """Samples of one program's figures, by the figure's key."""

    program: Program
    samples: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, key: str, value: float) -> None:
        self.samples[key].append(value)

    def median(self, key: str) -> float | None:
        return statistics.median(self.samples[key]) if self.samples[key] else None

    def percentile(self, key: str, percent: int) -> float | None:
        values = sorted(self.samples[key])
        return values[min(len(values) - 1, len(values) * percent // 100)] if values else None


def starts(all_figures: Sequence[Figures], driver: Driver, times: int) -> None:
    """Time to listening and to the first ok, everything cached."""
    for figures in all_figures:
        with Running(figures.program, driver):
            pass
    for _ in range(times):
        for figures in all_figures:
            with Running(figures.program, driver) as running:
                figures.add("listening", running.listening * 1e3)
                figures.add("first ok", running.first_ok * 1e3)
            time.sleep(0.05)


def first_runs(all_figures: Sequence[Figures], driver: Driver, folder: Path, times: int) -> None:
    """Time to the first ok of a file that has not been unpacked yet."""
    for turn in range(times):
        for number, figures in enumerate(all_figures):
            empty = {"SHIV_ROOT": str(folder / f"first-{turn}-{number}")}
            with Running(figures.program, driver, variables=empty) as running:
                figures.add("first run", running.first_ok * 1e3)


def once(all_figures: Sequence[Figures], driver: Driver, times: int) -> None:
    """The whole run of a check from the shell."""
    for _ in range(times):
        for figures in all_figures:
            seconds = figures.program.output("--once", f"--csi-address={driver.path}")[1]
            figures.add("once", seconds * 1e3)


def serving(all_figures: Sequence[Figures], driver: Driver, blocks: int) -> None:
    """All that is measured while the programs serve, side by side."""
    with ExitStack() as stack:
        pairs = [(each, stack.enter_context(Running(each.program, driver))) for each in all_figures]
        time.sleep(1.0)
        _memory(pairs, "at start")
        for block in range(blocks):
            for figures, running in pairs:
                _burst(figures, running, driver)
            if block + 1 == BLOCKS_BEFORE_MEMORY:
                _memory(pairs, "after 2,000")
        for _ in range(blocks):
            _cadence(pairs)
        _idle(pairs, seconds=max(10.0, blocks * 1.0))
        for figures, running in pairs:
            _storm(figures, running, driver)


def _memory(pairs: Sequence[tuple[Figures, Running]], when: str) -> None:
    time.sleep(0.5)
    for figures, running in pairs:
        memory = process.memory(running.pid)
        figures.add(f"resident {when}", memory.resident)
        figures.add(f"anonymous {when}", memory.anonymous)
        figures.add(f"proportional {when}", memory.proportional)
        figures.add(f"threads {when}", process.threads(running.pid))


def _burst(figures: Figures, running: Running, driver: Driver) -> None:
    """One check after another."""
    program, peer, client = (
        process.cpu_seconds(running.pid),
        process.cpu_seconds(driver.pid),
        time.thread_time(),
    )
    for _ in range(CHECKS_A_BLOCK):
        figures.add("latency", _healthy(running).seconds * 1e3)
    client_seconds = time.thread_time() - client
    peer_seconds = process.cpu_seconds(driver.pid) - peer
    time.sleep(0.1)  # the program may still have work to do
    program_seconds = process.cpu_seconds(running.pid) - program
    figures.add("burst", program_seconds / CHECKS_A_BLOCK * 1e3)
    figures.add("driver", peer_seconds / CHECKS_A_BLOCK * 1e3)
    figures.add("client", client_seconds / CHECKS_A_BLOCK * 1e3)


def _cadence(pairs: Sequence[tuple[Figures, Running]]) -> None:
    """Each program is asked every two seconds, all during the same time, each a moment after the last."""
    begin = time.monotonic()
    before = [process.cpu_seconds(running.pid) for _, running in pairs]
    for period in range(PERIODS_A_BLOCK):
        for number, (figures, running) in enumerate(pairs):
            at = begin + (period + (number + 0.5) / len(pairs)) * PERIOD_SECONDS
            time.sleep(max(0.0, at - time.monotonic()))
            figures.add("cadence latency", _healthy(running).seconds * 1e3)
    time.sleep(max(0.0, begin + PERIODS_A_BLOCK * PERIOD_SECONDS - time.monotonic()))
    for (figures, running), start in zip(pairs, before, strict=True):
        figures.add("cadence", (process.cpu_seconds(running.pid) - start) / PERIODS_A_BLOCK * 1e3)


def _idle(pairs: Sequence[tuple[Figures, Running]], seconds: float) -> None:
    """Nobody asks. Sampled now and then, because of threads that come and go."""
    time.sleep(2.0)
    begin = time.monotonic()
    before = [process.wake_ups(running.pid) for _, running in pairs]
    counts = [dict.fromkeys(threads, 0) for threads in before]
    while time.monotonic() - begin < seconds:
        time.sleep(1.0)
        for count, start, (_, running) in zip(counts, before, pairs, strict=True):
            for thread, switches in process.wake_ups(running.pid).items():
                count[thread] = switches - start.get(thread, 0)
    elapsed = time.monotonic() - begin
    for count, (figures, _) in zip(counts, pairs, strict=True):
        figures.add("wake-ups", sum(count.values()) / elapsed)


def _storm(figures: Figures, running: Running, driver: Driver) -> None:
    """Many requests at once, while the driver is slow."""
    driver.set(f"slow {STORM_DELAY_SECONDS}")
    driver.seen()
    answers = kubelet.storm(running.port, STORM_REQUESTS)
    seen = driver.seen()
    driver.set("healthy")
    figures.add("storm", max(answer.seconds for answer in answers) * 1e3)
    figures.add("storm ok", sum(answer.status == 200 for answer in answers))
    figures.add("storm probes", seen.probes)
    figures.add("storm at once", seen.most_at_once)
    figures.add("peak", process.memory(running.pid).peak)


def _healthy(running: Running) -> kubelet.Answer:
    answer = running.get()
    if answer.status != 200:
        raise RuntimeError(
            f"{running.program.name} answered {answer.status} for a healthy driver: {answer.body!r}"
        )
    return answer
