"""`make check-manifest`: what it says about a manifest, and that the program does what it said."""

from __future__ import annotations

import atexit
import copy
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checker
import manifest
import program
import pytest
import yaml
import yaml_nodes
from check_manifest import IMAGE as SUGGESTED
from finding import Finding, Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from probing import HEALTH_PATHS, sent
from sidecar import ADVISED_MEMORY, LEAST_MEMORY, PROGRAM, REQUESTED_MEMORY, check
from yaml_nodes import ManifestError

import livenessprobe

if TYPE_CHECKING:
    from conftest import ProbeFactory
    from fake_driver import FakeDriver

ROOT = program.ROOT
FIELD = Path(__file__).parent / "helpers" / "field_manifests.yaml"
pytestmark = pytest.mark.unmeasured


@functools.cache
def check_manifest() -> str:
    """The file as `make bin/check-manifest` packs it."""
    folder = tempfile.mkdtemp(prefix="lp")
    atexit.register(shutil.rmtree, folder)
    file = Path(folder) / "check-manifest"
    checker.pack(file)
    return str(file)


# The file takes the first python3 there: the one that made our environment, not a version manager's script, which costs as
# much as the check itself.
PATH = {"PATH": f"{sys.base_prefix}/bin:{os.environ['PATH']}"}


def script(*arguments: str | Path, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [check_manifest(), *arguments],
        capture_output=True,
        check=False,
        env=os.environ | PATH,
        input=stdin.encode() if isinstance(stdin, str) else stdin,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


# ---- the argument lists of the field

SIDECARS = {
    pod.name: (pod, container) for pod in manifest.pods(FIELD.read_text()) for container in pod.containers
}
FINDINGS = {name: list(check(*sidecar)) for name, sidecar in SIDECARS.items()}
ACCEPTED = [name for name, found in FINDINGS.items() if Kind.ACCEPTED in {each.kind for each in found}]


def arguments_of(container: manifest.Container) -> list[str]:
    return [*container.command[1:], *container.args]


def test_report_on_the_field() -> None:
    done = script(FIELD)

    assert done.stdout == FIELD.with_suffix(".txt").read_text()
    assert (done.returncode, done.stderr) == (1, "")


def test_only_windows_breaks_in_the_field() -> None:
    broken = {
        name for name, found in FINDINGS.items() for each in found if each.kind in (Kind.REFUSED, Kind.BREAKS)
    }

    assert len(SIDECARS) == len(list(yaml.safe_load_all(FIELD.read_text())))
    assert broken == {name for name in SIDECARS if name.endswith("windows")}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted_starts(name: str, driver: FakeDriver, probe_factory: ProbeFactory) -> None:
    written = arguments_of(SIDECARS[name][1])
    # The same flags, with this machine's socket and ports.
    here = [re.sub(r"=.*/.*", f"={driver.target}", each) for each in written if "-csi-address=" in each]
    here += [
        re.sub(r"(?<=[:=])[0-9]{4,5}$", lambda _: str(program.free_port()), each)
        for each in written
        if "-csi-address=" not in each
    ]
    if not any("-csi-address" in each for each in here):
        here.append(f"--csi-address={driver.target}")
    if not re.search("-health-port|-http-endpoint", " ".join(here)):
        here.append(f"--health-port={program.free_port()}")

    response = probe_factory(*here).get()

    assert (response.status, response.text) == (200, "ok")


# ---- what the program says itself


def findings(*arguments: str) -> list[Finding]:
    """What it finds about a sidecar with these arguments if everything else is right."""
    return found_in({"spec.containers.1.args": list(arguments)})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--feature-gates=ContextualLogging=true"],
        ["--probe-timeout=5"],
        ["--csi-address"],
        ["true", "--v=5"],
        ["--csi-address=csi.sock"],
        ["--csi-address=$(NOWHERE)"],
        ["--health-port=9809", "--http-endpoint=:9808"],
        ["--metrics-address=:9809", "--http-endpoint=:9808"],
        ["--logging-format=xml"],
        ['--metrics-path=with \x01 "quotes"', "--http-endpoint=:9808"],
    ],
)  # fmt: skip
def test_refused_in_the_words_of_the_program(arguments: list[str]) -> None:
    done = program.run_once(arguments)
    [refused] = [each.text for each in findings(*arguments) if each.kind is Kind.REFUSED]

    code, _, words = refused.partition(": ")
    assert code == f"exit {done.returncode}"
    assert done.stderr.removesuffix("; -h lists all flags\n").rstrip("\n").endswith(words)


def test_warns_in_the_words_of_the_program(probe_factory: ProbeFactory, socket_path: Path) -> None:
    flags = ["--logtostderr", "--log_dir=/var/log", "--stderrthreshold=2"]
    port = program.free_port()
    probe = probe_factory(f"--csi-address={socket_path}", f"--health-port={port}", *flags)

    warned = [
        each.text for each in findings("--csi-address=/csi/csi.sock", *flags) if each.kind is Kind.WARNS
    ]
    logged = [line.partition("] ")[2] for line in probe.log_lines if line.startswith("W")]

    assert len(warned) == 3
    assert sorted(warned) == sorted(logged)


# ---- the rules, each broken alone

