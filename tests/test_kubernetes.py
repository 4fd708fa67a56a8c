"""The manifests: valid, true to the program, and played by podman with a driver that is broken and repaired."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import built_images
import image
import image_engine
import pod_probes
import podman_engine
import program
import pytest
import tars
import this_run
import yaml
from image_engine import MARK, must
from kubernetes_validate import ValidationError, validate
from kubernetes_validate.utils import all_versions
from pod_probes import Kubelet, Manifest, containers, pod_spec, resolved

from livenessprobe import config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from podman_engine import Pod, Podman

    Play: TypeAlias = Callable[..., AbstractContextManager[tuple[Pod, Kubelet]]]

# It builds images, and maybe the one to build them in.
pytestmark = [pytest.mark.timeout(600), pytest.mark.unmeasured]

FOLDER = program.ROOT / "deploy" / "kubernetes"
README = (FOLDER / "README.md").read_text()
PROBE = "liveness-probe"
IMAGE = "registry.example/csi/livenessprobe:0.1.0"
DRIVER_IMAGE = "registry.example/csi/driver:1.0"

FILES = sorted(FOLDER.glob("*.yaml"))
VERSIONS = list(dict.fromkeys(version.rpartition(".")[0] for version in all_versions()))
# The first version that knows all fields, if not every version does.
SINCE = {"native-sidecar": (1, 28)}
LOOPBACK = "127.0.0.1"


def documents(text: str) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(text) if document]


def workload(text: str) -> Manifest:
    """The only document with containers."""
    [found] = [each for each in documents(text) if each["kind"] in ("Pod", "DaemonSet", "Deployment")]
    return found


def by_name(found: list[Manifest]) -> dict[str, Manifest]:
    return {each["name"]: each for each in found}


# ---- images


@pytest.fixture(scope="session")
def docker_engine() -> None:
    """A Docker engine."""
    if reason := image_engine.missing():
        pytest.skip(reason)


def build_image(folder: Path, dockerfile: str, **arguments: str) -> str:
    """Build a Dockerfile with what is in the folder; return the image's tag."""
    tag = f"livenessprobe-test:{this_run.name()}-{folder.name}"
    given = [f"--build-arg={name}={value}" for name, value in arguments.items()]
    (folder / "Dockerfile").write_text(dockerfile)
    must("build", *given, f"--label={MARK}", f"--tag={tag}", folder, timeout=300)
    return tag


@pytest.fixture(scope="session")
def kustomize(docker_engine: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], str]:
    """`kustomize(folder)` returns what Debian's kustomize builds from it, with the component in `../component`."""
    dockerfile = """
ARG BASE
FROM ${BASE}
RUN apt-get update && apt-get install --yes --no-install-recommends kustomize
"""
    tag = build_image(tmp_path_factory.mktemp("kustomize"), dockerfile, BASE=image.build_image())

    def build(folder: Path) -> str:
        mounts = [f"--volume={FOLDER}/component:/deploy/component:ro", f"--volume={folder}:/deploy/it:ro"]
        return must("run", "--rm", f"--label={MARK}", *mounts, tag, "kustomize", "build", "/deploy/it")

    return build


# Real drivers' arguments, for the example driver. When started, it forgets what it was told before.
START = """
import pathlib, runpy, sys
given = dict(argument.split("=", 1) for argument in sys.argv[1:])
socket = given["--endpoint"].removeprefix("unix://")
pathlib.Path(socket + ".state").unlink(missing_ok=True)
sys.argv = ["driver", f"--socket={socket}", f"--name={given.get('--nodeid', 'driver')}.example.com"]
sys.path.insert(0, "/driver/site-packages")
runpy.run_path("/driver/driver.py", run_name="__main__")
"""


