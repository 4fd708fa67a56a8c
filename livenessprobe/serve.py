"""The server, to its end: serve() returns an exit code. Decisions are health's, effects are here.

Three threads are all it ever needs: this one serves HTTP, one checks, one learns the driver's name. What they use is
loaded before they start, which takes time; requests that come meanwhile wait in the listeners' queues. If the system
grants no threads, this one checks between its turns, and the driver's name is not learnt.
"""

import gc
import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING

from livenessprobe import health, limits, threads
from livenessprobe.checks import Checked, Checks
from livenessprobe.config import Config, ConfigError, Exit
from livenessprobe.driver_name import Naming
from livenessprobe.exchange import Route
from livenessprobe.health import Outcome, Verdict
from livenessprobe.history import Change, History
from livenessprobe.listening import Listener
from livenessprobe.routes import health_routes, metrics_route, status_routes
from livenessprobe.stopping import Stop
from livenessprobe.web import Server

if TYPE_CHECKING:
    from livenessprobe.metrics import Metrics

DRAIN_SECONDS = 0.5
SHORTEST_CHECK_SECONDS = 0.1
_FIRST_MOMENT_SECONDS = 0.05
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_logger = logging.getLogger(__name__)


def serve(config: Config, listeners: Sequence[Listener]) -> Exit:
    """Serve health (and metrics) until SIGTERM or SIGINT; raises ConfigError if it cannot."""
    stop, problems = Stop(), list[str]()
    checks = Checks(stop, time.monotonic)
    metrics = cache(partial(_load_metrics, config.probe_timeout))
    history, names = History(), deque([""], maxlen=1)
    for_metrics = {config.metrics_path: metrics_route(metrics)}
    for_health = health_routes(checks)
    if config.statusz:
        others = for_metrics if config.metrics == config.health else ()
        for_health |= status_routes(
            config.csi_address, config.flags, (*for_health, "/statusz", "/flagz", *others), history, names
        )
    _offer(listeners, config, for_health, for_metrics)
    try:
        server = Server(*listeners)
    except OSError as error:
        reason = f"cannot serve: {str(error.strerror).lower()}"
        raise ConfigError(config.health.flag, config.health.value, reason) from None
    with _stopped_by_signals(server):
        between: Callable[[], None] = _nothing
        try:
            check, check_once, learn_name = _load_work(
                config, listeners[0].since, checks, metrics, stop, history, names
            )
            if not _started("checks", partial(run_or_end, check, problems, server.stop)):
                between = check_once
                # Also from within a check, which then ends at once.
                _on_signals(server.stop, stop.set)
            else:
                _started("name", partial(run_or_end, learn_name, problems, server.stop))
        except Exception as error:
            problems.append(limits.denial(error) or repr(error))
            server.stop()
        server.run(between)
        for problem in problems:
            _logger.critical("Cannot check", {"err": problem})
        _logger.info("Stopping")
        stop.set()
        server.drain(DRAIN_SECONDS)
    server.close()
    return Exit.CONFIGURATION if problems else Exit.OK


def _offer(
    listeners: Sequence[Listener],
    config: Config,
    for_health: Mapping[str, Route],
    for_metrics: Mapping[str, Route],
) -> None:
    """Give each listener its routes."""
    if config.metrics == config.health:
        listeners[0].routes = {**for_health, **for_metrics}
    else:
        for listener, routes in zip(listeners, (for_health, for_metrics), strict=False):
            listener.routes = routes
    for listener in listeners:
        _logger.info("Serving", {"address": listener.address, "paths": " ".join(listener.routes)})


