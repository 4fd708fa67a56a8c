"""What the fake driver and the hostile peers do, seen by a plain gRPC client: it shows whose fault a failure is."""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import fake_driver
import grpc
import peers
import program
import pytest
from fake_driver import FakeDriver
from google.protobuf.message import DecodeError

from livenessprobe.identity_pb2 import GetPluginInfoResponse, ProbeResponse

OPTIONS = [
    # A connection for each channel, as a new client would have.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_metadata_size", 16 << 20),
    ("grpc.absolute_max_metadata_size", 16 << 20),
]
FILE = str(fake_driver.__file__)
LATE = "Deadline Exceeded"


def channel_to(address: str) -> grpc.Channel:
    return grpc.insecure_channel(f"unix:{address}" if address.startswith("/") else address, OPTIONS)


def ask(channel: grpc.Channel, method: str = "Probe", timeout: float = 5.0) -> Any:
    """The bytes of the reply, or code and text of the error."""
    call: Any = channel.unary_unary(fake_driver.SERVICE + method)
    try:
        return call(b"", timeout=timeout)
    except grpc.RpcError as error:
        return error.code().name, error.details()


def ask_anew(address: str, method: str = "Probe", timeout: float = 5.0) -> Any:
    with closing(channel_to(address)) as channel:
        return ask(channel, method, timeout)


@pytest.mark.parametrize(
    ("behaviour", "present", "ready"),
    [("unset", False, False), ("ready", True, True), ("not-ready", True, False)],
)
def test_ready(driver: FakeDriver, behaviour: fake_driver.Behaviour, present: bool, ready: bool) -> None:
    driver.set(behaviour)

    reply = ProbeResponse.FromString(ask_anew(driver.address))

    assert (reply.HasField("ready"), reply.ready.value) == (present, ready)


def test_every_error_code(driver: FakeDriver) -> None:
    assert len(fake_driver.CODES) == 16
    with closing(channel_to(driver.address)) as channel:
        for code in fake_driver.CODES:
            driver.set("error", code=code, message=f"it is {code}")
            assert ask(channel) == (code, f"it is {code}")


@pytest.mark.parametrize(
    "message", ["", "\x00\n\r\t\x1b[31m\x7f", "größer 🦄 \u2028", "100 %41", "x" * 3_000_000]
)
def test_every_error_text(driver: FakeDriver, message: str) -> None:
    driver.set("error", message=message)

    assert ask_anew(driver.address) == ("INTERNAL", message)


@pytest.mark.parametrize("reply", fake_driver.UNDECODABLE.values(), ids=fake_driver.UNDECODABLE)
def test_undecodable_reply(driver: FakeDriver, reply: bytes) -> None:
    for method in ("Probe", "GetPluginInfo"):
        driver.set("raw", method=method, data=reply)
        assert ask_anew(driver.address, method) == reply

    for message in (ProbeResponse, GetPluginInfoResponse):
        with pytest.raises(DecodeError):
            message.FromString(reply)


@pytest.mark.parametrize("name", ["fake.csi.k8s.io", "", "n" * 63, "n" * 300])
def test_plugin_name(driver: FakeDriver, name: str) -> None:
    driver.set("name", name=name)

    assert GetPluginInfoResponse.FromString(ask_anew(driver.address, "GetPluginInfo")).name == name


def test_methods_behave_each_on_its_own(driver: FakeDriver) -> None:
    driver.set("error", method="GetPluginInfo", code="UNAVAILABLE", message="later")
    assert ask_anew(driver.address, "GetPluginInfo") == ("UNAVAILABLE", "later")
    driver.set("hang", method="GetPluginInfo")
    assert ask_anew(driver.address, "GetPluginInfo", 0.1) == ("DEADLINE_EXCEEDED", LATE)

    assert ask_anew(driver.address) == b""


