"""metrics.py: the exposition, read by a real parser: of the class in this process, and of the program."""

from __future__ import annotations

import gzip
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

import peers
import program
import pytest
from prometheus_client.parser import text_string_to_metric_families

from livenessprobe import __version__
from livenessprobe.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from conftest import ProbeFactory
    from fake_driver import Behaviour, FakeDriver
    from prometheus_client.metrics_core import Metric

PROBE = "/csi.v1.Identity/Probe"
GET_PLUGIN_INFO = "/csi.v1.Identity/GetPluginInfo"
BUCKETS = "0.1 0.25 0.5 1 2.5 5 10 15 25 50 120 300 600".split()  # as Go writes them


class Series:
    """One exposition."""

    def __init__(self, text: str) -> None:
        self.families: dict[str, Metric] = {}
        for family in text_string_to_metric_families(text):
            assert family.name not in self.families
            self.families[family.name] = family
        self.names = {sample.name for family in self.families.values() for sample in family.samples}

    def samples(self, name: str) -> Iterator[tuple[dict[str, str], float]]:
        for family in self.families.values():
            for sample in family.samples:
                if sample.name == name:
                    yield sample.labels, sample.value

    def value(self, name: str, **labels: str) -> float | None:
        """The only sample that has these labels, perhaps among others; None if there is none."""
        found = [value for have, value in self.samples(name) if labels.items() <= have.items()]
        assert len(found) <= 1, found
        return found[0] if found else None

    def calls(self) -> dict[tuple[str, str, str], float]:
        return {
            (labels["driver_name"], labels["method_name"], labels["grpc_status_code"]): value
            for labels, value in self.samples("csi_sidecar_operations_seconds_count")
        }

    def checks(self) -> dict[tuple[str, str], float]:
        return {
            (labels["result"], labels["reason"]): value
            for labels, value in self.samples("csi_liveness_checks_total")
        }


def rendered(metrics: Metrics) -> Series:
    return Series(metrics.render().decode())


def scraped(probe: program.Probe, path: str = "/metrics", listener: int = 0) -> Series:
    answer = probe.get(path, listener=listener)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.headers["Content-Length"] == str(len(answer.body))
    return Series(answer.text)


# ---- the class


def test_calls_are_a_histogram_that_dashboards_know() -> None:
    metrics = Metrics("1.2.3", 3.0)
    metrics.call(PROBE, "OK", 0.3)
    metrics.driver_name = "some.csi.k8s.io"
    for seconds in (0.05, 0.1, 0.2, 700):
        metrics.call(PROBE, "OK", seconds)
    metrics.call(PROBE, "DeadlineExceeded", 3)
    series = rendered(metrics)

    family = series.families["csi_sidecar_operations_seconds"]
    assert family.type == "histogram"
    assert series.calls() == {
        ("unknown-driver", PROBE, "OK"): 1,
        ("some.csi.k8s.io", PROBE, "OK"): 4,
        ("some.csi.k8s.io", PROBE, "DeadlineExceeded"): 1,
    }
    labels = {"driver_name": "some.csi.k8s.io", "method_name": PROBE, "grpc_status_code": "OK"}
    assert series.value("csi_sidecar_operations_seconds_sum", **labels) == pytest.approx(700.35)
    buckets = [
        (have["le"], value)
        for have, value in series.samples("csi_sidecar_operations_seconds_bucket")
        if labels.items() <= have.items()
    ]
    assert buckets == [
        *((bound, 2.0 if bound == "0.1" else 3.0) for bound in BUCKETS),
        ("+Inf", 4.0),
    ]


def test_no_verdict_is_shown_before_there_is_one() -> None:
    series = rendered(Metrics("1.2.3", 3.0))

    assert "csi_liveness_up" not in series.names
    assert "csi_liveness_last_success_timestamp_seconds" not in series.names
    assert series.value("csi_liveness_consecutive_failures") == 0
    assert series.value("csi_liveness_checks_shared_total") == 0
    assert series.value("csi_liveness_changes_total") == 0
    assert series.checks() == {}


def test_checks() -> None:
    metrics = Metrics("1.2.3", 3.0)

    metrics.check(False, "unreachable", "connection refused", 1)
    metrics.check(False, "unreachable", "connection refused", 3)
    series = rendered(metrics)
    assert series.value("csi_liveness_up") == 0
    assert series.value("csi_liveness_last_success_timestamp_seconds") is None
    assert series.value("csi_liveness_consecutive_failures") == 2
    assert series.value("csi_liveness_checks_shared_total") == 2

    before = time.time()
    metrics.check(True, "healthy", "OK", 2)
    after = time.time()
    series = rendered(metrics)
    assert series.value("csi_liveness_up") == 1
    success = series.value("csi_liveness_last_success_timestamp_seconds")
    assert success is not None
    assert before <= success <= after
    assert series.value("csi_liveness_consecutive_failures") == 0
    assert series.value("csi_liveness_checks_shared_total") == 3

    metrics.check(False, "failed", "Internal", 1)
    series = rendered(metrics)
    assert series.value("csi_liveness_up") == 0
    assert series.value("csi_liveness_last_success_timestamp_seconds") == success
    assert series.value("csi_liveness_consecutive_failures") == 1
    assert series.checks() == {
        ("unreachable", "connection refused"): 2,
        ("healthy", "OK"): 1,
        ("failed", "Internal"): 1,
    }


