"""Podman for tests, to play Kubernetes manifests: with a store, a network and a configuration of its own."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

NETWORK = "pods"

# Lower limits than podman's own, which take the capability SYS_RESOURCE to set. runc, since crun sets the limit on locked
# memory as well. Locks are files: the other kind is shared by all podmans of the machine.
SETTINGS = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]

[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
runtime = "runc"
tmp_dir = "{folder}/tmp"
volume_path = "{folder}/volumes"

[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
"""
STORAGE = """
[storage]
driver = "{driver}"
graphroot = "{folder}/root"
runroot = "{folder}/run"
"""


def playable(manifest: dict[str, Any]) -> dict[str, Any]:
    """The same in a form that podman 4.3 takes.

    It does not know DaemonSets, and takes a native sidecar for an init container that has to end. It turns probes into
    health checks with curl, which images without a shell do not have, and publishes the ports on the machine. All pods of
    a Deployment would share one emptyDir.
    """
    manifest = copy.deepcopy(manifest)
    if manifest["kind"] == "DaemonSet":
        manifest = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": manifest["metadata"]["name"]},
            "spec": manifest["spec"]["template"]["spec"],
        }
    spec = manifest["spec"]
    if manifest["kind"] == "Deployment":
        spec["replicas"] = 1
        spec = spec["template"]["spec"]
    spec["containers"] = [*spec.pop("initContainers", []), *spec["containers"]]
    for container in spec["containers"]:
        for field in ("livenessProbe", "ports", "readinessProbe", "restartPolicy", "startupProbe"):
            container.pop(field, None)
    return manifest


def missing() -> str:
    """Why there is no podman to test with; empty if there is one."""
    path = f"{os.environ.get('PATH')}:/usr/lib/podman"
    for command in ("podman", "netavark", "catatonit", "iptables", "runc"):
        if not shutil.which(command, path=path):
            return f"there is no {command} here: apt-get install podman netavark catatonit iptables runc"
    return "" if os.geteuid() == 0 else "only root can give pods a network"


class Podman:
    """The engine, entirely in one folder."""

    def __init__(self, folder: Path, driver: str) -> None:
        folder.mkdir()
        self._environment = {
            **os.environ,
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        }
        (folder / "containers.conf").write_text(SETTINGS.format(folder=folder))
        (folder / "storage.conf").write_text(STORAGE.format(folder=folder, driver=driver))

    def run(
        self, *arguments: str | Path, stdin: str = "", timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, which may fail."""
        return subprocess.run(
            ["podman", *arguments],
            capture_output=True,
            check=False,
            env=self._environment,
            input=stdin,
            text=True,
            timeout=timeout,
        )

    def must(self, *arguments: str | Path, stdin: str = "", timeout: float = 60.0) -> str:
        """Run a command that may not fail; return its output."""
        done = self.run(*arguments, stdin=stdin, timeout=timeout)
        assert done.returncode == 0, f"podman {arguments}: {done.stderr}"
        return done.stdout.strip()

    @contextlib.contextmanager
    def play(self, manifest: dict[str, Any], *, start: bool = True) -> Iterator[Pod]:
        """The pod of a manifest, in the network `NETWORK` unless it wants the node's."""
        manifest = playable(manifest)
        deployed = manifest["kind"] == "Deployment"
        spec = manifest["spec"]["template"]["spec"] if deployed else manifest["spec"]
        name = manifest["metadata"]["name"] + ("-pod-0" if deployed else "")
        network = [] if spec.get("hostNetwork") else [f"--network={NETWORK}"]
        try:
            text = yaml.safe_dump(manifest)
            self.must("kube", "play", *network, f"--start={str(start).lower()}", "-", stdin=text)
            yield Pod(self, name)
        finally:
            self.run("pod", "kill", name)  # removing one that runs takes seconds
            self.run("pod", "rm", "--force", "--time=0", name)
            self.run("volume", "prune", "--force")


class Pod:
    """A pod that was played. Its containers go by their names in the manifest."""

    def __init__(self, engine: Podman, name: str) -> None:
        self.engine = engine
        self.name = name

    @functools.cached_property
    def address(self) -> str:
        """In its network, once it runs; in the node's, the loopback address."""
        infra = json.loads(self.engine.must("pod", "inspect", self.name))["InfraContainerID"]
        settings = json.loads(self.engine.must("inspect", infra))[0]["NetworkSettings"]
        return str((settings.get("Networks") or {}).get(NETWORK, {}).get("IPAddress") or "127.0.0.1")

    def inspect(self, container: str) -> dict[str, Any]:
        return dict(json.loads(self.engine.must("inspect", self._of(container)))[0])

    def execute(self, container: str, *command: str, timeout: float) -> subprocess.CompletedProcess[str]:
        return self.engine.run("exec", self._of(container), *command, timeout=timeout)

    def log(self, container: str) -> str:
        done = self.engine.run("logs", self._of(container))
        return done.stdout + done.stderr

    def start(self, container: str) -> None:
        self.engine.must("start", self._of(container))

    def stop(self, container: str) -> int:
        """Stop it as the kubelet does; return its exit code."""
        self.engine.must("stop", "--time=10", self._of(container))
        return int(self.inspect(container)["State"]["ExitCode"])

    def restart(self, container: str) -> None:
        self.engine.must("restart", "--time=1", self._of(container))

    def crash(self, container: str) -> None:
        """End its process; return once podman has started it again, as it does until told to `stop` it."""
        before = self.inspect(container)
        pid = before["State"]["Pid"]
        assert pid > 0, f"{container} does not run"  # 0 would be this test's own process group
        os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + 30
        while self.inspect(container)["RestartCount"] == before["RestartCount"]:
            assert time.monotonic() < end, f"{container} was not started again:\n{self.log(container)}"
            time.sleep(0.05)

    def _of(self, container: str) -> str:
        return f"{self.name}-{container}"


@contextlib.contextmanager
def podman() -> Iterator[Podman]:
    """An engine without images; everything it made goes with it."""
    # Not a fixture's folder: it holds sockets, whose paths may have 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="lp", dir="/tmp"))
    engine = Podman(folder / "o", "overlay")
    try:
        if engine.run("info").returncode:  # if this folder is on an overlay itself, as in a container
            engine = Podman(folder / "v", "vfs")
        # Without a name server, which would be one more process.
        engine.must("network", "create", "--disable-dns", NETWORK)
        yield engine
    finally:
        engine.run("system", "reset", "--force")
        shutil.rmtree(folder)
