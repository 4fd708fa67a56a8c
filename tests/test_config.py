"""Every line of the flag table: what a command line becomes, and what is refused with flag, value and reason."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from livenessprobe import config, goflags
from livenessprobe.config import Config, ConfigError, Endpoint, Exit, parse

# The flag table of the contract; a name that is missing in the program, or is there in excess, is a defect.
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
EVERYWHERE = Endpoint("health-port", "9808", "", 9808)


def test_the_flags_are_those_of_the_contract() -> None:
    assert {flag.name for flag in config.FLAGS} == STRINGS.keys() | BOOLEANS | OLD.keys()
    assert {flag.name: flag.default for flag in config.FLAGS if flag.name in STRINGS} == STRINGS
    assert {flag.name for flag in config.FLAGS if flag.read is goflags.boolean} >= BOOLEANS


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
        verbosity=0,
        vmodule=(),
        json_logs=False,
        warnings=(),
    )


def test_a_config_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
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
        ("--metrics-path=/m", "metrics_path", "/m"),
        ("--statusz", "statusz", True),
        ("--statusz=false", "statusz", False),
        ("--once", "once", True),
        ("--once=false", "once", False),
        ("--version", "version", True),
        ("-v=5", "verbosity", 5),
        ("--v=2", "verbosity", 2),
        ("--vmodule=driver=5,web=4", "vmodule", (("driver", 5), ("web", 4))),
        ("--vmodule=driver.py=5,,*e?=1,", "vmodule", (("driver", 5), ("*e?", 1))),
        ("--vmodule=", "vmodule", ()),
        ("--logging-format=json", "json_logs", True),
        ("--logging-format=text", "json_logs", False),
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
        ("http://localhost:80", "colons"),
    ],
)
@pytest.mark.parametrize("flag", ["http-endpoint", "metrics-address"])
def test_bad_endpoints(flag: str, value: str, reason: str) -> None:
    refused(f"--{flag}={value}", flag=flag, value=value, reason=reason)


@pytest.mark.parametrize("value", ["", "x", "65536", "-1", "http", "80 ", " 80", "1e3", "0x50", ":80", "٨٠", "8.0"])  # fmt: skip
def test_bad_health_port(value: str) -> None:
    refused(f"--health-port={value}", flag="health-port", value=value, reason="bad port")


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
    ],
)
def test_http_endpoint_excludes(arguments: list[str], flag: str, value: str) -> None:
    refused(*arguments, flag=flag, value=value, reason="excluded by http-endpoint")


def test_http_endpoint_tolerates_the_default_health_port_with_a_warning() -> None:
    parsed = parse([HTTP, "--health-port=9808"])

    assert parsed.health.port == 9900
    assert [flag for _, flag in parsed.warnings] == ["health-port"]
    assert parse([HTTP, "--metrics-address="]).warnings == ()


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
        ("dns:///driver.example:9000", None),
        ("dns:///driver.example", None),
        ("ipv6:[::1]:9000", None),
        ("unix-abstract:csi:99999", None),
        ("vsock:2:99999", None),
        ("ipv4:127.0.0.1:9000", None),
        ("driver.example:9000", None),
        ("127.0.0.1:9000", None),
        ("[::1]:9000", None),
    ],
)
def test_csi_addresses(address: str, path: str | None) -> None:
    parsed = parse([f"--csi-address={address}"])

    assert (parsed.csi_address, parsed.socket_path) == (address, path)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
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
        ("/a\0b", "NUL"),
        (":", "neither"),
        ("./x:y", "neither"),
        ("http://driver.example:80", "neither"),
        ("dns:///driver\udcff:1", "neither"),
        ("dns:///driver\n:1", "neither"),
        ("driver.example:65536", "bad port"),
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
        ("--metrics-path=metrics", "metrics", "begin with a slash"),
        ("--metrics-path=", "", "begin with a slash"),
        ("--metrics-path=/m?x", "/m?x", "leave out blanks"),
        ("--metrics-path=/m n", "/m n", "leave out blanks"),
        ("--metrics-path=/m%6e", "/m%6e", "leave out blanks"),
        ("--metrics-path=/m#n", "/m#n", "leave out blanks"),
        ("--metrics-path=/m\n", "/m\n", "leave out blanks"),
        ("--logging-format=xml", "xml", "unknown log format"),
        ("--logging-format=", "", "unknown log format"),
        ("--logging-format=JSON", "JSON", "unknown log format"),
    ],
)
def test_bad_values(argument: str, value: str, reason: str) -> None:
    refused(argument, flag=argument[2:].partition("=")[0], value=value, reason=reason)


@pytest.mark.parametrize("path", ["/healthz", "/livez", "/readyz"])
def test_one_server_cannot_have_health_and_metrics_on_one_path(path: str) -> None:
    refused(HTTP, f"--metrics-path={path}", flag="metrics-path", value=path, reason="serves health")

    assert parse(["--metrics-address=:1", f"--metrics-path={path}"]).metrics_path == path


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
        ("--log-json-info-buffer-size=x", "quantity"),
        ("--log-text-info-buffer-size=-1", "quantity"),
        ("--log-text-info-buffer-size=1KB", "quantity"),
        ("--log-text-info-buffer-size=", "quantity"),
        ("--log-json-split-stream=x", "true or false"),
        ("--automaxprocs=x", "true or false"),
        ("--stderrthreshold=LOUD", "severity"),
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
    assert parse([argument]) == parse([])
    name = argument[2:].partition("=")[0]
    assert ["without effect" in flag.usage for flag in config.FLAGS if flag.name == name] == [True]


@pytest.mark.parametrize("flag", OLD)
def test_a_flag_of_older_releases_is_accepted_with_one_warning(flag: str) -> None:
    argument = f"-{flag}={OLD[flag]}"
    parsed = parse([argument, "--once", argument])

    assert parsed.once
    assert [name for _, name in parsed.warnings] == [flag]
    assert ["without effect" in each.usage for each in config.FLAGS if each.name == flag] == [True]


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
