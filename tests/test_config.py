"""Every line of the flag table: what a command line becomes; what is refused, with the flag, its value and the reason."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from livenessprobe import config, goflags
from livenessprobe.config import Config, ConfigError, Endpoint, Exit, parse

# The contract's flag table; a flag that the program lacks, or has besides these, is a defect.
STRINGS = {
    "csi-address": "/run/csi/socket",
    "connection-timeout": "30s",
    "probe-timeout": "3s",
    "health-port": "9808",
    "http-endpoint": "",
    "metrics-address": "",
    "metrics-path": "/metrics",
    "v": "0",
    "vmodule": "",
    "logging-format": "text",
    "log-flush-frequency": "5s",
    "log-json-info-buffer-size": "0",
    "log-text-info-buffer-size": "0",
}
BOOLEANS = {"once", "version", "statusz", "log-json-split-stream", "log-text-split-stream", "automaxprocs"}
OLD = {
    "logtostderr": "true",
    "alsologtostderr": "true",
    "stderrthreshold": "INFO",
    "log_dir": "/var/log",
    "log_file": "/var/log/x",
    "log_file_max_size": "1800",
    "log_backtrace_at": "driver.go:73",
    "skip_headers": "false",
    "skip_log_headers": "true",
    "add_dir_header": "true",
    "one_output": "true",
}
DEFAULTS = {
    **{name: "false" if value in ("true", "false") else "" for name, value in OLD.items()},
    **STRINGS,
    **dict.fromkeys(BOOLEANS, "false"),
    "statusz": "true",
}
EVERYWHERE = Endpoint("health-port", "9808", "", 9808)


def test_the_flags_are_those_of_the_contract() -> None:
    assert {flag.name for flag in config.FLAGS} == STRINGS.keys() | BOOLEANS | OLD.keys()
    assert {flag.name: flag.default for flag in config.FLAGS if flag.name in STRINGS} == STRINGS
    assert {flag.name for flag in config.FLAGS if flag.read is goflags.boolean} >= BOOLEANS
    assert {flag.default for flag in config.FLAGS if flag.read is goflags.boolean} == {"", "false", "true"}


def test_defaults() -> None:
    assert parse([]) == Config(
        csi_address="/run/csi/socket",
        socket_path="/run/csi/socket",
        connection_timeout=30.0,
        probe_timeout=3.0,
        health=EVERYWHERE,
        metrics=None,
        metrics_path="/metrics",
        statusz=True,
        once=False,
        version=False,
        warnings=(),
        flags=tuple((flag.name, DEFAULTS[flag.name]) for flag in config.FLAGS),
    )


def test_flags_are_written_as_go_does() -> None:
    given = {
        "csi-address": "unix:///csi/csi.sock",
        "connection-timeout": "0m90.50s",
        "probe-timeout": "0.3s",
        "http-endpoint": ":9808",
        "once": "T",
        "statusz": "0",
        "v": "+05",
        "vmodule": "driver.py=5,,web=4",
        "log_dir": "/x",
        "log_file_max_size": "07",
        "log-json-info-buffer-size": "4Ki",
        "logging-format": "json",
        "one_output": "1",
        "stderrthreshold": "Warning",
    }
    shown = dict(parse([f"--{name}={value}" for name, value in given.items()]).flags)

    assert shown == DEFAULTS | given | {
        "connection-timeout": "1m30.5s",
        "probe-timeout": "300ms",
        "once": "true",
        "statusz": "false",
        "v": "5",
        "vmodule": "driver=5,web=4",
        "log_file_max_size": "7",
        "one_output": "true",
    }


def test_a_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        parse([]).once = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("argument", "field", "value"),
    [
        ("--csi-address=/csi/csi.sock", "csi_address", "/csi/csi.sock"),
        ("--connection-timeout=1m", "connection_timeout", 60.0),
        ("--connection-timeout=0", "connection_timeout", 0.0),
        ("--probe-timeout=1m0.5s", "probe_timeout", 60.5),
        ("--probe-timeout=300ms", "probe_timeout", 0.3),
        ("--health-port=9898", "health", Endpoint("health-port", "9898", "", 9898)),
        ("--health-port=0", "health", Endpoint("health-port", "0", "", 0)),
        ("--health-port=65535", "health", Endpoint("health-port", "65535", "", 65535)),
        ("--metrics-address=:3305", "metrics", Endpoint("metrics-address", ":3305", "", 3305)),
        ("--metrics-address=", "metrics", None),
        ("--http-endpoint=", "health", EVERYWHERE),
        ("--statusz", "statusz", True),
        ("--statusz=false", "statusz", False),
        ("--once", "once", True),
        ("--once=false", "once", False),
        ("--version", "version", True),
    ],
)
def test_one_flag(argument: str, field: str, value: object) -> None:
    assert getattr(parse([argument]), field) == value
    assert parse([argument]).warnings == ()


# ---- where to listen


@pytest.mark.parametrize(
    ("value", "host", "port"),
    [
        (":9808", "", 9808),
        ("127.0.0.1:29643", "127.0.0.1", 29643),
        ("0.0.0.0:9808", "0.0.0.0", 9808),
        ("localhost:29653", "localhost", 29653),
        ("[::1]:9808", "::1", 9808),
        ("[::]:80", "::", 80),
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80),
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("x]:80", "x]", 80),
        ("[x:80", "[x", 80),
    ],
)
def test_endpoints(value: str, host: str, port: int) -> None:
    both = parse([f"--http-endpoint={value}"])
    assert both.health == both.metrics == Endpoint("http-endpoint", value, host, port)

    separate = parse([f"--metrics-address={value}"])
    assert separate.health == EVERYWHERE
    assert separate.metrics == Endpoint("metrics-address", value, host, port)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("9808", "missing port"),
        ("localhost", "missing port"),
        ("localhost:", "bad port"),
        (":http", "bad port"),
        (":65536", "bad port"),
        (":-1", "bad port"),
        (":99999999999999999999", "bad port"),
        (": 80", "bad port"),
        (":80 ", "bad port"),
        (":٨٠", "bad port"),
        ("::1", "colons"),
        ("::1:9808", "colons"),
        ("[::1]", "colons"),
        ("1:2:3", "colons"),
        ("[::1]:", "bad port"),
        ("http://localhost:80", "write host:port alone, without a scheme or a path"),
        (":9808/metrics", "write host:port alone"),
        ("localhost/", "write host:port alone"),
        ("$(POD_IP):9808", r"\$\(POD_IP\) was not replaced"),
        ("${POD_IP}:9808", r"\$\{POD_IP\} was not replaced"),
        (":" + "9" * 5000, "bad port"),
    ],
)
@pytest.mark.parametrize("flag", ["http-endpoint", "metrics-address"])
def test_bad_endpoints(flag: str, value: str, reason: str) -> None:
    refused(f"--{flag}={value}", flag=flag, value=value, reason=reason)


@pytest.mark.parametrize("value", ["", "x", "65536", "-1", "http", "80 ", " 80", "1e3", "0x50", ":80", "٨٠", "8.0", "9" * 5000, "065535"])  # fmt: skip
def test_bad_health_port(value: str) -> None:
    refused(f"--health-port={value}", flag="health-port", value=value, reason="bad port")


def test_a_health_port_that_was_not_replaced() -> None:
    refused(
        "--health-port=$(PORT)", flag="health-port", value="$(PORT)", reason=r"\$\(PORT\) was not replaced"
    )


HTTP = "--http-endpoint=127.0.0.1:9900"


@pytest.mark.parametrize(
    ("arguments", "flag", "value"),
    [
        ([HTTP, "--health-port=9898"], "health-port", "9898"),
        (["--health-port", "9898", HTTP], "health-port", "9898"),
        ([HTTP, "--health-port=9900"], "health-port", "9900"),
        ([HTTP, "--health-port=09808"], "health-port", "09808"),
        ([HTTP, "--metrics-address=:3305"], "metrics-address", ":3305"),
        ([HTTP, "--metrics-address=127.0.0.1:9900"], "metrics-address", "127.0.0.1:9900"),
        ([HTTP, "--metrics-address=:3305", "--health-port=9808"], "metrics-address", ":3305"),
        ([HTTP, "--metrics-address="], "metrics-address", ""),
    ],
)
def test_http_endpoint_excludes(arguments: list[str], flag: str, value: str) -> None:
    refused(*arguments, flag=flag, value=value, reason="excluded by http-endpoint")


def test_http_endpoint_tolerates_the_default_health_port_with_a_warning() -> None:
    parsed = parse([HTTP, "--health-port=9808"])

    assert parsed.health.port == 9900
    assert parsed.warnings == (("Flag has no effect beside http-endpoint, remove it", "health-port"),)
    assert parse([HTTP]).warnings == ()


def test_an_empty_http_endpoint_excludes_nothing() -> None:
    parsed = parse(["--http-endpoint=", "--health-port=9898", "--metrics-address=:3305"])

    assert (parsed.health.port, parsed.metrics and parsed.metrics.port, parsed.warnings) == (9898, 3305, ())


# ---- the driver's address


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("/csi/csi.sock", "/csi/csi.sock"),
        ("unix:///csi/csi.sock", "/csi/csi.sock"),
        ("unix:/csi/csi.sock", "/csi/csi.sock"),
        ("/with:colon:1", "/with:colon:1"),
        ("/with space/%41?#ä", "/with space/%41?#ä"),
        ("/" + "x" * 106, "/" + "x" * 106),
        ("unix:///" + "x" * 106, "/" + "x" * 106),
        ("//csi/csi.sock", "/csi/csi.sock"),
        ("unix:////csi/csi.sock", "/csi/csi.sock"),
        ("unix:///csi//csi.sock", "/csi//csi.sock"),
        ("UNIX:///csi/csi.sock", "/csi/csi.sock"),
        ("Unix:/csi/CSI.sock", "/csi/CSI.sock"),
        ("/csi/UNIX:/csi.sock", "/csi/UNIX:/csi.sock"),
        ("/X/csi.sock", "/X/csi.sock"),
        ("passthrough:///unix:///csi/csi.sock", "/csi/csi.sock"),
        ("passthrough:///unix:/csi/csi.sock", "/csi/csi.sock"),
        ("/csi - x/--y -z", "/csi - x/--y -z"),
        ("/\udcff", "/\udcff"),
        ("dns:///driver.example:9000", None),
        ("dns:///driver.example", None),
        ("ipv6:[::1]:9000", None),
        ("unix-abstract:csi:99999", None),
        ("vsock:2:99999", None),
        ("ipv4:127.0.0.1:9000", None),
        ("driver.example:9000", None),
        ("127.0.0.1:9000", None),
        ("[::1]:9000", None),
        ("driver.example:1", None),
        ("driver.example:65535", None),
        ("unix-abstract:CSI", None),
    ],
)
def test_csi_addresses(address: str, path: str | None) -> None:
    parsed = parse([f"--csi-address={address}"])

    assert (parsed.csi_address, parsed.socket_path) == (address, path)


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("DNS:///driver.example:9000", "dns:///driver.example:9000"),
        ("Dns:Driver.example:9000", "dns:Driver.example:9000"),
        ("DNS:///DNS:9000", "dns:///DNS:9000"),
        ("IPV4:127.0.0.1:9000", "ipv4:127.0.0.1:9000"),
        ("IPV6:[::1]:9000", "ipv6:[::1]:9000"),
        ("UNIX-ABSTRACT:CSI", "unix-abstract:CSI"),
        ("VSOCK:2:9000", "vsock:2:9000"),
        ("passthrough:///driver.example:9000", "dns:///driver.example:9000"),
        ("PASSTHROUGH:///driver.example:9000", "dns:///driver.example:9000"),
        ("passthrough://any/driver.example:9000", "dns:///driver.example:9000"),
        ("passthrough:driver.example:9000", "dns:///driver.example:9000"),
        ("passthrough:///[::1]:9000", "dns:///[::1]:9000"),
    ],
)
def test_targets_are_read_as_go_reads_them(address: str, target: str) -> None:
    parsed = parse([f"--csi-address={address}"])

    assert (parsed.csi_address, parsed.socket_path) == (target, None)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("passthrough:///driver.example", "write passthrough:///host:port"),
        ("passthrough:///", "write passthrough:///host:port"),
        ("passthrough:///dns:///driver.example:9000", "write passthrough:///host:port"),
        ("passthrough:////csi/csi.sock", "write passthrough:///host:port"),
        ("passthrough:///driver.example:0", "bad port"),
        ("passthrough:///unix:csi.sock", "not an absolute path"),
        ("$(ADDRESS)", r"\$\(ADDRESS\) was not replaced: define"),
        ("unix://${ADDRESS}", r"\$\{ADDRESS\} was not replaced: in a manifest"),
        ("/csi/csi.sock\n", "control character"),
        ("/csi/\tcsi.sock", "control character"),
        ("/csi/\x7f", "control character"),
        ("/csi/\x85", "control character"),
        ("unix:///csi\x1b[2J", "control character"),
        (" /csi/csi.sock", "spaces around it"),
        ("/csi/csi.sock ", "spaces around it"),
        ("/csi/csi.sock\u00a0", "spaces around it"),
        ("/csi/csi.sock --v=5", "second flag in it"),
        ("", "not an absolute path"),
        ("csi.sock", "not an absolute path"),
        ("./csi/csi.sock", "not an absolute path"),
        ("csi/csi.sock", "not an absolute path"),
        ("unix:csi.sock", "not an absolute path"),
        ("unix:", "not an absolute path"),
        ("unix://csi.sock", "not an absolute path"),
        (r"unix://C:\\csi\\csi.sock", "not an absolute path"),
        ("/" + "x" * 107, "108 bytes.*107"),
        ("/" + "ä" * 54, "109 bytes.*107"),
        ("unix:///" + "x" * 107, "108 bytes.*107"),
        ("/a\0b", "control character"),
        (":", "neither"),
        ("./x:y", "neither"),
        ("http://driver.example:80", "neither"),
        ("dns:///driver\udcff:1", "neither"),
        ("dns:///driver\u2028:1", "neither"),
        ("driver.example:65536", "bad port"),
        ("driver.example:009000", "bad port"),
        ("dns:///driver.example:99999", "bad port"),
        ("ipv6:[::1]:0", "bad port"),
        ("localhost:" + "9" * 5000, "bad port"),
    ],
)
def test_bad_csi_addresses(address: str, reason: str) -> None:
    refused(f"--csi-address={address}", flag="csi-address", value=address, reason=reason)


# ---- times, path, format


@pytest.mark.parametrize(
    ("argument", "value", "reason"),
    [
        ("--probe-timeout=0s", "0s", "longer than 0s"),
        ("--probe-timeout=0", "0s", "longer than 0s"),
        ("--probe-timeout=-3s", "-3s", "longer than 0s"),
        ("--connection-timeout=-1ms", "-0.001s", "not be below 0s"),
        ("--connection-timeout=-1ns", "-1e-09s", "not be below 0s"),
        ("--logging-format=${FORMAT}", "${FORMAT}", "was not replaced"),
        ("--logging-format=xml", "xml", "unknown log format"),
        ("--logging-format=", "", "unknown log format"),
        ("--logging-format=JSON", "JSON", "unknown log format"),
    ],
)
def test_bad_values(argument: str, value: str, reason: str) -> None:
    refused(argument, flag=argument[2:].partition("=")[0], value=value, reason=reason)


def test_a_metrics_path() -> None:
    parsed = parse([HTTP, "--metrics-path=/X/m-2"])

    assert (parsed.metrics_path, parsed.warnings) == ("/X/m-2", ())


def test_the_shortest_probe_timeout() -> None:
    assert parse(["--probe-timeout=1ns"]).probe_timeout == 1e-9


def test_longest_times() -> None:
    """A deadline further off than a century overflows clocks."""
    longest = "2562047h47m16.854775807s"
    parsed = parse([f"--probe-timeout={longest}", f"--connection-timeout={longest}"])

    assert parsed.probe_timeout == 876_000 * 3600
    assert parsed.connection_timeout == (2**63 - 1) / 1e9
    assert parse(["--probe-timeout=875999h"]).probe_timeout == 875_999 * 3600


BAD_PATHS = {
    "metrics": "begin with a slash",
    "": "begin with a slash",
    "$(METRICS)": "was not replaced",
    "/$(METRICS)": "was not replaced",
    "/m?x": "leave out spaces",
    "/m n": "leave out spaces",
    "/m%6e": "leave out spaces",
    "/m#n": "leave out spaces",
    "/m\n": "leave out spaces",
}


@pytest.mark.parametrize("path", BAD_PATHS)
def test_bad_metrics_paths(path: str) -> None:
    for metrics in (HTTP, "--metrics-address=:1"):
        refused(metrics, f"--metrics-path={path}", flag="metrics-path", value=path, reason=BAD_PATHS[path])


@pytest.mark.parametrize("path", [*BAD_PATHS, "/metrics", "/healthz"])
def test_a_metrics_path_that_nobody_uses_is_let_be_with_a_warning(path: str) -> None:
    parsed = parse([f"--metrics-path={path}"])

    assert parsed.metrics is None
    assert parsed.warnings == (
        ("Flag has no effect without http-endpoint or metrics-address", "metrics-path"),
    )


@pytest.mark.parametrize("path", ["/healthz", "/livez", "/readyz", "/statusz", "/flagz"])
def test_one_server_cannot_have_health_and_metrics_on_one_path(path: str) -> None:
    refused(HTTP, f"--metrics-path={path}", flag="metrics-path", value=path, reason="serves health")

    assert parse(["--metrics-address=:1", f"--metrics-path={path}"]).metrics_path == path


def test_without_status_pages_their_paths_are_free() -> None:
    assert parse([HTTP, "--statusz=false", "--metrics-path=/statusz"]).metrics_path == "/statusz"


# ---- syntax of single flags


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--probe-timeout=5", "write 5s"),
        ("--connection-timeout=x", "not a duration"),
        ("--log-flush-frequency=5", "write 5s"),
        ("--v=x", "whole number"),
        ("--v=", "whole number"),
        ("--vmodule=driver", "syntax error"),
        ("--vmodule=driver=x", "syntax error"),
        ("--vmodule=driver=-1", "syntax error"),
        ("--vmodule==5", "syntax error"),
        ("--once=maybe", "true or false"),
        ("--log-json-info-buffer-size=x", "not a quantity: write a number of bytes, as in 512, 4Ki, 1M$"),
        ("--log-text-info-buffer-size=-1", "quantity"),
        ("--log-text-info-buffer-size=1KB", "quantity"),
        ("--log-text-info-buffer-size=", "quantity"),
        ("--log-json-split-stream=x", "true or false"),
        ("--automaxprocs=x", "true or false"),
        ("--stderrthreshold=LOUD", "not a severity: write INFO, WARNING, ERROR, FATAL or 0 to 3$"),
        ("--stderrthreshold=4", "severity"),
        ("--log_file_max_size=x", "whole number"),
        ("--feature-gates=x=true", "not defined: -feature-gates"),
    ],
)
def test_flag_errors(argument: str, said: str) -> None:
    with pytest.raises(goflags.FlagError, match=said):
        parse([argument])


@pytest.mark.parametrize(
    "argument",
    [
        "--log-flush-frequency=5s",
        *(f"--log-json-info-buffer-size={size}" for size in ("0", "512", "1.5Ki", "4Mi", "1G", "100m", "2k")),
        "--log-text-info-buffer-size=4Ki",
        "--log-json-split-stream",
        "--log-text-split-stream=true",
        "--automaxprocs",
        "--automaxprocs=false",
    ],
)
def test_accepted_without_effect_and_without_a_word(argument: str) -> None:
    assert parse([argument])._replace(flags=()) == parse([])._replace(flags=())
    name = argument[2:].partition("=")[0]
    (usage,) = [flag.usage for flag in config.FLAGS if flag.name == name]
    assert re.fullmatch(r"Accepted without effect: ([a-z]|Python ).*\.", usage)


@pytest.mark.parametrize("flag", OLD)
def test_a_flag_of_older_releases_is_accepted_with_one_warning(flag: str) -> None:
    argument = f"-{flag}={OLD[flag]}"
    parsed = parse([argument, "--once", argument])

    assert parsed.once
    assert parsed.warnings == (("Flag of an older release has no effect, remove it", flag),)
    (usage,) = [each.usage for each in config.FLAGS if each.name == flag]
    assert re.fullmatch(r"Of older releases, accepted with a warning and without effect: [a-z].*\.", usage)


def test_all_flags_of_older_releases_together() -> None:
    parsed = parse([f"--{flag}={value}" for flag, value in OLD.items()])

    assert sorted(name for _, name in parsed.warnings) == sorted(OLD)


@pytest.mark.parametrize("severity", ["0", "3", "INFO", "warning", "Error", "FATAL"])
def test_severities(severity: str) -> None:
    assert [flag for _, flag in parse([f"--stderrthreshold={severity}"]).warnings] == ["stderrthreshold"]


# ---- all together


@given(st.lists(st.builds("--{}={}".format, st.sampled_from([f.name for f in config.FLAGS]), st.text())))
def test_junk_is_a_config_or_a_known_error(arguments: list[str]) -> None:
    flag, problem = "v", ""
    try:
        port = parse(arguments).health.port
    except ConfigError as error:
        flag, problem, port = error.flag, error.reason, 0
    except goflags.FlagError as error:
        problem, port = str(error), 0

    assert flag in {flag.name for flag in config.FLAGS}
    assert problem.isprintable()
    assert 0 <= port <= 65535


def test_the_usage_has_examples_and_each_flag_once_in_full_or_folded() -> None:
    introduction, _, rest = config.usage().partition("\nFlags:\n")
    effective, _, folded = rest.partition("\n\n")
    examples = re.findall(r"^  livenessprobe (.*)$", introduction, re.MULTILINE)
    full = re.findall(r"^  -(\S+)", effective, re.MULTILINE)

    assert introduction.endswith("with the verdict: 0 is healthy.\n")
    assert all(re.fullmatch(r".*\.", flag.usage) for flag in config.EFFECTIVE)
    assert folded.startswith(
        "Accepted without effect, so that manifests written for other releases keep working:\n-log-"
    )
    assert folded.endswith("-one_output.")
    assert len(examples) == 3
    assert all(parse(example.split()).warnings == () for example in examples)
    assert full == [name for name in [flag.name for flag in config.FLAGS] if name in full]
    assert sorted(full + re.findall(r" -(\w[\w-]*)[,.]", folded.replace("\n", " "))) == sorted(
        flag.name for flag in config.FLAGS
    )
    assert set(full) == {*STRINGS, *BOOLEANS} - {
        name for name in {*STRINGS, *BOOLEANS} if name.startswith("log-")
    } - {"automaxprocs"}
    assert max(map(len, folded.splitlines())) <= 100


def test_the_log_s_settings_are_known_whatever_the_other_values_are() -> None:
    given = goflags.parse(
        ["--logging-format=json", "-v=3", "--vmodule=web=4", "--health-port=x"], config.FLAGS
    )

    assert config.log_settings(given) == (3, (("web", 4),), True)
    assert config.log_settings({}) == (0, (), False)


@pytest.mark.parametrize(
    ("argument", "settings"),
    [
        ("-v=5", (5, (), False)),
        ("--v=2", (2, (), False)),
        ("--vmodule=driver=5,web=4", (0, (("driver", 5), ("web", 4)), False)),
        ("--vmodule=driver.py=5,,*e?=1,", (0, (("driver", 5), ("*e?", 1)), False)),
        ("--vmodule=", (0, (), False)),
        ("--logging-format=json", (0, (), True)),
        ("--logging-format=text", (0, (), False)),
    ],
)
def test_each_of_the_log_s_settings(argument: str, settings: tuple[object, ...]) -> None:
    assert config.log_settings(goflags.parse([argument], config.FLAGS)) == settings


def test_exit_codes_of_the_contract() -> None:
    assert {code.name: int(code) for code in Exit} == {
        "OK": 0,
        "CONFIGURATION": 1,
        "FLAGS": 2,
        "UNREACHABLE": 3,
        "FAILED": 4,
        "NOT_READY": 5,
    }


def refused(*arguments: str, flag: str, value: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        parse(list(arguments))
    found: Any = (caught.value.flag, caught.value.value)
    assert found == (flag, value)
    assert str(caught.value) == f"-{flag}={value}: {caught.value.reason}"
    assert [whole for whole in REASONS if re.fullmatch(whole, caught.value.reason)]


# Everything that may be wrong with a value, word for word.
REASONS = (
    r"bad port: write a number from 1 to 65535( \(0 lets the system choose\))?",
    r"excluded by http-endpoint, which (serves metrics too|has the port): give one of the two",
    r"has a control character in it, such as an end of line",
    r"has a second flag in it: make each flag an item of its own",
    r"has spaces around it",
    r"missing port: write host:port, :port or \[v6\]:port",
    r"must be longer than 0s",
    r"must begin with a slash, as in /metrics",
    r"must not be below 0s",
    r"neither a path nor a gRPC target: write /path, unix:///path, or dns:///host:port",
    r"no request has such a path: leave out spaces, \?, # and %",
    r"not an absolute path: write /path, unix:///path, or a gRPC target such as dns:///host:port",
    r"nothing to pass through: write passthrough:///host:port",
    r"the path has \d+ bytes, a unix socket's at most 107",
    r"this path serves health: choose another, as in /metrics",
    r"too many colons: write an IPv6 address in brackets, as in \[::1\]:9808",
    r"unknown log format: write text or json",
    r"write host:port alone, without a scheme or a path",
    r"\$\((\w+)\) was not replaced: define the variable \1 in the container's env",
    r"\$\{(\w+)\} was not replaced: in a manifest, Kubernetes replaces only \$\(\1\)",
)
