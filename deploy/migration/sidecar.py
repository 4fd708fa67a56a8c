"""What this livenessprobe would make of a sidecar's arguments, probes, ports, volumes, limits and user; pure rules."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from arguments import SERVING, arguments, parse, served, unknown, written
from finding import Finding, Kind
from probing import HEALTH_PATHS, probes
from releases import origin

from livenessprobe.quoting import quote

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manifest import Container, Mount, Pod

    from livenessprobe.config import Config, Endpoint

PROGRAM = "/livenessprobe"
# MiB, see docs/image.md: the least it works with, what to request, and what to limit it to.
LEAST_MEMORY, REQUESTED_MEMORY, ADVISED_MEMORY = 24, 32, 64
_EVERYWHERE = re.compile(r"(0\.0\.0\.0|::)?")
_SHELLS = ("sh", "bash", "dash", "ash", "busybox")


def check(pod: Pod, container: Container) -> Iterator[Finding]:
    """Return all findings on one livenessprobe container."""
    program = container.command[0] if container.command else PROGRAM
    if pod.windows or program.endswith(".exe"):
        yield Finding(
            Kind.BREAKS, "Windows: this program runs on Linux; keep the image you have on these nodes"
        )
    elif program.rpartition("/")[2] in _SHELLS:
        yield Finding(
            Kind.BREAKS, f"command: the image has no {program} and no other shell: give the flags as args"
        )
        return
    elif program != PROGRAM:
        yield Finding(Kind.BREAKS, f"command: in the image the program is {PROGRAM}, not {program}")
    elif container.command and not re.search("liveness-?probe", container.image):
        yield Finding(
            Kind.CHANGES,
            "the program is copied into an image of your own: take the one below, or see docs/hosts.md",
        )
    yield from written(container)
    accepted = parse(container)
    if isinstance(accepted, Finding):
        yield accepted
    else:
        yield from _flags(accepted, pod, container)
    yield from _memory(container)
    yield from _security(container)


def _flags(accepted: Config, pod: Pod, container: Container) -> Iterator[Finding]:
    """Judge the flags' values, but not by the default if a flag's value is elsewhere."""
    elsewhere = unknown(container)
    line = " ".join(arguments(container)) or "no arguments"
    yield Finding(Kind.ACCEPTED, f"{line} (without the unknown)" if elsewhere else line)
    for message, flag in accepted.warnings:
        yield Finding(Kind.WARNS, f"{quote(message)} flag={quote(flag)}")
    yield from origin(accepted, container)
    if not elsewhere & {"once", "version"}:
        yield from _lifetime(accepted, container)
    if not accepted.once and not elsewhere & SERVING:
        yield from _endpoints(accepted, pod, container)
        yield from probes(accepted, pod, container)
    if "csi-address" not in elsewhere and accepted.socket_path is not None:
        yield from _socket(PurePosixPath(accepted.socket_path), pod, container)


def _lifetime(accepted: Config, container: Container) -> Iterator[Finding]:
    if accepted.version:
        yield Finding(Kind.BREAKS, "it prints its version and ends")
    elif accepted.once and not container.must_end:
        yield Finding(
            Kind.BREAKS, "--once ends after one check: right for an init container or an exec probe alone"
        )
    elif container.must_end and not accepted.once:
        yield Finding(
            Kind.BREAKS,
            "an init container has to end, but this one serves: write restartPolicy: Always, or --once",
        )


def _endpoints(accepted: Config, pod: Pod, container: Container) -> Iterator[Finding]:
    health, metrics = accepted.health, accepted.metrics
    where = f"{health.host or 'all addresses'}, port {health.port}"
    measured = f"metrics at {accepted.metrics_path} there too"
    if metrics is None:
        measured = f"no metrics (--http-endpoint=:{health.port} would serve both)"
    elif metrics != health:
        measured = f"metrics at {metrics.value}{accepted.metrics_path}"
    yield Finding(Kind.SERVES, f"{', '.join(HEALTH_PATHS)} on {where}; {measured}")
    if metrics not in (None, health) and _collide(metrics, health):
        yield Finding(
            Kind.BREAKS,
            f"health and metrics cannot both listen on port {health.port}: address already in use",
        )
    for before in takewhile(lambda each: each is not container, pod.containers):
        for port in _collisions(container, before):
            yield Finding(
                Kind.BREAKS, f"{before.name} listens on port {port} of this pod too: address already in use"
            )
    if pod.host_network and health.port == 9808:
        yield Finding(
            Kind.ADVICE, "hostNetwork: port 9808 is the node's, and every driver's default: choose another"
        )


def _collisions(one: Container, other: Container) -> list[int]:
    """Find the ports that two containers of a pod cannot both have."""
    return sorted({each.port for each in served(one) if any(_collide(each, its) for its in served(other))})


def _collide(one: Endpoint, other: Endpoint) -> bool:
    hosts = {each.host.lower().replace("localhost", "127.0.0.1") for each in (one, other)}
    same = len(hosts) == 1 or any(map(_EVERYWHERE.fullmatch, hosts))
    return same and one.port == other.port != 0  # 0: the system finds a free one


def _socket(socket: PurePosixPath, pod: Pod, container: Container) -> Iterator[Finding]:
    """Judge whether the driver's socket can be where it is looked for."""
    mounts = [mount for mount in container.mounts if socket.is_relative_to(mount.path)]
    if not mounts:
        yield Finding(Kind.BREAKS, f"no volume is mounted where the socket {socket} should be")
        return
    mount = max(mounts, key=lambda each: len(PurePosixPath(each.path).parts))
    if mount.volume not in pod.volumes:
        yield Finding(Kind.BREAKS, f"the volume {mount.volume} is declared nowhere in the pod")
    elif not _shared(_place(socket, mount, pod), mount, pod):
        yield Finding(
            Kind.BREAKS,
            f"the volume {mount.volume}, where the socket {socket} should be, is not mounted by the driver",
        )


