"""The command line as a real process: its output and exit codes, and the argument lists found in the field."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import json
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import program
import pytest
import this_run
from fake_driver import FakeDriver

from livenessprobe import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from conftest import ProbeFactory

DEFAULT_PORT = 9808
DEFAULT_SOCKET = Path("/run/csi/socket")
ERROR_LINE = re.compile(
    r"E\d{4} \d\d:\d\d:\d\d\.\d{6} [ \d]{6}\d \w+\.py:\d+\] "
    r'"Bad configuration" err="(?P<err>[^"]+)" flag="(?P<flag>[\w-]+)" value="(?P<value>(?:[^"\\]|\\.)*)"'
)


# ---- what ends at once


# As an installed script calls it.
ENTRY_POINT = (sys.executable, "-c", "from livenessprobe.__main__ import main; main()")


@pytest.mark.parametrize("command", [None, program.MODULE, ENTRY_POINT], ids=["built", "module", "script"])
def test_version(command: Sequence[str] | None) -> None:
    done = program.run_once(["--version"], command=command)

    python = ".".join(map(str, sys.version_info[:2]))
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(
        rf"livenessprobe {re.escape(__version__)} \(Python {re.escape(python)}\.\S+, grpcio 1\.\d+\.\d+\)\n",
        done.stdout,
    )


@program.BOTH
@pytest.mark.parametrize("argument", ["-h", "--help"])
def test_help(argument: str, command: Sequence[str]) -> None:
    done = program.run_once(["--v=1", argument], command=command)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("livenessprobe answers /healthz")
    assert "\nExamples:\n  livenessprobe --csi-address=/csi/csi.sock\n" in done.stdout
    assert "\nFlags:\n  -csi-address string\n    \t" in done.stdout
    assert "\n  -probe-timeout duration\n    \tThe longest one check may take" in done.stdout
    assert "(default 3s)\n" in done.stdout
    assert done.stdout.endswith(", -one_output.\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--no-such-flag"], "flag provided but not defined: -no-such-flag"),
        (
            ["--probe-timeout-s=3"],
            "flag provided but not defined: -probe-timeout-s; the nearest is -probe-timeout;",
        ),
        (["--csi_address=/x"], "flag provided but not defined: -csi_address; the nearest is -csi-address;"),
        (
            ["--csi-address /x"],
            "flag provided but not defined: -csi-address /x: flag and value are one item: write ",
        ),
        (
            ["--v=$(LEVEL)"],
            'invalid value "$(LEVEL)" for flag -v: $(LEVEL) was not replaced: define the variable ',
        ),
        (["--feature-gates=A=true"], "flag provided but not defined: -feature-gates"),
        (
            ["--probe-timeout=5"],
            'invalid value "5" for flag -probe-timeout: missing unit in duration: write 5s',
        ),
        (["--csi-address"], "flag needs an argument: -csi-address"),
        (["--once", "false"], 'unexpected argument "false"'),
        (["stray", "--once"], 'unexpected argument "stray"'),
        (["---v=1"], 'bad flag syntax: "---v=1"'),
        (["--v=x\n\x1b[2J"], r'invalid value "x\n\x1b[2J" for flag -v: '),
        (["--v=1", "--version", "-"], 'unexpected argument "-"'),
    ],
)
def test_a_flag_error_exits_2_with_one_short_line(arguments: list[str], said: str) -> None:
    """`kubectl describe` shows the end of what a container wrote."""
    done = program.run_once(arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"livenessprobe: {said}")
    assert done.stderr.endswith("; -h lists all flags\n")
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) < 300


@program.BOTH
@pytest.mark.parametrize(
    ("argument", "redirection", "code"),
    [
        ("--version", ">/dev/full", 0),
        ("--version", ">&-", 0),
        ("--help", ">/dev/full", 0),
        ("--help", ">&-", 0),
        ("--no-such-flag", "2>/dev/full", 2),
        ("--health-port=x", "2>/dev/full", 1),
        ("--health-port=x", "<&- >&- 2>&-", 1),
    ],
)
def test_where_nothing_can_be_written_the_exit_code_still_tells(
    command: Sequence[str], argument: str, redirection: str, code: int
) -> None:
    in_shell = ["/bin/sh", "-c", f'"$@" {redirection}', "sh", *command, argument]
    done = subprocess.run(in_shell, capture_output=True, check=False, cwd=program.ROOT, timeout=30)

    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


REFUSED: dict[str, tuple[list[str], str, str, str]] = {
    # name: arguments (PORT: a port in use), flag, value, reason
    "health port in use": (["--health-port=PORT"], "health-port", "PORT", "address already in use"),
    "endpoint in use": (
        ["--http-endpoint=127.0.0.1:PORT"],
        "http-endpoint",
        "127.0.0.1:PORT",
        "address already in use",
    ),
    "metrics address in use": (
        ["--health-port=0", "--metrics-address=localhost:PORT"],
        "metrics-address",
        "localhost:PORT",
        "address already in use",
    ),
    "address not ours": (
        ["--http-endpoint=192.0.2.1:0"],
        "http-endpoint",
        "192.0.2.1:0",
        "cannot assign requested address",
    ),
    "unresolvable host": (
        ["--http-endpoint=host.invalid:80"],
        "http-endpoint",
        "host.invalid:80",
        "cannot resolve the host",
    ),
    "host no resolver takes": (
        [f"--http-endpoint={'x' * 64}.example:80"],
        "http-endpoint",
        "x" * 64 + ".example:80",
        "",
    ),
    "bad health port": (["--health-port=http"], "health-port", "http", "bad port"),
    "port too large": (["--http-endpoint=:65536"], "http-endpoint", ":65536", "bad port"),
    "no port": (["--metrics-address=localhost"], "metrics-address", "localhost", "missing port"),
    "two ports": (
        ["--http-endpoint=:9900", "--health-port=9901"],
        "health-port",
        "9901",
        "excluded by http-endpoint",
    ),
    "two metrics": (
        ["--http-endpoint=:9900", "--metrics-address=:9901"],
        "metrics-address",
        ":9901",
        "excluded by http-endpoint",
    ),
    "bad metrics path": (
        ["--metrics-path=metrics", "--http-endpoint=:0"],
        "metrics-path",
        "metrics",
        "must begin with a slash",
    ),
    "metrics on health's path": (
        ["--metrics-path=/healthz", "--http-endpoint=:0"],
        "metrics-path",
        "/healthz",
        "serves health",
    ),
    "unknown log format": (
        ["--logging-format=yaml"],
        "logging-format",
        "yaml",
        "unknown log format: write text or json",
    ),
    "relative path": (["--csi-address=csi/csi.sock"], "csi-address", "csi/csi.sock", "not an absolute path"),
    "a Windows path": (
        [r"--csi-address=unix://C:\\csi\\csi.sock", "--probe-timeout=30s", "--health-port=29603"],
        "csi-address",
        r"unix://C:\\csi\\csi.sock",
        "not an absolute path",
    ),
    "path too long": ([f"--csi-address=/{'x' * 107}"], "csi-address", "/" + "x" * 107, "at most 107"),
    "variable not replaced": (
        ["--csi-address=$(ADDRESS)"],
        "csi-address",
        "$(ADDRESS)",
        "$(ADDRESS) was not replaced: define the variable ADDRESS in the container's env",
    ),
    "folded YAML": (
        ["--csi-address=/csi/csi.sock --v=5"],
        "csi-address",
        "/csi/csi.sock --v=5",
        "has a second flag in it",
    ),
    "an address with an end of line": (
        ["--csi-address=/csi/csi.sock\n"],
        "csi-address",
        "/csi/csi.sock\n",
        "has a control character in it",
    ),
    "endpoint with a scheme": (
        ["--http-endpoint=http://127.0.0.1:9808/healthz"],
        "http-endpoint",
        "http://127.0.0.1:9808/healthz",
        "write host:port alone",
    ),
    "no time": (["--probe-timeout=0s"], "probe-timeout", "0s", "must be longer than 0s"),
    "negative time": (["--connection-timeout=-1s"], "connection-timeout", "-1s", "must not be below 0s"),
    "control characters": (
        ["--metrics-path=a\nE1123 forged\x1b[2J", "--http-endpoint=:0"],
        "metrics-path",
        "a\nE1123 forged\x1b[2J",
        "must begin with a slash",
    ),
}


@pytest.fixture
def taken_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield str(listener.getsockname()[1])


@pytest.mark.parametrize("case", REFUSED)
def test_bad_configuration_exits_1_with_one_line(case: str, taken_port: str) -> None:
    arguments, flag, value, reason = REFUSED[case]
    arguments = [argument.replace("PORT", taken_port) for argument in arguments]

    done = program.run_once(arguments)

    assert (done.returncode, done.stdout) == (1, "")
    line = ERROR_LINE.fullmatch(done.stderr.removesuffix("\n"))
    assert line, done.stderr
    assert line["flag"] == flag
    quoted = value.replace("PORT", taken_port).replace("\\", "\\\\")
    assert line["value"] == quoted.replace("\n", r"\n").replace("\x1b", r"\x1b")
    assert reason in line["err"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("argument", ["--health-port=x", "--health-port=PORT"])
def test_bad_configuration_in_json_is_one_line_of_json(argument: str, taken_port: str) -> None:
    argument = argument.replace("PORT", taken_port)
    done = program.run_once([argument, "--logging-format=json"])

    line = json.loads(done.stderr)
    assert done.returncode == 1
    assert list(line) == ["ts", "caller", "msg", "err", "flag", "value"]
    assert (line["flag"], line["value"]) == ("health-port", argument.partition("=")[2])


@program.BOTH
def test_a_warning_is_a_line_and_the_check_goes_on(command: Sequence[str]) -> None:
    arguments = ["--logtostderr", "--once", "--csi-address=/nowhere", "--connection-timeout=0"]
    done = program.run_once(arguments, command=command)

    assert (done.returncode, done.stdout) == (3, "cannot connect to /nowhere: no such file or directory\n")
    assert re.fullmatch(r'W.*\] "[^"]+" flag="logtostderr"\n', done.stderr)


def test_two_servers_on_one_port() -> None:
    port = program.free_port()
    done = program.run_once([f"--health-port={port}", f"--metrics-address=:{port}"])

    line = ERROR_LINE.fullmatch(done.stderr.removesuffix("\n"))
    assert done.returncode == 1
    assert line, done.stderr
    assert (line["flag"], line["value"]) == ("metrics-address", f":{port}")
    assert "address already in use" in line["err"]


def test_a_broken_installation_exits_1_with_one_line(folder: Path) -> None:
    (folder / "selectors.py").write_text("raise ImportError('it is broken')\n")
    done = program.run_once(["--v=0"], command=program.MODULE, env={"PYTHONPATH": str(folder)})

    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"F\d{4} .* log\.py:\d+\] "
        r'"Unexpected error, please report it" err="ImportError\(\'it is broken\'\)"\n',
        done.stderr,
    )


# ---- argument lists of the field; ADDRESS: the driver's socket, PORT: a free port, PORT2: another one

FIELD = {
    "EBS controller with metrics": "ADDRESS --probe-timeout=60s --health-port=PORT --metrics-address=0.0.0.0:PORT2",
    "SMB": "ADDRESS --probe-timeout=3s --http-endpoint=127.0.0.1:PORT --v=2",
    "NFS": "ADDRESS --probe-timeout=3s --http-endpoint=localhost:PORT --v=2",
    "azuredisk node": "ADDRESS --probe-timeout=10s --http-endpoint=localhost:PORT --v=2",
    "secrets-store": "ADDRESS --probe-timeout=3s --http-endpoint=0.0.0.0:PORT -v=2",
    "azurelustre": "ADDRESS --probe-timeout=120s --health-port=PORT --v=2",
    "OpenShift": "ADDRESS --http-endpoint=127.0.0.1:PORT --v=4",
    "OpenShift on the pod network": "ADDRESS --health-port=PORT --v=4",
    "IBM scale": "--health-port=PORT ADDRESS --v=5 --probe-timeout=20s",
    "JuiceFS": "ADDRESS --health-port=PORT",
    "hostpath": "ADDRESS --health-port=PORT",
    "TopoLVM": "ADDRESS --http-endpoint=:PORT",
    "port and its default": "ADDRESS --http-endpoint=127.0.0.1:PORT --health-port=9808",
}
# These take the default port, so the tests do too.
FIELD_DEFAULT_PORT = {
    "EBS node": "ADDRESS",
    "EBS Windows": "--csi-address=unix:SOCKET",
    "EBS controller": "ADDRESS --probe-timeout=60s",
    "vSphere, Longhorn": "--v=4 ADDRESS",
    "cinder": "-v=5 ADDRESS",
}


@pytest.fixture
def default_port() -> Iterator[int]:
    """No other test listens there."""
    with this_run.locked("default_port"):
        end = time.monotonic() + 60  # another test's container may have it for a while
        while problem := not_free(DEFAULT_PORT):
            if time.monotonic() > end:
                pytest.skip(f"port {DEFAULT_PORT}: {problem}")
            time.sleep(0.1)
        yield DEFAULT_PORT


def not_free(port: int) -> OSError | None:
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(("", port))
        except OSError as error:
            return error
    return None


def filled_in(arguments: str, **values: object) -> list[str]:
    text = arguments.replace("ADDRESS", "--csi-address=SOCKET")
    return [
        re.sub(r"SOCKET|PORT2|PORT", lambda found: str(values[found[0]]), argument)
        for argument in text.split()
    ]


def answers(probe: program.Probe, port: int, metrics: str) -> None:
    """Asked as by the kubelet, two at a time; metrics on the `same` server, on their `own`, or `none`."""
    assert probe.address()[1] == port
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(probe.get, ["/healthz"] * 2))
    assert [(answer.status, answer.text) for answer in both] == [(200, "ok")] * 2
    assert probe.get("/metrics").status == (200 if metrics == "same" else 404)
    if metrics == "own":
        assert probe.get("/metrics", listener=1).status == 200
        assert probe.get("/healthz", listener=1).status == 404


@pytest.mark.parametrize("who", FIELD)
def test_argument_lists_of_the_field(probe_factory: ProbeFactory, driver: FakeDriver, who: str) -> None:
    port, other = program.free_port(), program.free_port()
    arguments = filled_in(FIELD[who], SOCKET=driver.target, PORT=port, PORT2=other)
    own = "--metrics-address" in FIELD[who]

    probe = probe_factory(*arguments, listeners=1 + own)

    answers(probe, port, "own" if own else "same" if "http-endpoint" in FIELD[who] else "none")


@pytest.mark.parametrize("who", FIELD_DEFAULT_PORT)
def test_argument_lists_of_the_field_on_the_default_port(
    probe_factory: ProbeFactory, driver: FakeDriver, default_port: int, who: str
) -> None:
    probe = probe_factory(*filled_in(FIELD_DEFAULT_PORT[who], SOCKET=driver.target))

    answers(probe, default_port, "none")


def test_no_arguments(probe_factory: ProbeFactory, default_port: int) -> None:
    """As Hetzner runs it. Only root can put a driver where it looks for one then."""
    with contextlib.ExitStack() as cleaning:
        expected = (200, "ok")
        if DEFAULT_SOCKET.exists():
            pytest.skip(f"{DEFAULT_SOCKET} is there already")
        try:
            if not DEFAULT_SOCKET.parent.exists():
                DEFAULT_SOCKET.parent.mkdir()
                cleaning.callback(DEFAULT_SOCKET.parent.rmdir)
            cleaning.callback(DEFAULT_SOCKET.unlink, missing_ok=True)
            cleaning.enter_context(FakeDriver(DEFAULT_SOCKET))
        except PermissionError:
            expected = (500, f"cannot connect to {DEFAULT_SOCKET}: no such file or directory")
        probe = probe_factory()

        assert probe.address()[1] == default_port
        answer = probe.get()
        assert (answer.status, answer.text) == expected


def test_flags_of_older_releases_warn_once_each_and_serve(
    probe_factory: ProbeFactory, driver: FakeDriver
) -> None:
    old = [
        "--logtostderr",
        "-alsologtostderr=false",
        "--stderrthreshold",
        "INFO",
        "--log_dir=/x",
        "--one_output",
    ]
    probe = probe_factory(*old, f"--csi-address={driver.target}", "--http-endpoint=127.0.0.1:0")

    assert probe.get().text == "ok"
    warnings = [line for line in probe.log_lines if line.startswith("W")]
    assert [re.findall(r' flag="(\w+)"$', line) for line in warnings] == [
        ["logtostderr"],
        ["alsologtostderr"],
        ["stderrthreshold"],
        ["log_dir"],
        ["one_output"],
    ]


# ---- standard descriptors


@contextlib.contextmanager
def in_a_shell(script: str, *args: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The program as a shell starts it: `exec "$@"` and redirections. It must end well on SIGTERM."""
    command = ["/bin/sh", "-c", script, "sh", *program.built(), *args]
    with subprocess.Popen(command, cwd=program.ROOT, **options) as process:
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 0
        finally:
            process.kill()


