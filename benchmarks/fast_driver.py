"""A CSI driver that is never the bottleneck: unary gRPC calls over a unix socket, with just enough HTTP/2 for them.

Run as `python -IS fast_driver.py SOCKET`; takes commands on standard input, one per line, and answers each with a line.
It is a correct peer for any gRPC client: since it allows no header table, every header block stands on its own, and the
method's path can be found in it, plain or Huffman-coded, without decoding the rest.
"""

import os
import select
import socket
import sys
import time
from collections import deque
from contextlib import suppress

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM = ACK = 0x1
END_HEADERS = 0x4

# The second of each is Huffman-coded, by appendix B of RFC 7541.
PROBE = (b"/csi.v1.Identity/Probe", bytes.fromhex("608832fdc2be490b524c9f4c6bb0f197"))
GET_PLUGIN_INFO = (
    b"/csi.v1.Identity/GetPluginInfo",
    bytes.fromhex("608832fdc2be490b524c9f4c622a75d16cc6ab25529f"),
)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return b"%b%c%c%b%b" % (
        len(payload).to_bytes(3, "big"),
        kind,
        flags,
        stream.to_bytes(4, "big"),
        payload,
    )


def literal(name: bytes, value: bytes) -> bytes:
    """A header field for no table, by section 6.2.2 of RFC 7541."""
    return b"\x00%c%b%c%b" % (len(name), name, len(value), value)


def message(payload: bytes) -> bytes:
    """A gRPC message that is not compressed."""
    return b"\x00" + len(payload).to_bytes(4, "big") + payload


# SETTINGS_HEADER_TABLE_SIZE 0, and a connection window that no run uses up.
GREETING = frame(SETTINGS, 0, 0, b"\x00\x01\x00\x00\x00\x00") + frame(
    WINDOW_UPDATE, 0, 0, b"\x7f\xff\x00\x00"
)
SETTINGS_ACK = frame(SETTINGS, ACK, 0)
HEAD = b"\x88" + literal(b"content-type", b"application/grpc")  # 0x88: `:status: 200`
READY = message(b"\n\x02\x08\x01")
NAME = message(b"\n\x11bench.example.com")


def failure(code: int, text: bytes) -> bytes:
    return HEAD + literal(b"grpc-status", b"%d" % code) + literal(b"grpc-message", text)


def success(stream: int, reply: bytes) -> bytes:
    return (
        frame(HEADERS, END_HEADERS, stream, HEAD)
        + frame(DATA, 0, stream, reply)
        + frame(HEADERS, END_HEADERS | END_STREAM, stream, literal(b"grpc-status", b"0"))
    )


class Client:
    """One connection: what has not been read of it yet, and the header block of each call that has begun."""

    __slots__ = ("begun", "heads", "received", "socket")

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.begun = False
        self.received = bytearray()
        self.heads: dict[int, bytes] = {}

    def send(self, frames: bytes) -> None:
        with suppress(OSError):  # gone; its end is read next
            self.socket.send(frames)  # a few hundred bytes: never more than the socket's buffer takes


class Driver:
    """The server, on one thread."""

    def __init__(self, path: str) -> None:
        self.epoll = select.epoll()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(4096)
        self.listener.setblocking(False)
        self.epoll.register(self.listener.fileno(), select.EPOLLIN)
        self.epoll.register(0, select.EPOLLIN)
        self.clients: dict[int, Client] = {}
        self.behaviour = b"healthy"
        self.delay = 0.0
        self.waiting: dict[tuple[Client, int], None] = {}  # calls of Probe that hang, or are slow
        self.due: deque[tuple[float, Client, int]] = deque()
        self.probes = self.most_at_once = 0

    def run(self) -> None:
        """Serve until standard input ends."""
        while True:
            timeout = max(0.0, self.due[0][0] - time.monotonic()) if self.due else -1
            for descriptor, _ in self.epoll.poll(timeout):
                if client := self.clients.get(descriptor):
                    self.read(client)
                elif descriptor:
                    self.accept()
                elif not self.obey():
                    return
            while self.due and self.due[0][0] <= time.monotonic():
                _, client, stream = self.due.popleft()
                if self.waiting.pop((client, stream), ...) is None:
                    client.send(success(stream, READY))

    def accept(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        client = self.clients[connection.fileno()] = Client(connection)
        client.send(GREETING)
        self.epoll.register(connection.fileno(), select.EPOLLIN)

    def read(self, client: Client) -> None:
        try:
            chunk = client.socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            for call in [call for call in self.waiting if call[0] is client]:
                del self.waiting[call]
            del self.clients[client.socket.fileno()]
            client.socket.close()
            return
        client.received += chunk
        if answers := self.frames(client):
            client.send(answers)

    def frames(self, client: Client) -> bytes:
        """Take the whole frames from what was received; return what to send for them."""
        received, answers, at = client.received, b"", 0
        if not client.begun:
            if len(received) < len(PREFACE):
                return b""
            client.begun, at = True, len(PREFACE)
        while len(received) >= at + 9:
            end = at + 9 + int.from_bytes(received[at : at + 3], "big")
            if len(received) < end:
                break
            kind, flags = received[at + 3], received[at + 4]
            stream = int.from_bytes(received[at + 5 : at + 9], "big")
            payload = bytes(received[at + 9 : end])
            at = end
            if kind in (HEADERS, CONTINUATION):
                client.heads[stream] = client.heads.get(stream, b"") + payload
            elif kind == SETTINGS and not flags & ACK:
                answers += SETTINGS_ACK
            elif kind == PING and not flags & ACK:
                answers += frame(PING, ACK, 0, payload)
            elif kind == RST_STREAM:
                client.heads.pop(stream, None)
                self.waiting.pop((client, stream), None)
            if kind <= HEADERS and flags & END_STREAM:
                answers += self.answer(client, stream, client.heads.pop(stream, b""))
        del received[:at]
        return answers

    def answer(self, client: Client, stream: int, head: bytes) -> bytes:
        if any(path in head for path in GET_PLUGIN_INFO):
            return success(stream, NAME)
        if not any(path in head for path in PROBE):
            return frame(HEADERS, END_HEADERS | END_STREAM, stream, failure(12, b"no such method"))
        self.probes += 1
        self.most_at_once = max(self.most_at_once, len(self.waiting) + 1)
        if self.behaviour == b"healthy":
            return success(stream, READY)
        if self.behaviour == b"failing":
            return frame(HEADERS, END_HEADERS | END_STREAM, stream, failure(13, b"the disk is on fire"))
        self.waiting[client, stream] = None
        if self.behaviour == b"slow":
            self.due.append((time.monotonic() + self.delay, client, stream))
        return b""

    def obey(self) -> bool:
        """Carry out a command: healthy, failing, hung, slow SECONDS, or seen; False at the end of the input."""
        words = os.read(0, 4096).split()
        if not words:
            return False
        if words[0] == b"seen":
            os.write(1, b"%d %d\n" % (self.probes, self.most_at_once))
            self.probes = self.most_at_once = 0
        else:
            self.behaviour = words[0]
            self.delay = float(words[1]) if len(words) > 1 else 0.0
            os.write(1, b"\n")
        return True


def main() -> None:
    driver = Driver(sys.argv[1])
    os.write(1, b"\n")
    driver.run()


if __name__ == "__main__":
    main()
