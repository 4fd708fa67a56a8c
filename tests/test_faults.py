"""Faults of the node, each against the built file: what the probe says meanwhile, and that it recovers."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import program
import pytest
from fake_driver import SERVICE, Answer, FakeDriver, Identity, plugin_info
from image_engine import HARDENED, MARK, Container, created, missing, must
from test_exchange import FINE, read_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import ProbeFactory
    from fake_driver import Behaviour

GET = FINE["HTTP/1.1"]
NO_ANSWER = f"rpc error: code = DeadlineExceeded desc = no answer to {SERVICE}Probe in time"
MIB = 2**20


def arguments(socket_path: Path, timeout: str = "1s") -> list[str]:
    return [f"--csi-address={socket_path}", "--http-endpoint=127.0.0.1:0", f"--probe-timeout={timeout}"]


def ask(probe: program.Probe, request: bytes = GET) -> socket.socket:
    """A connection whose request was sent."""
    client = probe.connect(timeout=30)
    client.sendall(request)
    return client


def answer_on(client: socket.socket) -> tuple[int, str]:
    with client:
        answer = read_answer(b"".join(iter(lambda: client.recv(65536), b"")))
    return answer.status, answer.body.decode()


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """For things the kernel reports no event for."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


class Node:
    """What the program is made to believe about its node."""

    def __init__(self, library: Path, file: Path) -> None:
        self.env = {"LD_PRELOAD": str(library), "FAKE_NODE": str(file)}
        self._file = file
        self._file.write_bytes(bytes(mmap.PAGESIZE))

    def step_clock(self, hours: float) -> None:
        """Make its time of day differ from the true time by that much."""
        self._set(0, int(hours * 3600))

    def limit_threads(self, most: int) -> None:
        """Let each process start this many threads in its life, as if its pod had reached its limit."""
        self.deny_threads(most + 1, sys.maxsize)

    def deny_threads(self, first: int, last: int) -> None:
        """Deny each process some of the threads that it starts in its life, counted from 1."""
        self._set(2, last)
        self._set(1, first)

    def _set(self, which: int, number: int) -> None:
        with self._file.open("r+b") as file:
            file.seek(which * struct.calcsize("l"))
            file.write(struct.pack("l", number))


@pytest.fixture
def node(folder: Path) -> Node:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("there is no C compiler here")
    library = folder / "fake_node.so"
    source = program.ROOT / "tests" / "helpers" / "fake_node.c"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return Node(library, folder / "node")


# ---- time


def test_a_clock_that_is_stepped_changes_no_check_and_no_wait(
    driver: FakeDriver, probe_factory: ProbeFactory, node: Node, socket_path: Path
) -> None:
    driver.set("error", method="GetPluginInfo")
    probe = probe_factory(*arguments(socket_path, "600ms"), env=node.env)
    probe.wait_for_log("Cannot learn the CSI driver's name")
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as half_open:
        for hours in (2, -2, 48, -48):
            node.step_clock(hours)
            driver.set("unset")
            assert probe.get().text == "ok"
            (moment,) = re.findall(r"(?m)^csi_liveness_last_success\w* (\S+)$", probe.get("/metrics").text)
            assert abs(float(moment) - time.time() - hours * 3600) < 600, "the program's clock is not stepped"
            slow = half_open.enter_context(probe.connect(timeout=30))
            slow.sendall(GET[:9])

            driver.set("hang")
            hanging = pool.submit(probe.get)
            driver.wait(probing=1)
            node.step_clock(-hours)
            assert probe.get("/nothing").status == 404
            slow.sendall(GET[9:])
            answer = hanging.result()
            assert (answer.status, answer.text) == (500, NO_ANSWER)
            assert 0.4 < answer.seconds < 15
            assert answer_on(slow)[0] == 500

            driver.stop()
            missing_driver = pool.submit(probe.get)
            assert probe.get("/nothing").status == 404
            node.step_clock(hours)
            answer = missing_driver.result()
            assert answer.text.endswith("no such file or directory")
            assert 0.4 < answer.seconds < 15
            driver.start()

        # Given up when its time is over, and the name asked for again: neither hours too early nor hours too late.
        driver.set("name", name="late.csi.k8s.io")
        with probe.connect(timeout=60) as silent:
            assert probe.get("/nothing").status == 404  # by now it is accepted
            node.step_clock(-100)
            assert silent.recv(1) == b""
        probe.wait_for_log('"Learnt the CSI driver\'s name" driver="late.csi.k8s.io"', timeout=60)
    driver.set("unset")
    assert probe.get().status == 200
    lasted = re.findall(r'lasted="([\d.]+)s"', "\n".join(probe.log_lines))
    assert lasted
    assert max(map(float, lasted)) < 600
    begin = time.monotonic()
    assert probe.stop() == 0
    assert time.monotonic() - begin < 5


