"""`make bench`: measures the program beside a reference program, and prints one table with the budgets."""

from __future__ import annotations

import argparse
import sys
import time

import figures
import programs
import report
import rig


def main() -> None:
    arguments = _arguments()
    if arguments.blocks < figures.BLOCKS_BEFORE_MEMORY:
        sys.exit(f"bench: --blocks is at least {figures.BLOCKS_BEFORE_MEMORY}: 2,000 checks")
    begin = time.monotonic()
    with rig.scratch() as folder, rig.Driver(folder / "csi.sock") as driver:
        compared = programs.chosen(folder, arguments.program, arguments.reference)
        for line in programs.machine(compared):
            print(line)
        print(
            "driver     fast_driver.py: one thread, just the HTTP/2 that a call needs; its cost is in the table\n"
            f"runs       {arguments.blocks} blocks, the programs in turns in each: {figures.CHECKS_A_BLOCK} checks in a"
            f" burst; {figures.PERIODS_A_BLOCK} checks, one every {figures.PERIOD_SECONDS:g} s\n"
            f"storm      {figures.STORM_REQUESTS} requests at once, the driver answers after"
            f" {figures.STORM_DELAY_SECONDS:g} s",
            flush=True,
        )
        if arguments.cpus:
            compared.append(programs.with_cpus(compared[0], arguments.cpus, folder))
        measured = [figures.Figures(program) for program in compared]
        for each in measured:
            if size := each.program.bytes():
                each.add("bytes", size / 1e6)
        figures.starts(measured, driver, times=max(10, arguments.blocks))
        figures.first_runs(measured, driver, folder, times=max(3, arguments.blocks // 4))
        # A flag that the reference does not have.
        ours = [each for each in measured if each.program.name != "reference"]
        figures.once(ours, driver, times=max(10, arguments.blocks))
        figures.serving(measured, driver, arguments.blocks)
    print()
    print("\n".join(report.table(measured)))
    if arguments.cpus:
        print("\n" + report.independence(measured[0], measured[-1]))
        print(
            "The two copies of the program share pages: see its proportional memory in a run without the other."
        )
    print(f"\n{report.LEGEND} Took {time.monotonic() - begin:.0f} s.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description="Measure the program beside a reference program."
    )
    parser.add_argument("--program", default="bin/livenessprobe", help="a command with the program's flags")
    parser.add_argument(
        "--reference", default="", help="a command with the same flags; none: the program alone"
    )
    parser.add_argument("--blocks", type=int, default=24, help="8 to be quick, 24 (default) to be sure")
    parser.add_argument("--cpus", type=int, default=0, help="also on a machine that seems to have this many")
    return parser.parse_args()


if __name__ == "__main__":
    main()
