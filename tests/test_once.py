"""--once, as a shell sees it: one line, one exit code, and what it says while it waits."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import fake_driver
import peers
import program
import pytest
from fake_driver import FakeDriver

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

QUICK = ("--connection-timeout=300ms", "--probe-timeout=300ms")
# With time for whoever answers, and for the system to refuse a connection, on a busy machine.
PATIENT = ("--connection-timeout=300ms", "--probe-timeout=20s")
GO_CODES = {"CANCELLED": "Canceled"}


def once(path: Path | str, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return program.run_once(["--once", f"--csi-address={path}", *args], **options)


def told(done: subprocess.CompletedProcess[str]) -> tuple[int, str]:
    """The exit code and the one line; a quick check says nothing on standard error."""
    assert done.stderr == ""
    assert done.stdout.endswith("\n")
    line = done.stdout[:-1]
    assert line.isprintable()
    return done.returncode, line


# ---- the driver answers


@pytest.mark.parametrize(
    ("behaviour", "code", "line"),
    [
        ("unset", 0, "ok"),
        ("ready", 0, "ok"),
        ("not-ready", 5, "driver responded but is not ready"),
    ],
)
def test_answers(driver: FakeDriver, behaviour: fake_driver.Behaviour, code: int, line: str) -> None:
    driver.set(behaviour)

    assert told(once(driver.target)) == (code, line)
    assert driver.seen().probes == 1


@pytest.mark.parametrize("name", ["INTERNAL", "UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED", "FAILED_PRECONDITION"])  # fmt: skip
def test_errors(driver: FakeDriver, name: str) -> None:
    driver.set("error", code=name, message="disk gone")
    go_name = GO_CODES.get(name, name.title().replace("_", ""))

    assert told(once(driver.target)) == (4, f"rpc error: code = {go_name} desc = disk gone")


@pytest.mark.parametrize("behaviour", ["unimplemented", "no-service"])
def test_no_probe(driver: FakeDriver, behaviour: fake_driver.Behaviour) -> None:
    driver.set(behaviour)

    code, line = told(once(driver.target))

    assert code == 4
    assert line.startswith("rpc error: code = Unimplemented desc = ")


def test_an_undecodable_reply(driver: FakeDriver) -> None:
    driver.set("raw", data=b"\xff\xff\xff")

    code, line = told(once(driver.target))

    assert code == 4
    assert line.startswith("rpc error: code = Internal desc = cannot decode the reply")


def test_a_hanging_driver(driver: FakeDriver) -> None:
    driver.set("hang")
    begin = time.monotonic()

    code, line = told(once(driver.target, "--probe-timeout=300ms", "--connection-timeout=30s"))

    assert (code, line.partition(" = no answer")[0]) == (4, "rpc error: code = DeadlineExceeded desc")
    assert "/csi.v1.Identity/Probe" in line
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("a\nok", r"a\nok"),
        ("\r\x1b[2Jok", r"\r\x1b[2Jok"),
        ("\x00", r"\x00"),
        ("\u2028ok\u2029\u202e", r"\u2028ok\u2029\u202e"),
        ("\x85\x9b31m", r"\u0085\u009b31m"),
        ("größer 🦄 100 %41", "größer 🦄 100 %41"),
    ],
)
def test_a_driver_s_text_stays_one_line(driver: FakeDriver, message: str, shown: str) -> None:
    driver.set("error", message=message)

    code, line = told(once(driver.target))

    assert code == 4
    assert line == f"rpc error: code = Internal desc = {shown}"


def test_a_long_text_is_cut_and_says_so(driver: FakeDriver) -> None:
    driver.set("error", message="x" * 900_000)

    code, line = told(once(driver.target))

    assert code == 4
    assert len(line) <= 4096
    assert re.search(r"xxx\.\.\. \(cut, 9000\d\d bytes in all\)$", line)


# ---- addresses


@pytest.mark.parametrize("form", ["{}", "unix://{}", "unix:{}"])
def test_address_forms(driver: FakeDriver, form: str) -> None:
    assert told(once(form.format(driver.target))) == (0, "ok")


@pytest.mark.parametrize("form", ["{}", "dns:///{}", "ipv4:{}"])
def test_tcp_addresses(form: str) -> None:
    with FakeDriver("127.0.0.1:0") as driver:
        assert told(once(form.format(driver.address))) == (0, "ok")


def test_nobody_listens_on_a_tcp_port() -> None:
    address = f"127.0.0.1:{program.free_port()}"

    code, line = told(once(address, *PATIENT))

    assert code == 3
    assert line.startswith(f"cannot connect to {address}: ")
    assert "onnection refused" in line


# ---- no connection

UNREACHABLE: dict[str, tuple[peers.Peer, str]] = {
    "missing": (nullcontext, "no such file or directory"),
    "stale": (peers.stale_socket, "connection refused"),
    "regular file": (peers.regular_file, "not a socket"),
    "folder": (peers.directory, "not a socket"),
    "HTTP/1.1": (peers.http1, "the peer does not speak HTTP/2"),
    "closing at once": (peers.closing_at_once, "(closed by the peer|connection reset)$"),
    "junk": (peers.junk, "the peer does not speak HTTP/2"),
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_no_connection(socket_path: Path, case: str) -> None:
    peer, reason = UNREACHABLE[case]
    with peer(socket_path):
        code, line = told(once(socket_path, *PATIENT))

    assert code == 3
    assert re.match(f"cannot connect to {socket_path}: {reason}", line)


@pytest.mark.parametrize("peer", [peers.forbidden, peers.forbidden_folder])
def test_permission_denied_is_told_at_once_with_a_hint(socket_path: Path, peer: peers.Peer) -> None:
    user = program.unprivileged()
    begin = time.monotonic()
    with peer(socket_path):
        code, line = told(once(socket_path, user=user))

    assert time.monotonic() - begin < 5
    assert code == 3
    assert line.startswith(f"cannot connect to {socket_path}: permission denied")
    assert f"uid {os.geteuid() if user is None else user}" in line
    assert "SELinux" in line


def test_what_is_no_socket_is_told_at_once(socket_path: Path) -> None:
    begin = time.monotonic()
    with peers.regular_file(socket_path):
        assert once(socket_path).returncode == 3

    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("peer", [peers.silent, peers.settings_then_silent])
def test_a_peer_that_accepts_and_says_nothing_is_no_answer(socket_path: Path, peer: peers.Peer) -> None:
    with peer(socket_path):
        code, line = told(once(socket_path, *QUICK))

    assert (code, line.partition(" desc")[0]) == (4, "rpc error: code = DeadlineExceeded")


# ---- waiting


@contextmanager
def started(
    *args: str, command: Sequence[str] = program.built(), stderr: int = subprocess.PIPE
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*command, "--once", *args],
        cwd=program.ROOT,
        stderr=stderr,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=30)
    return process.returncode, output, errors


def read_line(descriptor: int, seconds: float) -> str:
    """The next line of a terminal or a pipe."""
    line, end = b"", time.monotonic() + seconds
    while not line.endswith(b"\n"):
        assert select.select([descriptor], [], [], max(0, end - time.monotonic()))[0], f"only {line!r}"
        line += os.read(descriptor, 1)
    return line.decode().rstrip("\r\n")


@contextmanager
def on_a_terminal(
    *args: str, command: Sequence[str] = program.built()
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The program with a terminal as its standard error, and the descriptor to read it from."""
    terminal, end = pty.openpty()
    try:
        with started(*args, command=command, stderr=end) as process:
            yield process, terminal
    finally:
        os.close(end)
        os.close(terminal)