def test_changes_are_counted_one_by_one() -> None:
    metrics = Metrics("1.2.3", 3.0)
    seen = []
    for healthy in (False, False, True, True, False, True):
        metrics.check(healthy, "healthy" if healthy else "failed", "OK" if healthy else "Internal", 1)
        seen.append(rendered(metrics).value("csi_liveness_changes_total"))

    # The first verdict is not a change.
    assert seen == [0, 0, 1, 1, 2, 3]


def test_the_driver_has_one_name_at_a_time() -> None:
    metrics = Metrics("1.2.3", 3.0)
    seen: list[tuple[dict[str, str], float]] = []
    for name in ("some.csi.k8s.io", "other.csi.k8s.io"):
        seen += rendered(metrics).samples("csi_liveness_driver_info")
        metrics.driver_name = name
    seen += rendered(metrics).samples("csi_liveness_driver_info")

    names = ("unknown-driver", "some.csi.k8s.io", "other.csi.k8s.io")
    assert seen == [({"driver_name": name}, 1.0) for name in names]
    assert metrics.driver_name == "other.csi.k8s.io"


def test_only_the_last_names_keep_their_series() -> None:
    """A driver may get another name at each start, for months."""
    metrics = Metrics("1.2.3", 3.0)
    for number in range(100):
        metrics.driver_name = f"driver-{number}.csi.k8s.io"
        metrics.call(PROBE, "OK", 0.1)
        metrics.call(PROBE, "Internal", 0.1)
    metrics.driver_name = "driver-95.csi.k8s.io"  # again
    metrics.driver_name = "driver-100.csi.k8s.io"

    names = {name for name, *_ in rendered(metrics).calls()}
    assert names == {f"driver-{number}.csi.k8s.io" for number in (93, 94, 95, 96, 97, 98, 99)}


def test_what_was_counted_is_rendered_at_once_and_nothing_twice() -> None:
    metrics = Metrics("1.2.3", 3.0)
    for count in range(1, 4):
        metrics.check(True, "healthy", "OK", 1)
        text = metrics.render()
        assert Series(text.decode()).checks() == {("healthy", "OK"): count}
        assert metrics.render() is text
    metrics.call(PROBE, "OK", 0.1)
    assert rendered(metrics).calls() == {("unknown-driver", PROBE, "OK"): 1}
    metrics.driver_name = "some.csi.k8s.io"
    ((labels, _),) = rendered(metrics).samples("csi_liveness_driver_info")
    assert labels == {"driver_name": "some.csi.k8s.io"}


def test_what_the_process_uses_is_a_second_old_at_most() -> None:
    now = [1000.0]
    metrics = Metrics("1.2.3", 3.0, clock=lambda: now[0])
    text = metrics.render()
    now[0] += 0.99
    assert metrics.render() is text
    now[0] = 1001.0
    later = metrics.render()
    assert later is not text
    now[0] = 1001.99
    assert metrics.render() is later


def test_what_is_counted_while_it_is_rendered_is_in_the_next_rendering() -> None:
    metrics = Metrics("1.2.3", 3.0)

    class Meanwhile:
        counted = False

        def collect(self) -> Iterator[Metric]:
            if not self.counted:
                self.counted = True
                metrics.check(True, "healthy", "OK", 1)
            yield from ()

    meanwhile = Meanwhile()
    metrics._registry.register(meanwhile)
    assert rendered(metrics).checks() == {}
    assert rendered(metrics).checks() == {("healthy", "OK"): 1}


def test_what_is_shown_and_what_for() -> None:
    metrics = Metrics("1.2.3", 3.0)
    metrics.check(True, "healthy", "OK", 1)
    metrics.call(PROBE, "OK", 0.1)
    series = rendered(metrics)

    assert "process_start_time_seconds" in series.names
    assert not [name for name in series.names if name.endswith("_created")]
    assert series.value("csi_liveness_probe_timeout_seconds") == 3
    assert {
        name: family.documentation
        for name, family in series.families.items()
        if not name.startswith("process_")
    } == {
        "csi_sidecar_operations_seconds": "Duration of gRPC calls to the CSI driver, by driver, method and resulting code.",
        "csi_liveness_up": "Whether the last check found the driver healthy (1) or not (0).",
        "csi_liveness_last_success_timestamp_seconds": "When a check last found the driver healthy, Unix time.",
        "csi_liveness_consecutive_failures": "Checks since the driver was last found healthy.",
        "csi_liveness_changes": "Times a check found the driver healthy when the one before had not, or the other way round.",
        "csi_liveness_checks": "Checks by result (healthy, not_ready, failed, unreachable) and reason (a gRPC code, or the system's words).",
        "csi_liveness_checks_shared": "Requests answered with the verdict of a check that another request had begun.",
        "csi_liveness_probe_timeout_seconds": "The longest one check may take.",
        "csi_liveness_driver_info": "Always 1; the label is the driver's name, unknown-driver until it is known.",
        "csi_liveness_build_info": "Always 1; the labels are versions.",
    }