def test_suspended_and_resumed_it_goes_on(
    driver: FakeDriver, probe_factory: ProbeFactory, socket_path: Path
) -> None:
    """As when a virtual machine is paused, or the container frozen."""
    probe = probe_factory(*arguments(socket_path, "10s"))
    assert probe.get().status == 200
    suspend(probe)
    clients = [ask(probe) for _ in range(50)]
    probe.send(signal.SIGCONT)
    assert [answer_on(client) for client in clients] == [(200, "ok")] * 50
    assert driver.seen().most_probing == 1


def test_suspended_in_a_check_it_goes_on(driver: FakeDriver, probe: program.Probe) -> None:
    """Meanwhile the driver answers, but the check's time has also run out."""
    driver.set("hang")
    client = ask(probe)
    driver.wait(probing=1)
    suspend(probe)
    driver.set("unset")
    time.sleep(1.5)
    probe.send(signal.SIGCONT)
    assert answer_on(client) in [(200, "ok"), (500, NO_ANSWER)]
    assert probe.get().text == "ok"

    suspend(probe)
    probe.send(signal.SIGTERM)
    probe.send(signal.SIGCONT)
    assert probe.wait() == 0


def suspend(probe: program.Probe) -> None:
    """Returns when every thread has stopped."""
    probe.send(signal.SIGSTOP)
    os.waitid(os.P_PID, probe.pid, os.WSTOPPED | os.WNOWAIT)


# ---- what the node runs out of


def test_out_of_descriptors_it_accepts_no_more_says_so_and_recovers(
    driver: FakeDriver, probe: program.Probe
) -> None:
    assert probe.get().status == 200
    probe.wait_for_log("Learnt the CSI driver's name")
    driver.wait_until(lambda seen: seen.connections == 0)
    with contextlib.ExitStack() as clients:
        with limited(probe, resource.RLIMIT_NOFILE, 3):
            waiting = [clients.enter_context(ask(probe)) for _ in range(20)]
            probe.wait_for_log(
                '"Cannot accept connections" err="too many open files; seen from here: ulimit -n 3"'
            )
        assert [answer_on(client) for client in waiting] == [(200, "ok")] * 20
    assert probe.get().status == 200
    assert sum("Cannot accept connections" in line for line in probe.log_lines) == 1


def test_out_of_descriptors_for_a_check_it_says_so_and_recovers(
    driver: FakeDriver, probe: program.Probe
) -> None:
    assert probe.get().status == 200
    probe.wait_for_log("Learnt the CSI driver's name")
    driver.wait_until(lambda seen: seen.connections == 0)
    found = set()
    for limit in (3, *range(probe.descriptors(), probe.descriptors() + 24)):
        with probe.connect(timeout=30) as client:
            assert probe.get("/nothing").status == 404  # by now it is accepted
            with limited(probe, resource.RLIMIT_NOFILE, limit):
                client.sendall(GET)
                found.add(answer_on(client))
        assert probe.get().status == 200
    reason = "too many open files in the liveness probe itself"
    assert found == {(200, "ok"), (500, f"cannot connect to {driver.target}: {reason}")}


@contextlib.contextmanager
def limited(probe: program.Probe, what: int, limit: int) -> Iterator[None]:
    """From now on the kernel grants it no more; it keeps what it has."""
    soft, hard = resource.prlimit(probe.pid, what)
    resource.prlimit(probe.pid, what, (limit, hard))
    try:
        yield
    finally:
        if probe.process.poll() is None:
            resource.prlimit(probe.pid, what, (soft, hard))


@program.BOTH
def test_where_no_thread_is_to_be_had_it_serves_on_one(
    driver: FakeDriver, probe_factory: ProbeFactory, node: Node, socket_path: Path
) -> None:
    node.limit_threads(0)
    args = [f"--csi-address={socket_path}", "--http-endpoint=localhost:0", "--connection-timeout=500ms"]
    probe = probe_factory(*args, "--probe-timeout=3s", env=node.env)
    probe.wait_for_log(
        r"""\] "Going on without a thread" thread="checks" reason="can't start new thread: a limit on processes .*"""
        r""" ulimit -u \w+, ulimit -v \w+, seccomp \w+\""""
    )
    assert probe.threads() == 1
    with contextlib.ExitStack() as clients:
        waiting = [clients.enter_context(ask(probe)) for _ in range(20)]
        assert [answer_on(client) for client in waiting] == [(200, "ok")] * 20
    driver.set("hang")
    assert probe.get().text == NO_ANSWER
    driver.stop()
    assert probe.get().text.endswith("no such file or directory")
    driver.set("unset")
    driver.start()
    assert probe.get().text == "ok"
    assert "csi_liveness_up 1.0" in probe.get("/metrics").text
    assert driver.seen().most_probing == 1