GOOD: dict[str, Any] = {
    "kind": "Pod",
    "metadata": {"name": "csi"},
    "spec": {
        "containers": [
            {
                "name": "driver",
                "image": "registry.example/driver:v1.0",
                "ports": [{"name": "healthz", "containerPort": 9808}],
                "livenessProbe": {"httpGet": {"path": "/livez", "port": "healthz"}, "timeoutSeconds": 3},
                "volumeMounts": [{"name": "socket-dir", "mountPath": "/plugin"}],
            },
            {
                "name": "liveness-probe",
                "image": "registry.example/livenessprobe:v2.19.0",
                "args": ["--csi-address=/csi/csi.sock"],
                "resources": {"requests": {"memory": "32Mi"}, "limits": {"memory": "64Mi"}},
                "securityContext": {
                    "readOnlyRootFilesystem": True,
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [{"name": "socket-dir", "mountPath": "/csi"}],
            },
        ],
        "volumes": [{"name": "socket-dir", "emptyDir": {}}],
    },
}
ARGS, IMAGE, COMMAND = "spec.containers.1.args", "spec.containers.1.image", "spec.containers.1.command"
LIMIT = "spec.containers.1.resources.limits.memory"
HTTP_GET = "spec.containers.0.livenessProbe.httpGet"
TIMEOUT = "spec.containers.0.livenessProbe.timeoutSeconds"
SECURITY = "spec.containers.1.securityContext"
OWN = "spec.containers.1."
A = "--csi-address=/csi/csi.sock"
BOTH = [A, "--http-endpoint=:9808"]
ELSEWHERE = {"name": "ELSEWHERE", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
VOLUMES, DRIVERS_VOLUME = "spec.volumes", "spec.containers.0.volumeMounts.0.name"
ASK_HEALTH = {"httpGet": {"path": "/healthz", "port": 9808}, "timeoutSeconds": 3}
ASK_METRICS = {"httpGet": {"path": "/metrics", "port": 9808}}


def host(name: str, path: str) -> dict[str, Any]:
    """A volume that is a folder on the node."""
    return {"name": name, "hostPath": {"path": path}}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    document = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *way, last = path.split(".")
        place: Any = document
        for key in way:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        place[int(last) if isinstance(place, list) else last] = value
    return document


def found_in(changes: dict[str, Any]) -> list[Finding]:
    [pod] = manifest.pods(yaml.safe_dump(changed(changes)))
    [sidecar] = pod.containers
    return list(check(pod, sidecar))


def findings_of(kind: Kind, found: list[Finding]) -> list[str]:
    return [each.text for each in found if each.kind is kind]


RULES: dict[str, tuple[dict[str, Any], tuple[Kind, str] | None]] = {
    "nothing": ({}, None),
    "a shell": ({COMMAND: ["/bin/sh", "-c"], ARGS: [A]}, (Kind.BREAKS, "no /bin/sh and no other shell")),
    "another program": ({COMMAND: ["/usr/bin/csi-probe"]}, (Kind.BREAKS, "in the image the program is /livenessprobe")),
    "its program": ({COMMAND: [PROGRAM, A], ARGS: []}, None),
    "its program, copied": (
        {COMMAND: [PROGRAM], IMAGE: "registry.example/driver:v1.0"},
        (Kind.CHANGES, "copied into an image of your own"),
    ),
    "windows, a label": ({"spec.nodeSelector": {"kubernetes.io/os": "windows"}}, (Kind.BREAKS, "Windows")),
    "windows, a field": ({"spec.os": {"name": "windows"}}, (Kind.BREAKS, "Windows")),
    "windows, a program": ({COMMAND: ["livenessprobe.exe"]}, (Kind.BREAKS, "Windows")),
    "help": ({ARGS: ["--help"]}, (Kind.BREAKS, "usage")),
    "version": ({ARGS: [A, "--version"]}, (Kind.BREAKS, "version")),
    "once": ({ARGS: [A, "--once"]}, (Kind.BREAKS, "--once ends")),
    "of v2.16": ({IMAGE: "registry.example/livenessprobe:v2.16.0"}, (Kind.CHANGES, "was 1s")),
    "of v2.16, timeout given": (
        {IMAGE: "registry.example/livenessprobe:v2.16.0", ARGS: [A, "--probe-timeout=2s"]},
        None,
    ),
    "one port for two": ({ARGS: [A, "--metrics-address=:9808"]}, (Kind.BREAKS, "address already in use")),
    "two ports": ({ARGS: [A, "--metrics-address=:9809"]}, None),
    "two ports of the system": (
        {ARGS: [A, "--health-port=0", "--metrics-address=:0"], HTTP_GET: None},
        (Kind.ADVICE, "nobody hears"),
    ),
    "the default port on the host": ({"spec.hostNetwork": True}, (Kind.ADVICE, "every driver's default")),
    "a port without a name": ({HTTP_GET + ".port": "health"}, (Kind.BREAKS, "asks port health")),
    "a port that nobody serves": ({HTTP_GET + ".port": 9898}, (Kind.BREAKS, "asks port 9898, not 9808")),
    "a port as a number": ({HTTP_GET + ".port": 9808}, None),
    "a port as a text": ({HTTP_GET + ".port": "9808"}, None),
    "a port that another container is told of": (
        {HTTP_GET + ".port": 9898, "spec.containers.0.args": ["--health=:9898"]},
        (Kind.ADVICE, "nobody hears"),
    ),
    "a port that another container has in a variable": (
        {HTTP_GET + ".port": 9898, "spec.containers.0.env": [{"name": "PORT", "value": "9898"}]},
        (Kind.ADVICE, "nobody hears"),
    ),
    "a port that is part of a number elsewhere": (
        {HTTP_GET + ".port": 9898, "spec.containers.0.args": ["--limit=19898", "--rate=0.9898"]},
        (Kind.BREAKS, "asks port 9898, not 9808"),
    ),
    "another sidecar's health": (
        {
            HTTP_GET: None,
            "spec.initContainers": [
                {"name": "registrar", "restartPolicy": "Always", "args": [A], "livenessProbe": {"httpGet": {"path": "/healthz", "port": 9809}}}
            ],
        },
        (Kind.ADVICE, "nobody hears"),
    ),
    "nobody asks": ({"spec.containers.0.livenessProbe": None}, (Kind.ADVICE, "nobody hears")),
    "another path": ({HTTP_GET + ".path": "/health"}, (Kind.BREAKS, "404")),
    "a path without a slash": ({HTTP_GET + ".path": "healthz"}, None),
    "a path with a query": ({HTTP_GET + ".path": "/healthz?verbose"}, None),
    "a path with a slash too many": ({HTTP_GET + ".path": "/healthz/"}, (Kind.BREAKS, "asks /healthz/, which is 404")),
    "a path with two slashes": ({HTTP_GET + ".path": "//healthz"}, (Kind.BREAKS, "asks //healthz, sent as /, which is 404")),
    "a path that is none": ({HTTP_GET + ".path": "healthz:1"}, (Kind.BREAKS, "which the kubelet does not take for a path")),
    "no path": ({HTTP_GET + ".path": ""}, (Kind.BREAKS, "asks /, which is 404")),
    "a query for metrics": ({ARGS: BOTH, OWN + "readinessProbe": {"httpGet": {"path": "metrics?a", "port": 9808}}}, None),
    "https": ({HTTP_GET + ".scheme": "HTTPS"}, (Kind.BREAKS, "plain HTTP")),
    "loopback in the pod": ({ARGS: [A, "--http-endpoint=localhost:9808"]}, (Kind.BREAKS, "asks the pod's address")),
    "loopback of the host": (
        {
            ARGS: [A, "--http-endpoint=127.0.0.1:9898"],
            HTTP_GET + ".port": 9898,
            "spec.hostNetwork": True,
        },
        (Kind.BREAKS, "add host: 127.0.0.1"),
    ),
    "loopback of the host, asked there": (
        {
            ARGS: [A, "--http-endpoint=[::1]:9898"],
            HTTP_GET + ".port": 9898,
            HTTP_GET + ".host": "::1",
            "spec.hostNetwork": True,
        },
        None,
    ),
    "the node's loopback": ({HTTP_GET + ".host": "127.0.0.1"}, (Kind.BREAKS, "remove host")),
    "an impatient kubelet": ({TIMEOUT: None}, (Kind.WARNS, "gives up after 1s, but a check may take 3s: write timeoutSeconds: 3")),
    "a livenessProbe of the sidecar": ({OWN + "livenessProbe": ASK_HEALTH}, (Kind.ADVICE, "restarts this container")),
    "a startupProbe of the sidecar": ({OWN + "startupProbe": ASK_HEALTH}, (Kind.ADVICE, "restarts this container")),
    "a readinessProbe of the sidecar": ({OWN + "readinessProbe": ASK_HEALTH}, None),
    "a probe of the metrics": ({ARGS: BOTH, OWN + "readinessProbe": ASK_METRICS}, None),
    "a livenessProbe of the metrics": ({ARGS: BOTH, OWN + "livenessProbe": ASK_METRICS}, None),
    "a probe of the metrics, elsewhere": (
        {ARGS: [*BOTH, "--metrics-path=/m"], OWN + "readinessProbe": ASK_METRICS | {"timeoutSeconds": 3}},
        (Kind.BREAKS, "asks /metrics, which is 404"),
    ),
    "a probe of the metrics, where there are none": (
        {OWN + "readinessProbe": ASK_METRICS | {"timeoutSeconds": 3}},
        (Kind.BREAKS, "asks /metrics, which is 404"),
    ),
    "a probe of the metrics alone": ({ARGS: BOTH, HTTP_GET + ".path": "/metrics"}, (Kind.ADVICE, "nobody hears")),
    "a probe of the metrics beside a wrong one": (
        {ARGS: BOTH, OWN + "readinessProbe": ASK_METRICS, HTTP_GET + ".port": 9898},
        (Kind.BREAKS, "asks port 9898, not 9808"),
    ),
    "no volume": ({"spec.containers.1.volumeMounts": []}, (Kind.BREAKS, "no volume is mounted")),
    "a volume that nobody declares": ({"spec.volumes": []}, (Kind.BREAKS, "socket-dir is declared nowhere")),
    "a volume for each pod of a StatefulSet": (
        {"spec.volumes": [], "spec.volumeClaimTemplates": [{"metadata": {"name": "socket-dir"}}]},
        None,
    ),
    "another volume than the driver's": (
        {VOLUMES: [{"name": "socket-dir", "emptyDir": {}}, {"name": "other", "emptyDir": {}}], DRIVERS_VOLUME: "other"},
        (Kind.BREAKS, "socket-dir, where the socket /csi/csi.sock should be, is not mounted by the driver"),
    ),
    "a volume below the driver's, by another name": (
        {VOLUMES: [host("socket-dir", "/plugins/a"), host("all", "/plugins")], DRIVERS_VOLUME: "all"},
        None,
    ),
    "a folder beside the driver's": (
        {VOLUMES: [host("socket-dir", "/plugins/a"), host("all", "/plugins/b")], DRIVERS_VOLUME: "all"},
        (Kind.BREAKS, "is not mounted by the driver"),
    ),
    "a volume over a part of another": (
        {OWN + "volumeMounts": [{"name": "none", "mountPath": "/"}, {"name": "socket-dir", "mountPath": "/csi"}]},
        None,
    ),
    "the pod's own folder, without a driver": ({"spec.containers.0.args": [A]}, (Kind.BREAKS, "is not mounted by the driver")),
    "a folder of the node, without a driver": (
        {"spec.containers.0.args": [A], VOLUMES: [host("socket-dir", "/plugins/a")]},
        None,
    ),
    "not a socket": ({ARGS: ["--csi-address=dns:///driver:10000"]}, None),
    "too little memory": ({LIMIT: "20Mi"}, (Kind.BREAKS, "memory limit of 20Mi")),
    "just enough memory": ({LIMIT: "24Mi"}, (Kind.ADVICE, "24Mi is just enough")),
    "little memory": ({LIMIT: "40000k"}, (Kind.ADVICE, "38.147Mi is just enough")),
    "memory without limit": ({"spec.containers.1.resources": {}}, None),
    "memory with the limit 0, which is none": ({LIMIT: 0}, None),
    "memory with a sign": ({LIMIT: "+1Gi"}, None),
    "memory of a few thousandths": ({LIMIT: "24000000000m"}, (Kind.BREAKS, "memory limit of 22.8882Mi")),
    "memory as an exponent": ({LIMIT: "2.4E+7"}, (Kind.BREAKS, "memory limit of 22.8882Mi")),
    "memory without end": ({LIMIT: "1Pi", "spec.containers.1.resources.requests.memory": ".5E"}, None),
    "nothing requested": ({"spec.containers.1.resources": {"requests": {"memory": "0"}}}, None),
    "little requested": (
        {"spec.containers.1.resources": {"requests": {"memory": "20Mi"}}},
        (Kind.ADVICE, "more than the 20Mi requested"),
    ),
    "not as root": ({SECURITY + ".runAsNonRoot": True}, (Kind.BREAKS, "the kubelet will not start it")),
    "not as root, as another": (
        {SECURITY + ".runAsNonRoot": True, SECURITY + ".runAsUser": 1},
        (Kind.ADVICE, "runs as uid 1:"),
    ),
    "the pod, not as root": ({"spec.securityContext": {"runAsNonRoot": True}}, (Kind.BREAKS, "the kubelet will not start")),
    "the pod, not as root, but this": (
        {"spec.securityContext": {"runAsNonRoot": True}, SECURITY + ".runAsNonRoot": False},
        None,
    ),
    "as another user": ({"spec.securityContext": {"runAsUser": 65532}}, (Kind.ADVICE, "runs as uid 65532")),
    "privileged": ({SECURITY + ".privileged": True}, (Kind.ADVICE, "privileged is not needed")),
    "softer": (
        {SECURITY + ".readOnlyRootFilesystem": False, SECURITY + ".capabilities": {}},
        (Kind.ADVICE, "readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: str) -> None:
    changes, expected = RULES[rule]
    found = [each for each in found_in(changes) if each.kind not in (Kind.ACCEPTED, Kind.SERVES)]

    if expected is None:
        assert not found
        return
    kind, text = expected
    assert [each.kind for each in found if text in each.text] == [kind]
    assert len(found) == 1


NOT_READY = (
    Kind.CHANGES,
    "/healthz was 200 for a driver that is not ready, now it is 500, which restarts it; /livez keeps the 200",
)
CUT = (
    Kind.CHANGES,
    "/healthz cut the connection for a driver that is not ready, now it is 500; /livez is 200",
)
ONE_SECOND = (Kind.CHANGES, "the default of --probe-timeout was 1s, now it is 3s")
NO_EFFECT = (
    Kind.CHANGES,
    "--connection-timeout had no effect; now it is how long a check waits for the socket",
)


def could_take(connection: str, probe: str) -> tuple[Kind, str]:
    text = f"a check could take --connection-timeout, {connection}; now it takes --probe-timeout, {probe}, at most"
    return Kind.CHANGES, text


@pytest.mark.parametrize(
    ("release", "arguments", "expected"),
    [
        ("v0.4.1", [], [(Kind.BREAKS, "releases before v1.0 probe drivers of CSI 0.x; this program calls csi.v1.Identity"), NOT_READY]),
        ("v1.0.2", [], [could_take("30s", "3s"), NOT_READY]),
        ("v1.0.2", ["--connection-timeout=1m", "--probe-timeout=2.5s"], [could_take("60s", "2.5s"), NOT_READY]),
        ("v1.0.2", ["--connection-timeout=$(ELSEWHERE)"], [NOT_READY]),
        ("v1.1.0", [], [ONE_SECOND, CUT]),
        ("v1.1.0", ["--connection-timeout=2s", "--probe-timeout=3s"], [NO_EFFECT, CUT]),
        ("v1.1.0", ["--connection-timeout=$(ELSEWHERE)", "--probe-timeout=$(ELSEWHERE)"], [NO_EFFECT, CUT]),
        ("v2.0.0", [], [ONE_SECOND]),
        ("v2.16.0", [], [ONE_SECOND]),
        ("v2.17.0", [], []),
        ("v2.10.0-eks-1-27-3@sha256:0123", [], [ONE_SECOND]),
    ],
)  # fmt: skip
def test_what_a_release_did(release: str, arguments: list[str], expected: list[tuple[Kind, str]]) -> None:
    image = f"registry.example/livenessprobe:{release}"
    found = found_in({IMAGE: image, ARGS: [A, *arguments], OWN + "env": [ELSEWHERE]})

    assert [(each.kind, each.text) for each in found if each.kind in (Kind.BREAKS, Kind.CHANGES)] == expected


@pytest.mark.parametrize("tag", ["v0.0.0", "v0.1.0", "v1.2.0", "v2.21.0", "v4.12", "v4.12.0@sha256:0123"])
def test_a_tag_that_is_no_release_is_unknown(tag: str) -> None:
    found = found_in({IMAGE: f"registry.example/ose-csi-livenessprobe:{tag}"})

    [text] = findings_of(Kind.UNKNOWN, found)
    assert text.startswith(".".join(re.findall("v?[0-9]+", tag)[:2]) + " is not one of upstream's releases")
    assert {each.kind for each in found} == {Kind.ACCEPTED, Kind.UNKNOWN, Kind.SERVES}


@pytest.mark.parametrize("tag", ["latest", "canary", "0.1.0", "v2"])
def test_other_tags_say_nothing(tag: str) -> None:
    assert not findings_of(Kind.UNKNOWN, found_in({IMAGE: f"registry.example/livenessprobe:{tag}"}))


def test_init_containers() -> None:
    sidecar = GOOD["spec"]["containers"][1]
    driver = GOOD["spec"]["containers"][0]

    def broken(init: dict[str, Any]) -> list[str]:
        found = found_in({"spec.containers": [driver], "spec.initContainers": [sidecar | init]})
        return [each.text for each in found if each.kind is Kind.BREAKS]

    assert broken({}) == [
        "an init container has to end, but this one serves: write restartPolicy: Always, or --once"
    ]
    assert broken({"restartPolicy": "Always"}) == []
    assert broken({"args": [A, "--once"]}) == []
    assert broken({"args": [A, "--once=$(ELSEWHERE)"], "env": [ELSEWHERE]}) == []


def test_a_driver_among_the_init_containers() -> None:
    driver, sidecar = GOOD["spec"]["containers"]
    found = found_in(
        {"spec.initContainers": [driver | {"restartPolicy": "Always"}], "spec.containers": [sidecar]}
    )

    assert {each.kind for each in found} == {Kind.ACCEPTED, Kind.SERVES}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([A], "on all addresses, port 9808; no metrics (--http-endpoint=:9808 would serve both)"),
        ([A, "--http-endpoint=:9808"], "on all addresses, port 9808; metrics at /metrics there too"),
        (
            [A, "--metrics-address=:9809", "--metrics-path=/m"],
            "on all addresses, port 9808; metrics at :9809/m",
        ),
    ],
)
def test_says_where_it_serves(arguments: list[str], line: str) -> None:
    [serves] = [each.text for each in findings(*arguments) if each.kind is Kind.SERVES]

    assert serves == f"{', '.join(HEALTH_PATHS)} {line}"


def test_memory_is_that_of_the_documentation() -> None:
    page = " ".join((ROOT / "docs" / "image.md").read_text().split())

    assert f"It serves within a limit of {LEAST_MEMORY} MiB" in page
    assert re.search(rf"request {REQUESTED_MEMORY} MiB and limit it to {ADVISED_MEMORY}\b", page)


# ---- flags whose values are elsewhere

# What the rules find with the defaults: no socket, and another port than the probes ask.
WRONG: dict[str, Any] = {OWN + "env": [ELSEWHERE], OWN + "volumeMounts": [], HTTP_GET + ".port": 9898}
SOCKET, PORT = "no volume is mounted where the socket /run/csi/socket should be", "asks port 9898, not 9808"


@pytest.mark.parametrize(
    ("arguments", "judged"),
    [
        (["--csi-address=$(ELSEWHERE)"], {PORT}),
        (["-csi-address", "$(ELSEWHERE)"], {PORT}),
        (["--http-endpoint=$(ELSEWHERE):9898"], {SOCKET}),
        (["--health-port=$(ELSEWHERE)"], {SOCKET}),
        (["--metrics-address=$(ELSEWHERE):9809"], {SOCKET}),
        (["--csi-address=$(ELSEWHERE)", "--http-endpoint=$(ELSEWHERE):9898"], set()),
        (["--v=$(ELSEWHERE)"], {SOCKET, PORT}),
        (["$(ELSEWHERE)"], set()),
        (["--$(ELSEWHERE)=1"], set()),
    ],
)
def test_no_default_is_judged_whose_value_is_elsewhere(arguments: list[str], judged: set[str]) -> None:
    found = found_in(WRONG | {ARGS: arguments})

    told = [
        text.partition(": the variable's value is not in this file")[0]
        for text in findings_of(Kind.UNKNOWN, found)
    ]
    assert " ".join(told) == " ".join(arguments)
    assert findings_of(Kind.ACCEPTED, found) == ["no arguments (without the unknown)"]
    assert bool(findings_of(Kind.SERVES, found)) == (PORT in judged)
    broken = findings_of(Kind.BREAKS, found)
    assert {rule for rule in (SOCKET, PORT) if any(rule in text for text in broken)} == judged
    assert len(broken) == len(judged)


def test_a_timeout_that_is_elsewhere_is_not_compared() -> None:
    arguments = [A, "--probe-timeout=$(ELSEWHERE)"]

    found = found_in({ARGS: arguments, OWN + "env": [ELSEWHERE], TIMEOUT: None})

    assert not findings_of(Kind.WARNS, found)


# ---- two sidecars of one pod


def of_two(*arguments: list[str]) -> list[list[Finding]]:
    """What it finds about two sidecars with these arguments, if the driver's probe asks port 9808."""
    driver, sidecar = GOOD["spec"]["containers"]
    named = [
        sidecar | {"name": f"liveness-{number}", "args": [A, *each], "env": [ELSEWHERE]}
        for number, each in enumerate(arguments)
    ]
    [pod] = manifest.pods(yaml.safe_dump(changed({"spec.containers": [driver, *named]})))
    return [list(check(pod, each)) for each in pod.containers]


@pytest.mark.parametrize(
    ("first", "second", "ports"),
    [
        ([], [], [9808]),
        ([], ["--health-port=9809"], []),
        ([], ["--http-endpoint=127.0.0.1:9808"], [9808]),
        (["--http-endpoint=[::1]:9808"], ["--http-endpoint=0.0.0.0:9808"], [9808]),
        (["--http-endpoint=localhost:9808"], ["--http-endpoint=127.0.0.1:9808"], [9808]),
        (["--http-endpoint=127.0.0.1:9808"], ["--http-endpoint=[::1]:9808"], []),
        (["--http-endpoint=10.0.0.1:9808"], ["--http-endpoint=127.0.0.1:9808"], []),
        (["--metrics-address=:9810"], ["--health-port=9810"], [9810]),
        (["--metrics-address=:9810"], ["--metrics-address=:9810"], [9808, 9810]),
        (["--health-port=0"], ["--health-port=0"], []),
        ([], ["--once"], []),
        (["--once"], [], []),
        (["--health-port=$(ELSEWHERE)"], [], []),
        (["--no-such-flag"], [], []),
        (["--version"], [], []),
    ],
)  # fmt: skip
def test_two_sidecars_cannot_have_one_port(first: list[str], second: list[str], ports: list[int]) -> None:
    found = of_two(first, second)

    expected = [
        f"liveness-0 listens on port {port} of this pod too: address already in use" for port in ports
    ]
    collisions = [
        [text for text in findings_of(Kind.BREAKS, each) if "address already in use" in text]
        for each in found
    ]
    assert collisions == [[], expected]


def test_an_init_container_is_over_when_the_others_serve() -> None:
    init = {**GOOD["spec"]["containers"][1], "name": "before"}

    def collisions(init: dict[str, Any]) -> list[str]:
        [pod] = manifest.pods(yaml.safe_dump(changed({"spec.initContainers": [init]})))
        assert [each.name for each in pod.containers] == ["before", "liveness-probe"]
        return [
            text for text in findings_of(Kind.BREAKS, list(check(pod, pod.containers[1]))) if "in use" in text
        ]

    assert collisions(init) == []
    assert len(collisions(init | {"restartPolicy": "Always"})) == 1


def test_a_probe_that_asks_the_other_sidecar_is_right() -> None:
    _, second = of_two([], ["--health-port=9809"])
    assert findings_of(Kind.BREAKS, second) == []
    assert findings_of(Kind.ADVICE, second) == [
        "no HTTP probe of the pod asks port 9809 for health: nobody hears the verdict"
    ]

    _, second = of_two(["--health-port=$(ELSEWHERE)"], ["--health-port=9809"])
    assert findings_of(Kind.BREAKS, second) == []

    _, second = of_two(["--health-port=9810"], ["--health-port=9809"])
    assert findings_of(Kind.BREAKS, second) == ["the livenessProbe of driver asks port 9808, not 9809"]


def test_two_sidecars_on_one_port_do_not_both_start(driver: FakeDriver, probe_factory: ProbeFactory) -> None:
    port = program.free_port()
    arguments = [f"--csi-address={driver.target}", f"--http-endpoint=127.0.0.1:{port}"]
    first = probe_factory(arguments[0], f"--health-port={port}")

    second = program.run_once(arguments)

    assert second.returncode == 1
    assert "address already in use" in second.stderr
    assert first.get().status == 200


# ---- which containers, in which objects


@pytest.mark.parametrize(
    ("container", "found"),
    [
        ({"image": "registry.k8s.io/sig-storage/livenessprobe:v2.19.0"}, True),
        ({"image": "registry.example:5000/livenessprobe@sha256:0123"}, True),
        ({"image": "registry.example/csi-livenessprobe"}, True),
        ({"image": "registry.example/liveness-probe:v2.1.0-build2"}, True),
        ({"image": "$(IMAGE)", "name": "csi-liveness-probe", "args": ["--csi-address=$(WHERE)"]}, True),
        ({"image": "any", "command": ["/livenessprobe"]}, True),
        ({"image": "any", "command": ["C:\\livenessprobe.exe"]}, True),
        ({"image": "registry.example/openshift/origin-csi-livenessprobe:4.12"}, True),
        ({"image": "registry.example/openshift4/ose-csi-livenessprobe-rhel9@sha256:0123"}, True),
        ({"image": "registry.example/rancher/mirrored-sig-storage-livenessprobe:v2.12.0"}, True),
        ({"image": "registry.example/eks-distro/kubernetes-csi-livenessprobe:v2.10.0-eks-1-27-3"}, True),
        ({"image": "registry.example/csi:5", "name": "csi-probe"}, None),
        ({"image": "registry.example/csi:5", "name": "liveness-probe"}, None),
        ({"image": "registry.example/csi-liveness:5", "name": "x"}, None),
        ({"image": "registry.example/csi:5", "name": "x", "command": ["/x", A], "args": ["-probe-timeout=1s"]}, None),
        ({"image": "registry.example/cephcsi", "name": "liveness-prometheus", "args": ["--type=liveness"]}, None),
        ({"image": "registry.example/provisioner", "name": "p", "args": ["--csi-address=/csi/csi.sock"]}, False),
        ({"image": "registry.example/livenessprobe/tools:1"}, False),
        ({"image": "any", "command": ["cp", "/livenessprobe"]}, False),
    ],
)  # fmt: skip
def test_which_containers(container: dict[str, Any], found: bool | None) -> None:
    """None: it only looks like one."""
    document = {"kind": "Pod", "spec": {"containers": [container]}}

    pods = manifest.pods(yaml.safe_dump(document))

    assert [len(pod.containers) for pod in pods] == {True: [1], None: [0], False: []}[found]
    assert [pod.lookalikes for pod in pods if not pod.containers] == [(container.get("name"),)] * (
        found is None
    )


def test_what_looks_like_one_is_told_of() -> None:
    alike = {"name": "csi-probe", "image": "registry.example/csi:5"}
    alone = {"kind": "Pod", "metadata": {"name": "\x1b[2J"}, "spec": {"containers": [alike]}}
    beside = changed({"spec.containers.0": GOOD["spec"]["containers"][0] | alike})

    one, two = (script("-", stdin=yaml.safe_dump(document)) for document in (alone, beside))

    assert one.stdout == (
        "Pod \\x1b[2J, container csi-probe\n  looks like a livenessprobe, not judged\n\n"
        "livenessprobe containers: 0; with something that would break: 0; that look like one, not judged: 1\n"
    )
    assert "\nPod csi, container csi-probe\n  looks like a livenessprobe, not judged\n\n" in two.stdout
    assert two.stdout.endswith(
        "containers: 1; with something that would break: 0; that look like one, not judged: 1\n"
    )
    assert (one.returncode, two.returncode) == (0, 0)


POD = {"spec": GOOD["spec"]}
OBJECTS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        kind: ({"spec": {"template": POD}}, kind)
        for kind in ("Deployment", "DaemonSet", "StatefulSet", "ReplicaSet", "Job", "Anything")
    },
    "CronJob": ({"spec": {"jobTemplate": {"spec": {"template": POD}}}}, "CronJob"),
    "PodTemplate": ({"template": POD}, "PodTemplate"),
    "List": ({"items": [GOOD, {"kind": "ConfigMap", "data": {"a": "{{ b }}"}}]}, "Pod csi"),
    "DaemonSetList": ({"items": [{"kind": "DaemonSet", "spec": {"template": POD}}]}, "DaemonSet"),
    # As the API answers.
    "PodList": ({"items": [POD]}, "Pod"),
    "CronJobList": ({"items": [{"spec": {"jobTemplate": {"spec": {"template": POD}}}}]}, "CronJob"),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_finds_the_pods_of(kind: str) -> None:
    body, name = OBJECTS[kind]
    others = ["---", "kind: Service", "spec: {ports: [{port: 1}]}", "---", "# nothing", "---", ""]

    found = manifest.pods("\n".join(others) + yaml.safe_dump({"kind": kind, **body}))

    assert [pod.name for pod in found] == [name]
    assert [each.name for each in found[0].containers] == ["liveness-probe"]


def app(**container: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "app", "image": "registry.example/app", **container}]}}


