"""Wiring and lifecycle of the server: serve(config) returns an exit code. Decisions are health's, effects are here."""

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from http import HTTPStatus
from typing import TYPE_CHECKING

from livenessprobe import health
from livenessprobe.config import Config, ConfigError, Endpoint, Exit
from livenessprobe.driver_name import Naming
from livenessprobe.exchange import Reply, Response, Route
from livenessprobe.health import Change, Checked, Checks, History, Outcome, Verdict
from livenessprobe.quoting import printable
from livenessprobe.resolving import Interrupted
from livenessprobe.web import Listener, Server

# grpc and prometheus_client cost time and memory: loaded after binding, and only where needed.
if TYPE_CHECKING:
    from livenessprobe.driver import Driver
    from livenessprobe.metrics import Metrics

DRAIN_SECONDS = 0.5
SHORTEST_CHECK_SECONDS = 0.1

_logger = logging.getLogger(__name__)


def serve(config: Config) -> Exit:
    """Serve health (and metrics) until SIGTERM or SIGINT; raises ConfigError where it cannot listen."""
    service = Service(config)
    try:
        server = Server(*service.listen())
    except Interrupted:
        _logger.info("Stopping")
        return Exit.OK
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        signal.signal(number, lambda *_: server.stop())
    # A handler runs when the server is awake, and a signal that comes just before it waits does not end the wait.
    signal.set_wakeup_fd(server.wake_up.fileno(), warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    service.start(server.stop)
    server.run()
    _logger.info("Stopping")
    service.close()
    server.drain(DRAIN_SECONDS)
    signal.set_wakeup_fd(-1)
    server.close()
    return service.exit


class Service:
    """One driver's checks, their log and metrics, and the routes that offer them."""

    def __init__(self, config: Config) -> None:
        self.exit = Exit.OK
        self._config = config
        self._patience = health.served(config.connection_timeout, config.probe_timeout)
        self._stopping = threading.Event()
        self._history = History()
        observers = (self._log, self._count, self._hear_of_driver)
        self._checks = Checks(self._check, time.monotonic, *observers, rest=self._rest)
        self._driver: Driver | None = None
        self._naming: Naming | None = None
        self._metrics: Metrics | None = None
        self._metrics_start = threading.Lock()
        self._early_scrapes: list[Reply] = []
        self._end: Callable[[], None] = lambda: None

    def listen(self) -> list[Listener]:
        """Bind every address; raises ConfigError that names the flag."""
        routes: dict[str, Route] = {
            "/healthz": self._health_route(Outcome.HEALTHY),
            "/livez": self._health_route(Outcome.HEALTHY, Outcome.NOT_READY),
            "/readyz": self._health_route(Outcome.HEALTHY),
        }
        metrics_routes: dict[str, Route] = {self._config.metrics_path: self._metrics_route}
        if self._config.metrics == self._config.health:
            listeners = [_listener(self._config.health, routes | metrics_routes)]
        else:
            listeners = [_listener(self._config.health, routes)]
            if self._config.metrics is not None:
                listeners.append(_listener(self._config.metrics, metrics_routes))
        for listener in listeners:
            _logger.info("Serving", {"address": listener.address, "paths": " ".join(listener.routes)})
        return listeners

    def start(self, end: Callable[[], None]) -> None:
        """Begin to check on a thread of its own; end is called where that cannot go on."""
        self._end = end
        threading.Thread(target=self._run, name="checks", daemon=True).start()

    def close(self) -> None:
        """End the check in flight, and let no new one begin."""
        self._stopping.set()
        self._checks.close()
        if self._naming is not None:
            self._naming.close()
        if self._driver is not None:
            self._driver.close()

    def _run(self) -> None:
        try:
            from livenessprobe.driver import GRPC_VERSION, Driver

            if self._config.metrics is not None:
                self._start_metrics(GRPC_VERSION)
            self._driver = Driver(self._config.csi_address, self._config.socket_path, self._count_call)
            self._naming = Naming(self._driver, self._config.probe_timeout, self._set_name)
            if self._stopping.is_set():  # close() came too early to see them
                self.close()
            threading.Thread(target=self._naming.run, name="naming", daemon=True).start()
            self._checks.run()
        except Exception as error:
            self._fail(repr(error))

    def _fail(self, problem: str) -> None:
        _logger.critical("Cannot check", {"err": problem})
        self.exit = Exit.CONFIGURATION
        self._end()

    def _check(self, asked: float) -> Verdict:
        assert self._driver is not None
        # The first request may have waited for grpc to load; whatever that took, a check must be given a chance.
        start = max(asked, time.monotonic() - max(0.0, self._patience.total - SHORTEST_CHECK_SECONDS))
        pause = self._stopping.wait
        attempt = partial(self._driver.attempt, keep=self._checks.in_burst)
        return health.check(attempt, self._patience, start, time.monotonic, pause)

    def _rest(self) -> None:
        assert self._driver is not None
        self._driver.rest()

    def _health_route(self, *good: Outcome) -> Route:
        def route(reply: Reply) -> None:
            def answer(verdict: Verdict) -> None:
                reply(_response(verdict, verdict.outcome in good))

            self._checks.ask(answer)
            # grpc keeps no deadline where the system denies it a thread, nor ever after: only a new process does.
            if self.exit is Exit.OK and self._driver and self._checks.hangs(self._patience.total):
                self._fail("the check in flight does not end")

        return route

    def _start_metrics(self, grpc_version: str) -> None:
        from livenessprobe.metrics import Metrics

        metrics = Metrics(grpc_version, self._config.probe_timeout)
        with self._metrics_start:
            self._metrics = metrics
        for reply in self._early_scrapes:
            _answer_scrape(metrics, reply)

    def _metrics_route(self, reply: Reply) -> None:
        with self._metrics_start:
            metrics = self._metrics
            if metrics is None:
                self._early_scrapes.append(reply)
                return
        _answer_scrape(metrics, reply)

    def _set_name(self, name: str) -> None:
        if self._metrics is not None:
            self._metrics.driver_name = name

    def _count_call(self, method: str, code: str, seconds: float) -> None:
        if self._metrics is not None:
            self._metrics.call(method, code, seconds)

    def _count(self, checked: Checked) -> None:
        if self._metrics is not None:
            outcome = checked.verdict.outcome
            self._metrics.check(
                outcome is Outcome.HEALTHY, outcome.value, checked.verdict.reason, checked.answers
            )

    def _hear_of_driver(self, checked: Checked) -> None:
        if self._naming is not None and checked.verdict.outcome is not Outcome.UNREACHABLE:
            self._naming.reached()

    def _log(self, checked: Checked) -> None:
        change = self._history.add(checked.verdict, checked.asked, time.monotonic())
        if change is not None and not self._stopping.is_set():
            log_change(change)


@lru_cache(maxsize=2)
def _response(verdict: Verdict, good: bool) -> Response:
    """Put a verdict into bytes, once for all who wait for it: hundreds can, and its text can be long."""
    status = HTTPStatus.OK if good else HTTPStatus.INTERNAL_SERVER_ERROR
    return Response(status, printable(verdict.text).encode())


def log_change(change: Change) -> None:
    """Write the line that a change is worth."""
    values: dict[str, object] = {}
    if change.repeated or change.verdict.outcome is Outcome.HEALTHY:
        values = {"failures": change.failures, "lasted": f"{change.seconds:.1f}s"}
    if change.verdict.outcome is not Outcome.HEALTHY:
        _logger.error("CSI driver is not healthy", {"err": change.verdict.text, **values})
    elif change.failures:
        _logger.info("CSI driver is healthy again", values)
    else:
        _logger.info("CSI driver is healthy")


def _answer_scrape(metrics: "Metrics", reply: Reply) -> None:
    reply(Response(HTTPStatus.OK, metrics.render(), metrics.content_type))


def _listener(endpoint: Endpoint, routes: Mapping[str, Route]) -> Listener:
    try:
        return Listener(endpoint.host, endpoint.port, routes)
    except socket.gaierror as error:
        raise ConfigError(
            endpoint.flag, endpoint.value, f"cannot resolve the host: {str(error.strerror).lower()}"
        ) from None
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise ConfigError(endpoint.flag, endpoint.value, f"cannot listen: {reason}") from None