def ask(port: int, process: subprocess.Popen[bytes]) -> bytes:
    """All the program sends on a new connection; waits until it listens, as nothing else tells here."""
    end = time.monotonic() + 10
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), 10) as connection:
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                return b"".join(iter(lambda: connection.recv(65536), b""))
        except ConnectionRefusedError:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)


def split(answer: bytes) -> tuple[bytes, bytes]:
    """Status line and body of an answer that has nothing before, after or in between."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *fields = head.split(b"\r\n")
    assert all(re.fullmatch(rb"[A-Za-z-]+: [^\r\n]+", field) for field in fields)
    assert f"Content-Length: {len(body)}".encode() in fields
    return status, body


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_descriptors(driver: FakeDriver, redirection: str) -> None:
    """No socket may get such a number, or the log would go to a client or to the driver."""
    port = program.free_port()
    arguments = ("-v=5", f"--csi-address={driver.target}", f"--http-endpoint=127.0.0.1:{port}")
    with in_a_shell(f'exec "$@" {redirection}', *arguments, stderr=subprocess.PIPE) as process:
        assert split(ask(port, process)) == (b"HTTP/1.1 200 OK", b"ok")
        driver.set("error", message="disk gone")
        assert split(ask(port, process)) == (
            b"HTTP/1.1 500 Internal Server Error",
            b"rpc error: code = Internal desc = disk gone",
        )
        driver.set("unset")
        assert [split(ask(port, process))[1] for _ in range(3)] == [b"ok"] * 3
        targets = [Path(f"/proc/{process.pid}/fd/{number}").readlink() for number in range(3)]
        closed = {number for number, sign in enumerate(("<&-", " >&-", "2>&-")) if sign in f" {redirection}"}
        assert {number for number, target in enumerate(targets) if str(target) == os.devnull} >= closed
        assert not any(str(target).startswith(("socket:", "anon_inode:")) for target in targets)


@contextlib.contextmanager
def full_pipe() -> Iterator[int]:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, resource.getpagesize())
    yield writer
    os.close(reader)
    os.close(writer)


@contextlib.contextmanager
def pipe_of_another_writer() -> Iterator[int]:
    """Room that is there one moment is taken by somebody else the next."""
    with full_pipe() as writer, subprocess.Popen(["yes"], stdout=writer) as other:
        try:
            yield writer
        finally:
            other.kill()


@contextlib.contextmanager
def nobody_reads() -> Iterator[int]:
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@contextlib.contextmanager
def full_device() -> Iterator[int]:
    with open("/dev/full", "wb") as device:
        yield device.fileno()


@contextlib.contextmanager
def terminal_that_nobody_reads() -> Iterator[int]:
    terminal, end = pty.openpty()
    yield end
    os.close(terminal)
    os.close(end)


@contextlib.contextmanager
def stopped_terminal() -> Iterator[int]:
    """As after ^S."""
    with terminal_that_nobody_reads() as end:
        termios.tcflow(end, termios.TCOOFF)
        yield end


@contextlib.contextmanager
def full_socket() -> Iterator[int]:
    """Like journald's, while that is stopped."""
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                writer.send(b"\n" * 1000)
        writer.setblocking(True)
        yield writer.fileno()