def test_unimplemented(driver: FakeDriver) -> None:
    driver.set("unimplemented")
    assert ask_anew(driver.address)[0] == "UNIMPLEMENTED"
    assert ask_anew(driver.address, "GetPluginInfo") == fake_driver.plugin_info("fake.csi.k8s.io")

    driver.set("no-service")
    assert ask_anew(driver.address, "GetPluginInfo")[0] == "UNIMPLEMENTED"
    assert driver.seen().probes == 1


def test_slow(driver: FakeDriver) -> None:
    driver.set("not-ready")
    driver.set("slow", after=0.2)

    assert ask_anew(driver.address, timeout=0.1) == ("DEADLINE_EXCEEDED", LATE)
    assert ask_anew(driver.address) == b"\n\x00"


def test_hang_until_released_or_changed(driver: FakeDriver) -> None:
    driver.set("hang")
    with ThreadPoolExecutor() as pool:
        first = [pool.submit(ask_anew, driver.address) for _ in range(3)]
        driver.wait(probing=3)
        driver.release()
        assert [call.result() for call in first] == [b""] * 3

        second = pool.submit(ask_anew, driver.address)
        driver.wait(probing=1)
        driver.set("error", message="changed")
        assert second.result() == ("INTERNAL", "changed")

    seen = driver.seen()
    assert (seen.probes, seen.probing, seen.most_probing) == (4, 0, 3)


def test_one_call_after_the_other_is_never_two_at_a_time(driver: FakeDriver) -> None:
    with closing(channel_to(driver.address)) as channel:
        for _ in range(100):
            ask(channel)
        driver.set("hang")
        for _ in range(50):
            ask(channel, timeout=0.01)

    assert driver.wait_until(lambda seen: seen.probing == 0).most_probing == 1


def test_counts_connections(driver: FakeDriver) -> None:
    assert driver.seen() == (0, 0, 0, 0, 0)
    with closing(channel_to(driver.address)) as one, closing(channel_to(driver.address)) as other:
        for channel, method in ((one, "Probe"), (other, "Probe"), (other, "GetPluginInfo")):
            ask(channel, method)
        assert driver.seen() == (2, 1, 0, 1, 2)

    driver.wait_until(lambda seen: seen.connections == 0)


def test_paused_and_resumed(driver: FakeDriver) -> None:
    driver.pause()
    stats = [task.read_text() for task in Path(f"/proc/{driver.pid}/task").glob("*/stat")]
    assert {stat.rpartition(")")[2].split()[0] for stat in stats} == {"T"}
    assert ask_anew(driver.address, timeout=0.1) == ("DEADLINE_EXCEEDED", LATE)

    driver.resume()
    assert ask_anew(driver.address) == b""


def test_out_of_descriptors(driver: FakeDriver) -> None:
    with closing(channel_to(driver.address)) as old:
        ask(old)
        driver.exhaust_descriptors()
        for _ in range(2):
            assert ask_anew(driver.address, timeout=0.2)[0] == "DEADLINE_EXCEEDED"
            assert ask(old) == b""
        assert driver.connections() == 1

        driver.release_descriptors()
        assert ask_anew(driver.address) == b""


def test_killed_stopped_and_restarted(driver: FakeDriver, socket_path: Path) -> None:
    driver.set("not-ready")
    driver.kill()
    assert (driver.running, socket_path.is_socket()) == (False, True)
    assert ask_anew(driver.address)[0] == "UNAVAILABLE"

    driver.start()
    assert ask_anew(driver.address) == b"\n\x00"

    process = driver.pid
    driver.restart()
    assert driver.pid != process
    assert ask_anew(driver.address) == b"\n\x00"

    driver.stop()
    assert (driver.running, socket_path.exists()) == (False, False)


def test_unlinked_and_replaced(driver: FakeDriver, socket_path: Path) -> None:
    with closing(channel_to(driver.address)) as old:
        ask(old)
        driver.unlink()
        assert ask(old) == b""
        assert ask_anew(driver.address)[0] == "UNAVAILABLE"

        with FakeDriver(socket_path) as other:
            other.set("not-ready")
            assert (ask(old), ask_anew(driver.address)) == (b"", b"\n\x00")