def _place(socket: PurePosixPath, mount: Mount, pod: Pod) -> PurePosixPath | None:
    """Where on the node the socket is; None if it is in a volume of the pod's own."""
    folder = pod.volumes[mount.volume]
    return PurePosixPath(folder) / socket.relative_to(mount.path) if folder else None


def _shared(place: PurePosixPath | None, mount: Mount, pod: Pod) -> bool:
    """Whether a container that may be the driver has the volume, or the same folder of the node by another name."""
    drivers = [each for each in pod.neighbours if not each.client]
    if not drivers:
        return place is not None  # it is on the node, or in another pod there
    return any(
        each.volume == mount.volume or _holds(pod.volumes.get(each.volume, ""), place)
        for driver in drivers
        for each in driver.mounts
    )


def _holds(folder: str, place: PurePosixPath | None) -> bool:
    return bool(folder) and place is not None and place.is_relative_to(folder)


def _memory(container: Container) -> Iterator[Finding]:
    limit, request = container.memory_limit, container.memory_request
    advice = f"request {REQUESTED_MEMORY}Mi and limit to {ADVISED_MEMORY}Mi"
    if limit is not None and limit < LEAST_MEMORY * 2**20:
        text = f"a memory limit of {limit / 2**20:g}Mi: it would read its own files again and again: {advice}"
        yield Finding(Kind.BREAKS, text)
    elif limit is not None and limit < ADVISED_MEMORY * 2**20:
        yield Finding(Kind.ADVICE, f"a memory limit of {limit / 2**20:g}Mi is just enough: {advice}")
    elif request is not None and request < REQUESTED_MEMORY * 2**20:
        yield Finding(Kind.ADVICE, f"memory: it uses more than the {request / 2**20:g}Mi requested: {advice}")


def _security(container: Container) -> Iterator[Finding]:
    if container.non_root and not container.user:
        yield Finding(
            Kind.BREAKS, "runAsNonRoot, but the user is root, as in the image: the kubelet will not start it"
        )
    elif container.user:
        text = f"it runs as uid {container.user}: that user must be able to write to the driver's socket"
        yield Finding(Kind.ADVICE, text)
    if container.privileged:
        yield Finding(
            Kind.ADVICE,
            "privileged is not needed, unless SELinux keeps it from the socket: see docs/operations.md",
        )
    settings = {
        "readOnlyRootFilesystem: true": container.read_only,
        "allowPrivilegeEscalation: false": not container.may_escalate,
        "capabilities: {drop: [ALL]}": container.drops_all,
    }
    if possible := [setting for setting, there in settings.items() if not there]:
        yield Finding(Kind.ADVICE, f"securityContext: it also runs with {', '.join(possible)}")
