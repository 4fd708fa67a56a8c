"""The pods in Kubernetes manifests that have a liveness sidecar, as far as it is concerned.

A file is often all of a cluster: so nothing in it is an error but what is read of a pod with a livenessprobe.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from yaml_nodes import ManifestError, Node, documents

if TYPE_CHECKING:
    from collections.abc import Iterator

# Where the pod's spec is, in kinds that do not have it at spec.template.spec.
_SPEC_AT = {"Pod": "spec", "PodTemplate": "template.spec", "CronJob": "spec.jobTemplate.spec.template.spec"}
# An image that is still a template may be anything: to read it says so.
_BY_IMAGE = re.compile(r"(^|/)(csi-)?liveness-?probe([:@]|$)|\{\{")
_BY_NAME = re.compile(r"liveness-?probe")
_BY_PROGRAM = re.compile(r"(^|[/\\])livenessprobe(\.exe)?$")
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
    """A livenessprobe container, with what it takes over from the pod's security context."""

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
    """Bytes; None for 0 too, which bounds nothing."""
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
    """Those that run a livenessprobe, in the order of their start."""
    probes: tuple[HTTPProbe, ...]
    host_network: bool
    windows: bool


def pods(text: str) -> list[Pod]:
    """Find the pods with a livenessprobe in all documents; raises ManifestError."""
    found: list[Pod] = []
    for document in documents(text):
        kind = document["kind"].text()
        if not kind:
            raise ManifestError("not a Kubernetes object: it has no kind")
        listed = kind.endswith("List") and isinstance(document["items"].value, list)
        objects = document["items"].items() if listed else [document]
        # The API leaves the kind out of the items of its typed lists.
        found += filter(None, (_pod(each, kind.removesuffix("List")) for each in objects))
    return found


def _pod(found: Node, kind: str) -> Pod | None:
    """Read the pod of an object, of this kind where it says none; None where there is no livenessprobe in it."""
    try:
        kind = found["kind"].text() or kind
        spec = found.at(_SPEC_AT.get(kind, "spec.template.spec"))
        init, regular = spec["initContainers"].items(), spec["containers"].items()
        init_sidecars, sidecars = list(filter(_is_sidecar, init)), list(filter(_is_sidecar, regular))
    except ManifestError:  # a custom resource may have anything in these places
        return None
    if not init_sidecars and not sidecars:
        return None
    metadata = found["metadata"]
    systems = [spec.at("os.name"), *(spec["nodeSelector"][label] for label in _SYSTEM_LABELS)]
    return Pod(
        name=f"{kind} {metadata['name'].text() or metadata['generateName'].text()}".rstrip(),
        containers=(
            *(_container(each, spec, each["restartPolicy"].text() != "Always") for each in init_sidecars),
            *(_container(each, spec, False) for each in sidecars),
        ),
        probes=tuple(probe for each in (*init, *regular) for probe in _probes(each)),
        host_network=bool(spec["hostNetwork"].flag()),
        windows="windows" in [system.text() for system in systems],
    )


def _is_sidecar(container: Node) -> bool:
    """Recognise a livenessprobe, by its image, else by its program, or by its name and a flag that all of them have."""
    image, name, command, args = (container[key].words() for key in ("image", "name", "command", "args"))
    if any(map(_BY_IMAGE.search, image)) or any(map(_BY_PROGRAM.search, command[:1])):
        return True
    return any(map(_BY_NAME.search, name)) and any("-csi-address" in word for word in (*command, *args))


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
        memory_request=found.at("resources.requests.memory").quantity() or None,
        memory_limit=found.at("resources.limits.memory").quantity() or None,
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
            elif not written.startswith("-") and known and re.fullmatch("-[^=]+", known[-1]):
                unknown.append(f"{known.pop()} {written}")  # the flag that it is the value of
            else:
                unknown.append(written)
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