def test_on_tcp() -> None:
    with FakeDriver("127.0.0.1:0") as driver, closing(channel_to(driver.address)) as channel:
        assert ask(channel) == b""
        assert driver.seen().connections == 1


def test_by_hand(socket_path: Path) -> None:
    command = [sys.executable, FILE, f"--socket={socket_path}", "--error=ABORTED", "--message=no"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline().startswith(f"listening: {socket_path}")
            assert ask_anew(str(socket_path)) == ("ABORTED", "no")
            process.terminate()
            assert process.wait(5) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("paused", [False, True])
def test_ends_with_a_killed_test(socket_path: Path, paused: bool) -> None:
    script = (
        "import sys; from fake_driver import FakeDriver; driver = FakeDriver(sys.argv[1]).start();"
        f"{paused} and driver.pause(); print(driver.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, socket_path],
        env={**os.environ, "PYTHONPATH": str(Path(FILE).parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as test:
        assert test.stdout
        driver = os.pidfd_open(int(test.stdout.readline()))
        test.kill()

    try:
        assert select.select([driver], [], [], 5)[0]
    finally:
        os.close(driver)


def heard_from(path: Path, length: int, closes: bool) -> tuple[bytes, bool]:
    """That many bytes of what a peer says to an HTTP/2 client, and whether it closes after that."""
    heard = b""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(path))
        try:
            client.sendall(peers.PREFACE + peers.SETTINGS)
            while len(heard) < length:
                heard += client.recv(length - len(heard))
            client.settimeout(5 if closes else 0.1)
            while client.recv(65536):
                pass
        except TimeoutError:
            return heard, False
        except (BrokenPipeError, ConnectionResetError):
            pass
        return heard, True


HEARD: dict[str, tuple[peers.Peer, bytes, bool]] = {
    "junk": (peers.junk, bytes(range(255, 0, -1)), False),
    "closing at once": (peers.closing_at_once, b"", True),
    "silent": (peers.silent, b"", False),
    "HTTP/1.1": (peers.http1, b"HTTP/1.1 400 Bad Request\r\n", True),
    "settings, close": (peers.settings_then_close, peers.SETTINGS, True),
    "settings, silent": (peers.settings_then_silent, peers.SETTINGS + peers.SETTINGS_ACK, False),
    "settings, goaway": (
        peers.settings_then_goaway,
        peers.SETTINGS + peers.SETTINGS_ACK + peers.GOAWAY,
        False,
    ),
}


@pytest.mark.parametrize(("peer", "start", "closes"), HEARD.values(), ids=HEARD)
def test_peers_that_accept(socket_path: Path, peer: peers.Peer, start: bytes, closes: bool) -> None:
    with peer(socket_path):
        for _ in range(2):
            assert heard_from(socket_path, len(start), closes) == (start, closes)
        assert ask_anew(str(socket_path), timeout=0.3)[0] in ("UNAVAILABLE", "DEADLINE_EXCEEDED")

    assert not socket_path.exists()


@pytest.mark.parametrize(
    ("peer", "number"),
    [
        (nullcontext, errno.ENOENT),
        (peers.stale_socket, errno.ECONNREFUSED),
        (peers.regular_file, errno.ECONNREFUSED),
        (peers.directory, errno.ECONNREFUSED),
        (peers.datagram_socket, errno.EPROTOTYPE),
        (peers.never_accepting, errno.EAGAIN),
        (peers.forbidden, errno.EACCES),
        (peers.forbidden_folder, errno.EACCES),
    ],
)
def test_peers_that_cannot_be_connected_to(socket_path: Path, peer: peers.Peer, number: int) -> None:
    user = os.geteuid()
    with peer(socket_path), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(0)
        # Modes do not bind root, so for these cases we stop being root for a moment.
        os.seteuid((number == errno.EACCES and program.unprivileged()) or user)
        try:
            assert client.connect_ex(str(socket_path)) == number
        finally:
            os.seteuid(user)

    assert not socket_path.exists()
