"""What this livenessprobe would make of a sidecar's arguments, probes, ports, limits and user; pure rules."""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from livenessprobe import config, goflags
from livenessprobe.quoting import quote

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manifest import Container, HTTPProbe, Pod

    from livenessprobe.config import Config, Endpoint

PROGRAM = "/livenessprobe"
HEALTH_PATHS = ("/healthz", "/livez", "/readyz")
LEAST_MEMORY, ADVISED_MEMORY = 32, 64  # MiB, see docs/image.md
# The flags that say whether it serves, what, and where.
_SERVING = frozenset(("once", "version", "http-endpoint", "health-port", "metrics-address", "metrics-path"))
_LOOPBACK = re.compile(r"localhost|127\.[0-9.]+|\[?::1\]?", re.IGNORECASE)
_EVERYWHERE = re.compile(r"(0\.0\.0\.0|::)?")
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
    program = container.command[0] if container.command else PROGRAM
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
        yield Finding(
            Kind.UNKNOWN,
            f"{written}: the variable's value is not in this file; not checked, nor what depends on it",
        )
    accepted = _parse(container)
    if isinstance(accepted, Finding):
        yield accepted
    else:
        yield from _flags(accepted, pod, container)
    yield from _memory(container)
    yield from _security(container)


def _arguments(container: Container) -> tuple[str, ...]:
    return (*container.command[1:], *container.args)


def _parse(container: Container) -> Config | Finding:
    """Read the arguments as the program does: what it accepts, or a finding in its own words."""
    try:
        return config.parse(_arguments(container))
    except goflags.HelpRequested:
        return Finding(Kind.BREAKS, "it prints its usage and ends")
    except goflags.FlagError as error:
        return Finding(Kind.REFUSED, f"exit 2: {error}")
    except config.ConfigError as error:
        values = {"err": error.reason, "flag": error.flag, "value": error.value}
        pairs = "".join(f" {key}={quote(value)}" for key, value in values.items())
        return Finding(Kind.REFUSED, f'exit 1: "Bad configuration"{pairs}')


def _unknown(container: Container) -> set[str]:
    """Name the flags whose values are elsewhere; all flags, where an unknown argument does not say its flag."""
    names = {re.split("[= ]", written.lstrip("-"))[0] for written in container.unknown}
    known = {flag.name for flag in config.FLAGS}
    return known if names - known else names


def _flags(accepted: Config, pod: Pod, container: Container) -> Iterator[Finding]:
    """Judge the flags' values, but none by the default of a flag whose value is elsewhere."""
    unknown = _unknown(container)
    written = " ".join(_arguments(container)) or "no arguments"
    yield Finding(Kind.ACCEPTED, f"{written} (without the unknown)" if unknown else written)
    for message, flag in accepted.warnings:
        yield Finding(Kind.WARNS, f"{quote(message)} flag={quote(flag)}")
    yield from _origin(accepted, container)
    if not unknown & {"once", "version"}:
        yield from _lifetime(accepted, container)
    if not accepted.once and not unknown & _SERVING:
        yield from _endpoints(accepted, pod, container)
        for probe in _reaching(accepted, pod):
            yield from _request(probe, accepted, pod)
            if not _measures(probe, accepted):
                yield from _answer(probe, accepted, container)
    if "csi-address" not in unknown:
        yield from _socket(accepted, container)


