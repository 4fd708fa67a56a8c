"""The units in deploy/systemd, started by a real systemd: PID 1 of a container that borrows this machine's /usr."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import program
import pytest
from fake_driver import FakeDriver
from image_engine import MARK, Container, created, docker, missing, must

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHIPPED = program.ROOT / "deploy" / "systemd"
SYSTEMD = Path("/usr/lib/systemd/systemd")
FILE = program.ROOT / "bin" / "livenessprobe"
OPERATIONS = (program.ROOT / "docs" / "operations.md").read_text()

# Only those of Debian's units that ours need: the others would handle devices, which this container does not have.
BORROWED = """basic.target local-fs.target multi-user.target network.target paths.target shutdown.target slices.target
    sockets.target swap.target sysinit.target timers.target umount.target
    systemd-journald.service systemd-journald.socket""".split()
FOLDERS = "csi dev etc opt proc root run sys tmp usr var/cache".split()
LINKS = {name: f"usr/{name}" for name in ("bin", "lib", "lib64", "sbin")}
PASSWORDS = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n"
GROUPS = "root:x:0:\nnogroup:x:65534:\nsystemd-journal:x:101:\n"


class Host:
    """A machine with systemd and livenessprobe's file and units."""

    def __init__(self, container: Container, folder: Path) -> None:
        self.container, self.folder = container, folder
        self.socket = folder / "csi" / "csi.sock"

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return docker("exec", self.container.id, *command)

    def must(self, *command: str) -> str:
        return must("exec", self.container.id, *command)

    def configure(self, name: str, flags: str) -> None:
        (self.folder / "flags" / f"{name}.conf").write_text(f"FLAGS={flags}\n")

    def adapt(self, unit: str, *lines: str) -> None:
        """Change settings of a unit, as `systemctl edit` does."""
        drop_in = self.folder / "units" / f"{unit}.d" / "override.conf"
        drop_in.parent.mkdir()
        drop_in.write_text("\n".join(lines) + "\n")
        self.must("systemctl", "daemon-reload")

    def show(self, unit: str, name: str) -> str:
        return self.must("systemctl", "show", "--value", f"--property={name}", unit)

    def log(self, unit: str) -> str:
        self.must("journalctl", "--sync")
        return self.must("journalctl", "--output=cat", f"--unit={unit}")

    def wait_until(self, true: Callable[[], bool], told: Callable[[], str], timeout: float = 30.0) -> None:
        end = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < end, told()
            time.sleep(0.05)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    if reason := missing():
        pytest.skip(reason)
    if not SYSTEMD.exists():
        pytest.skip(f"there is no {SYSTEMD} here: apt-get install systemd")
    fits = ["/usr/bin/python3", "-c", "import sys; sys.exit(sys.version_info < (3, 10))"]
    if not Path(fits[0]).exists() or subprocess.run(fits, check=False).returncode:
        pytest.skip("there is no CPython 3.10 or later in /usr/bin")
    with tempfile.TemporaryDirectory(prefix="lp", dir="/tmp") as name:
        folder = Path(name)
        for each in ("bin", "borrowed/sysinit.target.wants", "csi", "flags", "units"):
            (folder / each).mkdir(parents=True)
        shutil.copy2(FILE, folder / "bin")
        for unit in BORROWED:
            shutil.copy2(SYSTEMD.parent / "system" / unit, folder / "borrowed")
        for unit in ("systemd-journald.service", "systemd-journald.socket"):
            (folder / "borrowed" / "sysinit.target.wants" / unit).symlink_to(f"../{unit}")
        for path in SHIPPED.iterdir():
            shutil.copy2(path, folder / "units")
        image = must("import", f"--change=LABEL {MARK}", _skeleton(folder))
        try:
            with created(*_options(folder), image, str(SYSTEMD), "--unit=multi-user.target") as container:
                host = Host(container.start(), folder)
                # Until PID 1 answers.
                host.wait_until(lambda: host.run("systemctl", "list-units").returncode == 0, container.log)
                assert host.must("systemctl", "is-system-running", "--wait") == "running"
                yield host
        finally:
            must("rmi", "--force", image)


