"""The image, in a real Docker engine: as various users, hardened, small, cold, in a pod; its contents, and for arm64."""

from __future__ import annotations

import concurrent.futures
import email
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.parse
import zlib
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import built_images
import contents
import image
import kept
import peers
import program
import pytest
import sbom
from fake_driver import FakeDriver
from image_engine import (
    HARDENED,
    MARK,
    PORT,
    Container,
    created,
    docker,
    missing,
    must,
    volume,
)

from livenessprobe import __version__, config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Files: TypeAlias = dict[str, tarfile.TarInfo]

pytestmark = pytest.mark.timeout(600)  # builds an image, and maybe the one to build it in

ROOT = program.ROOT
PYTHON = f"/usr/bin/python{image.PYTHON}"
# As `kubectl` spells them: runAsUser, runAsGroup.
USERS = {"the image's": [], "nonroot": ["--user=65532:65532"], "arbitrary, gid 0": ["--user=1000680000:0"]}
MACHINES = {"amd64": 62, "arm64": 183}  # of elf.h


class Archive:
    """An image as `docker save` writes it: its configuration, its layers, and all of their files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with tarfile.open(path) as outer:
            [manifest] = json.load(self._open(outer, "manifest.json"))
            self.tag = manifest["RepoTags"][0]
            self.config = json.load(self._open(outer, manifest["Config"]))
            self.layers = [self._open(outer, name).read() for name in manifest["Layers"]]
        self.members: Files = {}
        self.contents: dict[str, bytes] = {}
        for layer in self.layers:
            with tarfile.open(fileobj=io.BytesIO(layer)) as inner:
                for member in inner:
                    self.members[member.name] = member
                    if member.isfile():
                        self.contents[member.name] = self._open(inner, member.name).read()

    @staticmethod
    def _open(archive: tarfile.TarFile, name: str) -> Any:
        file = archive.extractfile(name)
        assert file
        return file


# ---- what is built


@pytest.fixture(scope="session")
def engine() -> None:
    """A Docker engine."""
    if reason := missing():
        pytest.skip(reason)


def loaded(architecture: str) -> Archive:
    """The image for an architecture, loaded into the engine."""
    archive = Archive(built_images.archives()[f"linux/{architecture}"])
    must("load", f"--input={archive.path}")
    return archive


@pytest.fixture(scope="session")
def architecture(engine: None) -> str:
    return image.engine_platform().partition("/")[2]


@pytest.fixture(scope="session")
def built(architecture: str) -> Archive:
    """The image for the engine's machine."""
    return loaded(architecture)


@pytest.fixture(scope="session")
def foreign(architecture: str) -> Archive:
    """The image for the other machine."""
    return loaded("amd64" if architecture == "arm64" else "arm64")


# ---- what runs


@pytest.fixture
def run(built: Archive, folder: Path) -> Iterator[Callable[..., Container]]:
    """`run("--flag", options=["--user=1"])` starts the program in a container, with `folder` as /csi."""
    with ExitStack() as containers:

        def start(*flags: str, options: Sequence[str] = (), hardened: bool = True) -> Container:
            arguments = [*(HARDENED if hardened else ()), f"--volume={folder}:/csi:ro", *options]
            return containers.enter_context(created(*arguments, built.tag, *flags)).start()

        yield start


