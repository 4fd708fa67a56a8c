"""A CSI driver with an Identity service and nothing else, to try livenessprobe by hand. It needs only grpcio.

    python examples/driver.py --socket /tmp/csi.sock --name example.csi.k8s.io

It behaves as the file /tmp/csi.sock.state says, which is read again for each call of Probe:

    echo ready > /tmp/csi.sock.state                healthy, as without the file
    echo not-ready > /tmp/csi.sock.state            alive, and still initializing
    echo fail the disk is gone > /tmp/csi.sock.state    an error, with this message
    echo hang > /tmp/csi.sock.state                 no answer until the file says otherwise

Any other word is an error that says so.
Ctrl-C or `kill` ends it, and a new start is the driver coming back.
"""

from __future__ import annotations

import argparse
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import grpc

# ProbeResponse has one field, the message `ready`: if it is unset or true, the driver is ready.
READY = b""
REPLIES = {"ready": READY, "not-ready": b"\x0a\x00"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--socket", required=True, metavar="PATH", help="the unix socket to listen on")
    parser.add_argument("--name", default="example.csi.k8s.io", help="what GetPluginInfo says")
    options = parser.parse_args()
    state = options.socket + ".state"

    def told() -> str:
        try:
            with open(state) as file:
                return file.read().strip() or "ready"
        except FileNotFoundError:
            return "ready"

    def get_plugin_info(_request: bytes, _context: grpc.ServicerContext) -> bytes:
        name: bytes = options.name.encode()
        return b"\x0a" + bytes([len(name)]) + name  # field 1 of GetPluginInfoResponse, at most 63 bytes

    def probe(_request: bytes, context: grpc.ServicerContext) -> bytes:
        while (wanted := told()) == "hang":
            if not context.is_active():  # the caller has given up, or we have to end
                return READY
            time.sleep(0.05)
        word, _, message = wanted.partition(" ")
        if word == "fail":
            context.abort(grpc.StatusCode.INTERNAL, message.strip() or "failing, as told")
        if wanted not in REPLIES:
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"{state} says {wanted!r}: write ready, not-ready, hang, or fail and a message",
            )
        return REPLIES[wanted]

    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "GetPluginInfo": grpc.unary_unary_rpc_method_handler(get_plugin_info),
        "Probe": grpc.unary_unary_rpc_method_handler(probe),
    }
    # Blocked before gRPC starts threads, which would otherwise take the signals from sigwait.
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    server = grpc.server(ThreadPoolExecutor())
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("csi.v1.Identity", methods)])
    server.add_insecure_port(f"unix:{options.socket}")
    server.start()
    print(f"{options.name} listens on {options.socket}; its state is in {state}", flush=True)
    signal.sigwait(ends)
    server.stop(None).wait()


if __name__ == "__main__":
    main()
