"""`make image-budget`: the image's sizes, how soon its container serves, and in how little memory, beside another one.

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
import report
from report import Budget
from rig import START_SECONDS, Driver, free_port, scratch

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCKER = os.environ.get("DOCKER") or "docker"
TIMES = 10
# The container with little memory, without swap.
MEBIBYTES = 24
CHECKS = 2000

# Each figure's title, unit, and what SPEC allows of it.
FIGURES: dict[str, tuple[str, str, Budget | None]] = {
    "unpacked": ("files, unpacked", "MB", Budget(36, 30)),
    "compressed": ("layers, gzip -9", "MB", Budget(14, 12)),
    "listening": ("process start to listening", "ms", Budget(3.2, 2.5, ratio=True)),
    "first ok": ("process start to first ok", "ms", Budget(4.0, 3.0, ratio=True)),
    "cold ok": (f"{MEBIBYTES} MiB, no swap, cold: to first ok", "ms", Budget(1000)),
    "cold check": (f"{MEBIBYTES} MiB: slowest of {CHECKS:,} checks", "ms", Budget(1000)),
    "refaults": (f"{MEBIBYTES} MiB: pages read again", "", None),
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
    # Room for all that a busy machine starts meanwhile: what finds none ends the reading.
    _SO_RCVBUFFORCE, _ROOM_BYTES = 33, 1 << 23

    def __enter__(self) -> Starts:
        self._times: dict[int, float] = {}
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, self._CONNECTOR)
        self._socket.setsockopt(socket.SOL_SOCKET, self._SO_RCVBUFFORCE, self._ROOM_BYTES)
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


@contextlib.contextmanager
def container(image: str, driver: Driver, *options: str) -> Iterator[tuple[str, int]]:
    """A container that was created beside the driver, and the port it will serve on."""
    port = free_port()
    made = docker(
        *("create", "--network=host", "--read-only", "--cap-drop=ALL", f"--volume={driver.path.parent}:/csi:ro"),
        *(*options, image, f"--csi-address=/csi/{driver.path.name}", f"--health-port={port}"),
    ).decode().strip()  # fmt: skip
    try:
        yield made, port
    finally:
        docker("rm", "--force", made)


def start(made: str, port: int, starts: Starts) -> dict[str, float]:
    """Milliseconds from the start of a container's process until it listens, and until its first ok."""
    found: dict[str, float] = {}
    poll = threading.Thread(target=_poll, args=(port, found), daemon=True)
    poll.start()
    docker("start", made)
    pid = process_of(made)
    poll.join(START_SECONDS)
    if "first ok" not in found:
        sys.exit(f"image-budget: no ok within {START_SECONDS:.0f} s")
    began = starts.of(pid)
    return {key: (moment - began) * 1e3 for key, moment in found.items()}


def process_of(made: str) -> int:
    """The pid of a container's process."""
    return int(docker("inspect", "--format={{.State.Pid}}", made))


def little_memory(image: str, driver: Driver, starts: Starts) -> dict[str, float]:
    """How a container fares in which the image's own files must be read anew, and must fit."""
    limit = f"{MEBIBYTES}m"
    with container(image, driver, f"--memory={limit}", f"--memory-swap={limit}") as (made, port):
        forget(docker("inspect", "--format={{.GraphDriver.Data.LowerDir}}", made).decode().strip())
        found = {"cold ok": start(made, port, starts)["first ok"]}
        events = memory_events(process_of(made))
        before = refaults(events)
        found["cold check"] = max(kubelet.get(port).seconds for _ in range(CHECKS)) * 1e3
        return found | {"refaults": refaults(events) - before}


def forget(layers: str) -> None:
    """Have the kernel drop files from memory, as on a node where they never ran: those in folders with colons between."""
    os.sync()
    for layer in layers.split(":"):
        for path in Path(layer).rglob("*"):
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_events(pid: int) -> Path:
    """The kernel's statistics of the memory of a process's control group, version 1 or 2."""
    groups = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), path.lstrip("/")))
    if "memory" in groups:
        return Path("/sys/fs/cgroup/memory", groups["memory"], "memory.stat")
    return Path("/sys/fs/cgroup", groups[""], "memory.stat")


def refaults(events: Path) -> int:
    """Pages of files that were thrown out and read again."""
    lines = (line.split() for line in events.read_text().splitlines())
    names = ("workingset_refault_file", "workingset_refault")
    return sum(int(number) for name, number in lines if name in names)


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
            for key, value in sizes(image).items():
                samples[image][key].append(value)
            with container(image, driver) as once:  # so that all is cached
                start(*once, starts)
        for image in images * TIMES:
            with container(image, driver) as made:
                for key, value in start(*made, starts).items():
                    samples[image][key].append(value)
        for image in images * 3:
            for key, value in little_memory(image, driver, starts).items():
                samples[image][key].append(value)
    lines = [["", "unit", "budget", "", "image", "reference", "ratio"]]
    for key, (title, unit, budget) in FIGURES.items():
        value, *others = (statistics.median(samples[image][key]) for image in images)
        ratio = value / others[0] if others and others[0] else None
        verdict = budget.judge(value, ratio) if budget else ""
        beside = [f"{others[0]:.1f}", f"{ratio:.2f}" if ratio else ""] if others else ["", ""]
        lines.append([title, unit, str(budget or ""), verdict, f"{value:.1f}", *beside])
    print("\n".join(report.align(lines, left=4)))
    return int(any(line[3] == "over" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
