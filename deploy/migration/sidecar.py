"""What this livenessprobe would make of a sidecar's arguments, probes, ports, limits and user; pure rules."""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from livenessprobe import config, goflags
from livenessprobe.quoting import quote

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from manifest import Container, HTTPProbe, Pod

    from livenessprobe.config import Config

PROGRAM = "/livenessprobe"
HEALTH_PATHS = ("/healthz", "/livez", "/readyz")
LEAST_MEMORY, ADVISED_MEMORY = 32, 64  # MiB, see docs/image.md
_LOOPBACK = re.compile(r"localhost|127\.[0-9.]+|\[?::1\]?", re.IGNORECASE)
_SHELLS = ("sh", "bash", "dash", "ash", "busybox")


class Kind(enum.Enum):
    """What a finding means for who deploys; REFUSED and BREAKS have to be dealt with first."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    BREAKS = "breaks"
    WARNS = "warns"
    UNKNOWN = "unknown"
    SERVES = "serves"
    CHANGES = "changes"
    ADVICE = "advice"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    kind: Kind
    text: str


def check(pod: Pod, container: Container) -> Iterator[Finding]:
    """Give all findings on one livenessprobe container."""
    program, *more = container.command or (PROGRAM,)
    arguments = (*more, *container.args)
    if pod.windows or program.endswith(".exe"):
        yield Finding(
            Kind.BREAKS, "Windows: this program runs on Linux; keep the image you have on these nodes"
        )
    elif program.rpartition("/")[2] in _SHELLS:
        yield Finding(
            Kind.BREAKS, f"command: the image has no {program}, nor another shell: give the flags as args"
        )
        return
    elif program != PROGRAM:
        yield Finding(Kind.BREAKS, f"command: in the image the program is {PROGRAM}, not {program}")
    elif container.command and not re.search("liveness-?probe", container.image):
        yield Finding(
            Kind.CHANGES, "the program is copied into an image of your own: take the one below, or see README"
        )
    for written in container.unknown:
        yield Finding(Kind.UNKNOWN, f"{written}: the variable's value is not in this file; not checked")
    accepted = yield from _parse(arguments)
    if accepted is not None:
        yield from _origin(container.image, arguments)
        yield from _lifetime(accepted, container)
        if not accepted.once:
            yield from _endpoints(accepted, pod)
            for probe in _asking(accepted, pod):
                yield from _probe(probe, accepted, pod, container)
        yield from _socket(accepted, container)
    yield from _memory(container)
    yield from _security(container)


def _parse(arguments: tuple[str, ...]) -> Generator[Finding, None, Config | None]:
    """Read the arguments as the program does; yield its own words, and return what it accepts."""
    try:
        accepted = config.parse(arguments)
    except goflags.HelpRequested:
        yield Finding(Kind.BREAKS, "it prints its usage and ends")
        return None
    except goflags.FlagError as error:
        yield Finding(Kind.REFUSED, f"exit 2: {error}")
        return None
    except config.ConfigError as error:
        values = {"err": error.reason, "flag": error.flag, "value": error.value}
        pairs = "".join(f" {key}={quote(value)}" for key, value in values.items())
        yield Finding(Kind.REFUSED, f'exit 1: "Bad configuration"{pairs}')
        return None
    yield Finding(Kind.ACCEPTED, " ".join(arguments) or "no arguments")
    for message, flag in accepted.warnings:
        yield Finding(Kind.WARNS, f"{quote(message)} flag={quote(flag)}")
    return accepted


def _origin(image: str, arguments: tuple[str, ...]) -> Iterator[Finding]:
    """Tell what was different in the reference's release that the image's tag names."""
    tag = re.search(r"liveness-?probe:v([0-9]+)\.([0-9]+)", image)
    if tag is None:
        return
    release = int(tag[1]), int(tag[2])
    given = goflags.parse(arguments, config.FLAGS)
    if release < (1, 0):
        yield Finding(
            Kind.BREAKS, "releases before v1.0 probe drivers of CSI 0.x; this program calls csi.v1.Identity"
        )
    elif release < (1, 1):
        yield Finding(
            Kind.CHANGES,
            "a check could take --connection-timeout, 30s; now it takes --probe-timeout, 3s, at most",
        )
    elif release < (2, 17) and "probe-timeout" not in given:
        yield Finding(Kind.CHANGES, "--probe-timeout was 1s where it was not given, and is 3s")
    if release == (1, 1) and "connection-timeout" in given:
        yield Finding(
            Kind.CHANGES, "--connection-timeout had no effect; now a check waits so long for the socket"
        )


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
            "an init container has to end, this one serves: write restartPolicy: Always, or --once",
        )


def _endpoints(accepted: Config, pod: Pod) -> Iterator[Finding]:
    health, metrics = accepted.health, accepted.metrics
    where = f"{health.host or 'all addresses'}, port {health.port}"
    measured = f"metrics at {accepted.metrics_path} there too"
    if metrics is None:
        measured = f"no metrics (--http-endpoint=:{health.port} would serve both)"
    elif metrics != health:
        measured = f"metrics at {metrics.value}{accepted.metrics_path}"
    yield Finding(Kind.SERVES, f"{', '.join(HEALTH_PATHS)} on {where}; {measured}")
    if metrics not in (None, health) and metrics.port == health.port:
        yield Finding(
            Kind.BREAKS,
            f"health and metrics cannot both listen on port {health.port}: address already in use",
        )
    if pod.host_network and health.port == 9808:
        yield Finding(
            Kind.ADVICE, "hostNetwork: port 9808 is the node's, and every driver's default: choose another"
        )
    asking = [probe for probe in pod.probes if probe.path.rstrip("/") in HEALTH_PATHS]
    for probe in asking:
        if probe.port is None:
            yield Finding(
                Kind.BREAKS, f"{probe} asks port {probe.port_name}, which its container does not name"
            )
        elif not _asking(accepted, pod):
            yield Finding(Kind.BREAKS, f"{probe} asks port {probe.port}, not {health.port}")
    if not asking and not _asking(accepted, pod):
        yield Finding(
            Kind.ADVICE, f"no HTTP probe of the pod asks port {health.port}: nobody hears the verdict"
        )


def _asking(accepted: Config, pod: Pod) -> list[HTTPProbe]:
    """Find the probes that reach this container."""
    return [probe for probe in pod.probes if probe.port == accepted.health.port]


def _probe(probe: HTTPProbe, accepted: Config, pod: Pod, container: Container) -> Iterator[Finding]:
    host = accepted.health.host
    if probe.scheme.upper() != "HTTP":
        yield Finding(Kind.BREAKS, f"{probe} asks over {probe.scheme}, this serves plain HTTP")
    if probe.path not in HEALTH_PATHS:
        yield Finding(Kind.BREAKS, f"{probe} asks {probe.path}, which is 404: write /healthz")
    if _LOOPBACK.fullmatch(host) and not pod.host_network:
        yield Finding(
            Kind.BREAKS,
            f"{probe} asks the pod's address, this listens on {host}: write :{accepted.health.port}",
        )
    elif _LOOPBACK.fullmatch(host) and not _LOOPBACK.fullmatch(probe.host):
        yield Finding(
            Kind.BREAKS,
            f"{probe} asks the node's address, this listens on {host}: add host: {host} to httpGet",
        )
    elif _LOOPBACK.fullmatch(probe.host) and not pod.host_network:
        yield Finding(Kind.BREAKS, f"{probe} asks {probe.host}, which is the node: remove host from httpGet")
    if probe.timeout < accepted.probe_timeout:
        yield Finding(
            Kind.ADVICE,
            f"{probe} ends after {probe.timeout}s, a check may take {accepted.probe_timeout:g}s: "
            f"write timeoutSeconds: {math.ceil(accepted.probe_timeout)}, or --probe-timeout={probe.timeout}s",
        )
    if probe.container == container.name:
        yield Finding(
            Kind.ADVICE, f"{probe} restarts this container, not the driver: move it to the driver's"
        )


def _socket(accepted: Config, container: Container) -> Iterator[Finding]:
    path = accepted.socket_path
    if path is not None and not any(PurePosixPath(path).is_relative_to(mount) for mount in container.mounts):
        yield Finding(Kind.BREAKS, f"no volume is mounted where the socket {path} is to be")


def _memory(container: Container) -> Iterator[Finding]:
    limit, request = container.memory_limit, container.memory_request
    advice = f"request {LEAST_MEMORY}Mi and limit to {ADVISED_MEMORY}Mi"
    if limit is not None and limit < LEAST_MEMORY * 2**20:
        text = f"a memory limit of {limit / 2**20:g}Mi: it would read its own files again and again: {advice}"
        yield Finding(Kind.BREAKS, text)
    elif limit is not None and limit < ADVISED_MEMORY * 2**20:
        yield Finding(
            Kind.ADVICE, f"a memory limit of {limit / 2**20:g}Mi is enough, without reserve: {advice}"
        )
    elif request is not None and request < LEAST_MEMORY * 2**20:
        yield Finding(Kind.ADVICE, f"memory: it uses more than the {request / 2**20:g}Mi requested: {advice}")


def _security(container: Container) -> Iterator[Finding]:
    if container.non_root and not container.user:
        yield Finding(
            Kind.BREAKS, "runAsNonRoot, but the user is root, the image's too: the kubelet does not start it"
        )
    elif container.user:
        text = f"it runs as uid {container.user}: the driver's socket has to be writable for that user"
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
