"""Many clients at once, in brief; `make load` is the long form, with figures for times and memory."""

from __future__ import annotations

import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import kubelet
import load
import program
import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import ProbeFactory
    from fake_driver import FakeDriver


@pytest.mark.parametrize("requests", load.STORMS)
def test_a_storm_on_a_slow_driver_is_one_probe(
    driver: FakeDriver, probe_factory: ProbeFactory, socket_path: Path, requests: int
) -> None:
    program.allow_descriptors(requests + 100)
    probe = probe_factory(
        f"--csi-address={socket_path}", "--http-endpoint=127.0.0.1:0", "--probe-timeout=60s"
    )
    assert probe.get().status == 200
    driver.set("hang")
    sent = threading.Event()
    with ThreadPoolExecutor() as pool:
        answers = pool.submit(kubelet.storm, probe.address()[1], requests, sent.set)
        assert sent.wait(60)
        probe.catch_up()
        assert probe.descriptors() > requests
        driver.set("unset")
        assert [answer.status for answer in answers.result()] == [200] * requests
    seen = driver.seen()
    assert (seen.probes, seen.most_probing) == (2, 1)


def test_a_flood_of_half_open_connections_keeps_nobody_out(driver: FakeDriver, probe: program.Probe) -> None:
    program.allow_descriptors(load.MOST_HELD + 100)
    for _ in range(100):
        assert probe.get().status == 200
    memory = probe.memory()
    answers = load.flood(probe.address()[1], seconds=3)
    assert [answer.status for answer in answers] == [200] * 3 * load.REQUESTS_A_SECOND
    seconds = [answer.seconds for answer in answers]
    # `make load` bounds the slowest by this; beside other work, the slowest would also reflect that work.
    assert statistics.median(seconds) < load.FLOOD_SECONDS
    assert max(seconds) < 3
    assert probe.memory() - memory < load.MOST_GROWTH_MIB * 2**20
    assert driver.seen().most_probing == 1