def test_the_wait_for_the_socket_is_connection_timeout(socket_path: Path) -> None:
    begin = time.monotonic()
    code, _ = told(once(socket_path, "--connection-timeout=1.2s", "--probe-timeout=100ms"))

    assert code == 3
    assert 1.2 <= time.monotonic() - begin < 4


def test_zero_connection_timeout_is_one_attempt(socket_path: Path) -> None:
    begin = time.monotonic()

    assert told(once(socket_path, "--connection-timeout=0"))[0] == 3
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("before", [nullcontext, peers.stale_socket], ids=["missing", "stale"])
def test_a_driver_that_appears_meanwhile_is_found(socket_path: Path, before: peers.Peer) -> None:
    address = f"--csi-address={socket_path}"
    with before(socket_path), on_a_terminal(address, "--probe-timeout=2s") as (process, terminal):
        assert "Waiting for the CSI driver" in read_line(terminal, 5)
        socket_path.unlink(missing_ok=True)
        with FakeDriver(socket_path):
            assert finish(process)[:2] == (0, "ok\n")


def test_on_a_terminal_it_says_at_once_what_it_waits_for(socket_path: Path) -> None:
    begin = time.monotonic()
    with on_a_terminal(f"--csi-address={socket_path}") as (_, terminal):
        line = read_line(terminal, 5)

    assert time.monotonic() - begin < 3
    assert re.search(
        r"^I.* progress\.py:\d+\] "
        rf'"Waiting for the CSI driver" for="cannot connect to {socket_path}: no such file or directory" '
        rf'address="{socket_path}" waited="\d+s" longest="33s"$',
        line,
    )


def test_on_a_terminal_it_says_that_the_answer_is_awaited(driver: FakeDriver) -> None:
    driver.set("hang")
    with on_a_terminal(f"--csi-address={driver.target}", "--probe-timeout=30s") as (process, terminal):
        assert ' for="its answer to Probe" ' in read_line(terminal, 5)
        driver.release()
        assert finish(process)[:2] == (0, "ok\n")


