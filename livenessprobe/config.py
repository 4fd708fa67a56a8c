"""Our flags and the rules between them: a command line becomes a frozen Config, or an error that names the flag."""

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from livenessprobe import goflags
from livenessprobe.goflags import Flag, boolean, duration, string, unsigned
from livenessprobe.quoting import quote

_LONGEST_SOCKET_PATH = 107  # bytes: sun_path of unix(7), less its final NUL
# Deadlines are moments: a moment after the year 2262 overflows grpc's clock, and each check would end at once.
_FOREVER = 100 * 365 * 86400.0  # seconds
# The targets of gRPC's C core that can be a driver's, https://grpc.github.io/grpc/core/md_doc_naming.html; without a
# scheme it takes them for dns.
_TARGET = re.compile(r"(dns|ipv4|ipv6|unix-abstract|vsock):.+|([^:/]+|\[[^]/]+\]):[0-9]+")
_PORTLESS = ("unix-abstract:", "vsock:")
_HEALTH_PATHS = ("/healthz", "/livez", "/readyz")


class Exit(enum.IntEnum):
    """The program's exit codes; a part of the contract with shells, kubelets and systemd units."""

    OK = 0
    CONFIGURATION = 1
    FLAGS = 2
    UNREACHABLE = 3
    FAILED = 4
    NOT_READY = 5


class ConfigError(Exception):
    """A flag's value, or two flags together, that cannot be served."""

    def __init__(self, flag: str, value: str, reason: str) -> None:
        super().__init__(f"-{flag}={value}: {reason}")
        self.flag, self.value, self.reason = flag, value, reason


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to listen, and the flag that said so."""

    flag: str
    value: str
    """As the user wrote it."""
    host: str
    """Empty for all addresses."""
    port: int


@dataclass(frozen=True, slots=True)
class Config:
    """All that the command line decides."""

    csi_address: str
    """As the user wrote it."""
    socket_path: str | None
    """The driver's unix socket; None where csi_address is another gRPC target."""
    connection_timeout: float
    """Seconds."""
    probe_timeout: float
    """Seconds."""
    health: Endpoint
    metrics: Endpoint | None
    """Equal to health where one server has both; None where metrics are not served."""
    metrics_path: str
    statusz: bool
    """Whether /statusz and /flagz are served."""
    once: bool
    version: bool
    verbosity: int
    vmodule: tuple[tuple[str, int], ...]
    """(file name pattern without .py, verbosity)."""
    json_logs: bool
    warnings: tuple[tuple[str, str], ...]
    """(message, flag) for what was accepted and has no effect."""


def _vmodule(text: str) -> tuple[tuple[str, int], ...]:
    entries = []
    for entry in filter(None, text.split(",")):
        match = re.fullmatch(r"([^=]+)=([0-9]{1,9})", entry)
        if match is None:
            raise ValueError(f"syntax error in {quote(entry)}: write module=N,module=N")
        entries.append((match[1].removesuffix(".py"), int(match[2])))
    return tuple(entries)


def _quantity(text: str) -> str:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?([KMGTPE]i|[mkMGTPE])?", text):
        raise ValueError("not a quantity: write a number of bytes, as in 512, 4Ki, 1M")
    return text


def _severity(text: str) -> str:
    if not re.fullmatch(r"[0-3]|INFO|WARNING|ERROR|FATAL", text, re.IGNORECASE):
        raise ValueError("not a severity: write INFO, WARNING, ERROR, FATAL or 0 to 3")
    return text


_NO_EFFECT = "Accepted without effect: "
_OLD = "Of older releases, accepted with a warning and without effect: "

