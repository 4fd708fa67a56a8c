"""Fixtures: short folders, the fake driver, the program; and the guard against tests that leave a process behind."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import coverage
import program
import pytest
import this_run
from fake_driver import FakeDriver, unmeasured_children
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence


class ProbeFactory(Protocol):
    """Starts the program; whatever it started ends with the test."""

    def __call__(
        self, *args: str, env: Mapping[str, str] | None = None, user: int | None = None, listeners: int = 1
    ) -> program.Probe: ...


# The timeout of tests that need the images.
IMAGE_SECONDS = 600
_THE_FIRST = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--measure-all", action="store_true", help="measure coverage in unmeasured tests too")


def pytest_configure(config: pytest.Config) -> None:
    # The same examples in each run; new ones are torture's. A slow machine is not a failure.
    settings.register_profile(
        "tests", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("tests")
    config.stash[_THE_FIRST] = this_run.begin()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a worker is ended by whoever started it
        # A thread that a failed test left behind must not keep the process from ending.
        faulthandler.dump_traceback_later(60, exit=True)
    if config.stash[_THE_FIRST]:
        import image_engine  # which marks things with the run's name

        image_engine.remove_all()
        this_run.end()


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deal the tests out to the workers so that they end together, and soon.

    Those that share a fixture of their file go to the same worker. Each file is spread over the whole run, since the tests
    of some files wait and those of others compute, and long ones start early.
    """
    if not hasattr(config, "workerinput"):
        return
    sizes = Counter(item.path for item in items)
    seen: Counter[Path] = Counter()
    turns: dict[pytest.Item, float] = {}
    for item in items:
        assert isinstance(item, pytest.Function)
        for definitions in item._fixtureinfo.name2fixturedefs.values():
            if definitions[-1].scope != "function" and definitions[-1].baseid.endswith(".py"):
                item.add_marker(pytest.mark.xdist_group(definitions[-1].baseid))
        patience = max((mark.args[0] for mark in item.iter_markers("timeout")), default=0)
        turns[item] = seen[item.path] / sizes[item.path]
        if patience > IMAGE_SECONDS or item.path.name == "test_image.py":
            turns[item] = 0  # with the making of the images
        elif patience == IMAGE_SECONDS:
            turns[item] = 0.25 + turns[item] / 2  # once they are there
        seen[item.path] += 1
    items.sort(key=turns.__getitem__)


def _started() -> dict[int, str]:
    """The processes that tests have started, with their command lines or what became of them.

    They are our children, and the drivers, which are children of the one that forks them.
    """
    children = defaultdict(list)
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with (
            contextlib.suppress(FileNotFoundError, ProcessLookupError),
            open(f"/proc/{pid}/stat", "rb") as stat,
        ):
            children[int(stat.read().rpartition(b")")[2].split()[1])].append(pid)
    started: dict[int, str] = {}
    for pid in children[os.getpid()]:
        command = _command(pid)
        if "from multiprocessing." in command:
            started |= {driver: _command(driver) for driver in children[pid]}
        else:
            started[pid] = command
    return started


def _command(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return (
            Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
            or "ended, not waited for"
        )
    return "ended"


@contextlib.contextmanager
def _unmeasured(config: pytest.Config) -> Iterator[None]:
    """No coverage is measured meanwhile, neither here nor in processes that are started; unless all is to be."""
    if config.getoption("measure_all"):
        yield
        return
    measured = coverage.Coverage.current()
    if measured:
        measured.stop()
    try:
        with unmeasured_children():
            yield
    finally:
        if measured:
            measured.start()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Measures no coverage: tests show what the program's modules do when they are loaded."""
    with _unmeasured(session.config):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Measures no coverage in tests marked so: to run the package by the hundred thousand lines takes twice the time.

    Nor in what they start, since a tool in our environment would take 0.1 s more for its start, and reach none of it.
    """
    if not item.get_closest_marker("unmeasured"):
        return (yield)
    with _unmeasured(item.config):
        return (yield)


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Fails a test that leaves processes behind, and ends them so that they do not disturb later tests."""
    before = _started()
    yield
    left = {pid: command for pid, command in _started().items() if pid not in before}
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # a driver
            os.waitpid(pid, 0)
    assert not left, f"processes left behind: {left}"


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder whose name is short: the path of a unix socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="lp", dir="/tmp") as name:
        path = Path(name)
        # So that the program can also be run as another user.
        path.chmod(0o755)
        yield path


@pytest.fixture
def socket_path(folder: Path) -> Path:
    """Where the driver's socket will be; nothing is there yet."""
    return folder / "csi.sock"


@pytest.fixture
def driver(socket_path: Path) -> Iterator[FakeDriver]:
    """A healthy driver on `socket_path`."""
    with FakeDriver(socket_path) as running:
        yield running


@pytest.fixture
def command(request: pytest.FixtureRequest) -> Sequence[str] | None:
    """What to run (None: the built file); a test may choose: `parametrize("command", [program.MODULE], indirect=True)`."""
    chosen: Sequence[str] | None = getattr(request, "param", None)
    return chosen


@pytest.fixture
def probe_factory(command: Sequence[str] | None) -> Iterator[ProbeFactory]:
    """`probe_factory("--flag=…", …)` starts the program and returns it once it listens."""
    with contextlib.ExitStack() as probes:

        def start(
            *args: str, env: Mapping[str, str] | None = None, user: int | None = None, listeners: int = 1
        ) -> program.Probe:
            probe = program.Probe(args, command=command, env=env, user=user, listeners=listeners)
            return probes.enter_context(probe)

        yield start


@pytest.fixture
def probe(probe_factory: ProbeFactory, socket_path: Path) -> program.Probe:
    """The program beside `socket_path`, on a free port, with timeouts that are short, but not for a busy machine."""
    return probe_factory(
        f"--csi-address={socket_path}",
        "--http-endpoint=127.0.0.1:0",
        "--connection-timeout=1s",
        "--probe-timeout=3s",
    )