@pytest.fixture(scope="session")
def driver_images(docker_engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Their tags, by the names they have in the manifests."""
    base, platform = image.build_image(), image.engine_platform()
    built_images.archives()

    # The example driver, with the grpc that is packed for the same Python.
    file = image.ROOT / "bin" / "image" / platform.partition("/")[2] / "livenessprobe"
    folder = tmp_path_factory.mktemp("driver")
    with zipfile.ZipFile(file) as packed:
        packed.extractall(folder, [name for name in packed.namelist() if name.startswith("site-packages/")])
        with tarfile.open(fileobj=io.BytesIO(packed.read("cores.tar.xz"))) as cores:
            [core] = cores.getmembers()
            (folder / "site-packages" / "grpc" / "_cython" / core.name).write_bytes(
                tars.read(cores, core.name)
            )
    shutil.copy(program.ROOT / "examples" / "driver.py", folder)
    (folder / "start.py").write_text(START)
    dockerfile = """
ARG BASE
FROM ${BASE}
RUN apt-get update && apt-get install --yes --no-install-recommends python3 && rm -r /var/lib/apt /var/cache/apt
COPY . /driver/
ENTRYPOINT ["/usr/bin/python3", "/driver/start.py"]
"""
    driver = build_image(folder, dockerfile, BASE=base)
    folder = tmp_path_factory.mktemp("exec-probe")
    shutil.copy(file, folder)
    both = build_image(folder, (FOLDER / "Dockerfile.exec-probe").read_text(), DRIVER=driver)
    yield {DRIVER_IMAGE: driver, f"{DRIVER_IMAGE}-probe": both}
    must("rmi", "--force", both)  # before the one it was made from


# ---- each manifest, including the one that the component makes of another


@pytest.fixture(scope="session")
def example(kustomize: Callable[[Path], str]) -> str:
    return kustomize(FOLDER / "example")


@pytest.fixture
def text(request: pytest.FixtureRequest) -> str:
    """By name: the file's, or "example"."""
    name = request.param
    return str(request.getfixturevalue(name) if name == "example" else (FOLDER / f"{name}.yaml").read_text())


SERVED = ["side-by-side", "node-plugin", "controller-plugin", "native-sidecar", "example"]
served = pytest.mark.parametrize("text", SERVED, indirect=True)


def test_all_manifests_are_tried() -> None:
    assert {*SERVED, "exec-probe"} - {"example"} == {file.stem for file in FILES}


# ---- valid


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_manifests_are_valid(file: Path, version: str) -> None:
    found = documents(file.read_text())

    if tuple(map(int, version.split("."))) >= SINCE.get(file.stem, (1, 0)):
        for document in found:
            validate(document, version, strict=True)
    else:
        with pytest.raises(ValidationError, match="restartPolicy"):
            validate(workload(file.read_text()), version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_output_of_the_component_is_valid(version: str, example: str) -> None:
    for document in documents(example):
        validate(document, version, strict=True)


def test_versions_are_many() -> None:
    assert len(VERSIONS) > 10


# ---- true to the program, and to each other


@served
def test_arguments_are_accepted_without_a_warning(text: str) -> None:
    accepted = config.parse(by_name(containers(resolved(workload(text))))[PROBE]["args"])

    assert not accepted.warnings
    assert accepted.socket_path == "/csi/csi.sock"


@served
def test_kubelet_asks_where_the_program_listens_and_waits_long_enough(text: str) -> None:
    manifest = resolved(workload(text))
    accepted = config.parse(by_name(containers(manifest))[PROBE]["args"])
    loopback = accepted.health.host == LOOPBACK
    asked = [
        (container, kind, container[kind])
        for container in containers(manifest)
        for kind in pod_probes.KINDS
        if kind in container
    ]

    # Outside the node's network the kubelet does not reach the loopback address; inside, others would.
    assert loopback == pod_spec(manifest).get("hostNetwork", False)
    assert {container["name"] for container, _, probe in asked if "httpGet" in probe} == {driver(manifest)}
    for container, kind, probe in asked:
        target = probe.get("httpGet") or probe["tcpSocket"]
        assert pod_probes.port(container, target) == accepted.health.port
        assert target.get("host") == (LOOPBACK if loopback else None)
        if path := target.get("path"):
            assert path in {"readinessProbe": ["/readyz"]}.get(kind, ["/livez", "/healthz"])
            assert probe["timeoutSeconds"] >= accepted.probe_timeout
    # By this name Prometheus finds what it can scrape.
    names = {port["name"] for container in containers(manifest) for port in container.get("ports", [])}
    assert ("csi-liveness" in names) == (accepted.metrics is not None and not loopback)


def driver(manifest: Manifest) -> str:
    """The name of the container to restart."""
    [name] = [each["name"] for each in containers(manifest) if "livenessProbe" in each]
    return str(name)


@pytest.mark.parametrize("text", [*SERVED, "exec-probe"], indirect=True)
def test_probe_and_driver_see_the_same_socket(text: str) -> None:
    manifest = resolved(workload(text))
    both = by_name(containers(manifest))
    [endpoint] = [word.partition("=")[2] for word in both[driver(manifest)]["args"] if "endpoint" in word]
    probe = both.get(PROBE) or both[driver(manifest)]
    words = probe["args"] if PROBE in both else probe["livenessProbe"]["exec"]["command"][1:]

    def place(container: Manifest, path: str) -> tuple[str, str]:
        folder, _, name = path.rpartition("/")
        [volume] = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == folder]
        return volume, name

    seen = place(probe, str(config.parse(words).socket_path))
    assert seen == place(both[driver(manifest)], endpoint.removeprefix("unix://"))
    assert seen[0] in {volume["name"] for volume in pod_spec(manifest)["volumes"]}


@served
def test_probe_is_hardened_and_has_the_measured_resources(text: str) -> None:
    manifest = workload(text)
    probe = by_name(containers(manifest))[PROBE]
    context = {**pod_spec(manifest).get("securityContext", {}), **probe["securityContext"]}

    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert probe["resources"] == {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "64Mi"}}
    assert probe["image"] == IMAGE
    # If it ends, why.
    assert probe["terminationMessagePolicy"] == "FallbackToLogsOnError"


