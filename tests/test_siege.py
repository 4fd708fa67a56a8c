"""A siege: strangers, drivers and the node at their worst, at random moments; then it is lifted, and all is well."""

from __future__ import annotations

import contextlib
import http.client
import resource
import signal
import socket
import struct
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import peers
import program
from fake_driver import FakeDriver
from hypothesis import given
from hypothesis import strategies as st
from test_exchange import FINE
from torture import Tally, assert_well_formed, effort

if TYPE_CHECKING:
    from collections.abc import Callable

    from fake_driver import Behaviour

GET = FINE["HTTP/1.1"]
CLIENTS = 300
MIB = 2**20


class Siege:
    """One life of the program; each method that is a step may come at any moment, any number of times."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._socket, self._stack = folder / "csi.sock", stack
        self._peer = contextlib.ExitStack()
        stack.callback(self._peer.close)
        self._clients: list[socket.socket] = []
        self.probe = stack.enter_context(
            program.Probe(
                [
                    f"--csi-address={self._socket}",
                    "--http-endpoint=127.0.0.1:0",
                    "--probe-timeout=300ms",
                    "-v=5",
                ]
            )
        )
        self.drive("unset")
        self.probe.wait_for_log("Learnt the CSI driver's name")
        self.wait_until_healthy()
        self.limits = {
            what: resource.prlimit(self.probe.pid, what)
            for what in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_NPROC)
        }
        self.threads = self.probe.thread_ids()

    def wait_until_healthy(self) -> None:
        """Not at once: on a busy machine a check may time out."""
        end = time.monotonic() + 20
        while self.probe.get().text != "ok":
            assert time.monotonic() < end

    # ---- the driver

    def drive(self, behaviour: Behaviour) -> None:
        self._peer.close()
        driver = self._peer.enter_context(FakeDriver(self._socket))
        driver.set(behaviour)

    def impostor(self, peer: Callable[[Path], contextlib.AbstractContextManager[object]]) -> None:
        self._peer.close()
        self._socket.unlink(missing_ok=True)
        self._peer.enter_context(peer(self._socket))

    # ---- the node

    def deny(self, what: int, spare: int) -> None:
        """Grant this much more than is in use now."""
        used = {
            resource.RLIMIT_NOFILE: self.probe.descriptors,
            resource.RLIMIT_AS: self.probe.virtual_memory,
            resource.RLIMIT_NPROC: self.probe.threads,
        }[what]()
        hard = self.limits[what][1]
        most = used + spare if hard == resource.RLIM_INFINITY else min(used + spare, hard)
        resource.prlimit(self.probe.pid, what, (most, hard))

    def freeze(self, seconds: float) -> None:
        self.probe.send(signal.SIGSTOP)
        time.sleep(seconds)
        self.probe.send(signal.SIGCONT)

    def lift(self) -> None:
        for what, limit in self.limits.items():
            resource.prlimit(self.probe.pid, what, limit)

    # ---- strangers

    def flood(self, sent: bytes) -> None:
        for _ in range(CLIENTS):
            client = socket.socket()
            self._stack.callback(client.close)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            client.setblocking(False)
            with contextlib.suppress(OSError):
                client.connect(self.probe.address())
            client.setblocking(True)
            client.settimeout(1)
            with contextlib.suppress(OSError):
                client.sendall(sent)
            self._clients.append(client)

    def leave(self, *, reset: bool) -> None:
        for client in self._clients:
            if reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        self._clients.clear()

    def ask(self, path: str) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            self.probe.get(path, timeout=1)


STEPS = st.one_of(
    st.tuples(
        st.just("drive"), st.sampled_from(["unset", "not-ready", "error", "hang", "raw", "unimplemented"])
    ),
    st.tuples(
        st.just("impostor"),
        st.sampled_from([peers.http1, peers.stale_socket, peers.datagram_socket]),
    ),
    st.tuples(
        st.just("deny"),
        st.sampled_from([resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_NPROC]),
        st.sampled_from([0, 1, 5, 100, MIB]),
    ),
    st.tuples(st.just("freeze"), st.sampled_from([0.0, 0.05, 0.4])),
    st.tuples(st.just("lift")),
    st.tuples(
        st.just("flood"),
        st.sampled_from(
            [
                b"",
                GET,
                GET[:-2] + b"X: " + b"x" * 8000,
                GET.replace(b"healthz", b"metrics"),
                GET.replace(b"healthz", b"statusz"),
                b"\x16\x03\x01\x02\0\x01",
                b"POST /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\n",
            ]
        ),
    ),
    st.tuples(st.just("ask"), st.sampled_from(["/healthz", "/livez", "/metrics", "/statusz", "/flagz", "/"])),
)


@effort(3)
@given(steps=st.lists(STEPS, min_size=6, max_size=16), reset=st.booleans())
def besiege(tally: Tally, steps: list[tuple[str, ...]], reset: bool) -> None:
    program.allow_descriptors(CLIENTS * 16 + 1000)
    tally.add("sieges")
    tally.add("siege steps", len(steps))
    with tempfile.TemporaryDirectory(prefix="lp", dir="/tmp") as folder, contextlib.ExitStack() as stack:
        siege = Siege(Path(folder), stack)
        for name, *arguments in steps:
            getattr(siege, name)(*arguments)
            assert siege.probe.process.poll() is None, siege.probe.log_lines[-3:]
        siege.lift()
        siege.leave(reset=reset)
        siege.drive("unset")
        siege.wait_until_healthy()
        assert siege.probe.get("/metrics").status == siege.probe.get("/statusz").status == 200
        assert siege.threads <= siege.probe.thread_ids()
        assert len(siege.probe.thread_ids()) <= 4
        begin = time.monotonic()
        assert siege.probe.stop() == 0
        assert time.monotonic() - begin < 5
        assert_well_formed(siege.probe.log_lines)
        assert not any('] "Unexpected' in line or line.startswith("F") for line in siege.probe.log_lines)


def test_a_siege_leaves_nothing_behind(record_property: Callable[[str, object], None]) -> None:
    tally = Tally()
    besiege(tally)
    for name, value in tally.figures.items():
        record_property(name, value)
