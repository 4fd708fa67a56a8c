"""Our flags and the rules between them: a command line becomes a frozen Config, or an error that names the flag.

Longer than other modules because of the table of flags.
"""

import enum
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from livenessprobe import address, goflags
from livenessprobe.goflags import Flag, boolean, duration, string, unsigned
from livenessprobe.quoting import quote

# An attempt's deadline is a moment: one after the year 2262 overflows grpc's clock, and each check would end at once.
_FOREVER = 100 * 365 * 86400.0  # seconds
_HEALTH_PATHS = ("/healthz", "/livez", "/readyz")
_STATUS_PATHS = ("/statusz", "/flagz")

Given = Mapping[str, Any]
"""The values of the flags on the command line."""


class Exit(enum.IntEnum):
    """The program's exit codes, part of the contract with shells, kubelets and systemd units."""

    OK = 0
    CONFIGURATION = 1
    FLAGS = 2
    UNREACHABLE = 3
    FAILED = 4
    NOT_READY = 5


class ConfigError(Exception):
    """A flag's value, or two flags together, that cannot work."""

    def __init__(self, flag: str, value: str, reason: str) -> None:
        super().__init__(f"-{flag}={value}: {reason}")
        self.flag, self.value, self.reason = flag, value, reason


class Endpoint(NamedTuple):
    """Where to listen, and the flag that said so."""

    flag: str
    value: str
    """As the user wrote it."""
    host: str
    """Empty for all addresses."""
    port: int


class Config(NamedTuple):
    """All that the command line decides."""

    csi_address: str
    """As the user wrote it; a gRPC target as the C core wants it."""
    socket_path: str | None
    """The driver's unix socket; None if csi_address is another gRPC target."""
    connection_timeout: float
    """Seconds."""
    probe_timeout: float
    """Seconds."""
    health: Endpoint
    metrics: Endpoint | None
    """Equal to health if one server serves both; None if metrics are not served."""
    metrics_path: str
    statusz: bool
    """Whether /statusz and /flagz are served."""
    once: bool
    version: bool
    warnings: tuple[tuple[str, str], ...]
    """(message, flag) for what was accepted and has no effect."""
    flags: tuple[tuple[str, str], ...]
    """(name, value as Go writes it) of every flag, for people."""


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

# fmt: off
EFFECTIVE = (
    Flag("csi-address", string, "/run/csi/socket", "Address of the CSI driver: an absolute path, unix:///path, or another gRPC target."),
    Flag("connection-timeout", duration, "30s", "How long to wait for the CSI driver's socket; a served check never waits beyond probe-timeout."),
    Flag("probe-timeout", duration, "3s", "The longest one check may take; its answer is out shortly before."),
    Flag("health-port", string, "9808", "TCP port for health requests, on all addresses."),
    Flag("http-endpoint", string, "", "host:port, :port or [v6]:port that serves health and metrics; excludes health-port and metrics-address."),
    Flag("metrics-address", string, "", "host:port, :port or [v6]:port of a separate server for metrics alone; empty: no metrics."),
    Flag("metrics-path", string, "/metrics", "Path of the metrics, where they are served; begins with a slash."),
    Flag("statusz", boolean, "true", "Serve /statusz and /flagz, where health is served: plain text for people."),
    Flag("once", boolean, "", "Check once, print the verdict, and exit: 0 healthy, 3 no connection, 4 Probe failed, 5 not ready."),
    Flag("version", boolean, "", "Print the versions of the program, Python and grpcio, and exit."),
    Flag("v", unsigned, "0", "Log verbosity; 5 shows each call and reply."),
    Flag("vmodule", _vmodule, "", "module=N,... sets the verbosity of single files, as in driver=5,web=4; text logs only."),
    Flag("logging-format", string, "text", "Format of the log: text (klog) or json."),
)
WITHOUT_EFFECT = (
    Flag("log-flush-frequency", duration, "5s", _NO_EFFECT + "every line is written at once."),
    Flag("log-json-split-stream", boolean, "false", _NO_EFFECT + "all lines go to standard error."),
    Flag("log-json-info-buffer-size", _quantity, "0", _NO_EFFECT + "lines are not buffered."),
    Flag("log-text-split-stream", boolean, "false", _NO_EFFECT + "all lines go to standard error."),
    Flag("log-text-info-buffer-size", _quantity, "0", _NO_EFFECT + "lines are not buffered."),
    Flag("automaxprocs", boolean, "false", _NO_EFFECT + "Python has no GOMAXPROCS."),
)
OF_OLDER_RELEASES = (
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
)
# fmt: on
FLAGS = EFFECTIVE + WITHOUT_EFFECT + OF_OLDER_RELEASES


def usage() -> str:
    """Describe the program and its flags for people."""
    import textwrap  # needed only here

    ignored = "Accepted without effect, so that manifests written for other releases keep working: "
    ignored += ", ".join(f"-{flag.name}" for flag in WITHOUT_EFFECT + OF_OLDER_RELEASES) + "."
    folded = textwrap.fill(ignored, 100, break_on_hyphens=False)
    return f"{_INTRODUCTION}\nFlags:\n{goflags.describe(EFFECTIVE)}\n\n{folded}"


_INTRODUCTION = """\
livenessprobe answers /healthz by calling the CSI driver's Probe.

Examples:
  livenessprobe --csi-address=/csi/csi.sock
    \tServe /healthz on port 9808 of all addresses.
  livenessprobe --csi-address=/csi/csi.sock --http-endpoint=127.0.0.1:9808
    \tServe /healthz and /metrics on one address.
  livenessprobe --csi-address=/csi/csi.sock --once
    \tCheck once and exit with the verdict: 0 is healthy.
"""