@pytest.mark.parametrize("name", ["10.0", 'le="10.0"', 'x",le="10.0'])
def test_a_name_that_looks_like_a_bucket_is_shown_as_it_is(name: str) -> None:
    metrics = Metrics("1.2.3", 3.0)
    metrics.driver_name = name
    metrics.call(PROBE, name, 0.1)

    assert rendered(metrics).calls() == {(name, PROBE, name): 1}


def test_build() -> None:
    assert list(rendered(Metrics("1.2.3", 3.0)).samples("csi_liveness_build_info")) == [
        (
            {
                "version": __version__,
                "python_version": platform.python_version(),
                "grpcio_version": "1.2.3",
            },
            1.0,
        )
    ]


def test_two_never_share_a_registry() -> None:
    one, other = Metrics("1.2.3", 3.0), Metrics("1.2.3", 3.0)
    one.check(True, "healthy", "OK", 1)

    assert "csi_liveness_up" not in rendered(other).names


def test_a_drivers_name_cannot_forge_a_series() -> None:
    metrics = Metrics("1.2.3", 3.0)
    metrics.driver_name = name = 'x"} 1\ncsi_liveness_up 1\n\\'
    metrics.call(PROBE, "OK", 0.1)
    series = rendered(metrics)

    assert series.calls() == {(name, PROBE, "OK"): 1}
    assert list(series.samples("csi_liveness_driver_info")) == [({"driver_name": name}, 1.0)]
    assert "csi_liveness_up" not in series.names


# ---- the program


@program.BOTH
def test_for_a_scraper_that_takes_gzip_it_is_the_same_packed(
    driver: FakeDriver, probe: program.Probe, command: Sequence[str]
) -> None:
    probe.wait_for_log("Learnt the CSI driver's name")
    assert probe.get().status == 200
    plain = scraped(probe)

    # As Prometheus 3 asks.
    answer = probe.get("/metrics", headers={"Accept": "*/*", "Accept-Encoding": "gzip"})

    assert answer.headers["Content-Encoding"] == "gzip"
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.headers["Content-Length"] == str(len(answer.body))
    packed = Series(gzip.decompress(answer.body).decode())
    assert (packed.names, packed.calls(), packed.checks()) == (plain.names, plain.calls(), plain.checks())
    assert probe.get(headers={"Accept-Encoding": "gzip"}).body == b"ok"


@program.BOTH
def test_a_series_of_checks(driver: FakeDriver, probe: program.Probe, command: Sequence[str]) -> None:
    started = time.time()
    series = scraped(probe)
    assert "csi_liveness_up" not in series.names
    # The name is asked at the start, without waiting for a request.
    probe.wait_for_log('"Learnt the CSI driver\'s name" driver="fake.csi.k8s.io"')

    behaviours: list[tuple[Behaviour, int]] = [("ready", 3), ("not-ready", 2), ("error", 4)]
    for behaviour, times in behaviours:
        driver.set(behaviour, code="DATA_LOSS")
        for _ in range(times):
            probe.get()
    series = scraped(probe)
    assert series.calls() == {
        ("unknown-driver", GET_PLUGIN_INFO, "OK"): 1,
        ("fake.csi.k8s.io", PROBE, "OK"): 5,
        ("fake.csi.k8s.io", PROBE, "DataLoss"): 4,
    }
    assert series.value("csi_liveness_up") == 0
    assert series.value("csi_liveness_consecutive_failures") == 6
    assert series.value("csi_liveness_changes_total") == 1
    assert series.value("csi_liveness_probe_timeout_seconds") == 3
    assert series.value("csi_liveness_driver_info", driver_name="fake.csi.k8s.io") == 1
    success = series.value("csi_liveness_last_success_timestamp_seconds")
    assert success is not None
    assert started - 1 < success < time.time() + 1

    driver.stop()
    with peers.regular_file(Path(driver.target)):
        probe.get()
    driver.set("unset")
    driver.start()
    probe.get("/livez")
    series = scraped(probe)
    assert series.checks() == {
        ("healthy", "OK"): 4,
        ("not_ready", "not ready"): 2,
        ("failed", "DataLoss"): 4,
        ("unreachable", "not a socket"): 1,
    }
    # Without a connection there was no call.
    probes = {key: value for key, value in series.calls().items() if key[1] == PROBE}
    assert probes == {
        ("fake.csi.k8s.io", PROBE, "OK"): 6,
        ("fake.csi.k8s.io", PROBE, "DataLoss"): 4,
    }
    assert series.value("csi_liveness_up") == 1
    assert series.value("csi_liveness_consecutive_failures") == 0
    assert series.value("csi_liveness_checks_shared_total") == 0
    (build,) = series.samples("csi_liveness_build_info")
    version = program.run_once(["--version"], command=command).stdout
    assert version == "livenessprobe {version} (Python {python_version}, grpcio {grpcio_version})\n".format(
        **build[0]
    )
    start = series.value("process_start_time_seconds")
    assert start is not None
    assert started - 60 < start < started + 1
    assert not [name for name in series.names if name.endswith("_created")]