@contextmanager
def _stopped_by_signals(server: Server) -> Iterator[None]:
    _on_signals(server.stop)
    # Handlers run between bytecodes; the wakeup fd closes the race with a signal just before the server waits.
    signal.set_wakeup_fd(server.wake_up.fileno(), warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    yield
    signal.set_wakeup_fd(-1)


def _on_signals(*stops: Callable[[], None]) -> None:
    def handle(*_: object) -> None:
        for stop in stops:
            stop()

    for number in _SIGNALS:
        signal.signal(number, handle)


def _load_work(
    config: Config,
    bound: float,
    checks: Checks,
    metrics: "Callable[[], Metrics]",
    stop: Stop,
    history: History,
    names: deque[str],
) -> tuple[Callable[[], None], Callable[[], None], Callable[[], None]]:
    """Load what talks to the driver and what counts; return how to check whenever asked, to check once, to learn the name."""
    from livenessprobe.driver import Driver, way_to

    def learn(name: str) -> None:
        names.append(name)
        metrics().driver_name = name

    observers = [partial(_log_changes, history, stop)]
    call = way_to(config.csi_address, config.socket_path)
    if config.metrics is None:
        driver = Driver(config.csi_address, config.socket_path, call)
        naming = Naming(driver, config.probe_timeout, names.append)
    else:
        driver = Driver(config.csi_address, config.socket_path, call, metrics().call)
        naming = Naming(driver, config.probe_timeout, learn)
        observers.append(partial(_count, metrics()))
    observers.append(partial(_hear_of_driver, naming))
    patience = health.served(config.connection_timeout, config.probe_timeout)
    gc.freeze()  # what is loaded stays
    gc.enable()
    loaded = time.monotonic()
    waited_since = [bound]

    def check(asked: float) -> Verdict:
        # If the first check comes at once, its request may have waited since the listener was bound.
        at_once = waited_since and asked < loaded + _FIRST_MOMENT_SECONDS
        start = waited_since.pop() if at_once else asked
        # Don't count the loading time against the first check.
        start = max(start, time.monotonic() - max(0.0, patience.total - SHORTEST_CHECK_SECONDS))
        return health.check(driver.attempt, patience, start, time.monotonic, stop.wait)

    def interrupted(run: Callable[..., None]) -> None:
        with stop.interrupting(driver.close):
            run(check, *observers)

    return partial(interrupted, checks.run), partial(interrupted, checks.run_once), partial(naming.run, stop)


def _started(name: str, work: Callable[[], None]) -> bool:
    """Start a thread, or log why the system grants none."""
    try:
        threads.start(work)
    except threads.Denied as denied:
        _logger.warning("Going on without a thread", {"thread": name, "reason": str(denied)})
        return False
    return True


def _nothing() -> None:
    pass


def run_or_end(work: Callable[[], None], problems: list[str], end: Callable[[], None]) -> None:
    """Do a thread's work: a defect of ours ends the program, rather than leaving a server that never answers."""
    try:
        work()
    except Exception as error:
        problems.append(limits.denial(error) or repr(error))
        end()


def _load_metrics(probe_timeout: float) -> "Metrics":
    from livenessprobe.metrics import Metrics
    from livenessprobe.versions import grpcio

    return Metrics(grpcio(), probe_timeout)


def _count(metrics: "Metrics", checked: Checked) -> None:
    outcome = checked.verdict.outcome
    metrics.check(outcome is Outcome.HEALTHY, outcome.value, checked.verdict.reason, checked.answers)


def _hear_of_driver(naming: Naming, checked: Checked) -> None:
    if checked.verdict.outcome is not Outcome.UNREACHABLE:
        naming.reached()


def _log_changes(history: History, stop: Stop, checked: Checked) -> None:
    change = history.add(checked.verdict, checked.asked, time.monotonic())
    if change is not None and not stop.is_set():
        log_change(change)


def log_change(change: Change) -> None:
    """Write the line for a change."""
    values: dict[str, object] = {}
    if change.repeated or change.verdict.outcome is Outcome.HEALTHY:
        values = {"failures": change.failures, "lasted": f"{change.seconds:.1f}s"}
    if change.verdict.outcome is not Outcome.HEALTHY:
        _logger.error("CSI driver is not healthy", {"err": change.verdict.text, **values})
    elif change.failures:
        _logger.info("CSI driver is healthy again", values)
    else:
        _logger.info("CSI driver is healthy")
