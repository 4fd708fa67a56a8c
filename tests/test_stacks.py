"""Drivers on other implementations of gRPC are judged by what they say: healthy, failing, large."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import program
import pytest
from stacks import STACKS, node_reply

from livenessprobe.rpc import Reply
from livenessprobe.unix_call import UnixCall

if TYPE_CHECKING:
    from pathlib import Path

# Longer than anything here takes.
PATIENCE = 20.0


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("size", [0, 4, 16_384, 65_536])
def test_a_reply(stack: str, size: int, socket_path: Path) -> None:
    with STACKS[stack](socket_path, 0, "", node_reply(size)):
        call = UnixCall(str(socket_path))
        replies = [call("/csi.v1.Identity/Probe", b"", time.monotonic() + PATIENCE) for _ in range(3)]

    assert replies == [Reply("OK", "", node_reply(size))] * 3


@pytest.mark.parametrize("stack", STACKS)
def test_the_program_beside_it(stack: str, socket_path: Path) -> None:
    with STACKS[stack](socket_path, 0, "", node_reply(4)):
        done = program.run_once(["--once", f"--csi-address={socket_path}"], command=program.MODULE)

    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


@pytest.mark.parametrize("stack", STACKS)
def test_an_error(stack: str, socket_path: Path) -> None:
    text = 'the "volume" is 100% gone: \N{SNOWMAN}\n' + "x" * 5000
    with STACKS[stack](socket_path, 13, text, b""):
        reply = UnixCall(str(socket_path))("/csi.v1.Identity/Probe", b"", time.monotonic() + PATIENCE)

    assert reply == Reply("Internal", text, None)


@pytest.mark.parametrize("stack", STACKS)
def test_a_method_that_is_not_there(stack: str, socket_path: Path) -> None:
    with STACKS[stack](socket_path, 0, "", b""):
        reply = UnixCall(str(socket_path))("/csi.v1.Nothing/There", b"", time.monotonic() + PATIENCE)

    # grpclib says so without a content-type, which for grpc-go is not gRPC.
    assert (reply.code, reply.payload) == ("Unknown" if stack == "grpclib" else "Unimplemented", None)