@pytest.mark.parametrize("state", ["hanging", "missing", "idle"])
def test_on_one_thread_a_signal_ends_it_within_a_second(
    driver: FakeDriver, node: Node, socket_path: Path, state: str
) -> None:
    node.limit_threads(0)
    path = socket_path if state != "missing" else socket_path.with_name("none")
    args = [f"--csi-address={path}", "--http-endpoint=127.0.0.1:0", "--probe-timeout=1m"]
    texts = {"rpc error: code = Canceled desc = the liveness probe is stopping"}
    if state == "missing":  # whichever comes first, the signal or the end of the first attempt
        texts.add(f"cannot connect to {path}: no such file or directory")

    def seconds() -> float:
        driver.set("hang" if state == "hanging" else "unset")
        with program.Probe(args, env=node.env) as probe, contextlib.ExitStack() as clients:
            assert probe.get("/nothing").status == 404
            if state != "idle":
                client = clients.enter_context(ask(probe))
            if state == "hanging":
                driver.wait(probing=1)
            begin = time.monotonic()
            assert probe.stop() == 0
            took = time.monotonic() - begin
            if state != "idle":
                status, text = answer_on(client)
                assert status == 500
                assert text in texts
        return took

    assert program.best_of(3, seconds) < 1


def test_without_a_thread_for_the_name_it_serves(
    driver: FakeDriver, probe_factory: ProbeFactory, node: Node, socket_path: Path
) -> None:
    node.deny_threads(3, sys.maxsize)  # after those for the log and the checks
    probe = probe_factory(*arguments(socket_path), env=node.env)
    probe.wait_for_log('"Going on without a thread" thread="name"')
    assert probe.get().text == "ok"
    assert probe.threads() == 3


def test_the_threads_of_the_start_are_all_it_needs(
    driver: FakeDriver, probe_factory: ProbeFactory, node: Node, socket_path: Path
) -> None:
    """At any later moment the pod may reach its limit of processes and threads."""
    driver.set("name", name="one.csi.k8s.io")
    probe = probe_factory(*arguments(socket_path, "600ms"), "-v=5", env=node.env)
    probe.wait_for_log("Learnt the CSI driver's name")
    node.limit_threads(0)
    threads = probe.thread_ids()
    assert len(threads) == 4

    def storm(path: str = "/healthz") -> set[tuple[int, str]]:
        with contextlib.ExitStack() as clients:
            get = GET.replace(b"/healthz", path.encode())
            waiting = [clients.enter_context(ask(probe, get)) for _ in range(100)]
            assert probe.thread_ids() == threads
            return {answer_on(client) for client in waiting}

    assert storm() == {(200, "ok")}
    for path in ("/metrics", "/statusz", "/flagz"):
        assert {status for status, _ in storm(path)} == {200}
    driver.set("error", message="no disk " * 500)
    assert {status for status, _ in storm()} == {500}
    driver.set("hang")
    assert storm() == {(500, NO_ANSWER)}
    driver.stop()
    [(status, text)] = storm()
    assert (status, text.endswith("no such file or directory")) == (500, True)
    driver.set("unset")
    driver.set("name", name="two.csi.k8s.io")
    driver.start()
    assert storm() == {(200, "ok")}
    probe.wait_for_log("two.csi.k8s.io")
    with contextlib.ExitStack() as clients:
        for _ in range(500):
            clients.enter_context(probe.connect()).sendall(GET[:9])
        assert probe.get().text == "ok"
    assert probe.thread_ids() == threads


def test_out_of_memory_clients_are_evicted_and_it_recovers(driver: FakeDriver, probe: program.Probe) -> None:
    """As if the node granted no memory beyond what is in use; a kernel that kills is in test_image.py.

    A limit on the address space would not do: the C library has reserved some for threads, and can take from that.
    """
    assert probe.get().status == 200
    probe.wait_for_log("Learnt the CSI driver's name")
    driver.wait_until(lambda seen: seen.connections == 0)
    program.allow_descriptors(2200)
    with contextlib.ExitStack() as clients:
        with limited(probe, resource.RLIMIT_DATA, 1):
            for _ in range(2000):
                client = clients.enter_context(probe.connect(timeout=30))
                with contextlib.suppress(ConnectionError):
                    # With longer heads, their own limit may come first: the heap has up to 2 MiB to spare.
                    client.sendall(GET[:-2] + b"X: " + b"x" * 900)
            probe.wait_for_log('"Cannot accept connections" err="out of memory; seen from here: ')
        assert probe.get().status == 200
    assert sum("Cannot accept connections" in line for line in probe.log_lines) == 1