@pytest.mark.parametrize("kind", ["startupProbe", "livenessProbe"])
def test_kubelet_waits_long_enough_for_an_exec_probe(kind: str) -> None:
    [container] = containers(workload((FOLDER / "exec-probe.yaml").read_text()))
    command = container[kind]["exec"]["command"]
    accepted = config.parse(command[1:])

    assert command[0] == "/livenessprobe"
    assert accepted.once
    assert container[kind]["timeoutSeconds"] > accepted.connection_timeout + accepted.probe_timeout


def test_no_two_drivers_of_a_node_have_the_same_port(example: str) -> None:
    ports = [
        config.parse(by_name(containers(manifest))[PROBE]["args"]).health.port
        for manifest in (
            resolved(workload(text)) for text in (example, (FOLDER / "node-plugin.yaml").read_text())
        )
    ]

    assert len({9808, *ports}) == 3


def test_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    checked = [hadolint, FOLDER / "Dockerfile.exec-probe"]

    assert subprocess.run(checked, capture_output=True, check=False, text=True).stdout == ""


def test_page_names_each_file() -> None:
    listed = re.findall(r"(?m)^\| \[[^]]+\]\(([^)]+)\) \|", README)

    shown = {path.name for path in FOLDER.iterdir()} - {"README.md"}
    assert {name.rstrip("/") for name in listed} == shown


# ---- the component


def test_component_adds_what_is_named_and_leaves_the_rest(example: str) -> None:
    before, after = workload((FOLDER / "example" / "driver.yaml").read_text()), workload(example)
    was, now = by_name(containers(before)), by_name(containers(after))

    assert now.pop(PROBE)
    for field in ("ports", "startupProbe", "livenessProbe"):
        assert now["vendor-csi"].pop(field)
    assert now == was
    assert pod_spec(after) | {"containers": []} == pod_spec(before) | {"containers": []}


def test_component_reaches_each_kind_of_workload(kustomize: Callable[[Path], str], tmp_path: Path) -> None:
    kinds = ["DaemonSet", "Deployment", "StatefulSet"]
    pod = {"spec": {"containers": [{"name": "driver", "image": "driver"}]}}
    resources = [
        {"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": kind.lower()}, "spec": {"template": pod}}
        for kind in kinds
    ]
    resources.append({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "other"}, **pod})
    (tmp_path / "driver.yaml").write_text(yaml.safe_dump_all(resources))
    (tmp_path / "kustomization.yaml").write_text("resources: [driver.yaml]\ncomponents: [../component]\n")

    built = {each["kind"]: set(by_name(containers(each))) for each in documents(kustomize(tmp_path))}

    assert built == {**{kind: {"driver", PROBE} for kind in kinds}, "Pod": {"driver"}}


