"""What other tests take for granted about the fake driver, as a plain gRPC client sees it: its counts and its end."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import fake_driver
import grpc
import pytest
from fake_driver import FakeDriver

OPTIONS = [
    # One connection per channel, as a new client would have.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_metadata_size", 16 << 20),
    ("grpc.absolute_max_metadata_size", 16 << 20),
]
FILE = str(fake_driver.__file__)
LATE = "Deadline Exceeded"


def channel_to(address: str) -> grpc.Channel:
    return grpc.insecure_channel(f"unix:{address}" if address.startswith("/") else address, OPTIONS)


def ask(channel: grpc.Channel, method: str = "Probe", timeout: float = 20.0) -> Any:
    """The bytes of the reply, or the code and text of the error."""
    call: Any = channel.unary_unary(fake_driver.SERVICE + method)
    try:
        return call(b"", timeout=timeout)
    except grpc.RpcError as error:
        return error.code().name, error.details()


def ask_anew(address: str, method: str = "Probe", timeout: float = 20.0) -> Any:
    with closing(channel_to(address)) as channel:
        return ask(channel, method, timeout)


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
        call: Any = channel.unary_unary(f"{fake_driver.SERVICE}Probe")
        for _ in range(50):
            given_up = call.future(b"")
            driver.wait(probing=1)
            given_up.cancel()
            # gRPC promises no order of the end of a call that was given up and the beginning of the next.
            driver.wait_until(lambda seen: seen.probing == 0)

    assert driver.seen().most_probing == 1


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


@pytest.mark.parametrize("paused", [False, True])
def test_ends_with_a_killed_test(socket_path: Path, paused: bool) -> None:
    script = (
        "import sys; from fake_driver import FakeDriver; driver = FakeDriver(sys.argv[1]).start();"
        f"{paused} and driver.pause(); print(driver.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, socket_path],
        env={**os.environ, "PYTHONPATH": str(Path(FILE).parent), "TMPDIR": str(socket_path.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as test:
        assert test.stdout
        driver = os.pidfd_open(int(test.stdout.readline()))
        test.kill()

    try:
        assert select.select([driver], [], [], 20)[0]
    finally:
        os.close(driver)
