"""Changes the program in one place after another, and tells which changes no test notices: `make mutants`.

Each module has tests that need no process of the program, or hardly any (TESTS). They run once with coverage, so that a
mutant meets only the tests that reach its line, and those that start a process of the program, which may reach it
there; the quick ones first. Each mutant is written into a copy of the tree, and tested in a
fork of this process, which has loaded what tests need; nothing is ever changed in place.

A mutant is dead if a test fails, or if it makes a loop without end. One that makes the tests wait without end is alive: a
failing test has to end. The run fails if one is alive that is not listed with its reason (SURVIVORS), if a listed one
dies, or if more than a tenth of those that are not equivalent are alive.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import gc
import multiprocessing
import os
import pickle
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from importlib.util import cache_from_source
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

# What tests load is loaded once, for all forks, except the program.
import coverage
import google.protobuf.descriptor_pool  # noqa: F401
import grpc  # noqa: F401
import hpack  # noqa: F401
import hypothesis.internal.conjecture.providers
import hypothesis.strategies
import mutations
import prometheus_client  # noqa: F401
import pytest
import this_run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).parents[2]
SURVIVORS = Path(__file__).with_name("survivors.txt")
# The files with the tests of each module.
TESTS = {
    "address": "test_config",
    "checks": "test_checks",
    "config": "test_config",
    "connection": "test_web",
    "driver": "test_driver",
    "driver_name": "test_driver_name",
    "exchange": "test_exchange test_web",
    "goflags": "test_goflags test_config",
    "grpc_answer": "test_http2_call",
    "health": "test_health",
    "history": "test_history",
    "http2_call": "test_http2_call",
    "http2_frames": "test_http2_frames test_http2_call",
    "limits": "test_limits",
    "listening": "test_web",
    "log": "test_log",
    "metrics": "test_metrics",
    "progress": "test_progress",
    "quoting": "test_quoting",
    "rpc": "test_rpc",
    "status": "test_status",
    "stopping": "test_stopping",
    "threads": "test_threads",
    "unix_call": "test_unix_call",
    "versions": "test_versions",
    "web": "test_web",
    "writer": "test_writer",
}
LEAST_KILLED = 0.9
_COPIED = "livenessprobe tests examples benchmarks build deploy pyproject.toml".split()
_PYTEST = (
    "-q",
    "--assert=plain",
    "--tb=no",
    "-p",
    "no:unraisableexception",
    "-o",
    "addopts=",
    "-o",
    "timeout=0",
)
# What the tests may take beyond what they took on the unchanged module: seconds of the processor and of the clock.
_LOOPS, _WAITS = 4.0, 150.0


class Ran(NamedTuple):
    """A run of tests."""

    code: int
    """pytest's exit code; minus the signal's number if one ended it."""
    took: float
    output: str


class Reach(NamedTuple):
    """What the tests of a file reach, and how long each takes."""

    seconds: Mapping[str, float]
    tests: Mapping[tuple[str, int], set[str]]
    """The tests, by module and line; the empty name is what runs at import."""
    starting: set[str]
    """Tests that start a process with the program, or a part of it."""
    useless: set[str]
    """Tests that are skipped, or fail on the unchanged module."""


class _Watch:
    """A plugin for pytest: which test reaches which line."""

    def __init__(self, result: Path) -> None:
        self._result = result
        self._seconds: dict[str, float] = defaultdict(float)
        self._failed: set[str] = set()
        self._starting: set[str] = set()
        self._test = ""

    def pytest_configure(self) -> None:
        sys.addaudithook(self._hear)
        self._coverage = coverage.Coverage(data_file=None, config_file=False, source_pkgs=["livenessprobe"])
        self._coverage.start()

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "subprocess.Popen" and "livenessprobe" in str(arguments[1]):
            self._starting.add(self._test)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._test = nodeid
        self._coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration
        if not report.passed:
            self._failed.add(report.nodeid)

    def pytest_unconfigure(self) -> None:
        self._coverage.stop()
        data = self._coverage.get_data()
        tests: dict[tuple[str, int], set[str]] = {}
        for file in data.measured_files():
            for line, contexts in data.contexts_by_lineno(file).items():
                tests[Path(file).stem, line] = set(contexts)
        self._result.write_bytes(
            pickle.dumps(
                Reach(
                    {name: took for name, took in self._seconds.items() if name not in self._failed},
                    tests,
                    self._starting,
                    self._failed,
                )
            )
        )


def _fork(arguments: Sequence[str], allowed: float, *plugins: object) -> Ran:
    """Run pytest in a fork, in this worker's copy of the tree."""
    output = _Tree.path / "output"
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(_tested(output, arguments, allowed, plugins))
    code = _awaited(child, began + 3 * allowed + _WAITS)
    return Ran(code, time.monotonic() - began, output.read_text(errors="replace"))