def test_overlay_of_the_page_does_what_it_says(kustomize: Callable[[Path], str], tmp_path: Path) -> None:
    [overlay] = re.findall(r"(?ms)^```yaml\n(.*?)^```$", README)
    shutil.copy(FOLDER / "example" / "driver.yaml", tmp_path)
    (tmp_path / "kustomization.yaml").write_text(f"resources: [driver.yaml]\n{overlay}")

    manifest = workload(kustomize(tmp_path))

    validate(manifest, VERSIONS[-1], strict=True)
    assert driver(manifest) == "vendor-csi"
    probe = by_name(containers(manifest))[PROBE]
    assert [mount["name"] for mount in probe["volumeMounts"]] == ["plugin-dir"]
    assert probe["image"] == "registry.example.com/storage/livenessprobe:0.1.0"


def test_no_image_is_somebody_elses(tmp_path: Path) -> None:
    """Only the kubernetes-csi sidecars' images are real; the page says how to change the probe's in all files at once."""
    files = [*FOLDER.rglob("*.yaml")]
    images = {image for file in files for image in re.findall(r"(?m)^ *-? *image: (\S+)", file.read_text())}
    assert IMAGE in images
    assert {image for image in images if not image.startswith("registry.example/")} == {
        image for image in images if image.startswith("registry.k8s.io/sig-storage/csi-")
    }

    [change] = re.findall("(?m)^sed -i .*$", README)
    shutil.copytree(FOLDER, tmp_path / "deploy" / "kubernetes")
    subprocess.run(["sh", "-c", change], check=True, cwd=tmp_path)
    changed = [(tmp_path / "deploy" / "kubernetes" / file.name).read_text() for file in FILES]
    assert not [text for text in changed if IMAGE in text]
    assert (
        sum("registry.example.com/storage/livenessprobe:0.1.0" in text for text in changed) == len(SERVED) - 1
    )


# ---- played