def _skeleton(folder: Path) -> Path:
    """An image of folders, links and two users; everything else comes from the machine's /usr."""
    path = folder / "skeleton.tar"
    with tarfile.open(path, "w") as archive:
        for name in FOLDERS:
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(member)
        for name, target in LINKS.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
        for name, text in {"passwd": PASSWORDS, "group": GROUPS, "machine-id": ""}.items():
            member = tarfile.TarInfo(f"etc/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def _options(folder: Path) -> list[str]:
    """What systemd needs as PID 1 of a container: permission to mount for its units, and its control groups."""
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    mounts = {
        "/usr": "/usr:ro",
        "/sys/fs/cgroup": f"/sys/fs/cgroup:{'rw' if unified else 'ro'}",
        folder / "bin": "/usr/local/bin:ro",
        folder / "borrowed": "/usr/lib/systemd/system:ro",
        folder / "csi": "/csi",
        folder / "flags": "/etc/livenessprobe",
        folder / "units": "/etc/systemd/system",
    }
    return [
        *(["--cgroupns=host"] if unified else []),
        *("--cap-add=SYS_ADMIN", "--security-opt=seccomp=unconfined", "--security-opt=apparmor=unconfined"),
        *("--tmpfs=/run", "--tmpfs=/tmp", "--env=container=docker"),
        *(f"--volume={source}:{target}" for source, target in mounts.items()),
    ]


@pytest.fixture
def driver(host: Host) -> Iterator[FakeDriver]:
    """A healthy driver in the host's folder /csi."""
    with FakeDriver(host.socket) as running:
        yield running
    host.socket.unlink(missing_ok=True)


ADDRESS = "--csi-address=/csi/csi.sock"


def test_units_are_valid(host: Host) -> None:
    done = host.run(
        "systemd-analyze",
        "verify",
        "livenessprobe@a.service",
        "livenessprobe-once@a.service",
        "livenessprobe-once@a.timer",
    )

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_serves_without_privileges_until_it_is_stopped(host: Host, driver: FakeDriver) -> None:
    host.configure("served", ADDRESS)
    unit = "livenessprobe@served.service"
    host.must("systemctl", "start", unit)
    host.wait_until(lambda: '"Serving"' in host.log(unit), lambda: host.log(unit))

    healthy = host.container.get()
    driver.set("error", message="the disk is gone")
    broken = host.container.get()
    assert (healthy.status, healthy.text) == (200, "ok")
    assert (broken.status, broken.text) == (500, "rpc error: code = Internal desc = the disk is gone")
    assert 'err="rpc error: code = Internal desc = the disk is gone"' in host.log(unit)

    pid = host.show(unit, "MainPID")
    status = dict(line.split(":\t", 1) for line in host.must("cat", f"/proc/{pid}/status").splitlines())
    assert {status[name] for name in ("CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert host.show(unit, "MemoryMax") == str(64 * 2**20)
    assert host.must("ls", "/var/cache/livenessprobe")

    host.must("systemctl", "stop", unit)
    assert [host.show(unit, name) for name in ("Result", "ExecMainStatus")] == ["success", "0"]


def test_a_misspelt_flag_is_not_tried_again(host: Host) -> None:
    host.configure("misspelt", "--no-such-flag")
    unit = "livenessprobe@misspelt.service"

    host.run("systemctl", "start", unit)
    host.wait_until(lambda: host.show(unit, "ActiveState") == "failed", lambda: host.log(unit))

    shown = [host.show(unit, name) for name in ("ExecMainStatus", "NRestarts")]
    assert shown == ["2", "0"]
    assert "flag provided but not defined: -no-such-flag" in host.log(unit)


def test_a_port_that_gets_free_is_taken(host: Host, driver: FakeDriver) -> None:
    for name in ("first", "second"):
        host.configure(name, f"{ADDRESS} --health-port=9809")
    # Without the limit on starts, which so short a pause would soon reach.
    changes = "[Unit]", "StartLimitIntervalSec=0", "[Service]", "RestartSec=100ms"
    host.adapt("livenessprobe@second.service", *changes)
    log = "livenessprobe@second.service"
    host.must("systemctl", "start", "livenessprobe@first.service")
    host.wait_until(
        lambda: '"Serving"' in host.log("livenessprobe@first.service"),
        lambda: host.log("livenessprobe@first.service"),
    )

    host.run("systemctl", "start", log)
    host.wait_until(lambda: "address already in use" in host.log(log), lambda: host.log(log))
    assert '"Serving"' not in host.log(log)
    host.must("systemctl", "stop", "livenessprobe@first.service")
    host.wait_until(lambda: '"Serving"' in host.log(log), lambda: host.log(log))

    assert host.container.get(port=9809).text == "ok"
    assert int(host.show(log, "NRestarts")) > 0
    host.must("systemctl", "stop", log)


@pytest.mark.parametrize(
    ("behaviour", "status", "text"),
    [
        ("ready", "0", "ok"),
        ("not-ready", "5", "driver responded but is not ready"),
        ("error", "4", "rpc error: code = Internal desc = broken"),
        (None, "3", "cannot connect to /csi/csi.sock: no such file or directory"),
    ],
)
def test_one_check_tells_its_verdict(behaviour: str | None, status: str, text: str, host: Host) -> None:
    name = behaviour or "gone"
    unit = f"livenessprobe-once@{name}.service"
    # Also good for a server: --once does not use its port.
    host.configure(name, f"{ADDRESS} --http-endpoint=127.0.0.1:9810")
    driver = FakeDriver(host.socket)
    if behaviour:
        driver.set(behaviour, message="broken")  # type: ignore[arg-type]
        driver.start()
    try:
        done = host.run("systemctl", "start", unit)
    finally:
        driver.kill()
        host.socket.unlink(missing_ok=True)

    assert (done.returncode == 0) == (status == "0")
    assert host.show(unit, "ExecMainStatus") == status
    assert text in host.log(unit).splitlines()


def test_the_timer_checks_again_and_again(host: Host, driver: FakeDriver) -> None:
    host.configure("timed", ADDRESS)
    shipped = host.show("livenessprobe-once@timed.timer", "TimersMonotonic")
    assert "OnUnitInactiveUSec=30s" in shipped
    host.adapt(
        "livenessprobe-once@timed.timer",
        *("[Timer]", "OnUnitInactiveSec=", "OnActiveSec=0s", "OnUnitInactiveSec=100ms", "AccuracySec=1ms"),
    )

    host.must("systemctl", "start", "livenessprobe-once@timed.timer")
    driver.wait(probes=3, timeout=30)
    host.must("systemctl", "stop", "livenessprobe-once@timed.timer")

    timers = json.loads(host.must("systemctl", "list-timers", "--output=json"))
    assert not timers


def test_failed_checks_restart_the_driver_as_often_as_the_page_allows(host: Host) -> None:
    told, limited = re.findall(r"(?ms)^  ```ini\n(.*?)^  ```$", OPERATIONS)
    unit, restarts = "livenessprobe-once@mydriver.service", "restart-mydriver.service"
    host.configure("mydriver", f"{ADDRESS} --connection-timeout=0s")
    began = "[Service]\nExecStart=/bin/sh -c 'echo began; exec sleep infinity'\n"
    (host.folder / "units" / "mydriver.service").write_text(began)
    (host.folder / "units" / restarts).write_text(textwrap.dedent(limited))
    host.adapt(unit, *textwrap.dedent(told).splitlines())

    def restarted() -> int:
        """How often, once no restart is under way."""
        busy = host.show(restarts, "ActiveState") in ("activating", "deactivating")
        return -1 if busy else host.log("mydriver.service").count("began")

    for count in (1, 2):
        assert host.run("systemctl", "start", unit).returncode
        host.wait_until(lambda count=count: restarted() == count, lambda: host.log(restarts))  # type: ignore[misc]
    assert host.run("systemctl", "start", unit).returncode
    host.wait_until(lambda: host.show(restarts, "Result") != "success", lambda: host.log(restarts))

    assert host.show(restarts, "Result") == "start-limit-hit"
    assert restarted() == 2
    host.must("systemctl", "stop", "mydriver.service")


@pytest.mark.parametrize("unit", ["livenessprobe@a.service", "livenessprobe-once@a.service"])
def test_exposes_little(unit: str, host: Host) -> None:
    host.configure("a", ADDRESS)

    host.must("systemd-analyze", "security", "--threshold=25", "--offline=no", unit)


def test_both_services_are_confined_alike() -> None:
    confined = [
        (SHIPPED / f"{name}@.service").read_text().partition("# The first start")[2].partition("[Install]")[0]
        for name in ("livenessprobe", "livenessprobe-once")
    ]

    assert confined[0].strip()
    assert confined[0].strip() == confined[1].strip()
