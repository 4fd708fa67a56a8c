"""`make torture`: random lives of a driver and random junk, for some minutes; and what the tests that it runs share.

    python tests/helpers/torture.py --minutes 5
    python tests/helpers/torture.py --seed 12345     plays one round again

Each round runs tests/test_states.py, test_siege.py, test_fuzz.py and test_fuzz_call.py with a seed of its own. Exit code 1 at the first failure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from xml.etree import ElementTree

from hypothesis import HealthCheck, seed, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Test = TypeVar("Test", bound="Callable[..., object]")

TESTS = [
    str(Path(__file__).parent.parent / name)
    for name in ("test_states.py", "test_siege.py", "test_fuzz.py", "test_fuzz_call.py")
]
# Set for the tests of a round: its seed.
VARIABLE = "LIVENESSPROBE_TORTURE"

_QUOTED = r'"(?:[^"\\]|\\.)*"'
_KLOG = re.compile(
    rf"[IWE]\d{{4}} \d\d:\d\d:\d\d\.\d{{6}} [ \d]{{6}}\d \w+\.py:\d+\] {_QUOTED}( \w+=({_QUOTED}|[\w.+-]+))*"
)


def under_torture() -> bool:
    """Whether these are the tests of a round."""
    return VARIABLE in os.environ


def effort(examples: int) -> settings:
    """The same examples in every test run; under `make torture` twice as many, and new ones each time."""
    return settings(
        max_examples=examples * 2 if under_torture() else examples,
        derandomize=not under_torture(),
        # A slow machine is not a failure.
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


def in_part(part: int, test: Test) -> Test:
    """Have one of several parts of a test try different examples from the rest; the same in every test run."""
    return seed(f"{os.environ.get(VARIABLE, '')}-{part}")(test)


class Tally:
    """Figures of a run: those that begin with `most` are the highest seen, the others are sums."""

    def __init__(self) -> None:
        self.figures: Counter[str] = Counter()

    def add(self, name: str, value: int = 1) -> None:
        self.figures[name] = (
            max(self.figures[name], value) if name.startswith("most ") else self.figures[name] + value
        )


def assert_well_formed(lines: Iterable[str]) -> None:
    """Checks a log's format, text or JSON: then nothing else got in, neither a traceback nor a forged line."""
    for line in lines:
        if line.startswith("{"):
            record = json.loads(line)
            assert {"ts", "caller", "msg"} < record.keys(), f"not a log line: {line!r}"
        else:
            assert _KLOG.fullmatch(line), f"not a log line: {line!r}"
        assert line.isprintable(), f"not printable: {line!r}"
        assert len(line) < 20_000, f"endless: {line[:1000]!r}"


def _round(number: int, tally: Tally) -> int:
    """Runs the tests once; returns pytest's exit code."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        # A round takes as long as it takes; no test times out.
        options = [
            "-q",
            "-x",
            "--timeout=0",
            "-ojunit_family=xunit1",
            f"--hypothesis-seed={number}",
            f"--junitxml={report.name}",
        ]
        command = [sys.executable, "-m", "pytest", *options, *TESTS]
        code = subprocess.run(command, check=False, env={**os.environ, VARIABLE: str(number)}).returncode
        for figure in ElementTree.parse(report).iter("property"):
            if figure.attrib["value"].isdecimal():  # hypothesis has properties of its own
                tally.add(figure.attrib["name"], int(figure.attrib["value"]))
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs random tests for some minutes.")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument(
        "--seed", default="", help="of the one round to run (empty: rounds with random seeds)"
    )
    options = parser.parse_args()
    tally, begin, rounds, code = Tally(), time.monotonic(), 0, 0
    while not code and (not rounds or (not options.seed and time.monotonic() - begin < options.minutes * 60)):
        number = int(options.seed or random.getrandbits(32))
        rounds += 1
        print(f"\nround {rounds}, seed {number}", flush=True)
        code = _round(number, tally)
    print(f"\n{rounds} rounds in {(time.monotonic() - begin) / 60:.1f} minutes")
    for name, value in sorted(tally.figures.items()):
        print(f"{value:>12,}  {name}")
    if code:
        print(
            f"FAILED: `make torture SEED={number}` plays this round again; above is the smallest example that fails"
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