@pytest.fixture(scope="session")
def podman(driver_images: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """Podman with all images."""
    if reason := podman_engine.missing():
        pytest.skip(reason)
    drivers = tmp_path_factory.mktemp("drivers") / "drivers.tar"
    must("save", f"--output={drivers}", *driver_images.values())
    ours = built_images.archives()[image.engine_platform()]
    with podman_engine.podman() as engine:
        engine.must("load", "--quiet", f"--input={drivers}")
        for name, tag in driver_images.items():
            engine.must("tag", f"localhost/{tag}", name)
        loaded = engine.must("load", "--quiet", f"--input={ours}").removeprefix("Loaded image: ")
        engine.must("tag", loaded, IMAGE)
        yield engine


@pytest.fixture
def play(podman: Podman, folder: Path) -> Play:
    """`with play(text) as (pod, kubelet): …`, with `folder` as the kubelet's folder on the node, and a free port there."""

    @contextlib.contextmanager
    def start(text: str, *, at_once: bool = True) -> Iterator[tuple[Pod, Kubelet]]:
        # Only as a path on the node: in the containers it stays the same.
        moved = re.sub(r"(?m)^( +path: )/var/lib/kubelet", rf"\1{folder}", text)
        manifest = resolved(workload(re.sub(r"\b2968\d\b", str(program.free_port()), moved)))
        spec = pod_spec(manifest)
        # The other sidecars' images cannot be pulled here.
        spec["containers"] = [each for each in spec["containers"] if "registry.k8s.io" not in each["image"]]
        with podman.play(manifest, start=at_once) as pod:
            yield pod, Kubelet(manifest, pod)

    return start


# By path: the answers for a driver that is not ready.
SPARED = {"/healthz": False, "/livez": True, "/readyz": False}


@served
def test_driver_is_broken_and_mended(text: str, play: Play) -> None:
    name = driver(workload(text))
    with play(text) as (pod, kubelet):
        kinds = {kind: kubelet.path(name, kind) for kind in pod_probes.KINDS if kubelet.path(name, kind)}
        assert "livenessProbe" in kinds
        for kind in kinds:
            kubelet.wait(name, kind)
            assert kubelet.ask(name, kind) == (True, "ok")
        assert not kubelet.watch(name)

        assert_no_privilege(pod, pod_spec(workload(text)).get("securityContext", {}).get("runAsUser", 0))

        tell(pod, name, "not-ready")
        for kind, path in kinds.items():
            assert kubelet.ask(name, kind) == (SPARED[path], "driver responded but is not ready")
        tell(pod, name, "fail the disk is gone")
        for kind in kinds:
            answer = kubelet.ask(name, kind)
            assert answer == (False, "rpc error: code = Internal desc = the disk is gone")

        pod.crash(name)
        for kind in kinds:
            kubelet.wait(name, kind)

        tell(pod, name, "fail the disk is gone again")
        assert kubelet.watch(name)
        for kind in kinds:
            kubelet.wait(name, kind)
        assert not kubelet.watch(name)

        assert pod.stop(PROBE) == 0
        log = pod.log(PROBE)
        assert '"CSI driver is healthy again"' in log
        assert "Traceback" not in log


def assert_no_privilege(pod: Pod, user: int) -> None:
    """The probe's process as the kernel and podman see it."""
    seen = pod.inspect(PROBE)
    process = Path("/proc", str(seen["State"]["Pid"]))
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
    mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
    [root] = [options.split(",") for _, _, _, _, place, options, *_ in mounts if place == "/"]

    assert status["Uid"].split() == [str(user)] * 4
    assert {status[name] for name in ("CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert "ro" in root
    assert seen["HostConfig"]["Memory"] == 64 * 2**20


def tell(pod: Pod, name: str, state: str) -> None:
    """Make the example driver behave that way."""
    [socket] = re.findall("--endpoint=unix://([^ ]+)", " ".join(pod.inspect(name)["Config"]["Cmd"]))
    script = f"echo {state} > {socket}.new && mv {socket}.new {socket}.state"
    assert pod.execute(name, "sh", "-c", script, timeout=30).returncode == 0


def test_verdict_is_told_through_the_pod(play: Play) -> None:
    text = (FOLDER / "side-by-side.yaml").read_text()
    name = "hostpath-driver"
    with play(text) as (pod, kubelet):
        kubelet.wait(name, "livenessProbe")
        tell(pod, name, "hang")
        hung = kubelet.ask(name, "livenessProbe")
        pod.stop(name)
        gone = kubelet.ask(name, "livenessProbe")

    assert hung == (
        False,
        "rpc error: code = DeadlineExceeded desc = no answer to /csi.v1.Identity/Probe in time",
    )
    assert gone == (False, "cannot connect to /csi/csi.sock: no such file or directory")


def test_native_sidecar_answers_from_before_the_driver_starts_until_after_it_has_ended(play: Play) -> None:
    text = (FOLDER / "native-sidecar.yaml").read_text()
    with play(text, at_once=False) as (pod, kubelet):
        pod.start(PROBE)
        kubelet.wait(PROBE, "startupProbe")
        absent = "cannot connect to /csi/csi.sock: no such file or directory"
        assert kubelet.ask("driver", "livenessProbe") == (False, absent)
        pod.start("driver")
        kubelet.wait("driver", "startupProbe")
        # The kubelet ends them in reverse order.
        pod.stop("driver")
        assert kubelet.ask("driver", "livenessProbe") == (False, absent)
        assert pod.stop(PROBE) == 0


def test_exec_probe_needs_no_sidecar(play: Play) -> None:
    text = (FOLDER / "exec-probe.yaml").read_text()
    with play(text) as (pod, kubelet):
        kubelet.wait("driver", "startupProbe")
        assert kubelet.ask("driver", "livenessProbe") == (True, "ok")
        for state, verdict in {
            "not-ready": "driver responded but is not ready",
            "fail the disk is gone": "rpc error: code = Internal desc = the disk is gone",
            "hang": "rpc error: code = DeadlineExceeded desc = no answer to /csi.v1.Identity/Probe in time",
        }.items():
            tell(pod, "driver", state)
            assert kubelet.ask("driver", "livenessProbe") == (False, verdict)
        tell(pod, "driver", "ready")
        assert not kubelet.watch("driver")