FLAGS = (
    Flag("csi-address", string, "/run/csi/socket", "Address of the CSI driver: an absolute path, unix:///path, or another gRPC target."),
    Flag("connection-timeout", duration, "30s", "How long to wait for the CSI driver's socket; a served check never waits beyond probe-timeout."),
    Flag("probe-timeout", duration, "3s", "The longest one check may take; its answer is out shortly before."),
    Flag("health-port", string, "9808", "TCP port for health requests, on all addresses."),
    Flag("http-endpoint", string, "", "host:port, :port or [v6]:port that serves health and metrics; excludes health-port and metrics-address."),
    Flag("metrics-address", string, "", "host:port, :port or [v6]:port of a separate server for metrics alone; empty: no metrics."),
    Flag("metrics-path", string, "/metrics", "Path of the metrics; begins with a slash."),
    Flag("statusz", boolean, "true", "Serve /statusz and /flagz, where health is served: plain text for people."),
    Flag("once", boolean, "", "Check once, print the verdict, and exit: 0 healthy, 3 no connection, 4 Probe failed, 5 not ready."),
    Flag("version", boolean, "", "Print the versions of the program, Python and grpcio, and exit."),
    Flag("v", unsigned, "0", "Log verbosity; 5 shows each call and reply."),
    Flag("vmodule", _vmodule, "", "module=N,... sets the verbosity of single files, as in driver=5,web=4; text logs only."),
    Flag("logging-format", string, "text", "Format of the log: text (klog) or json."),
    Flag("log-flush-frequency", duration, "5s", _NO_EFFECT + "every line is written at once."),
    Flag("log-json-split-stream", boolean, "false", _NO_EFFECT + "all lines go to standard error."),
    Flag("log-json-info-buffer-size", _quantity, "0", _NO_EFFECT + "lines are not buffered."),
    Flag("log-text-split-stream", boolean, "false", _NO_EFFECT + "all lines go to standard error."),
    Flag("log-text-info-buffer-size", _quantity, "0", _NO_EFFECT + "lines are not buffered."),
    Flag("automaxprocs", boolean, "false", _NO_EFFECT + "Python has no GOMAXPROCS."),
    Flag("logtostderr", boolean, "", _OLD + "the log goes to standard error."),
    Flag("alsologtostderr", boolean, "", _OLD + "the log goes to standard error."),
    Flag("stderrthreshold", _severity, "", _OLD + "the log goes to standard error, whatever the severity."),
    Flag("log_dir", string, "", _OLD + "no log files are written."),
    Flag("log_file", string, "", _OLD + "no log files are written."),
    Flag("log_file_max_size", unsigned, "", _OLD + "no log files are written."),
    Flag("log_backtrace_at", string, "", _OLD + "no backtraces are logged."),
    Flag("skip_headers", boolean, "", _OLD + "every line has its header."),
    Flag("skip_log_headers", boolean, "", _OLD + "no log files are written."),
    Flag("add_dir_header", boolean, "", _OLD + "the header has the file's name alone."),
    Flag("one_output", boolean, "", _OLD + "the log goes to standard error."),
)  # fmt: skip


def parse(arguments: Sequence[str]) -> Config:
    """Read the command line (without the program's name).

    Raises goflags.FlagError for bad syntax, goflags.HelpRequested, and ConfigError for values that cannot work.
    """
    given = goflags.parse(arguments, FLAGS)
    values: dict[str, Any] = {flag.name: flag.read(flag.default) for flag in FLAGS if flag.default} | {
        "http-endpoint": "", "metrics-address": "", "once": False, "version": False, "vmodule": (),
    } | dict(given)  # fmt: skip
    if values["logging-format"] not in ("text", "json"):
        raise ConfigError(
            "logging-format", values["logging-format"], "unknown log format: write text or json"
        )
    warnings = [
        ("Flag of an older release has no effect, remove it", flag.name)
        for flag in FLAGS
        if flag.name in given and flag.usage.startswith(_OLD)
    ]
    if values["probe-timeout"] <= 0:
        raise ConfigError("probe-timeout", f"{values['probe-timeout']:g}s", "must be longer than 0s")
    if values["connection-timeout"] < 0:
        raise ConfigError("connection-timeout", f"{values['connection-timeout']:g}s", "must not be below 0s")
    health, metrics = _endpoints(values)
    if values["http-endpoint"] and "health-port" in given:
        warnings.append(("Flag has no effect beside http-endpoint, remove it", "health-port"))
    path = values["metrics-path"]
    if not path.startswith("/"):
        raise ConfigError("metrics-path", path, "must begin with a slash, as in /metrics")
    if not path.isprintable() or set(path) & set(" ?#%"):
        raise ConfigError("metrics-path", path, "no request has such a path: leave out blanks, ?, # and %")
    if metrics == health and path in _HEALTH_PATHS:
        raise ConfigError("metrics-path", path, "this path serves health: choose another, as in /metrics")
    return Config(
        csi_address=values["csi-address"],
        socket_path=_socket_path(values["csi-address"]),
        connection_timeout=min(values["connection-timeout"], _FOREVER),
        probe_timeout=min(values["probe-timeout"], _FOREVER),
        health=health,
        metrics=metrics,
        metrics_path=path,
        statusz=values["statusz"],
        once=values["once"],
        version=values["version"],
        verbosity=values["v"],
        vmodule=values["vmodule"],
        json_logs=values["logging-format"] == "json",
        warnings=tuple(warnings),
    )