@pytest.fixture
def once(built: Archive, folder: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`once("--flag")` runs the program in a container to its end, with `folder` as /csi."""

    def to_its_end(*flags: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        arguments = [*HARDENED, f"--volume={folder}:/csi:ro", "--network=none", *options]
        return docker("run", "--rm", f"--label={MARK}", *arguments, built.tag, *flags)

    return to_its_end


@pytest.fixture
def driver(folder: Path) -> Iterator[FakeDriver]:
    """A healthy driver that serves any user."""
    with FakeDriver(folder / "csi.sock") as running:
        (folder / "csi.sock").chmod(0o777)
        yield running


ADDRESS = "--csi-address=/csi/csi.sock"
DATABASE = "var/lib/dpkg/status.d/"
LOCKED = dict(re.findall(r"(?m)^([\w-]+)==(\S+)", kept.LOCK.read_text()))


@pytest.mark.parametrize("user", USERS)
def test_serves_as_any_user_without_any_privilege(
    user: str, run: Callable[..., Container], driver: FakeDriver
) -> None:
    # No HOME, no network but the loopback, no shared memory, and nothing writable.
    options = [*USERS[user], "--env=HOME=", "--ipc=none", "--network=host"]
    ports = program.free_port(), program.free_port()
    container = run(
        ADDRESS, f"--health-port={ports[0]}", f"--metrics-address=127.0.0.1:{ports[1]}", options=options
    )
    container.wait_for_log('Learnt the CSI driver\'s name" driver="fake.csi.k8s.io"')

    for path in ("/healthz", "/livez", "/readyz"):
        response = container.get(path, ports[0], host="127.0.0.1")
        assert (response.status, response.text) == (200, "ok")
    metrics = container.get("/metrics", ports[1], host="127.0.0.1").text
    assert "\ncsi_liveness_up 1.0\n" in metrics

    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{container.pid}/status").read_text().splitlines()
    )
    expected = (USERS[user] or ["--user=0:0"])[0].partition("=")[2].split(":")
    assert [status["Uid"].split()[0], status["Gid"].split()[0]] == expected
    assert {status[name] for name in ("CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    writable = [
        line.split()[4]
        for line in Path(f"/proc/{container.pid}/mountinfo").read_text().splitlines()
        if "rw" in line.split()[5].split(",")
    ]
    assert all(re.match("/(proc|sys|dev)(/|$)", path) for path in writable), writable
    assert must("diff", container.id) in ("", "C /csi\nA /csi", "A /csi")
    container.stop()
    assert "Traceback" not in container.log()


def test_user_who_may_not_use_the_socket_is_told_why(
    run: Callable[..., Container], once: Callable[..., subprocess.CompletedProcess[str]], driver: FakeDriver
) -> None:
    Path(driver.target).chmod(0o755)  # as node drivers create them
    text = (
        "cannot connect to /csi/csi.sock: permission denied "
        f"(this program is uid 65532, the socket belongs to uid {os.geteuid()}, mode 0755; "
        "if that allows it, SELinux does not)"
    )

    container = run(ADDRESS, options=["--user=65532:65532"])
    container.wait_for_log('"Serving"')
    response = container.get()
    assert (response.status, response.text) == (500, text)
    done = once("--once", ADDRESS, options=["--user=65532:65532"])
    assert (done.returncode, done.stdout) == (3, text + "\n")


@pytest.mark.parametrize(
    "command", ["sh", "/bin/sh", "bash", "dash", "busybox", "apt-get", "dpkg", "pip", "perl", "openssl"]
)
def test_no_shell_and_no_package_manager_runs(command: str, built: Archive) -> None:
    with created(f"--entrypoint={command}", built.tag, "--version") as container:
        done = docker("start", container.id)

    assert done.returncode != 0
    assert re.search("executable file not found|no such file or directory", done.stderr), done.stderr


@pytest.mark.parametrize("state", ["healthy", "hung", "no driver"])
def test_stops_within_a_second(state: str, run: Callable[..., Container], driver: FakeDriver) -> None:
    address = ADDRESS if state != "no driver" else "--csi-address=/csi/none.sock"

    def seconds_to_stop() -> float:
        container = run(address, "--probe-timeout=1m", "--connection-timeout=1m")
        container.wait_for_log('"Serving"')
        probes = driver.seen().probes
        with ExitStack() as connections:
            if state == "healthy":
                container.wait_until_healthy()
            else:
                driver.set("hang")
                client = connections.enter_context(container.connect())
                client.sendall(b"GET /healthz HTTP/1.1\r\nHost: probe\r\n\r\n")
                # It is waiting once this is answered.
                assert container.get("/nothing").status == 404
            if state == "hung":
                driver.wait(probes=probes + 1, probing=1)
            seconds = container.stop()
        assert container.exit_code == 0
        assert "Traceback" not in container.log()
        return seconds

    # The engine takes part of that.
    assert program.best_of(2, seconds_to_stop) < 1


# ---- 32 MiB and less, no swap

STRANGERS = 2000


@pytest.mark.parametrize("mebibytes", [32, 24])
def test_small_memory_and_cold_page_cache(
    run: Callable[..., Container], built: Archive, folder: Path, driver: FakeDriver, mebibytes: int
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can empty the page cache")
    limits = [f"--memory={mebibytes}m", f"--memory-swap={mebibytes}m", f"--volume={folder}:/csi:ro"]
    for _ in range(2):  # for the same reason as with its starts
        with ExitStack() as containers:
            # With time to spare: on a machine with other work the driver is slow at times, which is not the answer's fault.
            flags = [ADDRESS, "--v=0", "--probe-timeout=20s"]
            container = _started_in_time(containers, *HARDENED, *limits, built.tag, *flags)
            memory = container.memory()
            assert (memory["limit"], memory["swap"]) == (mebibytes * 2**20, 0)
            seconds = _hardship(container)
            after = container.memory()
            # One that keeps rereading its own pages may still answer, by the skin of its teeth.
            assert after["refaults"] - memory["refaults"] < 5000, (memory, after)
            assert after["kills"] == 0
            assert container.inspect()["State"]["Running"]
            seconds["the stop"] = container.stop()
            assert container.exit_code == 0
            assert not container.inspect()["State"]["OOMKilled"]
        if max(seconds.values()) < 1:
            break
    assert max(seconds.values()) < 1, seconds


def _started_in_time(containers: ExitStack, *arguments: str) -> Container:
    """One that was ready within a second, though none of its files was in memory."""
    starts: list[float] = []
    # More than once, so that a machine with other work at that moment does not fail it.
    while min(starts, default=1) >= 1:
        assert len(starts) < 5, f"ready {starts} s after its process began"
        container = containers.enter_context(created(*arguments))
        container.forget()
        container.start()
        ready = container.wait_until_healthy()
        # Since the fork of the process that became the container's: this includes Docker's part.
        started = int(Path(f"/proc/{container.pid}/stat").read_text().rpartition(")")[2].split()[19])
        taken = ready - started / os.sysconf("SC_CLK_TCK") + _suspended()
        # The time it waited for a processor is due to the machine's other work.
        starts.append(taken - program.waited_for_processors(container.pid))
        if starts[-1] >= 1:
            container.stop()
    return container


def _hardship(container: Container) -> dict[str, float]:
    """Many checks, then a storm of clients that never finish their requests; the slowest check of each."""
    host = container.address
    seconds = {"one of 5,000 checks": max(_checks(container, host, 5000, clients=4))}
    with ExitStack() as storm:
        checks = []
        for number in range(600):
            client = storm.enter_context(container.connect(host=host))
            client.sendall(b"GET /healthz HTTP/1.1\r\nX: " + b"x" * (number * 16))
            if number % 20 == 0:
                checks += _checks(container, host, 1)
        checks += _checks(container, host, 200, clients=2)
    return seconds | {"a check in the storm": max(checks)}


def _suspended() -> float:
    """By how many seconds the clock used for the start of processes is ahead of the monotonic one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic() if sys.platform == "linux" else 0


def _checks(container: Container, host: str, count: int, clients: int = 1) -> list[float]:
    def ask(_: int) -> float:
        response = container.get(host=host)
        assert (response.status, response.text) == (200, "ok")
        return response.seconds

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        return list(pool.map(ask, range(count)))


@pytest.mark.parametrize("mebibytes", [28, 24])
@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["announcing a body", "scraping", "waiting for a long error"],
)
def test_strangers_who_do_not_read_kill_no_small_container(
    built: Archive, folder: Path, driver: FakeDriver, mebibytes: int, request_head: bytes
) -> None:
    program.allow_descriptors(STRANGERS + 200)
    limits = [f"--memory={mebibytes}m", f"--memory-swap={mebibytes}m", f"--volume={folder}:/csi:ro"]
    flags = [ADDRESS, f"--http-endpoint=:{PORT}", "--probe-timeout=20s"]
    with created(*HARDENED, *limits, built.tag, *flags) as container:
        container.start()
        container.wait_until_healthy()
        host = container.address
        for _ in range(3):
            driver.set("hang" if b"healthz" in request_head else "unset")
            with ExitStack() as strangers:
                for _ in range(STRANGERS):
                    client = strangers.enter_context(socket.socket())
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                    client.connect((host, PORT))
                    with suppress(ConnectionError):  # evicted, as it is one of too many
                        client.sendall(request_head)
                if b"healthz" in request_head:
                    driver.set("error", message="\x01" * 5000)
                container.get(host=host)
        driver.set("unset")
        assert container.get(host=host).status == 200
        assert container.memory()["kills"] == 0
        container.stop()
        assert container.exit_code == 0