def test_the_name_is_learnt_late_and_anew(
    driver: FakeDriver, probe_factory: ProbeFactory, socket_path: Path
) -> None:
    driver.set("error", method="GetPluginInfo", message="not yet")
    probe = probe_factory(
        f"--csi-address={socket_path}", "--http-endpoint=127.0.0.1:0", "--probe-timeout=20s"
    )
    assert probe.get().status == 200
    probe.wait_for_log("Cannot learn the CSI driver's name.*not yet")
    assert scraped(probe).calls()["unknown-driver", PROBE, "OK"] == 1

    driver.set("name", name="late.csi.k8s.io")
    probe.wait_for_log('driver="late.csi.k8s.io"')
    assert probe.get().status == 200
    assert scraped(probe).calls()["late.csi.k8s.io", PROBE, "OK"] == 1

    driver.unlink()
    with type(driver)(socket_path, name="other.csi.k8s.io"):
        assert probe.get().status == 200
        probe.wait_for_log('driver="other.csi.k8s.io"')
        assert probe.get().status == 200
        calls = scraped(probe).calls()
    assert calls["other.csi.k8s.io", PROBE, "OK"] == 1
    assert calls["late.csi.k8s.io", PROBE, "OK"] == 2


def test_waiting_requests_are_counted_as_sharing(driver: FakeDriver, probe: program.Probe) -> None:
    driver.set("hang")
    clients = [probe.connect() for _ in range(10)]
    for client in clients:
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
    driver.wait(probing=1)
    probe.catch_up()
    driver.set("unset")
    for client in clients:
        assert client.recv(65536).endswith(b"ok")
        client.close()

    series = scraped(probe)
    assert series.value("csi_liveness_checks_shared_total") == 9
    assert series.checks() == {("healthy", "OK"): 1}


def modules(probe: program.Probe) -> set[str]:
    """Names that a process started with -X importtime has imported so far."""
    return {line.rpartition("|")[2].strip() for line in probe.log_lines if line.startswith("import time:")}


@pytest.mark.parametrize(
    ("args", "status", "imported"),
    [
        (["--health-port={port}"], 404, False),
        (["--http-endpoint=127.0.0.1:0"], 200, True),
        (["--http-endpoint=127.0.0.1:0", "--metrics-path=/other"], 404, True),
        (["--health-port={port}", "--metrics-address=127.0.0.1:0"], 404, True),
    ],
)
@pytest.mark.parametrize(
    "command", [(*program.MODULE[:1], "-X", "importtime", *program.MODULE[1:])], indirect=True
)
def test_served_and_imported_only_where_asked_for(
    driver: FakeDriver, probe_factory: ProbeFactory, args: Sequence[str], status: int, imported: bool
) -> None:
    port = program.free_port()
    probe = probe_factory(
        f"--csi-address={driver.target}",
        *(arg.format(port=port) for arg in args),
        listeners=1 + any("metrics-address" in arg for arg in args),
    )
    assert probe.get().status == 200
    assert probe.get("/metrics").status == status
    probe.wait_for_log("Learnt the CSI driver's name")
    assert ("prometheus_client" in modules(probe)) == imported
    if "--metrics-path=/other" in args:
        assert scraped(probe, "/other").value("csi_liveness_up") == 1


def test_a_server_of_its_own(driver: FakeDriver, probe_factory: ProbeFactory) -> None:
    probe = probe_factory(
        f"--csi-address={driver.target}",
        f"--health-port={program.free_port()}",
        "--metrics-address=127.0.0.1:0",
        listeners=2,
    )
    assert probe.get().status == 200
    assert scraped(probe, listener=1).value("csi_liveness_up") == 1
    for path in ("/healthz", "/livez", "/readyz"):
        assert probe.get(path, listener=1).status == 404
    assert probe.get("/metrics").status == 404
