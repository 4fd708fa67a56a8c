"""What upstream's releases did differently, by the tag of a sidecar's image."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from arguments import given, unknown
from finding import Finding, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manifest import Container

    from livenessprobe.config import Config

_TAG = re.compile(r"liveness-?probe[^/:@]*:v([0-9]{1,9})\.([0-9]{1,9})[^/:@]*(@[^/]*)?$")
RELEASES = frozenset([(0, 2), (0, 3), (0, 4), (1, 0), (1, 1), *((2, minor) for minor in range(21))])
"""Major and minor version. Others who build it have their own numbers: v4.12 is one of OpenShift's releases."""


def origin(accepted: Config, container: Container) -> Iterator[Finding]:
    """Tell what was different in the release that the image's tag names."""
    tag = _TAG.search(container.image)
    if tag is None:
        return
    release, elsewhere, flags = (int(tag[1]), int(tag[2])), unknown(container), given(container)
    if release not in RELEASES:
        named = f"v{tag[1]}.{tag[2]}"
        yield Finding(Kind.UNKNOWN, f"{named} is not one of upstream's releases: what it did is not compared")
        return
    if release < (1, 0):
        yield Finding(
            Kind.BREAKS, "releases before v1.0 probe drivers of CSI 0.x; this program calls csi.v1.Identity"
        )
    elif release < (1, 1) and not elsewhere & {"connection-timeout", "probe-timeout"}:
        yield Finding(
            Kind.CHANGES,
            f"a check could take --connection-timeout, {accepted.connection_timeout:g}s; "
            f"now it takes --probe-timeout, {accepted.probe_timeout:g}s, at most",
        )
    elif (1, 1) <= release < (2, 17) and "probe-timeout" not in flags:
        yield Finding(Kind.CHANGES, "the default of --probe-timeout was 1s, now it is 3s")
    if release == (1, 1) and "connection-timeout" in flags:
        yield Finding(
            Kind.CHANGES,
            "--connection-timeout had no effect; now it is how long a check waits for the socket",
        )
    if release < (1, 1):
        yield Finding(
            Kind.CHANGES,
            "/healthz was 200 for a driver that is not ready, now it is 500, which restarts it; /livez keeps the 200",
        )
    elif release == (1, 1):
        yield Finding(
            Kind.CHANGES,
            "/healthz cut the connection for a driver that is not ready, now it is 500; /livez is 200",
        )