UNRELATED: dict[str, dict[str, Any]] = {
    "a template of its own": app(args=["--format={{.Names}}"], command=["app", "{{ a }}"]),
    "an odd quantity": app(resources={"limits": {"memory": "lots"}}),
    "no strings": app(args=[5], env=[{"name": 5, "value": 5}]),
    "odd flags": app(securityContext={"privileged": "yes"}, livenessProbe="yes", volumeMounts={}),
    "an odd pod": {"spec": {**app()["spec"], "hostNetwork": 1, "os": "linux", "nodeSelector": [], "securityContext": 1}},
    "an odd container": {"spec": {"containers": ["hello"], "initContainers": [None]}},
    "an image in parts": {"spec": {"containers": [{"image": {"repository": "app"}, "name": 5, "command": 5, "args": {}}]}},
    "no list of containers": {"spec": {"containers": {"app": {}}, "initContainers": "none"}},
    "no pod": {"spec": "hello"},
    "nothing": {"spec": None},
}  # fmt: skip


def reports(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What is said of each pod, and that there is nothing else but the last line."""
    *each, last = done.stdout.split("\n\n")
    found = dict(text.removeprefix("Pod ").split(", container liveness-probe\n") for text in each)
    assert last.startswith(f"livenessprobe containers: {len(each)}; ")
    assert len(found) == len(each)
    return found


def test_what_others_have_is_no_error(folder: Path) -> None:
    """A file for each, with a sidecar of its own at the end: an error would name the file."""
    files = [folder / name for name in UNRELATED]
    for file in files:
        other = UNRELATED[file.name]
        of_others = [
            {"kind": kind, "metadata": {"name": "other"}, "spec": {"template": other}}
            for kind in ("Deployment", "Anything")
        ]
        own = changed({"metadata.name": file.name})
        listed = {"kind": "List", "items": [*of_others, {"kind": "Pod"} | other, "hello", None, own]}
        file.write_text(yaml.safe_dump(listed))

    done = script(*files)

    assert done.stderr == ""
    assert done.returncode == 0
    assert list(reports(done)) == list(UNRELATED)


def test_a_container_beside_the_sidecar_is_read_for_its_probes_alone() -> None:
    driver = GOOD["spec"]["containers"][0]
    odd = driver | {"args": ["{{ a }}", 5], "resources": {"limits": {"memory": "lots"}}}

    assert found_in({"spec.containers.0": odd}) == found_in({})


def test_text_that_yaml_would_read_as_something_else() -> None:
    config_map = "kind: ConfigMap\ndata: {a: =, b: 2026-99-99, c: 2026-10-11, <<: {d: <<}}\n"

    done = script("-", stdin=f"{config_map}---\n{yaml.safe_dump(GOOD)}")

    assert (done.returncode, done.stderr) == (0, "")
    [read] = yaml_nodes.documents(config_map)
    assert read["data"].value == {"a": "=", "b": "2026-99-99", "c": "2026-10-11", "d": "<<"}


def test_variables_are_replaced_as_the_kubelet_does() -> None:
    variables = [
        {"name": "DIR", "value": "/csi"},
        {"name": "ADDRESS", "value": "$(DIR)/csi.sock"},
        {"name": "EMPTY"},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "BOTH", "value": "$(NODE)-$(DIR)"},
    ]
    arguments = [
        "$(ADDRESS)",
        "a$(EMPTY)b",
        "$$(DIR)",
        "$(NONE)",
        "$(DIR",
        "$",
        "-a",
        "$(NODE)",
        "-b=$(BOTH)",
        "c",
        "-d=e",
        "$(NODE)",
    ]
    container = {"name": "x", "image": "livenessprobe", "env": variables, "args": arguments}

    def expanded(more: dict[str, Any]) -> manifest.Container:
        document = {"kind": "Pod", "spec": {"containers": [container | more]}}
        return manifest.pods(yaml.safe_dump(document))[0].containers[0]

    assert expanded({}).args == ("/csi/csi.sock", "ab", "$(DIR)", "$(NONE)", "$(DIR", "$", "c", "-d=e")
    assert expanded({}).unknown == ("-a $(NODE)", "-b=$(BOTH)", "$(NODE)")
    assert expanded({}).undefined == (("$(NONE)", "NONE"),)
    chain = [
        {"name": "A", "value": "$(LATER)"},
        {"name": "LATER", "value": "x"},
        {"name": "B", "value": "$(A)"},
    ]
    assert expanded({"env": chain, "args": ["$(B)"]}).undefined == (("$(B)", "LATER"),)
    # If more variables are elsewhere, an undefined one may be among them.
    incomplete = expanded({"envFrom": [{"configMapRef": {"name": "y"}}]})
    assert (incomplete.unknown[0], incomplete.undefined) == ("$(NONE)", ())


NOT_MEANT = {
    "--csi-address=$(NOWHERE)": "the container has no variable NOWHERE, so the text stays as it is",
    "--csi-address=/csi/$(NOWHERE).sock": "the container has no variable NOWHERE",
    "--csi-address=${ADDRESS}": "Kubernetes does not replace ${ADDRESS}: write $(ADDRESS), or the value",
    "--csi-address=/csi/csi.sock --v=5": "two flags in one argument",
    "--csi-address=/csi/csi.sock\n--v=5": "two flags in one argument",
    "--csi-address=/csi/csi.sock\n": "a character that cannot be printed",
    "--csi-address=/csi/csi\x1b[2J.sock": "a character that cannot be printed",
    "--csi-address= /csi/csi.sock": "a space in an argument",
    "--csi-address /csi/csi.sock": "a space in an argument",
}


def test_an_argument_that_is_not_what_was_meant_breaks() -> None:
    pods = [changed({"metadata.name": str(n), ARGS: [each]}) for n, each in enumerate(NOT_MEANT)]

    done = script("-", stdin=yaml.safe_dump_all(pods))

    said = reports(done)
    for number, (argument, expected) in enumerate(NOT_MEANT.items()):
        escaped = argument.replace("\n", "\\n").replace("\x1b", "\\x1b")
        assert f"  breaks    {escaped}: {expected}" in said[str(number)]
    # Each counts alone, and one would do for the exit code.
    assert done.stdout.endswith(f"with something that would break: {len(NOT_MEANT)}\n")
    assert done.returncode == 1
    assert done.stdout.replace("\n", "").isprintable()


def test_folded_yaml_is_seen_through() -> None:
    text = yaml.safe_dump(changed({ARGS: ["FOLDED"]})).replace(
        "- FOLDED", f"- >-\n        {A}\n        --v=5\n"
    )

    assert f"breaks    {A} --v=5: two flags in one argument" in script("-", stdin=text).stdout


@pytest.mark.parametrize(
    ("path", "request_path"),
    [
        ("/healthz", "/healthz"),
        ("healthz", "/healthz"),
        ("", "/"),
        ("/healthz?verbose", "/healthz"),
        ("/healthz#x?y", "/healthz"),
        ("/healthz/", "/healthz/"),
        ("//healthz", "/"),
        ("//x/healthz", "/healthz"),
        ("///healthz", "///healthz"),
        ("https://x:1/healthz", "/healthz"),
        ("https://x", "/"),
        ("https:/healthz", "/healthz"),
        ("https:healthz", ""),
        ("/health z", "/health%20z"),
        ("/%68ealthz", "/%68ealthz"),
        ("/healthz\n", "/healthz%0A"),
        ("healthz?\n", "/healthz%3F%0A"),
    ],
)
def test_paths_as_the_kubelet_sends_them(path: str, request_path: str) -> None:
    assert sent(path) == request_path


@pytest.mark.parametrize("path", ["/healthz", "/healthz/", "//healthz", "/%68ealthz", "/healthz%20"])
def test_a_path_is_found_where_the_program_serves_it(path: str, probe: program.Probe) -> None:
    """What is sent for `path`, and what the rule says, beside what the program answers."""
    found = found_in({HTTP_GET + ".path": path})

    assert (probe.get(sent(path)).status == 404) == bool(findings_of(Kind.BREAKS, found))


# ---- files that are none, exit codes


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "line 1: not YAML: "),
        ("a: b\n c: d\n", "line 2: not YAML: mapping values are not allowed here"),
        ("kind: Pod\nspec: {{ .Values.spec }}\n", "line 2: a template, not a manifest: render it first, as by `helm template`"),
        ("kind: Pod\nspec: {containers: [{image: '{{ .Values.image }}'}]}", "spec.containers[0].image: a template, not a manifest: "),
        ("hello", "a document: not a mapping: 'hello'"),
        ("- kind: Pod", "a document: not a mapping: "),
        ("a: b", "not a Kubernetes object: it has no kind"),
        ("kind: [Pod]", "kind: not a string: ['Pod']"),
        ("kind: Pod\nspec: {containers: [{image: livenessprobe, command: /livenessprobe}]}", "spec.containers[0].command: not a list: '/livenessprobe'"),
        ("kind: Pod\nspec: {containers: [{image: livenessprobe, args: [5]}]}", "spec.containers[0].args[0]: not a string: 5"),
        ("kind: Pod\nspec: {containers: [{image: livenessprobe, args: ['{{ a }}']}]}", "spec.containers[0].args[0]: a template, not a manifest: "),
        ("kind: Pod\nspec: {hostNetwork: 1, containers: [{image: livenessprobe}]}", "spec.hostNetwork: not true or false: 1"),
        ("kind: Pod\nspec: {securityContext: {runAsUser: true}, containers: [{image: livenessprobe}]}", "spec.securityContext.runAsUser: not a whole number: True"),
        ("kind: Pod\nspec: {containers: [{image: livenessprobe, resources: {limits: {memory: lots}}}]}", "spec.containers[0].resources.limits.memory: not a quantity: 'lots'"),
        ("kind: Pod\nspec: {nodeSelector: &a [*a], containers: [{image: livenessprobe}]}", "spec.nodeSelector: not a mapping: "),
        ("kind: Pod\na: !!int b", "not YAML: invalid literal for int"),
        ("kind: Pod\na: !!bool b", "not YAML: 'b'"),
        ("[\n" * 1500, "not YAML: "),  # a line each: on one line PyYAML looks ahead for a key at each bracket
    ],
)  # fmt: skip
def test_what_is_no_manifest_gets_one_line(text: str, line: str, folder: Path) -> None:
    file = folder / "manifest.yaml"
    file.write_text(text)
    done = script(file)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"check-manifest: {file}: {line}")
    assert done.stderr.count("\n") == 1


def test_files_that_cannot_be_read(folder: Path) -> None:
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    none, directory, binary = (script(name) for name in (folder / "none", folder, folder / "binary"))

    assert none.stderr == f"check-manifest: {folder}/none: no such file or directory\n"
    assert directory.stderr == f"check-manifest: {folder}: is a directory\n"
    assert binary.stderr == f"check-manifest: {folder}/binary: not text\n"
    assert {done.returncode for done in (none, directory, binary)} == {2}
    assert script().stderr.startswith("check-manifest: no manifest given: ")
    assert script("-", stdin=b"\xff").stderr == "check-manifest: -: not text\n"


def test_exit_codes_and_image() -> None:
    good, bad = yaml.safe_dump(GOOD), yaml.safe_dump(changed({ARGS: ["--no-such-flag"]}))

    fine, both, none = script("-", stdin=good), script("-", stdin=f"{good}---\n{bad}"), script("-")

    assert (fine.returncode, both.returncode, none.returncode) == (0, 1, 0)
    assert both.stdout.endswith("\nlivenessprobe containers: 2; with something that would break: 1\n")
    assert none.stdout == (
        "livenessprobe containers: 0; with something that would break: 0\n"
        "Nothing here looks like one: no image, program, name or flags of a livenessprobe in any pod.\n"
    )
    named = script("--image=registry.example/livenessprobe:v2.19.0", "-", stdin=good)
    assert "image " not in named.stdout
    assert f"  image     {SUGGESTED} (instead of registry.example/" in fine.stdout


def test_the_suggested_image_is_of_this_version() -> None:
    """And in a registry that does not exist: by default, the Makefile gives a build the name of upstream's own image."""
    assert f"registry.example/csi/livenessprobe:{livenessprobe.__version__}" == SUGGESTED


# ---- the file


def test_the_file_is_the_same_whenever_it_is_packed(folder: Path) -> None:
    checker.pack(folder / "again")

    assert (folder / "again").read_bytes() == Path(check_manifest()).read_bytes()


def test_the_file_needs_nothing_but_a_python(folder: Path) -> None:
    """Outside a checkout, with Python's own modules alone, and beside a folder of ours that it must not use."""
    copy = folder / "check-manifest"
    shutil.copy(check_manifest(), copy)
    (folder / "livenessprobe").mkdir()
    (folder / "livenessprobe" / "__init__.py").write_text("raise SystemExit('not this one')")
    done = subprocess.run(
        [sys.executable, "-IS", copy, "-"],
        capture_output=True,
        check=False,
        cwd=folder,
        input=yaml.safe_dump(GOOD),
        text=True,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "containers: 1;" in done.stdout
    with zipfile.ZipFile(copy) as packed:
        names = packed.namelist()
        assert "livenessprobe/LICENSE" in names
        assert any(re.fullmatch(r"(?i)pyyaml-[\d.]+\.dist-info/(licenses/)?LICENSE", name) for name in names)


def make(*variables: str) -> subprocess.CompletedProcess[str]:
    # As from a shell, though `make test` may run this.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", "-C", str(ROOT), "check-manifest", *variables]
    return subprocess.run(command, capture_output=True, check=False, env=env, text=True)


def test_make_target() -> None:
    done = make(f"FILE={FIELD}", "SUGGEST=registry.test/probe:1")

    assert done.returncode == 2
    assert "check-manifest] Error 1" in done.stderr
    assert done.stdout == FIELD.with_suffix(".txt").read_text().replace(SUGGESTED, "registry.test/probe:1")


def test_make_target_takes_a_name_with_a_blank(folder: Path) -> None:
    file = folder / "with a blank.yaml"
    file.write_text(yaml.safe_dump(GOOD))

    done, none = make(f"FILE={file}"), make()

    assert (done.returncode, done.stderr) == (0, "")
    assert "containers: 1;" in done.stdout
    assert none.stderr.startswith("check-manifest: no manifest given: ")


def test_ends_in_silence_when_nobody_reads_on() -> None:
    nobody, output = os.pipe()
    os.close(nobody)
    done = subprocess.run(
        [check_manifest(), FIELD], check=False, env=os.environ | PATH, stdout=output, stderr=subprocess.PIPE
    )
    os.close(output)

    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


KEYS = """kind spec template metadata name items containers initContainers image command args env value valueFrom
    envFrom resources limits requests memory securityContext runAsUser ports livenessProbe httpGet port path host
    timeoutSeconds volumeMounts mountPath os""".split()
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
WORDS = st.sampled_from(
    [A, "--http-endpoint=:1", "livenessprobe", "Pod", "List", "$(A)", "/healthz", "9808", "64Mi"]
)
TREES = st.recursive(
    SCALARS | WORDS,
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | SCALARS, below, max_size=6)
    ),
    max_leaves=30,
)


@settings(max_examples=300)
@given(
    tree=TREES,
    path=st.sampled_from(["", "spec", "spec.containers.1", ARGS, HTTP_GET, SECURITY]),
)
def test_any_yaml_is_checked_or_refused(tree: object, path: str) -> None:
    document = changed({path: tree}) if path else tree

    with suppress(ManifestError):
        for pod in manifest.pods(yaml.safe_dump(document)):
            for container in pod.containers:
                assert all(isinstance(each.text, str) for each in check(pod, container))
