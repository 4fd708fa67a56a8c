"""The address of a CSI driver: a unix socket's path, or a target of gRPC's; read as Go's client does."""

import re

_LONGEST_SOCKET_PATH = 107  # bytes: sun_path of unix(7), less its final NUL
# Not compiled before one is needed, which takes time.
_CONTROL = r"[\x00-\x1f\x7f-\x9f]"
# Go dials the rest as it is; gRPC's C core has no such scheme.
_PASSTHROUGH = r"passthrough:(?://[^/]*/)?(unix:)?((?s:.*))"
# Those of the C core's targets that a driver can have, https://grpc.github.io/grpc/core/md_doc_naming.html; a target
# without a scheme is dns.
_HOST_PORT = r"(?:[^:/]+|\[[^]/]+\]):[0-9]+"
_TARGET = rf"(?:dns|ipv4|ipv6|unix-abstract|vsock):.+|{_HOST_PORT}"
_SCHEMES = ("dns", "ipv4", "ipv6", "passthrough", "unix", "unix-abstract", "vsock")
_PORTLESS = ("unix-abstract:", "vsock:")


def read(text: str) -> tuple[str, str | None]:
    """Return the address to call, and the path of its unix socket (None for another target).

    Raises ValueError with the reason if nothing can be called there.
    """
    _refuse_damage(text)
    scheme, colon, rest = text.partition(":")
    # In capitals or not: Go reads a target as a URL.
    target = scheme.lower() + colon + rest if scheme.lower() in _SCHEMES else text
    if passed := target.startswith("passthrough:") and re.fullmatch(_PASSTHROUGH, target):
        if not passed[1] and not re.fullmatch(_HOST_PORT, passed[2]):
            raise ValueError("nothing to pass through: write passthrough:///host:port")
        target = (passed[1] or "dns:///") + passed[2]
    path = target.removeprefix("unix://") if target.startswith("unix://") else target.removeprefix("unix:")
    if path.startswith("/"):
        path = "/" + path.lstrip("/")  # gRPC would read a host after two slashes
        size = len(path.encode(errors="surrogateescape"))
        if size > _LONGEST_SOCKET_PATH:
            raise ValueError(f"the path has {size} bytes, a unix socket's at most {_LONGEST_SOCKET_PATH}")
        return text, path
    if target.startswith("unix:") or ":" not in target:
        raise ValueError(
            "not an absolute path: write /path, unix:///path, or a gRPC target such as dns:///host:port"
        )
    if not (re.fullmatch(_TARGET, target) and target.isprintable()):
        raise ValueError("neither a path nor a gRPC target: write /path, unix:///path, or dns:///host:port")
    # gRPC would take a larger port modulo 65536, and so call whoever listens there.
    port = None if target.startswith(_PORTLESS) else re.search(r":([0-9]+)$", target)
    if port and not (len(port[1]) <= 5 and 0 < int(port[1]) <= 65535):
        raise ValueError("bad port: write a number from 1 to 65535")
    return target, None


def _refuse_damage(text: str) -> None:
    """Refuse an address that a manifest's quoting or folding has mangled: no driver's socket has such a name."""
    if re.search(_CONTROL, text):
        raise ValueError("has a control character in it, such as an end of line")
    if text != text.strip():
        raise ValueError("has spaces around it")
    if " --" in text:
        raise ValueError("has a second flag in it: make each flag an item of its own")
