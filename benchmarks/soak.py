"""`make soak`: many checks of a driver in every state; what the program holds must not grow. Exits 1 if it does."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import astuple, dataclass

import phases
import process
import programs
import report
import rig
from report import Budget

PROBE_TIMEOUT = "50ms"  # what a check of a driver that is hung or absent takes at most
WARM_UP_CHECKS = 2_000
ROUNDS = 4
MOST_UNEXPECTED = 0.01  # on a busy machine, so short a timeout is missed now and then
BUDGETS = {
    "RSS MiB": Budget(1.5, 1.0),
    "anonymous": Budget(1.5, 1.0),
    "descriptors": Budget(0),
    "threads": Budget(1),
}
HEAD = ["", "round", "driver", "checks", "unexpected", "ms a check", *BUDGETS]


@dataclass(frozen=True, slots=True)
class Held:
    """What a program holds: MiB, and numbers."""

    resident: float
    anonymous: float
    descriptors: int
    threads: int


class Soak:
    """One program's way through the phases."""

    def __init__(self, running: rig.Running, driver: rig.Driver) -> None:
        self.running, self.driver = running, driver
        self.checks = self.unexpected = 0
        self.lines: list[list[str]] = []

    def round(self, number: int, checks: int) -> None:
        for phase, share in phases.SHARES.items():
            count = max(1, round(checks * share))
            begin = time.monotonic()
            statuses = phases.run(phase, self.running, self.driver, count)
            seconds = time.monotonic() - begin
            unexpected = sum(n for status, n in statuses.items() if status not in phases.EXPECTED[phase])
            self.checks += count
            self.unexpected += unexpected
            self.lines.append(
                [
                    self.running.program.name,
                    str(number or "warm-up"),
                    phase,
                    f"{count:,}",
                    str(unexpected),
                    f"{seconds / count * 1e3:.2f}",
                    *_cells(self.held(), ""),
                ]
            )
            # One line of progress; the table comes at the end.
            print(" ".join(self.lines[-1]), file=sys.stderr, flush=True)

    def held(self) -> Held:
        time.sleep(0.5)  # some things end a moment after the answer
        pid = self.running.pid
        memory = process.memory(pid)
        return Held(memory.resident, memory.anonymous, process.descriptors(pid), process.threads(pid))

    def judge(self, start: Held, end: Held) -> bool:
        """Add the growth and the verdict to the table."""
        growth = Held(
            end.resident - start.resident,
            end.anonymous - start.anonymous,
            end.descriptors - start.descriptors,
            end.threads - start.threads,
        )
        verdicts = [
            budget.judge(value, None) for budget, value in zip(BUDGETS.values(), astuple(growth), strict=True)
        ]
        late = "over" if self.unexpected > MOST_UNEXPECTED * self.checks else "ok"
        name, checks = self.running.program.name, f"{self.checks:,}"
        self.lines.append([name, "growth", "", checks, str(self.unexpected), "", *_cells(growth, "+")])
        self.lines.append(["", "budget", "", "", f"{MOST_UNEXPECTED:.0%}", "", *map(str, BUDGETS.values())])
        self.lines.append(["", "", "", "", late, "", *verdicts])
        return "over" not in [late, *verdicts]


def main() -> None:
    arguments = _arguments()
    begin = time.monotonic()
    good, lines = True, [HEAD]
    with rig.scratch() as folder:
        compared = programs.chosen(folder, arguments.program, arguments.reference)
        for line in programs.machine(compared):
            print(line, flush=True)
        for program in compared:
            with (
                rig.Driver(folder / "csi.sock") as driver,
                rig.Running(program, driver, f"--probe-timeout={PROBE_TIMEOUT}") as running,
            ):
                soak = Soak(running, driver)
                soak.round(0, WARM_UP_CHECKS)
                start = soak.held()
                soak.checks = soak.unexpected = 0
                for number in range(ROUNDS):
                    soak.round(number + 1, arguments.checks // ROUNDS)
                kept = soak.judge(start, soak.held())
            good = good and (kept or program.name == "reference")
            lines += soak.lines
    print()
    print("\n".join(report.align(lines, left=3)))
    print(
        "\nGrowth since the warm-up. A budget (in brackets: the goal) is the most allowed."
        f" Took {time.monotonic() - begin:.0f} s."
    )
    sys.exit(not good)


def _cells(held: Held, sign: str) -> list[str]:
    return [
        f"{held.resident:{sign}.2f}",
        f"{held.anonymous:{sign}.2f}",
        f"{held.descriptors:{sign}d}",
        f"{held.threads:{sign}d}",
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="soak", description="Make many checks, and see what the program holds."
    )
    parser.add_argument("--program", default="bin/livenessprobe", help="a command with the program's flags")
    parser.add_argument(
        "--reference", default="", help="a command with the same flags; none: the program alone"
    )
    parser.add_argument("--checks", type=int, default=100_000, help="in all; default: 100000")
    return parser.parse_args()


if __name__ == "__main__":
    main()