def test_the_engine_keeps_to_its_limit_of_memory(built: Archive) -> None:
    """Shows that the tests above can fail: whatever takes more is killed.

    The engine's own word for that, OOMKilled, is a race: it may hear of the end before it hears of the reason.
    """
    codes = []
    for limit in ("24m", "64m"):
        limits = [f"--memory={limit}", f"--memory-swap={limit}", f"--entrypoint={PYTHON}"]
        with created(*HARDENED, *limits, built.tag, "-IS", "-c", "b'x' * (32 << 20)") as container:
            container.start()
            codes.append(must("wait", container.id))
    assert codes == ["137", "0"]


# ---- what the node denies


@pytest.mark.parametrize("error", [1, 38], ids=["EPERM", "ENOSYS"])
@pytest.mark.parametrize(
    "call", ["clone3", "epoll_create1", "epoll_ctl", "eventfd2", "prlimit64", "setrlimit", "socketpair"]
)
def test_serves_under_a_seccomp_profile(
    call: str, error: int, run: Callable[..., Container], driver: FakeDriver, tmp_path: Path
) -> None:
    """Like those of engines older than the calls; each profile denies one, after the engine itself has used it."""
    profile = tmp_path / "profile.json"
    denied = {"names": [call], "action": "SCMP_ACT_ERRNO", "errnoRet": error}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [denied]}))
    container = run(ADDRESS, f"--http-endpoint=:{PORT}", options=[f"--security-opt=seccomp={profile}"])
    container.wait_until_healthy()
    assert container.get("/metrics").status == 200
    driver.set("error", message="no disk")
    assert container.get().text == "rpc error: code = Internal desc = no disk"
    container.stop()
    assert container.exit_code == 0
    bad = [line for line in container.log().splitlines() if not line.startswith("I")]
    without_a_thread = call == "clone3" and error == 1
    assert ['"Going on without a thread" thread="checks"' in line for line in bad] == (
        [True, False] if without_a_thread else [False]
    )
    assert '"CSI driver is not healthy"' in bad[-1]