def test_elsewhere_it_says_so_after_10_seconds(socket_path: Path) -> None:
    """It takes that long: the only slow test here."""
    begin = time.monotonic()
    with started(f"--csi-address={socket_path}", "--logging-format=json") as process:
        assert process.stderr
        line = json.loads(read_line(process.stderr.fileno(), 15))

    assert 9.5 < time.monotonic() - begin < 13
    assert line["msg"] == "Waiting for the CSI driver"
    assert "no such file or directory" in line["for"]


# ---- signals


@program.BOTH
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_while_waiting_it_tells_the_reason_so_far(
    command: Sequence[str], socket_path: Path, number: signal.Signals
) -> None:
    with on_a_terminal(f"--csi-address={socket_path}", command=command) as (process, terminal):
        read_line(terminal, 5)
        begin = time.monotonic()
        process.send_signal(number)
        code, output, _ = finish(process)

    assert (code, output) == (3, f"cannot connect to {socket_path}: no such file or directory\n")
    assert time.monotonic() - begin < 1


@program.BOTH
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_in_a_hanging_probe(
    command: Sequence[str], driver: FakeDriver, number: signal.Signals
) -> None:
    driver.set("hang")
    with started(f"--csi-address={driver.target}", "--probe-timeout=1h", command=command) as process:
        driver.wait(probing=1)
        begin = time.monotonic()
        process.send_signal(number)

        assert finish(process) == (
            4,
            f"rpc error: code = Canceled desc = interrupted by {number.name}\n",
            "",
        )
        assert time.monotonic() - begin < 1


def test_a_driver_that_came_and_hangs_is_no_missing_driver(socket_path: Path) -> None:
    address = f"--csi-address={socket_path}"
    with on_a_terminal(address, "--probe-timeout=1h") as (process, terminal):
        read_line(terminal, 5)
        driver = FakeDriver(socket_path)
        driver.set("hang")
        with driver:
            driver.wait(probing=1)
            process.send_signal(signal.SIGTERM)
            assert finish(process)[0] == 4


# ---- surroundings


def test_it_starts_no_server_and_reads_no_port(driver: FakeDriver) -> None:
    with peers_port() as port:
        assert told(once(driver.target, f"--http-endpoint=127.0.0.1:{port}")) == (0, "ok")


@contextmanager
def peers_port() -> Iterator[int]:
    """A port that is in use."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("redirection", "code"), [("1>&-", 0), (">/dev/full", 0), ("1>&- 2>&-", 0), ("0<&- 1>&- 2>&-", 0)]
)
def test_where_the_line_cannot_be_written_the_exit_code_still_tells(driver: FakeDriver, redirection: str, code: int) -> None:  # fmt: skip
    command = [*program.built(), "--once", f"--csi-address={driver.target}"]
    done = shell(f'"$@" {redirection}', command)

    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def shell(script: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", "-c", script, "sh", *command],
        capture_output=True,
        check=False,
        cwd=program.ROOT,
        text=True,
        timeout=30,
    )


def test_a_broken_installation_is_told_as_an_answer(folder: Path) -> None:
    """It also loads slowly; until it knows whether there is a driver, it says nothing about waiting for one."""
    (folder / "hpack.py").write_text("import time\ntime.sleep(0.8)\nraise ImportError('hpack is broken')\n")
    terminal, end = pty.openpty()
    done = subprocess.run(
        [*program.MODULE, "--once"],
        check=False,
        cwd=program.ROOT,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stderr=end,
        stdout=subprocess.PIPE,
        text=True,
        timeout=30,
    )
    os.close(end)

    assert (done.returncode, done.stdout) == (
        4,
        "rpc error: code = Internal desc = the liveness probe itself failed: ImportError('hpack is broken')\n",
    )
    assert not select.select([terminal], [], [], 0)[0] or not read_all(terminal)
    os.close(terminal)


def read_all(terminal: int) -> bytes:
    """What is left; a terminal that nobody writes to any more gives an error."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_verbosity_5_shows_the_call_on_standard_error(driver: FakeDriver) -> None:
    done = once(driver.target, "-v=5")

    assert (done.returncode, done.stdout) == (0, "ok\n")
    assert (
        len(
            re.findall(
                r'^I.* driver\.py:\d+\] "Calling .*"/csi\.v1\.Identity/Probe"', done.stderr, re.MULTILINE
            )
        )
        == 1
    )
    assert (
        len(
            re.findall(
                r'^I.* driver\.py:\d+\] "The CSI driver replied".* code="OK"', done.stderr, re.MULTILINE
            )
        )
        == 1
    )


@pytest.mark.parametrize(("args", "code"), [(["--health-port=x"], 1), (["--probe-timeout=5"], 2)])
def test_configuration_and_flag_errors(driver: FakeDriver, args: list[str], code: int) -> None:
    done = once(driver.target, *args)

    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr
