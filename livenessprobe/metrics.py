"""What is measured, in Prometheus' terms, on a registry of our own. The only importer of prometheus_client."""

import re
import sys
import threading
import time
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from livenessprobe import __version__

UNKNOWN_DRIVER = "unknown-driver"

_MOST_DRIVERS = 8  # whose series are kept: a driver that changes its name each time must not fill the memory
_FRESH_SECONDS = 1.0  # how long a rendering is used, unless something is counted: a storm of scrapes is cheap

# Seconds; the buckets that dashboards made for the CSI sidecars rely on.
_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 25, 50, 120, 300, 600)


class Metrics:
    """All series of one process. Methods may be called from any thread."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(
        self, grpc_version: str, probe_timeout: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Take what does not change while the process runs; probe_timeout is in seconds."""
        self._clock = clock
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._operations = Histogram(
            "csi_sidecar_operations_seconds",
            "Duration of gRPC calls to the CSI driver, by driver, method and resulting code.",
            ("driver_name", "method_name", "grpc_status_code"),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        # Registered with the first verdict: before it, 0 would be a lie.
        self._up = Gauge(
            "csi_liveness_up",
            "Whether the last check found the driver healthy (1) or not (0).",
            registry=None,
        )
        self._last_success = Gauge(
            "csi_liveness_last_success_timestamp_seconds",
            "When a check last found the driver healthy, Unix time.",
            registry=None,
        )
        self._failures = Gauge(
            "csi_liveness_consecutive_failures",
            "Checks since the driver was last found healthy.",
            registry=self._registry,
        )
        self._changes = Counter(
            "csi_liveness_changes_total",
            "Times a check found the driver healthy when the one before had not, or the other way round.",
            registry=self._registry,
        )
        self._checks = Counter(
            "csi_liveness_checks_total",
            "Checks by result (healthy, not_ready, failed, unreachable) and reason (a gRPC code, or the system's words).",
            ("result", "reason"),
            registry=self._registry,
        )
        self._shared = Counter(
            "csi_liveness_checks_shared_total",
            "Requests answered with the verdict of a check that another request had begun.",
            registry=self._registry,
        )
        Gauge(
            "csi_liveness_probe_timeout_seconds", "The longest one check may take.", registry=self._registry
        ).set(probe_timeout)
        # The other csi_liveness series have no label for the name: they go on when it is learnt. Join them with this.
        self._driver = Info(
            "csi_liveness_driver",
            "Always 1; the label is the driver's name, unknown-driver until it is known.",
            registry=self._registry,
        )
        self._drivers: list[str] = []
        self._rendering = threading.Lock()
        self._rendered: bytes
        self._rendered_at: float
        self.driver_name = UNKNOWN_DRIVER
        names = ("version", "python_version", "grpcio_version")
        build = Gauge(
            "csi_liveness_build_info", "Always 1; the labels are versions.", names, registry=self._registry
        )
        build.labels(__version__, sys.version.split()[0], grpc_version).set(1)
        self._seen: set[Gauge] = set()
        self._healthy: bool | None = None

    @property
    def driver_name(self) -> str:
        """The driver's name once it is known; a label of the calls from then on."""
        return self._driver_name

    @driver_name.setter
    def driver_name(self, name: str) -> None:
        self._driver_name = name
        self._driver.info({"driver_name": name})
        drivers = [*(other for other in self._drivers if other != name), name]
        for forgotten in drivers[:-_MOST_DRIVERS]:
            self._operations.remove_by_labels({"driver_name": forgotten})
        self._drivers = drivers[-_MOST_DRIVERS:]
        self._stale = True

    def call(self, method: str, code: str, seconds: float) -> None:
        """Count a gRPC call: its full method name, its code named as in Go, and how long it took."""
        self._operations.labels(self.driver_name, method, code).observe(seconds)
        self._stale = True

    def check(self, healthy: bool, result: str, reason: str, answers: int) -> None:
        """Count a check and the requests that shared it; reason must be one of few."""
        self._checks.labels(result, reason).inc()
        self._shared.inc(answers - 1)
        self._show(self._up, float(healthy))
        if self._healthy not in (None, healthy):
            self._changes.inc()
        self._healthy = healthy
        if healthy:
            self._failures.set(0)
            self._show(self._last_success, time.time())
        else:
            self._failures.inc()
        self._stale = True

    def render(self) -> bytes:
        """Return all series in Prometheus' text format, as content_type says.

        What the process itself uses may be a second old; everything that was counted is there.
        """
        with self._rendering:
            now = self._clock()
            if self._stale or now - self._rendered_at >= _FRESH_SECONDS:
                self._stale = False  # first, since whatever is counted meanwhile makes it stale again
                # Go writes the buckets' bounds as 1 and 10, and queries name them so; the library as 1.0 and 10.0.
                self._rendered = re.sub(rb'(?<=le=")(\d+)\.0(?=")', rb"\1", generate_latest(self._registry))
                self._rendered_at = now
            return self._rendered

    def _show(self, gauge: Gauge, value: float) -> None:
        gauge.set(value)
        if gauge not in self._seen:
            self._seen.add(gauge)
            self._registry.register(gauge)