def test_where_accept4_is_denied_one_line_says_so(run: Callable[..., Container], tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    denied = {"names": ["accept4"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [denied]}))
    container = run(ADDRESS, options=[f"--security-opt=seccomp={profile}"])
    container.wait_for_log('"Serving"')
    with container.connect():
        container.wait_for_log(
            '"Cannot accept connections" err="operation not permitted: a seccomp profile or a security module'
            " denies accept"
        )
    container.stop()
    assert container.exit_code == 0


def test_a_limit_of_processes_that_is_reached_later(
    run: Callable[..., Container], driver: FakeDriver
) -> None:
    container = run(ADDRESS, f"--http-endpoint=:{PORT}", "--probe-timeout=2s")
    container.wait_for_log("Learnt the CSI driver's name")
    tasks = Path(f"/proc/{container.pid}/task")
    threads = sorted(task.name for task in tasks.iterdir())
    must("update", f"--pids-limit={len(threads)}", container.id)
    for _ in range(3):
        assert container.get().text == "ok"
        assert container.get("/metrics").status == container.get("/statusz").status == 200
        driver.set("hang")
        assert "DeadlineExceeded" in container.get().text
        driver.restart()
        driver.set("unset")
        container.wait_until_healthy()
    assert sorted(task.name for task in tasks.iterdir()) == threads
    container.stop()
    assert container.exit_code == 0


# ---- every flag, every path


@pytest.mark.parametrize(
    ("behaviour", "flags", "code", "text"),
    [
        ("unset", [], 0, "ok"),
        ("not-ready", [], 5, "driver responded but is not ready"),
        ("error", [], 4, "rpc error: code = Internal desc = the disk is gone"),
        ("hang", ["--probe-timeout=300ms"], 4, "rpc error: code = DeadlineExceeded desc = .+"),
        (
            "unset",
            ["--csi-address=/csi/none", "--connection-timeout=300ms"],
            3,
            "cannot connect to /csi/none: no such file or directory",
        ),
        ("unset", ["--csi-address=/csi"], 3, "cannot connect to /csi: not a socket"),
        ("unset", ["--probe-timeout=0s"], 1, ""),
        ("unset", ["--probe-timeout=3"], 2, ""),
        ("unset", ["--no-such-flag"], 2, ""),
    ],
)
def test_once_exits_with_its_codes(
    behaviour: Any,
    flags: list[str],
    code: int,
    text: str,
    once: Callable[..., subprocess.CompletedProcess[str]],
    driver: FakeDriver,
) -> None:
    driver.set(behaviour, message="the disk is gone")

    done = once("--once", ADDRESS, *flags)

    assert done.returncode == code, done.stderr
    assert re.fullmatch(text, done.stdout.strip()), done.stdout
    assert "Traceback" not in done.stderr


def test_a_target_that_is_not_a_socket_is_judged(
    once: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = once("--once", "--csi-address=localhost:1", "--connection-timeout=0")

    assert done.returncode == 3, done
    assert done.stdout.startswith("cannot connect to localhost:1: connection refused")


def test_a_node_that_grants_no_file_in_memory_is_told_of(
    once: Callable[..., subprocess.CompletedProcess[str]], folder: Path, driver: FakeDriver
) -> None:
    """Only targets other than unix sockets need one: what they need is unpacked into it."""
    denied = {"names": ["memfd_create"], "action": "SCMP_ACT_ERRNO"}
    profile = folder / "profile.json"
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [denied]}))
    options = [f"--security-opt=seccomp={profile}"]

    done = once("--once", "--csi-address=localhost:1", options=options)
    healthy = once("--once", ADDRESS, options=options)

    assert done.returncode == 4, done
    assert "cannot unpack grpc._cython.cygrpc into memory: Operation not permitted" in done.stdout
    assert (done.stdout.count("\n"), done.stderr) == (1, "")
    assert (healthy.returncode, healthy.stdout) == (0, "ok\n"), healthy


