"""deploy/prometheus and deploy/grafana: by promtool, and beside real drivers in a real Prometheus."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import monitored
import program
import pytest
import yaml
from monitored import DEPLOYED, Cluster, Pod, Prometheus, hurried, target
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fake_driver import FakeDriver

OPERATOR = DEPLOYED / "operator"
RULES = yaml.safe_load((DEPLOYED / "rules.yml").read_text())["groups"]
ALERTS = {rule["alert"]: rule for group in RULES for rule in group["rules"] if "alert" in rule}
RECORDS = {rule["record"]: rule for group in RULES for rule in group["rules"] if "record" in rule}
RUNBOOK = (program.ROOT / "docs" / "runbook.md").read_text()
DASHBOARD = json.loads((program.ROOT / "deploy" / "grafana" / "dashboard.json").read_text())
QUERIES = [
    (f"{panel['title']} {target['refId']}", target["expr"])
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
]
RATE_INTERVAL = "2s"  # as in Grafana: four times the scrape interval


def promtool(*arguments: str | Path) -> str:
    """Its output; it must not fail."""
    if reason := monitored.missing():
        pytest.skip(reason)
    done = subprocess.run(["promtool", *arguments], capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def expanded(expression: str, **chosen: str) -> str:
    """A query of the dashboard with its variables replaced: those chosen by their values, the others by All."""
    expression = expression.replace("$__rate_interval", RATE_INTERVAL)
    for variable in ("driver_name", "namespace", "pod"):
        expression = expression.replace(f"${variable}", chosen.get(variable, ".*"))
    return expression


def metrics_in(expression: str) -> set[str]:
    """The names of the series that a query asks for."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^]]*\]', "", re.sub(r'"[^"]*"', '""', expression))
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right) *\([^)]*\)", "", bare)
    names = set(re.findall(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()", bare))
    return names - {"and", "bool", "by", "offset", "or", "unless"}


# ---- the files by themselves


@pytest.mark.parametrize("name", ["kubernetes.yml", "static.yml"])
def test_configurations_are_valid(name: str, folder: Path) -> None:
    config = (DEPLOYED / name).read_text()
    if name == "kubernetes.yml":
        config = monitored.discovered_by_file(config, folder / "targets.json")
    for file, text in {name: config, "rules.yml": (DEPLOYED / "rules.yml").read_text()}.items():
        (folder / file).write_text(text)

    assert "1 rule files found" in promtool("check", "config", "--lint=all", "--lint-fatal", folder / name)


def test_rules_do_as_their_tests_say() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", DEPLOYED / "rules.yml")
    promtool("test", "rules", DEPLOYED / "tests" / "rules.yml")


def test_each_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    tests = yaml.safe_load((DEPLOYED / "tests" / "rules.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]

    assert {case["alertname"] for case in cases if case["exp_alerts"]} == set(ALERTS)
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == set(ALERTS)


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_leads_to_its_entry_in_the_runbook(alert: str) -> None:
    rule = ALERTS[alert]
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert set(rule["labels"]) == {"severity"}
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"]["runbook_url"].endswith(f"/docs/runbook.md#{alert.lower()}")

    heading, entry = next(part for part in RUNBOOK.split("\n## ") if part.startswith(alert)).split("\n", 1)
    assert heading == alert
    parts = re.findall(r"^\*\*(.*?)\.\*\*", entry, re.MULTILINE)
    assert parts == ["Meaning", "Cause", "What to do"]
    assert "```sh\n" in entry
    assert f"Severity: {rule['labels']['severity']}." in " ".join(entry.split())


def test_the_pages_name_all_alerts_and_no_other() -> None:
    page = (DEPLOYED / "README.md").read_text()
    rows = re.findall(r"^\| \[(CSI\w+)\]\(.*#(\w+)\) \| (\w+) \|", page, re.MULTILINE)

    assert re.findall(r"^## (CSI\w+)$", RUNBOOK, re.MULTILINE) == list(ALERTS)
    assert rows == [(name, name.lower(), rule["labels"]["severity"]) for name, rule in ALERTS.items()]


# A pod with a native sidecar, as the API server shows it.
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "csi-node-7x2kq", "namespace": "storage"},
    "spec": {
        "initContainers": [{"name": "liveness-probe", "ports": [{"name": "csi-liveness"}]}],
        "containers": [{"name": "driver"}],
    },
    "status": {
        "initContainerStatuses": [{"name": "liveness-probe"}],
        "containerStatuses": [{"name": "driver"}],
    },
}


def test_runbook_looks_at_native_sidecars_too(folder: Path) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("there is no kubectl here")
    pod = folder / "pod.json"
    pod.write_text(json.dumps(POD))
    expressions = re.findall(r'jsonpath="(.*?)" *(?:\||$)', RUNBOOK, re.MULTILINE)
    assert len(expressions) == RUNBOOK.count("{range ") > 0
    for expression in expressions:
        # Without a server, kubectl shows what it is asked to change. The one pod stands for a list.
        one = expression.replace("{range .items[*]}", "{range @}")
        command = ["kubectl", "label", "--local", "-f", str(pod), "a=b", "-o", f"jsonpath={one}"]
        environment = {**os.environ, "HOME": str(folder), "KUBECONFIG": "/dev/null"}

        assert "liveness" in subprocess.check_output(command, env=environment, text=True), expression


def test_runbook_asks_the_sidecar(driver: FakeDriver, folder: Path) -> None:
    """Its command, with a kubectl that is slow to forward and then stands for the sidecar itself."""
    if not shutil.which("curl"):
        pytest.skip("there is no curl here")
    [command] = re.findall(r"^PORT=.*\n.*port-forward.*\n.*statusz.*$", RUNBOOK, re.MULTILINE)
    flags = f"--csi-address={driver.target} --http-endpoint=127.0.0.1:19808"
    kubectl = folder / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@"\nsleep 0.5\nexec {shlex.join(program.built())} {flags}\n')
    kubectl.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "NAMESPACE": "storage", "POD": "csi-node-7x2kq"}

    # Nothing holds its output open when it ends: the background job is gone.
    asked = subprocess.run(
        ["sh", "-c", command], capture_output=True, check=True, env=environment, text=True, timeout=60
    )

    assert asked.stdout.startswith("\nlivenessprobe statusz\n")
    assert f"Driver address: {driver.target}\n" in asked.stdout


def pod_specs(document: Any) -> Iterator[dict[str, Any]]:
    """Whatever looks like one, at any depth of a manifest."""
    if isinstance(document, dict):
        if isinstance(document.get("containers"), list):
            yield document
        for value in document.values():
            yield from pod_specs(value)


def discovered(manifest: str) -> list[int]:
    """The ports that Prometheus finds by their name, each of which serves metrics for it."""
    found = []
    for spec in itertools.chain(*map(pod_specs, yaml.safe_load_all(manifest))):
        containers = [*spec["containers"], *spec.get("initContainers", ())]
        ports = [port for container in containers for port in container.get("ports", ())]
        named = [port["containerPort"] for port in ports if port.get("name") == "csi-liveness"]
        arguments = [arg for container in containers for arg in container.get("args", ())]
        endpoints = re.findall(
            r"--(?:http-endpoint|metrics-address)=(?!127\.|localhost)\S*:(\d+)", " ".join(arguments)
        )
        assert named in ([], [int(port) for port in endpoints])
        found += named
    return found


def test_ports_that_are_discovered_serve_metrics() -> None:
    shipped = (program.ROOT / "deploy" / "kubernetes").rglob("*.yaml")

    assert list(itertools.chain.from_iterable(discovered(path.read_text()) for path in shipped))


def test_node_plugin_is_scraped_as_the_page_says_and_not_before() -> None:
    [change] = re.findall(
        r"^(sed -e .*node-plugin\.yaml) > ", (DEPLOYED / "README.md").read_text(), re.MULTILINE
    )
    changed = subprocess.check_output(["sh", "-c", change], cwd=program.ROOT, text=True)
    shipped = (program.ROOT / "deploy" / "kubernetes" / "node-plugin.yaml").read_text()

    assert discovered(shipped) == []
    (port,) = discovered(changed)
    (spec,) = (spec for document in yaml.safe_load_all(changed) for spec in pod_specs(document))
    driver = spec["containers"][0]
    asked = [driver[kind]["httpGet"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert {(one.get("host"), one["port"]) for one in asked} == {(None, "csi-liveness")}
    assert driver["ports"] == [{"name": "csi-liveness", "containerPort": port}]


def test_what_is_recorded_is_used() -> None:
    used = set().union(*(metrics_in(rule["expr"]) for rule in ALERTS.values()))

    assert {name for name in used if ":" in name} == set(RECORDS)


# ---- the dashboard by itself


def test_panels_are_told_apart_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels):
        columns = range(place["x"], place["x"] + place["w"])
        cells = set(itertools.product(columns, range(place["y"], place["y"] + place["h"])))
        assert max(columns) < 24
        assert not taken & cells
        taken |= cells


def test_every_panel_asks_the_chosen_data_source_for_the_chosen_drivers() -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "driver_name", "namespace", "pod"]
    for variable in DASHBOARD["templating"]["list"][1:]:
        assert variable["datasource"] == chosen
    for panel in DASHBOARD["panels"]:
        assert [panel["datasource"], *(one["datasource"] for one in panel["targets"])] == [chosen] * (
            1 + len(panel["targets"])
        )
        assert set(re.findall(r"\bCSI[A-Z]\w+", panel.get("description", ""))) <= set(ALERTS)
    for title, query in QUERIES:
        assert set(re.findall(r"\$(\w+)", query)) - {"__rate_interval"} == set(names[1:]), title


def test_the_dashboard_and_the_rules_use_what_is_exported(driver: FakeDriver, probe: program.Probe) -> None:
    probe.get()
    exported: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(probe.get("/metrics").text):
        name = family.name + ("_total" if family.type == "counter" else "")
        exported[name] = {sample.name for sample in family.samples}
    series = set().union(*exported.values())

    shown = set().union(*(metrics_in(query) for _, query in QUERIES))
    assert shown <= series
    csi = {name for name in exported if name.startswith("csi_")}
    assert csi == {name for name in csi if exported[name] & shown}
    ruled = set().union(*(metrics_in(rule["expr"]) for group in RULES for rule in group["rules"]))
    assert ruled - set(RECORDS) <= series | {"up"}
    for variable in DASHBOARD["templating"]["list"][1:]:
        assert metrics_in(re.sub(r", \w+\)", ")", variable["query"]["query"])) <= series


# ---- live


def alternately(*behaviours: str) -> Callable[[FakeDriver], None]:
    turns = itertools.cycle(behaviours)
    return lambda driver: driver.set(next(turns))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Pods with one problem each from the beginning; all their alerts are under way at the same time."""
    if reason := monitored.missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="lp", dir="/tmp") as short:
        folder = Path(short)
        pods = {
            "steady": Pod("steady", folder),
            # A controller, beside a healthy node of the same driver.
            "broken": Pod("broken", folder, controller_kind="ReplicaSet"),
            "node": Pod("node", folder, driver_name="broken.csi.k8s.io"),
            "flapping": Pod("flapping", folder, before=alternately("ready", "error")),
            "slow": Pod("slow", folder, probe_timeout="500ms"),
            "unasked": Pod("unasked", folder),
            "gone": Pod("gone", folder),
        }
        nobody = f"127.0.0.1:{program.free_port()}"
        others = [
            target("finished", nobody, phase="Succeeded"),
            target("foreign", nobody, port_name="healthz"),
        ]
        with Cluster(folder, pods, others) as cluster:
            cluster.pods["broken"].driver.set("error", message="the disk is gone")
            cluster.pods["slow"].driver.set("slow", after=0.35)
            for name in pods.keys() - {"unasked", "gone"}:
                cluster.pods[name].ask()
            seen = 'csi_liveness_driver_info{driver_name="gone.csi.k8s.io"}'
            cluster.prometheus.wait(lambda: cluster.prometheus.query(seen), seen)
            assert cluster.pods["gone"].probe.stop() == 0
            yield cluster


def pods_of(samples: list[tuple[dict[str, str], float]]) -> set[str]:
    return {labels["pod"].removeprefix("csi-") for labels, _ in samples}


def wait_until_scraped(cluster: Cluster) -> None:
    cluster.prometheus.wait(lambda: pods_of(cluster.prometheus.query("up")) >= set(cluster.pods), "all pods")


def test_each_pod_is_found_once_and_no_other(cluster: Cluster) -> None:
    wait_until_scraped(cluster)

    assert len(cluster.prometheus.query("up")) == len(cluster.pods)
    for labels, _ in cluster.prometheus.query("up"):
        name = labels["pod"].removeprefix("csi-")
        assert labels == {
            "__name__": "up",
            "controller_kind": cluster.pods[name].controller_kind,
            "instance": "{}:{}".format(*cluster.pods[name].probe.address()),
            "job": "csi-livenessprobe",
            "namespace": "storage",
            "node": f"node-{name}",
            "pod": f"csi-{name}",
        }


def test_a_broken_driver_is_told_of_until_it_is_mended(cluster: Cluster) -> None:
    prometheus, driver = cluster.prometheus, cluster.pods["broken"].driver
    names = {"namespace": "storage", "driver_name": "broken.csi.k8s.io"}
    prometheus.wait(lambda: prometheus.firing("CSIDriverUnhealthy", pod="csi-broken", **names), "unhealthy")
    prometheus.wait(lambda: prometheus.firing("CSIDriverOutage", **names), "an outage: one controller of one")
    (alert,) = prometheus.firing("CSIDriverUnhealthy", **names)
    assert alert["annotations"]["summary"] == "CSI driver broken.csi.k8s.io is unhealthy on node-broken"
    (alert,) = prometheus.firing("CSIDriverOutage", **names)
    assert alert["labels"]["controller_kind"] == "ReplicaSet"

    driver.set("ready")

    prometheus.wait(lambda: not prometheus.firing("CSIDriverUnhealthy", **names), "healthy again")
    prometheus.wait(lambda: not prometheus.firing("CSIDriverOutage", **names), "no outage any more")


@pytest.mark.parametrize(
    ("alert", "pod"),
    [("CSIDriverFlapping", "flapping"), ("CSIDriverSlow", "slow"), ("CSIDriverNotChecked", "unasked")],
)
def test_a_trouble_is_told_of(cluster: Cluster, alert: str, pod: str) -> None:
    labels = {"pod": f"csi-{pod}", "node": f"node-{pod}", "driver_name": f"{pod}.csi.k8s.io"}

    cluster.prometheus.wait(lambda: cluster.prometheus.firing(alert, **labels), alert)


def test_a_sidecar_that_ended_is_told_of(cluster: Cluster) -> None:
    prometheus = cluster.prometheus
    names = {"namespace": "storage", "driver_name": "gone.csi.k8s.io"}

    prometheus.wait(lambda: prometheus.firing("CSILivenessProbeDown", pod="csi-gone"), "it is down")
    prometheus.wait(lambda: prometheus.firing("CSILivenessProbeAbsent", **names), "it is absent")


def test_nothing_is_told_of_a_driver_without_trouble(cluster: Cluster) -> None:
    prometheus = cluster.prometheus
    told = 'count by (alertname) (last_over_time(ALERTS{alertstate="firing"}[10m]))'
    prometheus.wait(lambda: prometheus.query("instance:csi_probe_duration_seconds:mean5m"), "rules")
    prometheus.wait(lambda: prometheus.query(told), "alerts of the others")

    steady = 'last_over_time(ALERTS{{alertstate="firing", {0}="{1}"}}[10m])'
    assert not prometheus.query(steady.format("pod", "csi-steady"))
    assert not prometheus.query(steady.format("driver_name", "steady.csi.k8s.io"))
    assert prometheus.query("driver:csi_liveness_up:avg{driver_name='steady.csi.k8s.io'} == 1")
    assert {labels["alertname"] for labels, _ in prometheus.query(told)} <= set(ALERTS)


@pytest.mark.parametrize("title", dict(QUERIES))
def test_each_query_of_the_dashboard_has_data(cluster: Cluster, title: str) -> None:
    query = expanded(dict(QUERIES)[title])

    cluster.prometheus.wait(lambda: cluster.prometheus.query(query), query)


def test_a_chosen_driver_is_all_that_is_shown(cluster: Cluster) -> None:
    shown = set()
    for title, query in QUERIES:
        chosen = expanded(query, driver_name="steady.csi.k8s.io")
        cluster.prometheus.wait(lambda query=chosen: cluster.prometheus.query(query), chosen)  # type: ignore[misc]
        samples = cluster.prometheus.query(chosen)
        shown |= {labels["pod"] for labels, _ in samples if "pod" in labels}
        if title in ("Healthy A", "Not healthy A", "Not checked A"):
            assert [value for _, value in samples] == [title == "Healthy A"], title
    assert shown == {"csi-steady"}


def test_the_dashboards_variables_have_values(cluster: Cluster) -> None:
    wait_until_scraped(cluster)
    for variable in DASHBOARD["templating"]["list"][1:]:
        query = expanded(variable["query"]["query"])
        found = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
        assert found

        # As Grafana asks.
        assert cluster.prometheus.api(f"label/{found[2]}/values", **{"match[]": found[1]})


# ---- by prometheus-operator


def test_the_prometheusrule_has_the_same_rules() -> None:
    shipped = yaml.safe_load((OPERATOR / "prometheusrule.yaml").read_text())

    assert shipped["kind"] == "PrometheusRule"
    assert shipped["spec"] == {"groups": RULES}
    monitor = yaml.safe_load((OPERATOR / "podmonitor.yaml").read_text())
    assert shipped["metadata"] == monitor["metadata"]


def monitor_of_others() -> str:
    """A PodMonitor as a driver's chart may have one: it finds the same ports, and adds no labels."""
    monitor: dict[str, Any] = yaml.safe_load((OPERATOR / "podmonitor.yaml").read_text())
    monitor["metadata"] = {"namespace": "storage", "name": "csi-node"}
    del monitor["spec"]["podMetricsEndpoints"][0]["relabelings"]
    return yaml.safe_dump(monitor)


@pytest.mark.parametrize("whose", ["ours", "another's"])
def test_operated(whose: str) -> None:
    """Alerts and dashboard where prometheus-operator renders the configuration."""
    if reason := monitored.missing():
        pytest.skip(reason)
    ours = whose == "ours"
    monitor = (OPERATOR / "podmonitor.yaml").read_text() if ours else monitor_of_others()
    job = "csi-livenessprobe" if ours else "storage/csi-node"
    with tempfile.TemporaryDirectory(prefix="lp", dir="/tmp") as short:
        folder = Path(short)
        pods = {
            name: Pod(name, folder, driver_name="example.csi.k8s.io") for name in ("broken", "ends", "steady")
        }
        nobody = f"127.0.0.1:{program.free_port()}"
        others = [
            target("finished", nobody, phase="Succeeded"),
            target("foreign", nobody, port_name="healthz"),
        ]
        with Cluster(folder, pods, others, monitored.rendered(monitor)) as cluster:
            prometheus = cluster.prometheus
            wait_until_scraped(cluster)
            for name in ("broken", "steady"):
                pods[name].ask()
            assert pods_of(prometheus.query(f'up{{job="{job}"}}')) == set(pods)
            for labels, _ in prometheus.query("up"):
                assert ("node" in labels, "controller_kind" in labels) == (ours, ours)
            for _, query in QUERIES:
                asked = expanded(query, driver_name="example.csi.k8s.io", namespace="storage")
                prometheus.wait(lambda asked=asked: prometheus.query(asked), asked)  # type: ignore[misc]

            pods["broken"].driver.set("error", message="the disk is gone")
            assert pods["ends"].probe.stop() == 0

            names = {"namespace": "storage", "driver_name": "example.csi.k8s.io"}
            prometheus.wait(
                lambda: prometheus.firing("CSIDriverUnhealthy", pod="csi-broken", **names), "unhealthy"
            )
            (alert,) = prometheus.firing("CSIDriverUnhealthy", **names)
            where = "node-broken" if ours else alert["labels"]["instance"]
            assert alert["annotations"]["summary"] == f"CSI driver example.csi.k8s.io is unhealthy on {where}"
            prometheus.wait(
                lambda: prometheus.firing("CSILivenessProbeDown", pod="csi-ends", job=job), "down"
            )
            # Not even pending: there are sidecars, and the driver still has some.
            assert not prometheus.query('ALERTS{alertname="CSILivenessProbeAbsent"}')
            assert not prometheus.query('last_over_time(ALERTS{alertstate="firing", pod="csi-steady"}[10m])')


def test_targets_by_hand_are_scraped(probe: program.Probe, folder: Path) -> None:
    if reason := monitored.missing():
        pytest.skip(reason)
    config: dict[str, Any] = yaml.safe_load(hurried((DEPLOYED / "static.yml").read_text()))
    (address,) = probe.addresses
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [address]
    with Prometheus(
        yaml.safe_dump(config), hurried((DEPLOYED / "rules.yml").read_text()), folder
    ) as prometheus:
        # An alert that the rules can raise only by the job's name.
        prometheus.wait(lambda: prometheus.query(f'up{{instance="{address}"}} == 1'), "the sidecar")
        assert probe.stop() == 0
        alert = f'ALERTS{{alertname="CSILivenessProbeDown", instance="{address}"}}'
        prometheus.wait(lambda: prometheus.query(alert), alert)
