"""CSI drivers by other implementations of gRPC: each a context manager on a socket's path, answering Probe as told."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from fake_driver import FakeDriver
from grpclib.const import Cardinality, Handler, Status
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError
from grpclib.server import Server, Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from typing import TypeAlias

    Stack: TypeAlias = Callable[[Path, int, str, bytes], AbstractContextManager[object]]

PROBE = "/csi.v1.Identity/Probe"
NODE = Path(__file__).parent / "node"


# ---- grpcio


@contextlib.contextmanager
def grpcio(path: Path, code: int, text: str, reply: bytes) -> Iterator[None]:
    with FakeDriver(path) as driver:
        if code:
            name = next(status.name for status in grpc.StatusCode if status.value[0] == code)
            driver.set("error", code=name, message=text)
        else:
            driver.set("raw", data=reply)
        yield


# ---- grpclib


class _Bytes(CodecBase):
    """Passes messages on as they are."""

    __content_subtype__ = "proto"

    def encode(self, message: bytes, message_type: object) -> bytes:
        return message

    def decode(self, data: bytes, message_type: object) -> bytes:
        return data


class _Identity:
    def __init__(self, code: int, text: str, reply: bytes) -> None:
        self._code, self._text, self._reply = code, text, reply

    async def _probe(self, stream: Stream[bytes, bytes]) -> None:
        await stream.recv_message()
        if self._code:
            raise GRPCError(Status(self._code), self._text)
        await stream.send_message(self._reply)

    def __mapping__(self) -> dict[str, Handler]:
        return {PROBE: Handler(self._probe, Cardinality.UNARY_UNARY, bytes, bytes)}


@contextlib.contextmanager
def grpclib(path: Path, code: int, text: str, reply: bytes) -> Iterator[None]:
    """On a thread with an event loop of its own."""
    loop = asyncio.new_event_loop()
    listening = threading.Event()

    async def serve(over: asyncio.Event) -> None:
        server = Server([_Identity(code, text, reply)], codec=_Bytes())
        await server.start(path=str(path))
        listening.set()
        await over.wait()
        server.close()
        await server.wait_closed()

    over = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve(over)), daemon=True)
    thread.start()
    try:
        assert listening.wait(20)
        yield
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(60)
        loop.close()


# ---- Node


def node(stack: str) -> Stack:
    @contextlib.contextmanager
    def running(path: Path, code: int, text: str, reply: bytes) -> Iterator[None]:
        program = shutil.which("node")
        if program is None:
            pytest.skip("there is no node")
        if stack == "grpc-js" and not (NODE / "node_modules").exists():
            pytest.skip("grpc-js is not installed: npm ci --ignore-scripts --prefix tests/helpers/node")
        arguments: list[Any] = [program, NODE / "driver.js", stack, path, str(code), text, str(len(reply))]
        with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "listening\n"
                yield
            finally:
                process.kill()

    return running


def node_reply(size: int) -> bytes:
    """What driver.js replies with: the same for all stacks."""
    return (b"\n\x02\x08\x01" * (1 + size // 4))[:size]


STACKS: dict[str, Stack] = {
    "grpcio": grpcio,
    "grpclib": grpclib,
    "grpc-js": node("grpc-js"),
    "node's http2, padded, with early hints": node("http2"),
}