def _tested(output: Path, arguments: Sequence[str], allowed: float, plugins: Sequence[object]) -> int:
    """Run pytest in this process."""
    os.setsid()
    os.chdir(_Tree.path)
    descriptor = os.open(output, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for each in (1, 2):
        os.dup2(descriptor, each)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    seconds = int(allowed + _LOOPS)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    sys.dont_write_bytecode = True
    os.environ["LIVENESSPROBE"] = f"{sys.executable} -m livenessprobe"
    # Fake drivers, which are forks of another process, would load this script.
    vars(sys.modules["__main__"]).pop("__file__", None)
    try:
        return int(pytest.main([*_PYTEST, *arguments], plugins=plugins))
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()


def _awaited(child: int, deadline: float) -> int:
    """Wait for a fork and end whatever it has started; SIGALRM's number if it took too long."""
    descriptor = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        in_time = bool(poll.poll(1000 * max(0.0, deadline - time.monotonic())))
    finally:
        os.close(descriptor)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if in_time else -signal.SIGALRM


class _Tree:
    """This worker's copy of the tree."""

    path: Path

    @classmethod
    def copy(cls, folder: str, files: Sequence[str]) -> None:
        cls.path = Path(folder) / str(os.getpid())
        cls.path.mkdir()
        for name in _COPIED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "node_modules")
                shutil.copytree(ROOT / name, cls.path / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, cls.path / name)
        for name in ("livenessprobe", "tests/helpers"):  # forks write none
            compileall.compile_dir(cls.path / name, maxlevels=0, quiet=1)
        for name in ("conftest", *files):
            compileall.compile_file(cls.path / "tests" / f"{name}.py", quiet=1)
        os.environ[this_run.VARIABLE] = folder
        # One failure is enough; hypothesis need not shrink it.
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile("mutants", phases=phases)
        hypothesis.settings.load_profile("mutants")
        gc.freeze()  # so that forks do not go through all of this again and again


def reach(file: str) -> Reach:
    """Run a test file on the program as it is, and see what it reaches."""
    result = _Tree.path / "reach"
    ran = _fork([f"tests/{file}.py", "--measure-all"], 600, _Watch(result))
    if ran.code not in (0, 1):
        raise RuntimeError(f"tests/{file}.py ends with {ran.code}:\n{ran.output[-4000:]}")
    return cast("Reach", pickle.loads(result.read_bytes()))


def judge(module: str, source: str, tests: Sequence[str], seconds: float) -> str:
    """Tell what becomes of a mutant: dead, alive, loops, or waits."""
    path = _Tree.path / "livenessprobe" / f"{module}.py"
    kept = path.read_bytes()
    path.write_text(source)
    Path(cache_from_source(path)).unlink(missing_ok=True)
    try:
        ran = _fork(["--exitfirst", *tests], seconds)
    finally:
        path.write_bytes(kept)
    if ran.code == -signal.SIGXCPU:
        return "loops"
    if ran.code == -signal.SIGALRM:
        return "waits"
    return "alive" if ran.code == 0 else "dead"


def tests_of(module: str, line: int, reached: Mapping[str, Reach]) -> dict[str, float]:
    """Choose the tests that reach a line, or may reach it, quick ones first, with the time each takes."""
    chosen: dict[str, float] = {}
    for file in TESTS[module].split():
        names = reached[file].tests.get((module, line), set()) | reached[file].starting
        # All tests reach what runs at import.
        chosen |= {name: took for name, took in reached[file].seconds.items() if name in names or "" in names}
    return dict(sorted(chosen.items(), key=lambda test: test[1]))


