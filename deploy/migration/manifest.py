"""The pods in Kubernetes manifests, as far as a liveness sidecar is concerned. Knows no flag of ours."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from yaml_nodes import ManifestError, Node, documents

if TYPE_CHECKING:
    from collections.abc import Iterator

# Where the pod is, in kinds that do not have it at spec.template.
_POD_AT = {"Pod": "", "PodTemplate": "template", "CronJob": "spec.jobTemplate.spec.template"}
_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
_SYSTEM_LABELS = ("kubernetes.io/os", "beta.kubernetes.io/os")


@dataclass(frozen=True, slots=True)
class HTTPProbe:
    """One of the kubelet's HTTP probes."""

    kind: str
    container: str
    path: str
    port: int | None
    """None where port_name is not one of the container's ports."""
    port_name: str
    host: str
    """Empty for the pod's address."""
    scheme: str
    timeout: int
    """Seconds."""

    def __str__(self) -> str:
        return f"the {self.kind} of {self.container}"


@dataclass(frozen=True, slots=True)
class Container:
    """A container, with what it takes over from the pod's security context."""

    name: str
    image: str
    command: tuple[str, ...]
    args: tuple[str, ...]
    unknown: tuple[str, ...]
    """Arguments, as they are written, that use a variable whose value is elsewhere; they are not in args."""
    must_end: bool
    """Whether the pod waits for its end: an init container that is no native sidecar."""
    mounts: tuple[str, ...]
    memory_request: float | None
    """Bytes."""
    memory_limit: float | None
    user: int | None
    non_root: bool
    privileged: bool
    read_only: bool
    may_escalate: bool
    drops_all: bool


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod, or the template of many."""

    name: str
    """With the kind that it stands in: `DaemonSet csi-node`."""
    containers: tuple[Container, ...]
    probes: tuple[HTTPProbe, ...]
    host_network: bool
    windows: bool


def pods(text: str) -> list[Pod]:
    """Find the pods of all documents; raises ManifestError."""
    found: list[Pod] = []
    for document in documents(text):
        if not document["kind"].text():
            raise ManifestError("not a Kubernetes object: it has no kind")
        listed = document["kind"].text().endswith("List") and document["items"].value is not None
        for each in document["items"].items() if listed else [document]:
            found += _pods(each)
    return found


def _pods(found: Node) -> Iterator[Pod]:
    kind = found["kind"].text()
    template = found
    for key in filter(None, _POD_AT.get(kind, "spec.template").split(".")):
        if not isinstance(template[key].value, dict):  # a kind that has no pods
            return
        template = template[key]
    spec, metadata = template["spec"], found["metadata"]
    regular, init = spec["containers"].items(), spec["initContainers"].items()
    systems = [spec.at("os.name"), *(spec["nodeSelector"][label] for label in _SYSTEM_LABELS)]
    yield Pod(
        name=f"{kind} {metadata['name'].text() or metadata['generateName'].text()}".rstrip(),
        containers=(
            *(_container(each, spec, False) for each in regular),
            *(_container(each, spec, each["restartPolicy"].text() != "Always") for each in init),
        ),
        probes=tuple(probe for each in (*regular, *init) for probe in _probes(each)),
        host_network=bool(spec["hostNetwork"].flag()),
        windows="windows" in [system.text() for system in systems],
    )


def _container(found: Node, spec: Node, must_end: bool) -> Container:
    own, shared = found["securityContext"], spec["securityContext"]
    user, non_root = own["runAsUser"].number(), own["runAsNonRoot"].flag()
    environment = _Environment(found)
    command, unknown_command = environment.expand(found["command"])
    args, unknown_args = environment.expand(found["args"])
    return Container(
        name=found["name"].text(),
        image=found["image"].text(),
        command=command,
        args=args,
        unknown=unknown_command + unknown_args,
        must_end=must_end,
        mounts=tuple(mount["mountPath"].text() for mount in found["volumeMounts"].items()),
        memory_request=found.at("resources.requests.memory").quantity(),
        memory_limit=found.at("resources.limits.memory").quantity(),
        user=shared["runAsUser"].number() if user is None else user,
        non_root=bool(shared["runAsNonRoot"].flag() if non_root is None else non_root),
        privileged=bool(own["privileged"].flag()),
        read_only=bool(own["readOnlyRootFilesystem"].flag()),
        may_escalate=own["allowPrivilegeEscalation"].flag() is not False,
        drops_all="ALL" in [each.text() for each in own.at("capabilities.drop").items()],
    )


class _Environment:
    """The variables of a container, for `$(NAME)` in its arguments."""

    def __init__(self, container: Node) -> None:
        self._incomplete = container["envFrom"].value is not None
        self._values: dict[str, str | None] = {}
        for variable in container["env"].items():
            elsewhere = variable["valueFrom"].value is not None
            # A value may use the variables before it.
            value = None if elsewhere else self._replace(variable["value"].text())
            self._values[variable["name"].text()] = value

    def expand(self, arguments: Node) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the arguments that are known, expanded, and those that are not, as they are written."""
        known: list[str] = []
        unknown: list[str] = []
        for argument in arguments.items():
            written = argument.text()
            expanded = self._replace(written)
            if expanded is not None:
                known.append(expanded)
            elif written.startswith("-") or not known:
                unknown.append(written)
            else:  # the value of the flag before it
                unknown.append(f"{known.pop()} {written}")
        return tuple(known), tuple(unknown)

    def _replace(self, text: str) -> str | None:
        """Replace variables as the kubelet does: `$$` is a dollar, what is not defined stays. None: one is unknown."""
        unknown = False

        def value(found: re.Match[str]) -> str:
            nonlocal unknown
            if found[0] == "$$":
                return "$"
            known = self._values.get(found[1], None if self._incomplete else found[0])
            unknown |= known is None
            return known or ""

        expanded = re.sub(r"\$\$|\$\(([^)]*)\)", value, text)
        return None if unknown else expanded


def _probes(container: Node) -> Iterator[HTTPProbe]:
    ports = {port["name"].text(): port["containerPort"].number() for port in container["ports"].items()}
    for kind in _PROBES:
        asked = container[kind]["httpGet"]
        if asked.value is None:
            continue
        port = asked["port"]
        number = port.value if isinstance(port.value, int) else None
        name = "" if number is not None else port.text()
        yield HTTPProbe(
            kind=kind,
            container=container["name"].text(),
            path=asked["path"].text() or "/",
            port=number if not name else ports.get(name, int(name) if name.isdecimal() else None),
            port_name=name,
            host=asked["host"].text(),
            scheme=asked["scheme"].text() or "HTTP",
            timeout=container[kind]["timeoutSeconds"].number() or 1,  # the kubelet's default
        )
