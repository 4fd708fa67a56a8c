"""`make steady`: runs the tests again and again beside two busy loops per processor, and says what failed how often.

    python tests/helpers/steady.py --runs 20 --workers 4 [what pytest takes]

Exit code 1 if any run failed. If a test fails here because of its timing, the test or the program has to be mended.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
LOOPS_A_PROCESSOR = 2
# When to give up on a run.
LIMIT = "1h"


@contextlib.contextmanager
def busy(loops: int) -> Iterator[None]:
    """This many processes that take all the CPU they get."""
    with contextlib.ExitStack() as ends:
        for _ in range(loops):
            loop = ends.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            ends.callback(loop.kill)
        yield


def run(log: Path, arguments: list[str]) -> list[str]:
    """Run the tests once; return those that failed, or the last line if there is no other sign."""
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    with log.open("w") as output:
        # A test that fails must leave nobody waiting.
        bound = ["timeout", "--signal=INT", "--kill-after=60", LIMIT]
        code = subprocess.run(
            [*bound, *command], cwd=ROOT, check=False, stdout=output, stderr=output
        ).returncode
    text = log.read_text()
    failed = re.findall(r"(?m)^(?:FAILED|ERROR) (\S+)", text)
    return failed or ([f"exit code {code}: {text.strip().splitlines()[-1]}"] if code else [])


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs the tests on a busy machine.")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--workers", default="4")
    options, more = parser.parse_known_args()
    logs = Path(tempfile.mkdtemp(prefix="steady-", dir=_cache()))
    failures: Counter[str] = Counter()
    red = 0
    with busy(LOOPS_A_PROCESSOR * (os.cpu_count() or 1)):
        for number in range(1, options.runs + 1):
            begin = time.monotonic()
            failed = run(logs / f"{number}.log", [f"--numprocesses={options.workers}", *more])
            failures.update(failed)
            red += bool(failed)
            told = "; ".join(failed) or "green"
            print(f"run {number:>2}, {time.monotonic() - begin:.0f} s: {told}", flush=True)
    print(f"{options.runs} runs, {red} with a failure; what they said: {logs.relative_to(ROOT)}")
    for test, times in failures.most_common():
        print(f"{times:>4}  {test}")
    return int(red > 0)


def _cache() -> Path:
    folder = ROOT / ".cache"
    folder.mkdir(exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
