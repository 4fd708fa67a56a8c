"""The kubelet's HTTP probes: which of them ask a sidecar, and what they get."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from arguments import SERVING, served, unknown
from finding import Finding, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manifest import Container, HTTPProbe, Pod

    from livenessprobe.config import Config

HEALTH_PATHS = ("/healthz", "/livez", "/readyz")
_LOOPBACK = re.compile(r"localhost|127\.[0-9.]+|\[?::1\]?", re.IGNORECASE)


def sent(path: str) -> str:
    """Return what the kubelet requests for a probe's path, by the rules of Go's net/url; empty if it cannot request it."""
    if re.search(r"[\x00-\x1f\x7f]", path):
        return quote("/" + path.removeprefix("/"))
    rest, scheme = re.split("[?#]", path, maxsplit=1)[0], ""
    if named := re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", rest):
        scheme, rest = named[1], rest[named.end() :]
        if not rest.startswith("/"):
            return ""
    # Two slashes begin a host, which the pod's address replaces.
    if rest.startswith("//") and (scheme or not rest.startswith("///")):
        rest = "/" + rest[2:].partition("/")[2]
    return quote("/" + rest.removeprefix("/"), safe="/%:@!$&'()*+,;=~")


def reaches(probe: HTTPProbe, *paths: str) -> bool:
    """Whether a probe asks for one of these paths."""
    return unquote(sent(probe.path)) in paths


def reaching(accepted: Config, pod: Pod) -> list[HTTPProbe]:
    """Find the probes that ask this container's health port."""
    return [probe for probe in pod.probes if probe.port == accepted.health.port]


def probes(accepted: Config, pod: Pod, container: Container) -> Iterator[Finding]:
    """Judge what the kubelet asks, and what it makes of the answers."""
    yield from _unheard(accepted, pod, container)
    for probe in reaching(accepted, pod):
        yield from _request(probe, accepted, pod)
        if not _measures(probe, accepted):
            yield from _answer(probe, accepted, container)


def _unheard(accepted: Config, pod: Pod, container: Container) -> Iterator[Finding]:
    """Find the probes that were meant to get the verdict but do not."""
    heard = any(not _measures(probe, accepted) for probe in reaching(accepted, pod))
    others = [each for each in pod.containers if each is not container]
    asking = [
        probe
        for probe in pod.probes
        if reaches(probe, *HEALTH_PATHS, *(f"{path}/" for path in HEALTH_PATHS))
        and not any(_may_serve(each, probe) for each in others)
        and not _asks_another(probe, pod)
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


def _may_serve(container: Container, probe: HTTPProbe) -> bool:
    """Whether a probe may be meant for this livenessprobe."""
    return bool(unknown(container) & SERVING) or probe.port in [each.port for each in served(container)]


def _asks_another(probe: HTTPProbe, pod: Pod) -> bool:
    """Whether a probe asks for the health of a container that is not a livenessprobe, such as the registrar's port 9809.

    Those have a /healthz of their own: a container that is a client of the driver, as this one is, or whose arguments or
    variables name the port.
    """
    port = re.compile(rf"(?<![0-9.]){probe.port}(?![0-9.])")
    return any(
        (each.client and each.name == probe.container) or any(map(port.search, each.words))
        for each in pod.neighbours
    )


def _measures(probe: HTTPProbe, accepted: Config) -> bool:
    """Whether a probe of the health port asks for metrics, which are 200 whatever the driver's health."""
    return accepted.metrics == accepted.health and reaches(probe, accepted.metrics_path)


def _request(probe: HTTPProbe, accepted: Config, pod: Pod) -> Iterator[Finding]:
    """Judge whether what a probe asks for is served."""
    host = accepted.health.host
    if probe.scheme.upper() != "HTTP":
        yield Finding(Kind.BREAKS, f"{probe} asks over {probe.scheme}, but this serves plain HTTP")
    if not sent(probe.path):
        yield Finding(
            Kind.BREAKS,
            f"{probe} asks {probe.path}, which the kubelet does not take for a path: write /healthz",
        )
    elif not reaches(probe, *HEALTH_PATHS) and not _measures(probe, accepted):
        asked = sent(probe.path)
        as_sent = "" if asked == probe.path else f", sent as {asked}"
        yield Finding(Kind.BREAKS, f"{probe} asks {probe.path}{as_sent}, which is 404: write /healthz")
    if _LOOPBACK.fullmatch(host) and not pod.host_network:
        yield Finding(
            Kind.BREAKS,
            f"{probe} asks the pod's address, but this listens on {host}: write :{accepted.health.port}",
        )
    elif _LOOPBACK.fullmatch(host) and not _LOOPBACK.fullmatch(probe.host):
        yield Finding(
            Kind.BREAKS,
            f"{probe} asks the node's address, but this listens on {host}: add host: {host} to httpGet",
        )
    elif _LOOPBACK.fullmatch(probe.host) and not pod.host_network:
        yield Finding(Kind.BREAKS, f"{probe} asks {probe.host}, which is the node: remove host from httpGet")


def _answer(probe: HTTPProbe, accepted: Config, container: Container) -> Iterator[Finding]:
    """Judge what the kubelet makes of the verdict."""
    if probe.timeout < accepted.probe_timeout and "probe-timeout" not in unknown(container):
        yield Finding(
            Kind.WARNS,
            f"{probe} gives up after {probe.timeout}s, but a check may take {accepted.probe_timeout:g}s: "
            f"write timeoutSeconds: {math.ceil(accepted.probe_timeout)}, or --probe-timeout={probe.timeout}s",
        )
    if probe.container == container.name and probe.kind != "readinessProbe":
        yield Finding(
            Kind.ADVICE, f"{probe} restarts this container, not the driver: move it to the driver's"
        )
