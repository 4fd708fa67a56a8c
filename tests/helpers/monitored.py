"""A real Prometheus, set up as deploy/prometheus/ says, over pods of real drivers and sidecars.

A minute lasts a second here: `hurried` divides every duration in the files by 60. The only other change is where the
pods come from: Debian's Prometheus is built without Kubernetes discovery, so a file gives the labels.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any

import program
import yaml
from fake_driver import FakeDriver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

DEPLOYED = program.ROOT / "deploy" / "prometheus"
KUBERNETES = (DEPLOYED / "kubernetes.yml").read_text()
KUBELETS_PERIOD = 10 / 60
_MILLISECONDS = {"s": 1_000, "m": 60_000, "h": 3_600_000}


def missing() -> str:
    """Why there is no Prometheus to test with; empty if there is one."""
    absent = [command for command in ("prometheus", "promtool") if not shutil.which(command)]
    return f"there is no {absent[0]} here: apt-get install prometheus" if absent else ""


def hurried(text: str) -> str:
    """A configuration or rules with every duration divided by 60; names such as rate5m stay."""
    return re.sub(
        r"\b(\d+)([smh])\b", lambda found: f"{int(found[1]) * _MILLISECONDS[found[2]] // 60}ms", text
    )


def discovered_by_file(config: str, targets: Path) -> str:
    """The configuration for Kubernetes with a file instead of its API: the same targets with the same labels."""
    read: dict[str, Any] = yaml.safe_load(config)
    (job,) = read["scrape_configs"]
    (discovery,) = job.pop("kubernetes_sd_configs")
    assert discovery["role"] == "pod"
    return yaml.safe_dump(read | {"scrape_configs": [job | {"file_sd_configs": [{"files": [str(targets)]}]}]})


def rendered(monitor: str) -> str:
    """The configuration that prometheus-operator renders from a PodMonitor for all namespaces.

    Its own relabelling comes first: pods that ended are dropped, the port is kept by its name, and namespace, container,
    pod, job (the PodMonitor's name) and endpoint become labels. Then comes the PodMonitor's.
    """
    read: dict[str, Any] = yaml.safe_load(monitor)
    (endpoint,) = read["spec"]["podMetricsEndpoints"]
    assert read["spec"]["namespaceSelector"] == {"any": True}
    assert read["spec"]["selector"] == {}
    meta = "__meta_kubernetes_"
    relabel = [
        {"source_labels": ["job"], "target_label": "__tmp_prometheus_job_name"},
        {"source_labels": [f"{meta}pod_phase"], "regex": "(Failed|Succeeded)", "action": "drop"},
        {"source_labels": [f"{meta}pod_container_port_name"], "regex": endpoint["port"], "action": "keep"},
        {"source_labels": [f"{meta}namespace"], "target_label": "namespace"},
        {"source_labels": [f"{meta}pod_container_name"], "target_label": "container"},
        {"source_labels": [f"{meta}pod_name"], "target_label": "pod"},
        {"target_label": "job", "replacement": "{namespace}/{name}".format(**read["metadata"])},
        {"target_label": "endpoint", "replacement": endpoint["port"]},
    ]
    names = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
    relabel += [
        {names.get(key, key): value for key, value in rule.items()}
        for rule in endpoint.get("relabelings", ())
    ]
    job = {
        "job_name": "podMonitor/{namespace}/{name}/0".format(**read["metadata"]),
        "honor_labels": False,
        "scrape_interval": endpoint["interval"],
        "kubernetes_sd_configs": [{"role": "pod"}],
        "relabel_configs": relabel,
    }
    settings = {"evaluation_interval": "30s", "scrape_interval": "30s"}
    return yaml.safe_dump({"global": settings, "rule_files": ["rules.yml"], "scrape_configs": [job]})


class Prometheus:
    """`with Prometheus(config, rules, folder) as prometheus: …`, each a text."""

    def __init__(self, config: str, rules: str, folder: Path) -> None:
        self._folder = folder
        (folder / "prometheus.yml").write_text(config)
        (folder / "rules.yml").write_text(rules)
        self.url = f"http://127.0.0.1:{program.free_port()}"

    def __enter__(self) -> Prometheus:
        command = [
            "prometheus",
            f"--config.file={self._folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
            "--scrape.discovery-reload-interval=100ms",
        ]
        self._log = (self._folder / "prometheus.log").open("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        try:
            self.wait(self._is_ready, "it is ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def api(self, path: str, **parameters: str | float) -> Any:
        """The data in its HTTP API's answer; an error is raised in its words."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The samples of an instant vector, each with its labels."""
        data = self.api("query", query=expression)
        assert data["resultType"] == "vector"
        return [(one["metric"], float(one["value"][1])) for one in data["result"]]

    def firing(self, alert: str, **labels: str) -> list[dict[str, Any]]:
        """The alerts with this name and these labels that are firing now."""
        return [
            one
            for one in self.api("alerts")["alerts"]
            if one["state"] == "firing" and {"alertname": alert, **labels}.items() <= one["labels"].items()
        ]

    def wait(self, true: Callable[[], object], what: str, timeout: float = 60.0) -> None:
        # Asks again and again: Prometheus reports what it found only to an Alertmanager.
        end = time.monotonic() + timeout
        while not true():
            if time.monotonic() > end or self._process.poll() is not None:
                self._log.seek(0)
                raise AssertionError(f"not seen: {what}; Prometheus logged:\n{self._log.read()[-4000:]}")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/-/ready", timeout=10):
            return True
        return False


class Pod:
    """A driver, the sidecar beside it, and a kubelet that asks it; `before` each request, something is done to the driver."""

    def __init__(
        self,
        name: str,
        folder: Path,
        probe_timeout: str = "5s",
        before: Callable[[FakeDriver], None] = lambda driver: None,
        driver_name: str = "",
        controller_kind: str = "DaemonSet",
    ) -> None:
        self.name = name
        self.controller_kind = controller_kind
        self.driver = FakeDriver(folder / f"{name}.sock", name=driver_name or f"{name}.csi.k8s.io")
        self._flags = [f"--csi-address={self.driver.target}", f"--probe-timeout={probe_timeout}"]
        self._before = before
        self._ends = contextlib.ExitStack()
        self._quiet = threading.Event()

    def __enter__(self) -> Pod:
        with self._ends:
            self._ends.enter_context(self.driver)
            self.probe = self._ends.enter_context(
                program.Probe([*self._flags, "--http-endpoint=127.0.0.1:0"])
            )
            # Its metrics have the name from the first scrape on: learning a name is tried elsewhere.
            self.probe.wait_for_log("Learnt the CSI driver's name", timeout=60)
            self._ends = self._ends.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def ask(self) -> None:
        """Begin to ask, as the kubelet does, until the end or `quiet()`."""
        asking = threading.Thread(target=self._ask, daemon=True)
        asking.start()
        self._ends.callback(asking.join)
        self._ends.callback(self._quiet.set)

    def quiet(self) -> None:
        self._quiet.set()

    def target(self) -> dict[str, Any]:
        """What Kubernetes discovery says about it."""
        address = "{}:{}".format(*self.probe.address())
        return target(self.name, address, controller_kind=self.controller_kind)

    def _ask(self) -> None:
        while not self._quiet.wait(KUBELETS_PERIOD):
            self._before(self.driver)
            self.probe.get()


def target(
    pod: str,
    address: str,
    port_name: str = "csi-liveness",
    phase: str = "Running",
    controller_kind: str = "DaemonSet",
) -> dict[str, Any]:
    """What Kubernetes discovery says about one port of a pod."""
    labels = {
        "namespace": "storage",
        "pod_name": f"csi-{pod}",
        "pod_node_name": f"node-{pod}",
        "pod_phase": phase,
        "pod_container_name": "driver",
        "pod_container_port_name": port_name,
        "pod_controller_kind": controller_kind,
    }
    return {
        "targets": [address],
        "labels": {f"__meta_kubernetes_{name}": value for name, value in labels.items()},
    }


class Cluster:
    """Some pods and the Prometheus that discovers them; `others` are targets that no pod here stands for."""

    def __init__(
        self,
        folder: Path,
        pods: Mapping[str, Pod],
        others: Iterable[dict[str, Any]] = (),
        config: str = KUBERNETES,
    ) -> None:
        self.pods = pods
        self._others = list(others)
        self._targets = folder / "targets.json"
        config = discovered_by_file(config, self._targets)
        self.prometheus = Prometheus(hurried(config), hurried((DEPLOYED / "rules.yml").read_text()), folder)
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> Cluster:
        with self._ends:
            for pod in self.pods.values():
                self._ends.enter_context(pod)
            targets = [pod.target() for pod in self.pods.values()]
            self._targets.write_text(json.dumps([*targets, *self._others]))
            self._ends.enter_context(self.prometheus)
            self._ends = self._ends.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()