def _origin(accepted: Config, container: Container) -> Iterator[Finding]:
    """Tell what was different in the reference's release that the image's tag names."""
    tag = re.search(r"liveness-?probe:v([0-9]+)\.([0-9]+)", container.image)
    if tag is None:
        return
    release, unknown = (int(tag[1]), int(tag[2])), _unknown(container)
    given = unknown.union(goflags.parse(_arguments(container), config.FLAGS))
    if release < (1, 0):
        yield Finding(
            Kind.BREAKS, "releases before v1.0 probe drivers of CSI 0.x; this program calls csi.v1.Identity"
        )
    elif release < (1, 1) and not unknown & {"connection-timeout", "probe-timeout"}:
        yield Finding(
            Kind.CHANGES,
            f"a check could take --connection-timeout, {accepted.connection_timeout:g}s; "
            f"now it takes --probe-timeout, {accepted.probe_timeout:g}s, at most",
        )
    elif (1, 1) <= release < (2, 17) and "probe-timeout" not in given:
        yield Finding(Kind.CHANGES, "--probe-timeout was 1s where it was not given, and is 3s")
    if release == (1, 1) and "connection-timeout" in given:
        yield Finding(
            Kind.CHANGES, "--connection-timeout had no effect; now a check waits so long for the socket"
        )
    if release < (1, 1):
        yield Finding(
            Kind.CHANGES,
            "/healthz was 200 for a driver that is not ready, and is 500, which restarts it; /livez keeps 200",
        )
    elif release == (1, 1):
        yield Finding(
            Kind.CHANGES,
            "/healthz cut the connection for a driver that is not ready, and is 500; /livez is 200",
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
    yield from _unheard(accepted, pod, container)


def _unheard(accepted: Config, pod: Pod, container: Container) -> Iterator[Finding]:
    """Find the probes that were to hear the verdict and do not."""
    heard = any(not _measures(probe, accepted) for probe in _reaching(accepted, pod))
    others = [each for each in pod.containers if each is not container]
    asking = [
        probe
        for probe in pod.probes
        if probe.path.rstrip("/") in HEALTH_PATHS and not any(_may_serve(each, probe) for each in others)
    ]
    for probe in asking:
        if probe.port is None:
            yield Finding(
                Kind.BREAKS, f"{probe} asks port {probe.port_name}, which its container does not name"
            )
        elif not heard:
            yield Finding(Kind.BREAKS, f"{probe} asks port {probe.port}, not {accepted.health.port}")
    if not asking and not heard:
        yield Finding(
            Kind.ADVICE,
            f"no HTTP probe of the pod asks port {accepted.health.port} for health: nobody hears the verdict",
        )


def _served(container: Container) -> list[Endpoint]:
    """Where a container listens while the pod runs, as far as it can be known."""
    accepted = _parse(container)
    if isinstance(accepted, Finding) or accepted.once or accepted.version or container.must_end:
        return []
    if _unknown(container) & _SERVING:
        return []
    return [each for each in (accepted.health, accepted.metrics) if each]


def _may_serve(container: Container, probe: HTTPProbe) -> bool:
    """Whether a probe may be meant for this container."""
    return bool(_unknown(container) & _SERVING) or probe.port in [each.port for each in _served(container)]


def _collisions(one: Container, other: Container) -> list[int]:
    """Find the ports that two containers of a pod cannot both have."""
    return sorted({each.port for each in _served(one) if any(_collide(each, its) for its in _served(other))})


def _collide(one: Endpoint, other: Endpoint) -> bool:
    hosts = {each.host.lower().replace("localhost", "127.0.0.1") for each in (one, other)}
    same = len(hosts) == 1 or any(map(_EVERYWHERE.fullmatch, hosts))
    return same and one.port == other.port != 0  # 0: the system finds a free one


def _reaching(accepted: Config, pod: Pod) -> list[HTTPProbe]:
    """Find the probes that reach this container's health port."""
    return [probe for probe in pod.probes if probe.port == accepted.health.port]


def _measures(probe: HTTPProbe, accepted: Config) -> bool:
    """Whether a probe of the health port asks for metrics, which are 200 whatever the driver's health."""
    return accepted.metrics == accepted.health and probe.path == accepted.metrics_path


def _request(probe: HTTPProbe, accepted: Config, pod: Pod) -> Iterator[Finding]:
    """Judge whether what a probe asks is served."""
    host = accepted.health.host
    if probe.scheme.upper() != "HTTP":
        yield Finding(Kind.BREAKS, f"{probe} asks over {probe.scheme}, this serves plain HTTP")
    if probe.path not in HEALTH_PATHS and not _measures(probe, accepted):
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


def _answer(probe: HTTPProbe, accepted: Config, container: Container) -> Iterator[Finding]:
    """Judge what the kubelet makes of the verdict."""
    if probe.timeout < accepted.probe_timeout and "probe-timeout" not in _unknown(container):
        yield Finding(
            Kind.ADVICE,
            f"{probe} ends after {probe.timeout}s, a check may take {accepted.probe_timeout:g}s: "
            f"write timeoutSeconds: {math.ceil(accepted.probe_timeout)}, or --probe-timeout={probe.timeout}s",
        )
    if probe.container == container.name and probe.kind != "readinessProbe":
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
