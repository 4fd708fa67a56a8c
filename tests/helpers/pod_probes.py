"""What the kubelet does with a manifest and podman 4.3 does not: it resolves names and variables, and makes probes."""

from __future__ import annotations

import contextlib
import copy
import http.client
import re
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from podman_engine import Pod

Manifest: TypeAlias = dict[str, Any]
NODE = {"spec.nodeName": "node-1"}
KINDS = ("startupProbe", "livenessProbe", "readinessProbe")


def pod_spec(manifest: Manifest) -> Manifest:
    """The part that describes the pod."""
    template: Manifest = manifest if manifest["kind"] == "Pod" else manifest["spec"]["template"]
    spec: Manifest = template["spec"]
    return spec


def containers(manifest: Manifest) -> list[Manifest]:
    """All of them, in the order in which they start."""
    spec = pod_spec(manifest)
    return [*spec.get("initContainers", []), *spec["containers"]]


def resolved(manifest: Manifest) -> Manifest:
    """The manifest with values instead of names: fields of the pod, and $(VARIABLES)."""
    manifest = copy.deepcopy(manifest)
    for container in containers(manifest):
        values: dict[str, str] = {}
        for variable in container.get("env", []):
            if source := variable.pop("valueFrom", None):
                variable["value"] = NODE[source["fieldRef"]["fieldPath"]]
            values[variable["name"]] = variable["value"]
        for words in (container.get("command", []), container.get("args", [])):
            words[:] = [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], word) for word in words]  # noqa: B023
    return manifest


def port(container: Manifest, probe: Manifest) -> int:
    """The port that a probe asks; a name refers to its own container's ports."""
    asked = probe["port"]
    if isinstance(asked, int):
        return asked
    [number] = [each["containerPort"] for each in container["ports"] if each["name"] == asked]
    return int(number)


class Answer(NamedTuple):
    """A probe's result: whether it succeeded, and its text, which the kubelet's event quotes only for an exec probe."""

    success: bool
    text: str


class Kubelet:
    """Makes the probes of a pod that podman plays, and restarts a container when its livenessProbe fails."""

    # Longer than in any manifest, so that a slow machine fails no test. Other tests compare the manifests with the program.
    TIMEOUT = 60.0

    def __init__(self, manifest: Manifest, pod: Pod) -> None:
        self._containers = {container["name"]: container for container in containers(manifest)}
        self._pod = pod

    def ask(self, name: str, kind: str) -> Answer:
        container = self._containers[name]
        probe = container[kind]
        if "exec" in probe:
            done = self._pod.execute(name, *probe["exec"]["command"], timeout=self.TIMEOUT)
            return Answer(done.returncode == 0, done.stdout.strip())
        asked = probe.get("httpGet") or probe["tcpSocket"]
        address = asked.get("host", self._pod.address), port(container, asked)
        if "tcpSocket" in probe:
            with socket.create_connection(address, self.TIMEOUT):
                return Answer(success=True, text="")
        connection = http.client.HTTPConnection(*address, timeout=self.TIMEOUT)
        with contextlib.closing(connection):
            connection.request("GET", asked["path"])
            with connection.getresponse() as response:
                return Answer(200 <= response.status < 400, response.read().decode())

    def path(self, name: str, kind: str) -> str:
        """What the probe asks for over HTTP; None if there is no such probe."""
        return str(self._containers[name].get(kind, {}).get("httpGet", {}).get("path", ""))

    def wait(self, name: str, kind: str, timeout: float = 30.0) -> None:
        """Repeat the probe until it succeeds."""
        end = time.monotonic() + timeout
        answer = Answer(success=False, text="")
        while not answer.success:
            assert time.monotonic() < end, f"{kind} of {name} fails: {answer.text}\n{self._logs()}"
            with contextlib.suppress(OSError, http.client.HTTPException, subprocess.SubprocessError):
                answer = self.ask(name, kind)
            time.sleep(0.05)

    def watch(self, name: str) -> bool:
        """Ask its livenessProbe, and restart it after as many failures in a row as the manifest allows."""
        for _ in range(self._containers[name]["livenessProbe"]["failureThreshold"]):
            if self.ask(name, "livenessProbe").success:
                return False
        self._pod.restart(name)
        return True

    def _logs(self) -> str:
        return "\n".join(f"{name}: {self._pod.log(name)}" for name in self._containers)