MUTE = [
    full_pipe,
    pipe_of_another_writer,
    nobody_reads,
    full_device,
    terminal_that_nobody_reads,
    stopped_terminal,
    full_socket,
]
Mute = Callable[[], contextlib.AbstractContextManager[int]]


@pytest.mark.parametrize("errors", MUTE)
def test_a_log_that_takes_nothing_stops_neither_service_nor_program(driver: FakeDriver, errors: Mute) -> None:
    port = program.free_port()
    arguments = ("-v=5", f"--csi-address={driver.target}", f"--http-endpoint=127.0.0.1:{port}")
    with errors() as descriptor, in_a_shell('exec "$@"', *arguments, stderr=descriptor) as process:
        for _ in range(60):
            driver.set("not-ready")
            assert split(ask(port, process))[0] == b"HTTP/1.1 500 Internal Server Error"
            driver.set("ready")
            assert split(ask(port, process)) == (b"HTTP/1.1 200 OK", b"ok")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--once", "-v=5"], 0),
        (["--help"], 0),
        (["--version"], 0),
        (["--no-such-flag"], 2),
        (["--health-port=x"], 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("mute", MUTE)
def test_streams_that_take_nothing_stop_no_command(
    driver: FakeDriver, mute: Mute, arguments: list[str], code: int
) -> None:
    with mute() as descriptor:
        done = subprocess.run(
            [*program.built(), f"--csi-address={driver.target}", *arguments],
            check=False,
            cwd=program.ROOT,
            stderr=descriptor,
            stdout=descriptor,
            timeout=20,
        )

    assert done.returncode == code


# Like a shell with job control: starts a command in the background, and tells whether it was stopped.
BACKGROUND = """
import fcntl, os, subprocess, sys, termios
fcntl.ioctl(1, termios.TIOCSCTTY, 0)
settings = termios.tcgetattr(1)
settings[3] |= termios.TOSTOP
termios.tcsetattr(1, termios.TCSANOW, settings)
job = subprocess.Popen(sys.argv[1:], preexec_fn=os.setpgrp)
status = os.waitpid(job.pid, os.WUNTRACED)[1]
job.kill()
os._exit(99 if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status))
"""


def test_in_the_background_of_a_terminal_a_line_does_not_stop_it() -> None:
    terminal, end = pty.openpty()
    command = [sys.executable, "-c", BACKGROUND, *program.built(), "--health-port=x"]
    try:
        code = subprocess.run(
            command, check=False, cwd=program.ROOT, start_new_session=True, stderr=end, stdout=end, timeout=20
        ).returncode
        said = os.read(terminal, 1000)
    finally:
        os.close(terminal)
        os.close(end)

    assert code == 1
    assert b"bad port" in said


def test_what_is_said_last_arrives(probe: program.Probe) -> None:
    probe.stop()

    assert probe.log_lines[-1].endswith('"Stopping"')


# ---- the environment

LIBRARIES = {
    "GRPC_POLL_STRATEGY": "epollex",
    "GRPC_EXPERIMENTS": "no_such_experiment,event_engine_client",
    "GRPC_TRACE": "all",
    "GRPC_VERBOSITY": "DEBUG",
    "GRPC_DNS_RESOLVER": "none of these",
    "GRPC_PYTHON_DEFAULT_TIMEOUT_SECONDS": "x",
    "grpc_proxy": "http://127.0.0.1:1",
    "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "cpp",
    "PROMETHEUS_MULTIPROC_DIR": "/nonexistent",
    "prometheus_multiproc_dir": "/nonexistent",
    "PROMETHEUS_DISABLE_CREATED_SERIES": "false",
    "PROMETHEUS_PORT": "tcp://10.0.0.1:9090",
}


# Several at a time, but apart from those that would hide what they do: with a folder of many processes, Prometheus's client
# has no series of creation, and it reads one name of that folder only if there isn't the other.
TOGETHER = (
    (
        *("GRPC_POLL_STRATEGY", "GRPC_TRACE", "GRPC_DNS_RESOLVER"),
        *("PROMETHEUS_DISABLE_CREATED_SERIES", "PROMETHEUS_PORT"),
    ),
    (
        *("GRPC_EXPERIMENTS", "GRPC_VERBOSITY"),
        *("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "PROMETHEUS_MULTIPROC_DIR"),
    ),
    ("GRPC_PYTHON_DEFAULT_TIMEOUT_SECONDS", "grpc_proxy", "prometheus_multiproc_dir"),
)


@pytest.mark.parametrize("command", [None, program.MODULE], ids=["built", "module"], indirect=True)
@pytest.mark.parametrize("names", [*TOGETHER, tuple(LIBRARIES)], ids=["first", "second", "third", "all"])
def test_no_library_s_variable_has_a_say(
    probe_factory: ProbeFactory,
    driver: FakeDriver,
    command: Sequence[str] | None,
    names: tuple[str, ...],
) -> None:
    """Checks the same driver over TCP, which gRPC's own library calls."""
    with FakeDriver("127.0.0.1:0") as far:
        for target in (driver.target, f"dns:///{far.address}"):
            have_no_say(names, target, probe_factory, command)


def have_no_say(
    names: tuple[str, ...], target: str, probe_factory: ProbeFactory, command: Sequence[str] | None
) -> None:
    env = {name: LIBRARIES[name] for name in names}
    flags = (f"--csi-address={target}", "--http-endpoint=127.0.0.1:0", "--v=4")
    try:
        probe = probe_factory(*flags, env=env)
        assert [probe.get().text for _ in range(3)] == ["ok"] * 3
        probe.wait_for_log("Learnt the CSI driver's name")
        metrics = probe.get("/metrics").text
        assert "\ncsi_liveness_up 1.0\n" in metrics
        assert "_created" not in metrics
        assert probe.stop() == 0
        assert [line for line in probe.log_lines if not OUR_LINE.match(line)] == []
        done = program.run_once(["--once", flags[0]], command=command, env=env)
        assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
    except (AssertionError, OSError) as error:
        for name in names if len(names) > 1 else ():
            have_no_say((name,), target, probe_factory, command)
        raise AssertionError(f"{' or '.join(names)} has a say") from error


def test_all_variables_are_tried() -> None:
    assert sorted(itertools.chain(*TOGETHER)) == sorted(LIBRARIES)


OUR_LINE = re.compile(r"[IWEF]\d{4} [\d:.]{15} [ \d]{6}\d (serve|driver_name|driver|exchange)\.py:\d+\] ")


def test_metrics_are_not_written_into_the_folder_of_many_processes(
    probe_factory: ProbeFactory, driver: FakeDriver, folder: Path
) -> None:
    shared = folder / "shared"
    shared.mkdir()
    probe = probe_factory(
        f"--csi-address={driver.target}",
        "--http-endpoint=127.0.0.1:0",
        env={"PROMETHEUS_MULTIPROC_DIR": str(shared)},
    )
    assert probe.get().text == "ok"
    assert probe.get("/metrics").status == 200

    assert list(shared.iterdir()) == []


PYTHON = {
    "PYTHONWARNINGS": "error",
    "PYTHONVERBOSE": "1",
    "PYTHONDEVMODE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONINSPECT": "1",
    "PYTHONIOENCODING": "no such codec",
    "PYTHONHOME": "/nonexistent",
    "PYTHONPATH": "/nonexistent",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONPROFILEIMPORTTIME": "1",
}
# What a Python that isn't told to ignore them (-I) does before the program begins.
OF_THE_INTERPRETER = {"PYTHONVERBOSE", "PYTHONIOENCODING", "PYTHONHOME", "PYTHONPROFILEIMPORTTIME"}


@pytest.mark.parametrize(
    ("command", "names"),
    [
        # As it starts itself; `python3 bin/livenessprobe` has no -I.
        ((str(program.ROOT / "bin" / "livenessprobe"),), PYTHON.keys()),
        (program.MODULE, PYTHON.keys() - OF_THE_INTERPRETER),
    ],
    ids=["built", "module"],
)
def test_no_variable_of_python_s_has_a_say(
    driver: FakeDriver, command: Sequence[str], names: Iterable[str]
) -> None:
    for name in names:
        env = {name: PYTHON[name]}
        done = program.run_once(["--once", f"--csi-address={driver.target}"], command=command, env=env)
        assert (name, done.returncode, done.stdout, done.stderr) == (name, 0, "ok\n", "")


# ---- signals


def _blocks(thread: int, number: signal.Signals) -> bool:
    """Whether a thread blocks a signal, as those do that were started before there were handlers."""
    blocked = re.search(r"(?m)^SigBlk:\s*(\w+)$", Path(f"/proc/{thread}/status").read_text())
    assert blocked
    return bool(int(blocked[1], 16) >> number - 1 & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_does_not_end_the_wait_itself_stops_it_too(
    probe: program.Probe, number: signal.Signals
) -> None:
    """Delivered to another thread, it comes like one that arrives just before the main thread waits."""
    assert probe.get("/nothing").status == 404
    tgkill = ctypes.CDLL(None, use_errno=True).tgkill
    others = [thread for thread in map(int, probe.thread_ids()) if thread != probe.pid]
    assert tgkill(probe.pid, next(each for each in others if not _blocks(each, number)), number) == 0

    assert probe.wait() == 0
