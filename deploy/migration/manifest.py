"""The pods in Kubernetes manifests that have a liveness sidecar, as far as it is concerned.

A file is often a whole cluster, so nothing in it is an error except in what is read of a pod with a livenessprobe.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from environment import Environment
from yaml_nodes import ManifestError, Node, documents

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# Where the pod's spec is, in kinds that do not have it at spec.template.spec.
_SPEC_AT = {"Pod": "spec", "PodTemplate": "template.spec", "CronJob": "spec.jobTemplate.spec.template.spec"}
# By the last part of its name, to which others who build it add: ose-csi-livenessprobe-rhel9. If an image's name is still
# a template, it may be anything: reading it says so.
_BY_IMAGE = re.compile(r"liveness-?probe[^/:@]*([:@][^/]*)?$|\{\{")
_BY_NAME = re.compile(r"liveness-?probe")
_BY_PROGRAM = re.compile(r"(^|[/\\])livenessprobe(\.exe)?$")
_ALIKE = re.compile(r"liveness|csi-?probe")
_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
_SYSTEM_LABELS = ("kubernetes.io/os", "beta.kubernetes.io/os")


@dataclass(frozen=True, slots=True)
class HTTPProbe:
    """One of the kubelet's HTTP probes."""

    kind: str
    container: str
    path: str
    port: int | None
    """None if port_name is not one of the container's ports."""
    port_name: str
    host: str
    """Empty for the pod's address."""
    scheme: str
    timeout: int
    """Seconds."""

    def __str__(self) -> str:
        return f"the {self.kind} of {self.container}"


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a container has a volume."""

    path: str
    volume: str


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A container beside a livenessprobe that is not one itself, and runs as long as the pod does."""

    name: str
    words: tuple[str, ...]
    """Its command, its arguments and the values of its variables."""
    mounts: tuple[Mount, ...]
    client: bool
    """Whether it calls the driver, as other sidecars do, and so is not the driver."""


@dataclass(frozen=True, slots=True)
class Container:
    """A livenessprobe container, with what it takes over from the pod's security context."""

    name: str
    image: str
    command: tuple[str, ...]
    args: tuple[str, ...]
    unknown: tuple[str, ...]
    """Arguments, as they are written, that use a variable whose value is elsewhere; they are not in args."""
    undefined: tuple[tuple[str, str], ...]
    """Arguments, and the variable in each that the container does not have."""
    must_end: bool
    """Whether the pod waits for it to end: an init container that is not a native sidecar."""
    mounts: tuple[Mount, ...]
    memory_request: float | None
    """Bytes; None for 0 too, which limits nothing."""
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
    """With its kind: `DaemonSet csi-node`."""
    lookalikes: tuple[str, ...]
    """The names of the containers that may or may not be a livenessprobe."""
    containers: tuple[Container, ...] = ()
    """Those that run a livenessprobe, in the order in which they start. If there is none, nothing below is read."""
    neighbours: tuple[Neighbour, ...] = ()
    probes: tuple[HTTPProbe, ...] = ()
    volumes: Mapping[str, str] = field(default_factory=dict)
    """The path on the node by the volume's name; empty for anything that is not a folder of the node."""
    host_network: bool = False
    windows: bool = False


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
    """Read the pod of an object, of this kind if it names none; None if there is no livenessprobe in it."""
    try:
        kind = found["kind"].text() or kind
        spec = found.at(_SPEC_AT.get(kind, "spec.template.spec"))
        init, regular = spec["initContainers"].items(), spec["containers"].items()
        sidecars = [each for each in (*init, *regular) if _is_sidecar(each)]
        others = [each for each in (*init, *regular) if each not in sidecars]
        alike = tuple("".join(each["name"].words()) for each in others if _looks_like_one(each))
        metadata = found["metadata"]
        names = [*metadata["name"].words(), *metadata["generateName"].words()]
    except ManifestError:  # a custom resource may have anything in these places
        return None
    name = " ".join([kind, *names[:1]])
    if not sidecars:
        return Pod(name, alike) if alike else None

    def ends(container: Node) -> bool:
        return container in init and container["restartPolicy"].text() != "Always"

    systems = [spec.at("os.name"), *(spec["nodeSelector"][label] for label in _SYSTEM_LABELS)]
    return Pod(
        name,
        alike,
        containers=tuple(_container(each, spec, ends(each)) for each in sidecars),
        neighbours=tuple(_neighbour(each) for each in others if not ends(each)),
        probes=tuple(probe for each in (*init, *regular) for probe in _probes(each)),
        volumes={
            **{each["name"].text(): each["hostPath"]["path"].text() for each in spec["volumes"].items()},
            **{each["metadata"]["name"].text(): "" for each in found.at("spec.volumeClaimTemplates").items()},
        },
        host_network=bool(spec["hostNetwork"].flag()),
        windows="windows" in [system.text() for system in systems],
    )


def _is_sidecar(container: Node) -> bool:
    """Recognise a livenessprobe by its image or its program, or by its name and a flag that every one of them has."""
    image, name, command, args = (container[key].words() for key in ("image", "name", "command", "args"))
    if any(map(_BY_IMAGE.search, image)) or any(map(_BY_PROGRAM.search, command[:1])):
        return True
    return any(map(_BY_NAME.search, name)) and any("-csi-address" in word for word in (*command, *args))


def _looks_like_one(container: Node) -> bool:
    """Whether a name, an image or two flags suggest a livenessprobe."""
    names = [word.rpartition("/")[2] for key in ("image", "name") for word in container[key].words()]
    given = " ".join([*container["command"].words(), *container["args"].words()])
    return any(map(_ALIKE.search, names)) or ("-csi-address" in given and "-probe-timeout" in given)


def _neighbour(found: Node) -> Neighbour:
    words = (*found["command"].words(), *found["args"].words())
    values = (word for variable in found["env"].items() for word in variable["value"].words())
    return Neighbour(
        name="".join(found["name"].words()),
        words=(*words, *values),
        mounts=_mounts(found),
        client=any("-csi-address" in word for word in words),
    )


def _mounts(container: Node) -> tuple[Mount, ...]:
    return tuple(
        Mount(mount["mountPath"].text(), mount["name"].text()) for mount in container["volumeMounts"].items()
    )


def _container(found: Node, spec: Node, must_end: bool) -> Container:
    own, shared = found["securityContext"], spec["securityContext"]
    user, non_root = own["runAsUser"].number(), own["runAsNonRoot"].flag()
    environment = Environment(found)
    command, unknown_command, undefined_command = environment.expand(found["command"])
    args, unknown_args, undefined_args = environment.expand(found["args"])
    return Container(
        name=found["name"].text(),
        image=found["image"].text(),
        command=command,
        args=args,
        unknown=unknown_command + unknown_args,
        undefined=undefined_command + undefined_args,
        must_end=must_end,
        mounts=_mounts(found),
        memory_request=found.at("resources.requests.memory").quantity() or None,
        memory_limit=found.at("resources.limits.memory").quantity() or None,
        user=shared["runAsUser"].number() if user is None else user,
        non_root=bool(shared["runAsNonRoot"].flag() if non_root is None else non_root),
        privileged=bool(own["privileged"].flag()),
        read_only=bool(own["readOnlyRootFilesystem"].flag()),
        may_escalate=own["allowPrivilegeEscalation"].flag() is not False,
        drops_all="ALL" in [each.text() for each in own.at("capabilities.drop").items()],
    )


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