def test_with_too_little_memory_for_a_thread_it_serves_on_one(driver: FakeDriver, socket_path: Path) -> None:
    """How little that is depends on the Python; with less than loading needs, it ends."""
    program.run_once(["--version"])  # unpacked by now
    verdicts: set[str] = set()
    alone: list[str] = []
    for mebibytes in range(24, 64, 2):
        limit = f'ulimit -v {mebibytes * 1024}; exec "$@"'
        probe = program.Probe(
            arguments(socket_path), command=["/bin/sh", "-c", limit, "sh", *program.built()]
        )
        with contextlib.suppress(AssertionError, OSError), probe:
            verdicts.add(probe.get().text)
            told = re.compile(rf'"Going on without a thread" thread="checks" .* ulimit -v {mebibytes * 1024}')
            alone += filter(told.search, probe.log_lines)
        if alone:
            break
    assert verdicts == {"ok"}
    assert alone


def test_once_needs_no_thread(driver: FakeDriver, node: Node) -> None:
    node.limit_threads(0)
    flags = ["--once", f"--csi-address={driver.target}", "--connection-timeout=0", "--probe-timeout=300ms"]
    done = program.run_once(flags, env=node.env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
    driver.set("hang")
    done = program.run_once(flags, env=node.env)
    assert (done.returncode, done.stdout) == (4, NO_ANSWER + "\n")


@program.BOTH
def test_without_threads_for_grpc_a_check_ends_in_time(command: list[str] | None, node: Node) -> None:
    """Targets other than unix sockets need some: for a channel, or inside gRPC, which without them never ends a call."""
    told = set()
    with FakeDriver("127.0.0.1:0") as driver:
        flags = [
            "--once",
            f"--csi-address={driver.address}",
            "--connection-timeout=0",
            "--probe-timeout=500ms",
        ]
        # The program's own come first, then the trial's 16.
        for first, last in [
            (1, 999),
            (4, 999),
            (19, 21),
            (20, 22),
            (21, 23),
            (22, 999),
            (23, 999),
            (24, 999),
        ]:
            node.deny_threads(first, last)
            done = program.run_once(flags, command=command, env=node.env)
            told.add((done.returncode, done.stdout, done.stderr))
    denied = f"cannot connect to {driver.address}: can't start new thread in the liveness probe itself\n"
    assert {(3, denied, ""), (4, NO_ANSWER + "\n", "")} <= told
    assert told <= {(3, denied, ""), (4, NO_ANSWER + "\n", ""), (0, "ok\n", "")}


@pytest.fixture
def confined(folder: Path) -> Iterator[Callable[..., Container]]:
    """`confined("--cpus=1", …)` starts the built file, over this machine's own files, in a container with those limits."""
    if reason := missing():
        pytest.skip(reason)
    unpacked = folder / "unpacked"
    program.run_once(["--version"], env={"SHIV_ROOT": str(unpacked)})
    tag = f"livenessprobe-test:nothing-{os.getpid()}"
    with tarfile.open(folder / "nothing.tar", "w"):
        pass
    must("import", f"--change=LABEL {MARK}", folder / "nothing.tar", tag)
    files = {"/usr", "/bin", "/lib", "/lib64", sys.base_prefix, str(program.ROOT), str(folder)}
    seen = [f"--volume={path}:{path}:ro" for path in files if Path(path).exists()]
    with contextlib.ExitStack() as containers:

        def start(*options: str) -> Container:
            command = [*program.built(), f"--csi-address={folder}/csi.sock"]
            environment = f"--env=SHIV_ROOT={unpacked}"
            container = created(
                *HARDENED, *options, *seen, environment, f"--workdir={program.ROOT}", tag, *command
            )
            return containers.enter_context(container).start()

        yield start
    must("rmi", "--force", tag)


def test_a_twentieth_of_a_cpu_is_enough(driver: FakeDriver, confined: Callable[..., Container]) -> None:
    container = confined("--cpus=0.05", "--memory=64m")
    container.wait_until_healthy(60)
    address = container.address
    cases: list[tuple[Behaviour, int]] = [("unset", 200), ("error", 500)]
    for behaviour, status in cases * 5:
        driver.set(behaviour, message="no disk")
        answer = container.get(host=address)
        assert answer.status == status
        # The default of --probe-timeout, and what kubelets are told to wait for.
        assert answer.seconds < 3
    driver.set("hang")
    # The kernel may stop us for 95 ms out of 100 just when the time is up: seldom, and never for long.
    late = [container.get(host=address).seconds for _ in range(3)]
    assert min(late) < 3
    assert max(late) < 3.3


# ---- ports and folders


def test_a_port_that_was_taken_and_is_freed(driver: FakeDriver, socket_path: Path) -> None:
    """Even right after a probe was killed while it had clients."""
    port = program.free_port()
    args = [f"--csi-address={socket_path}", f"--health-port={port}"]
    with program.Probe(args) as first, contextlib.ExitStack() as clients:
        refused = program.run_once(args)
        assert refused.returncode == 1
        assert "address already in use" in refused.stderr
        for number in range(20):
            clients.enter_context(first.connect()).sendall(GET[: len(GET) * (number % 2)])
        assert first.get().status == 200
        first.process.kill()
        first.wait()
    for _ in range(3):
        with program.Probe(args) as probe:
            assert probe.get().status == 200


NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


def may(*command: str) -> bool:
    done = (
        subprocess.run([*command, "true"], check=False, capture_output=True)
        if shutil.which(command[0])
        else None
    )
    return done is not None and done.returncode == 0


@pytest.mark.skipif(not may(*NAMESPACE), reason="needs name spaces")
def test_a_folder_that_is_mounted_late_and_anew(folder: Path, socket_path: Path) -> None:
    """As when the kubelet recreates the volume under a running container."""
    seen = folder / "seen"
    seen.mkdir()
    args = arguments(seen / "csi.sock", "500ms")
    with program.Probe(args, command=[*NAMESPACE, *program.built()]) as probe:
        enter = ["nsenter", f"--target={probe.pid}", "--user", "--mount", "--preserve-credentials"]
        for _ in range(2):
            answer = probe.get()
            assert (answer.status, "no such file or directory" in answer.text) == (500, True)
            with FakeDriver(socket_path):
                subprocess.run([*enter, "mount", "--bind", folder, seen], check=True)
                assert probe.get().text == "ok"
            assert probe.get().status == 500
            with FakeDriver(socket_path):
                assert probe.get().text == "ok"
                subprocess.run([*enter, "umount", seen], check=True)
                assert probe.get().status == 500


# ---- wear


class Figures:
    """What a probe holds, which must not grow."""

    def __init__(self, probe: program.Probe) -> None:
        self._probe = probe
        self.memory, self.descriptors, self.threads = probe.memory(), probe.descriptors(), probe.threads()

    def hold(self, mib: float) -> None:
        wait_until(lambda: self._probe.descriptors() <= self.descriptors)
        assert self._probe.threads() <= self.threads + 8
        assert self._probe.memory() - self.memory < mib * MIB


@pytest.mark.timeout(300)
def test_a_thousand_restarts_of_the_driver(probe_factory: ProbeFactory, socket_path: Path) -> None:
    identity = Identity()
    identity.tell("GetPluginInfo", Answer(plugin_info("wearing.csi.k8s.io")))
    probe = probe_factory(*arguments(socket_path, "10s"), "--connection-timeout=0s")
    figures = None
    with ThreadPoolExecutor(4) as pool:
        for number in range(1100):
            if number == 100:  # warm by now
                figures = Figures(probe)
            server = grpc.server(pool, [identity])
            server.add_insecure_port(f"unix:{socket_path}")
            server.start()
            assert probe.get().text == "ok", number
            server.stop(None).wait()
            answer = probe.get()
            assert (answer.status, answer.text.startswith("cannot connect")) == (500, True), answer
    assert figures
    figures.hold(2)
    assert identity.seen()["most_probing"] == 1


def test_ten_thousand_connections_that_are_opened_and_dropped(
    driver: FakeDriver, probe: program.Probe
) -> None:
    for _ in range(100):
        assert probe.get().status == 200
    probe.wait_for_log("Learnt the CSI driver's name")
    driver.wait_until(lambda seen: seen.connections == 0)
    figures = Figures(probe)
    for number in range(10_000):
        with probe.connect() as client:
            client.sendall((b"", b"GET /he", GET, b"\0")[number % 4])
            # Half of them end by a reset.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", number // 4 % 2, 0))
    assert probe.get().text == "ok"
    figures.hold(4)
    assert driver.seen().most_probing == 1