def test_version_and_help(once: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    version = once("--version")
    usage = once("--help")

    expected = rf"livenessprobe {re.escape(__version__)} \(Python {re.escape(image.PYTHON)}\.\d+, grpcio \d+\.\d+\.\d+\)\n"
    assert re.fullmatch(expected, version.stdout), version
    assert (version.returncode, usage.returncode) == (0, 0)
    assert all(f"-{flag.name}" in usage.stdout + usage.stderr for flag in config.FLAGS)


FLAGS = [
    ["--csi-address=unix:///csi/csi.sock", "--health-port=9808", "--v=9", "--probe-timeout=1s",
     "--statusz=true"],
    ["--csi-address=unix:/csi/csi.sock", "--http-endpoint=localhost:9808", "--metrics-path=/m", "--v=5"],
    ["--csi-address=dns:///localhost:{tcp}", "--http-endpoint=:9808", "--logging-format=json", "--v=5"],
    ["--csi-address=localhost:{tcp}", "--metrics-address=[::]:9809", "--connection-timeout=1s", "--vmodule=driver=9"],
    # Without effect.
    [ADDRESS, "--log-flush-frequency=1s", "--log-json-split-stream", "--log-json-info-buffer-size=1Ki",
     "--log-text-split-stream", "--log-text-info-buffer-size=0", "--automaxprocs", "--logtostderr",
     "--alsologtostderr", "--stderrthreshold=INFO", "--log_dir=/x", "--log_file=x", "--log_file_max_size=1",
     "--log_backtrace_at=x:1", "--skip_headers", "--skip_log_headers", "--add_dir_header", "--one_output"],
]  # fmt: skip


def test_flags_are_all_tried() -> None:
    tried = {flag.lstrip("-").partition("=")[0] for flags in FLAGS for flag in flags}

    assert tried | {"once", "version"} == {flag.name for flag in config.FLAGS}


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: flags[0])
def test_every_flag_and_every_path(
    flags: list[str], run: Callable[..., Container], folder: Path, driver: FakeDriver
) -> None:
    """Each must find in the image what it imports when first used."""
    with FakeDriver("127.0.0.1:0") as tcp_driver:
        port = program.free_port()
        arguments = [flag.format(tcp=tcp_driver.address.rpartition(":")[2]) for flag in flags]
        arguments = [flag.replace("9808", str(port)).replace("9809", "0") for flag in arguments]
        arguments += [] if str(port) in "".join(arguments) else [f"--health-port={port}"]
        container = run(*arguments, options=["--network=host"])
        container.wait_for_log("Learnt the CSI driver's name")
        used = driver if "/csi" in arguments[0] else tcp_driver

        def ask(path: str = "/healthz", method: str = "GET") -> tuple[int, str]:
            connection = http.client.HTTPConnection("localhost", port, timeout=10)
            connection.request(method, path)
            with connection.getresponse() as response:
                body = response.read().decode()
            connection.close()
            return response.status, body

        assert [ask(path) for path in ("/healthz", "/livez?x=1", "/readyz")] == [(200, "ok")] * 3
        assert ask(method="HEAD") == (200, "")
        assert [ask("/none")[0], ask(method="POST")[0]] == [404, 405]
        with socket.create_connection(("localhost", port), 5) as client:
            client.sendall(b"what?\r\n\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 400 ")
        used.set("not-ready")
        assert [ask(path)[0] for path in ("/healthz", "/livez", "/readyz")] == [500, 200, 500]
        used.set("error", message="no \N{SNOWMAN}\n disk")
        assert ask()[1].startswith("rpc error: code = Internal desc = no \N{SNOWMAN}")
        used.set("raw", data=b"\xff\xff\xff")
        assert ask()[1].startswith("rpc error: code = Internal desc = ")
        used.set("unimplemented")
        assert ask()[1].startswith("rpc error: code = Unimplemented desc = ")
        used.kill()
        assert ask()[1].startswith("cannot connect to ")
        for peer in (peers.http1, peers.stale_socket, peers.datagram_socket) if used is driver else ():
            driver_path = Path(driver.target)
            driver_path.unlink(missing_ok=True)
            with peer(driver_path):
                assert ask()[1].startswith("cannot connect to ")
        if "endpoint" in "".join(flags):
            path = "/m" if "--metrics-path=/m" in flags else "/metrics"
            assert "csi_liveness_up 0.0" in ask(path)[1]
        container.stop()
    log = container.log()
    assert container.exit_code == 0
    assert not re.search("Traceback|No module|ImportError|Unexpected|Cannot (check|answer)", log), log