def parse(arguments: Sequence[str]) -> Config:
    """Read the command line (without the program's name).

    Raises goflags.FlagError for bad syntax, goflags.HelpRequested, and ConfigError for values that cannot work.
    """
    return decide(goflags.parse(arguments, FLAGS))


def log_settings(given: Given) -> tuple[int, tuple[tuple[str, int], ...], bool]:
    """Return verbosity, vmodule, and whether the log is JSON; it is needed before the other values are judged.

    Vmodule is pairs: a pattern for file names, without .py, and a verbosity.
    """
    return given.get("v", 0), given.get("vmodule", ()), given.get("logging-format") == "json"


def decide(given: Given) -> Config:
    """Turn the values that were given into a configuration; raises ConfigError for those that cannot work."""
    values: dict[str, Any] = {flag.name: flag.read(flag.default) for flag in EFFECTIVE if flag.default} | {
        "http-endpoint": "", "metrics-address": "", "once": False, "version": False,
    } | dict(given)  # fmt: skip
    for name in ("csi-address", "health-port", "http-endpoint", "metrics-address", "logging-format"):
        if reason := goflags.unreplaced(values[name]):
            raise ConfigError(name, values[name], reason)
    if values["logging-format"] not in ("text", "json"):
        raise ConfigError(
            "logging-format", values["logging-format"], "unknown log format: write text or json"
        )
    if values["probe-timeout"] <= 0:
        raise ConfigError("probe-timeout", f"{values['probe-timeout']:g}s", "must be longer than 0s")
    if values["connection-timeout"] < 0:
        raise ConfigError("connection-timeout", f"{values['connection-timeout']:g}s", "must not be below 0s")
    health, metrics = _endpoints(values, given)
    if metrics:
        shared = metrics == health
        _check_metrics_path(
            values["metrics-path"], _HEALTH_PATHS + _STATUS_PATHS * values["statusz"] if shared else ()
        )
    try:
        csi_address, socket_path = address.read(values["csi-address"])
    except ValueError as error:
        raise ConfigError("csi-address", values["csi-address"], str(error)) from None
    return Config(
        csi_address=csi_address,
        socket_path=socket_path,
        connection_timeout=values["connection-timeout"],
        probe_timeout=min(values["probe-timeout"], _FOREVER),
        health=health,
        metrics=metrics,
        metrics_path=values["metrics-path"],
        statusz=values["statusz"],
        once=values["once"],
        version=values["version"],
        warnings=tuple(_warnings(values, given)),
        flags=tuple((flag.name, _written(flag, values.get(flag.name, flag.default))) for flag in FLAGS),
    )


def _written(flag: Flag, value: Any) -> str:
    if flag.read is boolean:
        return str(value is True).lower()
    if isinstance(value, str):
        return value
    if flag.read is duration:
        return goflags.written(value)
    if flag.read is _vmodule:
        return ",".join(f"{pattern}={verbosity}" for pattern, verbosity in value)
    return str(value)


def _warnings(values: Mapping[str, Any], given: Given) -> Iterator[tuple[str, str]]:
    for flag in OF_OLDER_RELEASES:
        if flag.name in given:
            yield "Flag of an older release has no effect, remove it", flag.name
    if values["http-endpoint"] and "health-port" in given:
        yield "Flag has no effect beside http-endpoint, remove it", "health-port"
    if "metrics-path" in given and not (values["http-endpoint"] or values["metrics-address"]):
        yield "Flag has no effect without http-endpoint or metrics-address", "metrics-path"


def _endpoints(values: Mapping[str, Any], given: Given) -> tuple[Endpoint, Endpoint | None]:
    """Decide where health and metrics are served."""
    port = values["health-port"]
    if values["http-endpoint"]:
        if "metrics-address" in given:
            raise ConfigError(
                "metrics-address",
                values["metrics-address"],
                "excluded by http-endpoint, which serves metrics too: give one of the two",
            )
        # Upstream lets the default port pass here, so manifests in the field have it beside http-endpoint.
        if port != "9808":
            raise ConfigError(
                "health-port", port, "excluded by http-endpoint, which has the port: give one of the two"
            )
        both = _endpoint("http-endpoint", values["http-endpoint"])
        return both, both
    health = Endpoint("health-port", port, "", _port("health-port", port, port))
    if not values["metrics-address"]:
        return health, None
    return health, _endpoint("metrics-address", values["metrics-address"])


def _check_metrics_path(path: str, taken: Collection[str]) -> None:
    if reason := goflags.unreplaced(path):
        raise ConfigError("metrics-path", path, reason)
    if not path.startswith("/"):
        raise ConfigError("metrics-path", path, "must begin with a slash, as in /metrics")
    if not path.isprintable() or set(path) & set(" ?#%"):
        raise ConfigError("metrics-path", path, "no request has such a path: leave out spaces, ?, # and %")
    if path in taken:
        raise ConfigError("metrics-path", path, "this path serves health: choose another, as in /metrics")


def _endpoint(flag: str, value: str) -> Endpoint:
    if "/" in value:
        raise ConfigError(flag, value, "write host:port alone, without a scheme or a path")
    host, colon, port = value.rpartition(":")
    if not colon:
        raise ConfigError(flag, value, "missing port: write host:port, :port or [v6]:port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(flag, value, "too many colons: write an IPv6 address in brackets, as in [::1]:9808")
    return Endpoint(flag, value, host, _port(flag, value, port))


def _port(flag: str, value: str, port: str) -> int:
    if not (port.isascii() and port.isdigit()) or len(port) > 5 or int(port) > 65535:
        raise ConfigError(flag, value, "bad port: write a number from 1 to 65535 (0 lets the system choose)")
    return int(port)