def wants_json(arguments: Sequence[str]) -> bool:
    """Say whether the log is to be JSON, for a command line whose syntax is right, but whose values may not be."""
    return goflags.parse(arguments, FLAGS).get("logging-format") == "json"


def _endpoints(values: Mapping[str, Any]) -> tuple[Endpoint, Endpoint | None]:
    """Decide where health and metrics are served."""
    port = values["health-port"]
    if values["http-endpoint"]:
        if values["metrics-address"]:
            raise ConfigError(
                "metrics-address",
                values["metrics-address"],
                "excluded by http-endpoint, which serves metrics too: give one of the two",
            )
        # The reference lets the default port pass here, so manifests in the field have it beside http-endpoint.
        if port != "9808":
            raise ConfigError(
                "health-port", port, "excluded by http-endpoint, which says the port: give one of the two"
            )
        both = _endpoint("http-endpoint", values["http-endpoint"])
        return both, both
    health = Endpoint("health-port", port, "", _port("health-port", port, port))
    if not values["metrics-address"]:
        return health, None
    return health, _endpoint("metrics-address", values["metrics-address"])


def _endpoint(flag: str, value: str) -> Endpoint:
    host, colon, port = value.rpartition(":")
    if not colon:
        raise ConfigError(flag, value, "missing port: write host:port, :port or [v6]:port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(flag, value, "too many colons: write an IPv6 address in brackets, as in [::1]:9808")
    return Endpoint(flag, value, host, _port(flag, value, port))


def _port(flag: str, value: str, port: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ConfigError(flag, value, "bad port: write a number from 1 to 65535 (0 lets the system choose)")
    return int(port)


def _socket_path(address: str) -> str | None:
    """Find the unix socket's path in a CSI address; None for another gRPC target."""
    path = address.removeprefix("unix://") if address.startswith("unix://") else address.removeprefix("unix:")
    if path.startswith("/"):
        path = "/" + path.lstrip("/")  # what follows two slashes gRPC takes for a host
        size = len(path.encode(errors="surrogateescape"))
        if size > _LONGEST_SOCKET_PATH:
            raise ConfigError(
                "csi-address",
                address,
                f"the path has {size} bytes, a unix socket's at most {_LONGEST_SOCKET_PATH}",
            )
        if "\0" in path:
            raise ConfigError("csi-address", address, "the path has a NUL character")
        return path
    if address.startswith("unix:") or ":" not in address:
        raise ConfigError(
            "csi-address",
            address,
            "not an absolute path: write /path, unix:///path, or a gRPC target such as dns:///host:port",
        )
    if not (_TARGET.fullmatch(address) and address.isprintable()):
        raise ConfigError(
            "csi-address",
            address,
            "neither a path nor a gRPC target: write /path, unix:///path, or dns:///host:port",
        )
    # A larger port gRPC would take modulo 65536, and so take somebody else for the driver.
    port = None if address.startswith(_PORTLESS) else re.search(r":([0-9]+)$", address)
    if port and not (len(port[1]) <= 5 and 0 < int(port[1]) <= 65535):
        raise ConfigError("csi-address", address, "bad port: write a number from 1 to 65535")
    return None
