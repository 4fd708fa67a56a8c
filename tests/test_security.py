"""What docs/security.md claims and no other test holds: it leaks nothing, writes nothing, and talks to nobody else."""

from __future__ import annotations

import os
import re
import select
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_driver import FakeDriver
from prometheus_client.parser import text_string_to_metric_families
from test_exchange import read_answer

if TYPE_CHECKING:
    import program
    from conftest import ProbeFactory

MALICE = 'x"} 1\nI1123 03:29:05.528510 9037 x.py:1] "forged"\r\x1b[31m\u202e\0'
SECRET = "Zm9yIHlvdXIgZXllcyBvbmx5"


def test_what_a_client_says_in_its_fields_is_nowhere_told(
    driver: FakeDriver, probe_factory: ProbeFactory
) -> None:
    probe = probe_factory(f"--csi-address={driver.target}", "--http-endpoint=127.0.0.1:0", "-v=9")
    fields = f"Host: x\r\nAuthorization: Bearer {SECRET}\r\nCookie: {SECRET}\r\n".encode()
    answers = b"".join(
        probe.raw(request + fields + rest)
        for request in (
            b"GET /healthz HTTP/1.1\r\n",
            b"GET /metrics HTTP/1.1\r\n",
            b"GET / HTTP/1.1\r\n",
            b"junk\r\n",
        )
        for rest in (b"\r\n", b"\x00: x\r\n\r\n", b"Content-Length: x\r\n\r\n")
    )
    assert probe.stop() == 0
    assert answers.count(b"HTTP/1.1 400 ") > 5
    assert SECRET.encode() not in answers
    assert not [line for line in probe.log_lines if SECRET in line]


@pytest.mark.parametrize(
    "message",
    ["x" * 15_000_000, "é" * 150_000, "failed to connect to all addresses" + "%41" * 300_000],
    ids=["too long", "escaped", "as of our own"],
)
def test_a_driver_s_long_texts_take_little_memory_and_no_time(
    driver: FakeDriver, probe: program.Probe, message: str
) -> None:
    assert probe.get().status == 200
    before = probe.peak_memory()
    for _ in range(3):
        driver.set("error", code="UNAVAILABLE", message=message)
        assert probe.get().status == 500
        driver.set("unset")
        assert probe.get().status == 200
    assert probe.peak_memory() - before < 16 << 20


def test_a_driver_s_name_forges_neither_lines_nor_series(
    driver: FakeDriver, probe_factory: ProbeFactory
) -> None:
    driver.set("name", name=MALICE)
    probe = probe_factory(f"--csi-address={driver.target}", "--http-endpoint=127.0.0.1:0", "-v=9")
    probe.wait_for_log("Learnt the CSI driver's name")
    assert probe.get().status == 200
    text = probe.get("/metrics").text
    assert probe.stop() == 0

    names = {
        sample.labels["driver_name"]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "driver_name" in sample.labels
    }
    assert MALICE in names
    assert all(re.match(r"[IWE]\d{4} .*\w+\.py:\d+\] \"", line) for line in probe.log_lines)
    assert all(line.isprintable() for line in probe.log_lines)


def test_a_verdict_is_no_page(driver: FakeDriver, probe_factory: ProbeFactory) -> None:
    """A browser that is lured to the port runs nothing that the driver says."""
    probe = probe_factory(f"--csi-address={driver.target}", "--http-endpoint=127.0.0.1:0")
    driver.set("error", message="<script>alert(1)</script>")
    for path in ("/healthz", "/livez", "/readyz", "/<script>"):
        answer = read_answer(probe.raw(f"GET {path} HTTP/1.0\r\n\r\n".encode()))
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("target", ["unix", "tcp"])
def test_it_talks_to_the_driver_alone(probe_factory: ProbeFactory, socket_path: Path, target: str) -> None:
    with socket.socket() as proxy, FakeDriver(socket_path if target == "unix" else "127.0.0.1:0") as driver:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        names = ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy")
        env = {spelt: address for name in names for spelt in (name, name.upper())} | {"no_proxy": ""}
        probe = probe_factory(f"--csi-address={driver.address}", "--http-endpoint=127.0.0.1:0", env=env)
        for _ in range(10):
            assert probe.get().text == "ok"
        assert not select.select([proxy], [], [], 0)[0]


def test_once_it_is_unpacked_it_has_no_file_open_but_its_own_and_writes_none(
    driver: FakeDriver, probe_factory: ProbeFactory, folder: Path
) -> None:
    home = folder / "home"
    home.mkdir()
    env = {"HOME": str(home), "TMPDIR": str(home), "SHIV_ROOT": str(home / "unpacked")}
    args = [f"--csi-address={driver.target}", "--http-endpoint=127.0.0.1:0"]
    # The first one unpacks; the second one's reading may change the files' access times.
    for _ in range(2):
        earlier = probe_factory(*args, env=env)
        assert earlier.get("/metrics").status == 200
        assert earlier.stop() == 0
    before = sorted(home.rglob("*"))
    probe = probe_factory(*args, env=env)
    for _ in range(20):
        assert probe.get().status == 200
        assert probe.get("/metrics").status == 200
    opened = {str(path.readlink()) for path in Path(f"/proc/{probe.pid}/fd").iterdir()}
    files = {name for name in opened if name.startswith("/") and not name.startswith(env["SHIV_ROOT"])}
    assert files <= {os.devnull}
    assert "\nwrite_bytes: 0\n" in Path(f"/proc/{probe.pid}/io").read_text()
    assert probe.stop() == 0
    assert sorted(home.rglob("*")) == before