def test_what_is_missing_was_left_out_on_purpose(built: Archive) -> None:
    """Every module that is there finds all that it imports, except what build/builder/contents.py says is unused."""
    script = """
import importlib, pkgutil, sys
sys.path[:] = ["/usr/lib/livenessprobe", *sys.path[-2:]]
from image_start import CoreFinder
from livenessprobe import postponed
sys.meta_path.append(CoreFinder)
postponed.postpone(postponed.UNUSED | postponed.UNUSED_SERVING)
for folder in sys.path:
    for module in pkgutil.walk_packages([folder], onerror=print):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            print(module.name, error.name)
        else:
            print(module.name)
"""
    done = docker(
        "run",
        "--rm",
        f"--label={MARK}",
        f"--entrypoint={PYTHON}",
        built.tag,
        "-IS",
        "-c",
        script,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    # One codec is for Windows alone.
    missed = {words[1] for words in lines if len(words) == 2 and words[0] != "encodings.mbcs"}

    assert done.returncode == 0, done.stderr
    assert {"livenessprobe.serve", "grpc._channel", "http.server"} <= {words[0] for words in lines}
    assert len(lines) > 100
    assert missed <= contents.UNUSED.keys(), lines


# ---- a pod


def test_two_containers_as_in_a_pod(built: Archive) -> None:
    """They share a volume and a network namespace, and nothing of the host's."""
    # The example driver, run by the image's Python: it needs only grpcio, of which half is there.
    start = """
import sys
sys.path.insert(0, "/usr/lib/livenessprobe")
from image_start import CoreFinder
from livenessprobe import postponed
sys.meta_path.append(CoreFinder)
postponed.postpone(postponed.UNUSED | postponed.UNUSED_SERVING)
exec(open("/driver.py").read())
"""
    driver_arguments = [
        f"--volume={ROOT / 'examples' / 'driver.py'}:/driver.py:ro",
        f"--entrypoint={PYTHON}",
        built.tag,
        *("-IS", "-c", start, "--socket=/csi/csi.sock", "--name=pod.csi.k8s.io"),
    ]
    with volume() as name, ExitStack() as pod:
        # A pod's sandbox: it owns the network, and outlives the pod's containers.
        sleep = "import time; time.sleep(600)"
        sandbox = pod.enter_context(created(f"--entrypoint={PYTHON}", built.tag, "-IS", "-c", sleep)).start()
        shared = [f"--volume={name}:/csi", f"--network=container:{sandbox.id}"]
        probe = pod.enter_context(
            created(*HARDENED, *shared, built.tag, ADDRESS, "--http-endpoint=:9808")
        ).start()
        probe.wait_for_log('"Serving"')
        absent = probe.get()
        assert (absent.status, absent.text) == (
            500,
            "cannot connect to /csi/csi.sock: no such file or directory",
        )

        driver = pod.enter_context(created(*shared, *driver_arguments)).start()
        probe.wait_until_healthy()
        probe.wait_for_log('driver="pod.csi.k8s.io"')
        driver.kill()
        refused = probe.get()
        assert (refused.status, refused.text) == (
            500,
            "cannot connect to /csi/csi.sock: connection refused",
        )
        driver.start()  # as the kubelet would
        probe.wait_until_healthy()
        assert 'driver_name="pod.csi.k8s.io"' in probe.get("/metrics").text

        def seconds_to_stop() -> float:
            probe.start().wait_until_healthy()  # if it runs already, nothing is started
            return probe.stop()

        assert program.best_of(2, seconds_to_stop) < 1
        assert probe.exit_code == 0
        assert "Traceback" not in probe.log()


# ---- what is in it


def test_is_within_its_size(built: Archive) -> None:
    unpacked = sum(len(content) for content in built.contents.values())
    compressed = sum(_compressed(layer) for layer in built.layers)

    assert unpacked <= 30_000_000
    assert compressed <= 12_000_000


def _compressed(data: bytes) -> int:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return len(packer.compress(data)) + len(packer.flush())


def test_says_what_it_is(built: Archive, architecture: str) -> None:
    settings = built.config["config"]
    prefix = "org.opencontainers.image."
    labels = {name.removeprefix(prefix): value for name, value in settings["Labels"].items()}

    assert built.config["architecture"] == architecture
    assert settings["Entrypoint"] == ["/livenessprobe"]
    assert not settings.get("User"), "the sockets of node drivers belong to root"
    assert labels.keys() >= {"title", "description", "base.name", "created"}
    assert labels["source"] == built_images.SOURCE
    assert (labels["version"], labels["licenses"]) == (__version__, "Apache-2.0")
    if head := image.git("rev-parse", "HEAD"):
        assert labels["revision"].removesuffix("-dirty") == head
    assert image.build_time() == time.mktime(
        time.strptime(labels["created"] + "GMT", "%Y-%m-%dT%H:%M:%SZ%Z")
    ) - (time.timezone)
    assert built.contents["usr/lib/os-release"].startswith(b'PRETTY_NAME="Debian GNU/Linux 13 (trixie)"')
    users = {line.split(":")[0]: line.split(":")[2] for line in built.contents["etc/passwd"].decode().split()}
    assert users == {"root": "0", "nobody": "65534", "nonroot": "65532"}


def test_nothing_is_compiled_or_unpacked_at_start(built: Archive) -> None:
    modules = [name for name in built.members if re.search(r"\.pyc?$", name)]

    assert len(modules) > 200
    for name in modules:
        assert name.endswith(".pyc"), "a source: it would be compiled at each start"
        # PEP 552: it has a hash, which is not to be checked.
        assert built.contents[name][4:8] == b"\x01\0\0\0", name
    assert len(built.contents["livenessprobe"]) < 1024, "the payload is in it a second time"
    large = [hashlib.sha256(data).digest() for data in built.contents.values() if len(data) > 60_000]
    assert len(set(large)) == len(large)


def test_only_the_program_can_be_executed(built: Archive) -> None:
    executable = {name for name, member in built.members.items() if member.isfile() and member.mode & 0o111}
    linker = {name for name in executable if re.search(r"/ld-linux-[\w-]+\.so\.\d$|/libc\.so\.6$", name)}

    assert executable - linker == {"livenessprobe", contents.INTERPRETER.replace(contents.PYTHON, PYTHON[9:])}
    assert not [name for name, member in built.members.items() if member.mode & 0o022 and not member.issym()]
    assert not [name for name, member in built.members.items() if member.mode & 0o7000]


def test_scanners_see_all_packages(built: Archive) -> None:
    """Every file of Debian's is in the database, and a scanner reads all of that from the image."""
    packages, sums = debian_packages(built), debian_sums(built)
    for path, digest in sums.items():
        assert hashlib.md5(built.contents[path]).hexdigest() == digest, path
    ours = re.compile(
        r"livenessprobe$|etc/(passwd|group|nsswitch\.conf)$|usr/lib/livenessprobe/|var/lib/dpkg/|.*\.pyc$"
    )
    assert [path for path in built.contents if path not in sums and not ours.match(path)] == []

    document = json.loads(sbom.list_content(built.path).read_text())
    found = {package["name"]: package.get("versionInfo") for package in document["packages"]}
    assert {name: found.get(name) for name in LOCKED} == LOCKED
    assert packages.keys() >= {"base-files", "libc6", "libstdc++6", f"python{image.PYTHON}-minimal"}
    assert found["livenessprobe"] == __version__
    assert {name: found.get(name) for name in packages} == {
        name: fields["Version"] for name, fields in packages.items()
    }


def debian_packages(archive: Archive) -> dict[str, email.message.Message]:
    """What the database says about each package."""
    return {
        name.removeprefix(DATABASE): email.message_from_bytes(content)
        for name, content in archive.contents.items()
        if name.startswith(DATABASE) and not name.endswith(".md5sums")
    }


def debian_sums(archive: Archive) -> dict[str, str]:
    """The files of all packages in the database, with their checksums."""
    lists = [
        content.decode()
        for name, content in archive.contents.items()
        if name.startswith(DATABASE) and name.endswith(".md5sums")
    ]
    return {path: digest for text in lists for digest, path in re.findall("(.*)  (.*)\n", text)}


def test_trivy_finds_what_it_reads(built: Archive) -> None:
    """By its rules, in pkg/fanal/analyzer: os/debian, pkg/dpkg, language/python/packaging; and pkg/detector/ospkg/debian."""
    # Without this file it does not take the image for Debian, and ignores Debian's packages. It reads the first line, and
    # needs a release number before the dot: it does not look up testing and unstable, which have a name there.
    assert built.members["etc/debian_version"].isfile()
    first = built.contents["etc/debian_version"].decode().splitlines()[0]
    assert first.partition(".")[0] == "13"

    for name, fields in debian_packages(built).items():
        assert not fields.defects, name
        assert fields["Package"] == name
        assert re.fullmatch(r"(\d+:)?\d[\w.+~:-]*", fields["Version"])
        # It looks advisories up by the source package.
        assert re.fullmatch(r"\S+( \(\d[^)]*\))?", fields.get("Source", name))
        assert not {"deinstall", "purge"} & set(fields.get("Status", "").split())

    metadata = {name for name in built.contents if name.endswith(".dist-info/METADATA")}
    described = [email.message_from_bytes(built.contents[name]) for name in metadata]
    assert {each["Name"].replace("_", "-"): each["Version"] for each in described} == LOCKED
    # It drops a Python package that it finds in one of Debian's.
    assert not metadata & debian_sums(built).keys()


def test_syft_and_grype_find_what_they_read(built: Archive, architecture: str) -> None:
    """By their rules, in syft/linux, syft/pkg/cataloger/debian and …/python; grype/distro. Syft itself is run."""
    release = dict(
        line.split("=", 1) for line in built.contents["usr/lib/os-release"].decode().splitlines() if line
    )
    assert (release["ID"], release["VERSION_ID"]) == ("debian", '"13"')
    assert os.path.normpath(f"etc/{built.members['etc/os-release'].linkname}") == "usr/lib/os-release"

    document = json.loads(sbom.list_content(built.path).read_text())
    locators = [
        reference["referenceLocator"]
        for package in document["packages"]
        for reference in package.get("externalRefs", [])
        if reference["referenceType"] == "purl"
    ]
    # Grype looks advisories up by the release and, for Debian's, by the source package.
    for name, fields in debian_packages(built).items():
        [locator] = [
            each
            for each in map(urllib.parse.urlsplit, locators)
            if urllib.parse.unquote(each.path) == f"deb/debian/{name}@{fields['Version']}"
        ]
        asked = urllib.parse.parse_qs(locator.query)
        assert asked["distro"] == ["debian-13"], name
        assert asked["arch"][0] in (architecture, "all")
        source = fields.get("Source", name).partition(" ")[0]
        assert asked.get("upstream", [name])[0].partition("@")[0] == source
        # By these it knows which files belong to a package.
        assert f"{DATABASE}{name}.md5sums" in built.contents
    assert {f"pkg:pypi/{name}@{version}" for name, version in LOCKED.items()} <= set(locators)


def test_the_engine_has_the_layers_that_were_built(built: Archive) -> None:
    [known] = json.loads(must("image", "inspect", built.tag))

    assert known["RootFS"]["Layers"] == built.config["rootfs"]["diff_ids"]


# ---- the other machine


def test_is_built_for_the_other_machine(built: Archive, foreign: Archive, architecture: str) -> None:
    other = "amd64" if architecture == "arm64" else "arm64"

    assert foreign.config["architecture"] == other
    assert must("image", "inspect", "--format={{.Architecture}}", foreign.tag) == other
    for archive, machine in ((built, architecture), (foreign, other)):
        machines = {
            name: int.from_bytes(data[18:20], "little")
            for name, data in archive.contents.items()
            if data[:4] == b"\x7fELF"
        }
        assert len(machines) > 10
        assert set(machines.values()) == {MACHINES[machine]}, machines
    # Python's compiled files are the same everywhere.
    assert built.config["rootfs"]["diff_ids"][1] == foreign.config["rootfs"]["diff_ids"][1]


def test_runs_on_the_other_machine(
    foreign: Archive, architecture: str, folder: Path, driver: FakeDriver
) -> None:
    emulator = shutil.which(f"qemu-{'x86_64' if architecture == 'arm64' else 'aarch64'}-static")
    if emulator is None:
        pytest.skip("there is no emulator: apt-get install qemu-user-static")
    arguments = [
        *("run", "--rm", f"--label={MARK}", *HARDENED, "--network=none", "--entrypoint=/emulator"),
        *(f"--volume={emulator}:/emulator:ro", f"--volume={folder}:/csi:ro", foreign.tag),
        *(PYTHON, "-IS", "/livenessprobe"),
    ]

    version = docker(*arguments, "--version")
    healthy = docker(*arguments, "--once", ADDRESS, "--probe-timeout=50s", timeout=100)
    driver.set("not-ready")
    not_ready = docker(*arguments, "--once", ADDRESS, "--probe-timeout=50s", timeout=100)

    assert version.stdout.startswith(f"livenessprobe {__version__} (Python {image.PYTHON}."), version
    assert (healthy.returncode, healthy.stdout) == (0, "ok\n"), healthy
    assert (not_ready.returncode, not_ready.stdout) == (5, "driver responded but is not ready\n"), not_ready


# ---- how it is built


def test_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")

    clean = subprocess.run([hadolint, image.DOCKERFILE], capture_output=True, check=False, text=True)
    dirty = subprocess.run(
        [hadolint, "-"],
        capture_output=True,
        check=False,
        input="FROM debian\nRUN cd /x && sudo true",
        text=True,
    )

    assert (clean.returncode, clean.stdout + clean.stderr) == (0, "")
    assert dirty.returncode != 0


def test_no_engine_is_told_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "build" / "here" / "image.py", "livenessprobe:none"],
        capture_output=True,
        check=False,
        env=os.environ | {"DOCKER_HOST": "unix:///nowhere.sock"},
        text=True,
    )

    assert done.returncode == 1
    assert re.fullmatch("livenessprobe: no Docker engine answers: .*\n", done.stderr)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gets this far")
def test_base_image_needs_debootstrap_and_says_so(folder: Path) -> None:
    (folder / "id").symlink_to("/usr/bin/id")

    done = subprocess.run(
        ["/bin/sh", ROOT / "build" / "here" / "base.sh", "livenessprobe-base:none"],
        capture_output=True,
        check=False,
        env={"PATH": str(folder)},
        text=True,
    )

    assert done.returncode == 1
    assert re.fullmatch("livenessprobe: .*BUILD_IMAGE.*\n", done.stderr), done.stderr
