"""`make image-budget`: the image's sizes and how soon its container serves, beside another image or program.

    python benchmarks/image_budget.py quay.io/k8scsi/livenessprobe:canary [REFERENCE-IMAGE-OR-FILE]

A reference that is a file is put into an image of its own, alone. Containers start in turns, so that the machine's moods
affect all alike. Exit code 1 if a figure of the first image is over its budget. Only root can learn from the kernel when a
process began.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import kubelet
from rig import START_SECONDS, Driver, free_port, scratch

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCKER = os.environ.get("DOCKER") or "docker"
TIMES = 10

# Titles, units, and what SPEC allows.
BUDGETS = {
    "unpacked": ("files, unpacked", "MB", 36.0),
    "compressed": ("layers, gzip -9", "MB", 14.0),
    "listening": ("process start to listening", "ms", 80.0),
    "first ok": ("process start to first ok", "ms", 180.0),
}


def docker(*arguments: str, data: bytes | None = None) -> bytes:
    """Have Docker do something; return what it prints."""
    done = subprocess.run([DOCKER, *arguments], input=data, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"{DOCKER} {arguments[0]}: {done.stderr.decode().strip()}")
    return done.stdout


def sizes(image: str) -> dict[str, float]:
    """Bytes of all files, and of the layers as a registry has them, in MB."""
    found = {"unpacked": 0, "compressed": 0}
    with tarfile.open(fileobj=io.BytesIO(docker("save", image))) as saved:
        manifest = saved.extractfile("manifest.json")
        assert manifest
        for name in json.load(manifest)[0]["Layers"]:
            file = saved.extractfile(name)
            assert file
            layer = file.read()
            found["compressed"] += len(gzip.compress(layer, 9))
            with tarfile.open(fileobj=io.BytesIO(layer)) as files:
                found["unpacked"] += sum(member.size for member in files)
    return {key: value / 1e6 for key, value in found.items()}


class Starts:
    """When processes began: what the kernel says about each execve, on the monotonic clock."""

    # linux/connector.h and linux/cn_proc.h
    _CONNECTOR, _CN_IDX_PROC, _CN_VAL_PROC, _LISTEN, _EXEC = 11, 1, 1, 1, 2

    def __enter__(self) -> Starts:
        self._times: dict[int, float] = {}
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, self._CONNECTOR)
        self._socket.bind((0, self._CN_IDX_PROC))
        message = struct.pack("=IIIIHHI", self._CN_IDX_PROC, self._CN_VAL_PROC, 0, 0, 4, 0, self._LISTEN)
        self._socket.send(struct.pack("=IHHII", 16 + len(message), 3, 0, 0, 0) + message)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def of(self, pid: int) -> float:
        """When a process last called execve."""
        end = time.monotonic() + START_SECONDS
        while pid not in self._times:
            if time.monotonic() > end:
                sys.exit(
                    "image-budget: the kernel does not tell when processes start: not root, or a container?"
                )
            time.sleep(0.001)
        return self._times[pid]

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while event := self._socket.recv(4096):
                # After a netlink header and a connector's: what, cpu, nanoseconds, pid.
                what, _, nanoseconds, pid = struct.unpack_from("=IIQI", event, 36)
                if what == self._EXEC:
                    self._times[pid] = nanoseconds / 1e9


def start(image: str, driver: Driver, starts: Starts) -> dict[str, float]:
    """Milliseconds from the start of a container's process until it listens, and until its first ok."""
    port = free_port()
    container = docker(
        *("create", "--network=host", "--read-only", "--cap-drop=ALL", f"--volume={driver.path.parent}:/csi:ro"),
        *(image, f"--csi-address=/csi/{driver.path.name}", f"--health-port={port}"),
    ).decode().strip()  # fmt: skip
    try:
        found: dict[str, float] = {}
        poll = threading.Thread(target=_poll, args=(port, found), daemon=True)
        poll.start()
        docker("start", container)
        pid = int(docker("inspect", "--format={{.State.Pid}}", container))
        poll.join(START_SECONDS)
        if "first ok" not in found:
            sys.exit(f"image-budget: no ok from {image} within {START_SECONDS:.0f} s")
        began = starts.of(pid)
    finally:
        docker("rm", "--force", container)
    return {key: (moment - began) * 1e3 for key, moment in found.items()}


def _poll(port: int, found: dict[str, float]) -> None:
    while "first ok" not in found:
        with contextlib.suppress(OSError), kubelet.connect(port) as connection:
            found.setdefault("listening", time.monotonic())
            if kubelet.ask(connection, time.perf_counter()).status == 200:
                found["first ok"] = time.monotonic()
        time.sleep(0.0005)


@contextlib.contextmanager
def as_image(name: str) -> Iterator[str]:
    """The image of this name; or for a file, one that has nothing else in it."""
    file = Path(name)
    if not file.is_file():
        docker("image", "inspect", name)
        yield name
        return
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(file, "livenessprobe")
    entry_point = '--change=ENTRYPOINT ["/livenessprobe"]'
    made = docker("import", entry_point, "-", data=packed.getvalue()).decode().strip()
    try:
        yield made
    finally:
        docker("rmi", made)


def main() -> int:
    """Measure what the command line names, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image")
    parser.add_argument("reference", nargs="?", help="an image's name, or a statically linked program's file")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("image-budget: only root learns when a process began: sudo make image-budget")
    samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with contextlib.ExitStack() as ends:
        names = filter(None, [options.image, options.reference])
        images = [ends.enter_context(as_image(name)) for name in names]
        starts = ends.enter_context(Starts())
        driver = ends.enter_context(Driver(ends.enter_context(scratch()) / "csi.sock"))
        for image in images:
            start(image, driver, starts)  # so that all is cached
            for key, value in sizes(image).items():
                samples[image][key].append(value)
        for image in images * TIMES:
            for key, value in start(image, driver, starts).items():
                samples[image][key].append(value)
    print(f"{'':28}{'budget':>8}{'image':>8}{'reference':>11}{'ratio':>7}")
    over = 0
    for key, (title, unit, budget) in BUDGETS.items():
        values = [statistics.median(samples[image][key]) for image in images]
        over += values[0] > budget
        beside = f"{values[1]:11.1f}{values[0] / values[1]:7.2f}" if values[1:] else ""
        print(
            f"{title + ', ' + unit:28}{budget:8.1f}{values[0]:8.1f}{beside}{'  OVER' * (values[0] > budget)}"
        )
    return min(over, 1)


if __name__ == "__main__":
    sys.exit(main())