def known(text: str) -> dict[str, str]:
    """Read the survivors: keys, one per line, and below them, indented, the reason they share."""
    reasons: dict[str, str] = {}
    keys: list[str] = []
    reason: list[str] = []
    for line in [*text.splitlines(), "end"]:
        if line.startswith("#"):
            continue
        if line.startswith(" "):
            reason.append(line.strip())
        elif line:
            if reason:
                reasons |= dict.fromkeys(keys, " ".join(reason))
                keys, reason = [], []
            keys.append(line)
    return reasons


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--survivors", type=Path, default=SURVIVORS)
    parser.add_argument("--containing", default="", help="change only lines that contain this text")
    parser.add_argument("modules", nargs="*", help="those to change, if not all")
    arguments = parser.parse_args()
    modules = arguments.modules or sorted(TESTS)
    files = sorted({file for module in modules for file in TESTS[module].split()})
    with (
        tempfile.TemporaryDirectory(prefix="mutants-", dir="/tmp") as folder,
        ProcessPoolExecutor(
            arguments.workers,
            multiprocessing.get_context("fork"),
            initializer=_Tree.copy,
            initargs=(folder, files),
        ) as pool,
    ):
        reached = dict(zip(files, pool.map(reach, files), strict=True))
        for test in sorted(set().union(*(each.useless for each in reached.values()))):
            print(f"skipped, or failing without any change: {test}", flush=True)
        reasons = {
            key: reason
            for key, reason in known(arguments.survivors.read_text()).items()
            if arguments.containing in key
        }
        return report(pool, modules, reached, reasons, arguments.containing)


def report(
    pool: ProcessPoolExecutor,
    modules: Sequence[str],
    reached: Mapping[str, Reach],
    reasons: Mapping[str, str],
    containing: str,
) -> int:
    """Judge all mutants and print the results; reasons are those of the known survivors."""
    wrong = 0
    totals: Counter[str] = Counter()
    print(f"{'module':14}{'mutants':>8}{'dead':>6}{'alive':>7}{'equivalent':>12}{'seconds':>9}", flush=True)
    for module in modules:
        began = time.monotonic()
        source = (ROOT / "livenessprobe" / f"{module}.py").read_text()
        judged = {}
        for mutant in mutations.mutants(module, source):
            if containing not in mutant.key:
                continue
            tests = tests_of(module, mutant.line, reached)
            judged[mutant.key] = (
                pool.submit(judge, module, mutant.source, list(tests), sum(tests.values())) if tests else None
            )
        fates = {key: future.result() if future else "not reached" for key, future in judged.items()}
        alive = {key: fate for key, fate in fates.items() if fate not in ("dead", "loops")}
        counts = Counter(mutants=len(fates), dead=len(fates) - len(alive))
        for key in alive:
            counts["equivalent" if reasons.get(key, "").startswith("equivalent") else "alive"] += 1
        totals += counts
        print(_row(module, counts, time.monotonic() - began), flush=True)
        surprises = [f"{fate}: {key}" for key, fate in alive.items() if key not in reasons]
        surprises += [
            f"listed in {SURVIVORS.name}, but {fates.get(key, 'no mutant any more')}: {key}"
            for key in reasons
            if key.startswith(f"{module}: ") and key not in alive
        ]
        wrong += len(surprises)
        print("".join(f"    {line}\n" for line in surprises), end="", flush=True)
    killed = totals["dead"] / max(1, totals["dead"] + totals["alive"])
    print(
        _row("all", totals, 0), f"\n{killed:.1%} of those that are not equivalent are dead; {wrong} surprises"
    )
    return int(wrong > 0 or killed < LEAST_KILLED)


def _row(name: str, counts: Mapping[str, int], seconds: float) -> str:
    return f"{name:14}{counts['mutants']:8}{counts['dead']:6}{counts['alive']:7}{counts['equivalent']:12}{seconds:9.0f}"


if __name__ == "__main__":
    sys.exit(main())
