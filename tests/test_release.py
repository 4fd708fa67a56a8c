"""What a release consists of: files that start with the Pythons they are for, one layout of all images, checksums."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import built_images
import debian_host
import image
import image_engine
import kept
import oci
import podman_engine
import program
import pytest
import pyz
import release
import sbom
from fake_driver import FakeDriver
from test_docs import column

from livenessprobe import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

    from podman_engine import Podman

# It builds images, and maybe the one to build them in.
pytestmark = [pytest.mark.timeout(600), pytest.mark.unmeasured]

PAGE = (program.ROOT / "docs" / "release.md").read_text()
NAME = f"registry.example/csi/livenessprobe:v{__version__}"
OURS = next(name for name, machine in pyz.PLATFORMS.items() if machine == platform.machine())
# Which Debian release has which Python.
HOSTS = [("trixie", "3.13", ["amd64"]), ("forky", "3.14", ["amd64", "arm64"])]


# ---- packed files


def pythons_at_hand() -> dict[str, Path]:
    """The Pythons we release for that can be started here, in PATH or where pyenv keeps them."""
    found: dict[str, Path] = {}
    for version in pyz.PYTHONS:
        name = f"python{version}"
        places = [Path(path) for path in [shutil.which(name)] if path]
        places += sorted(Path.home().glob(f".pyenv/versions/{version}*/bin/{name}"))
        for place in places:
            if subprocess.run([place, "--version"], capture_output=True, check=False).returncode == 0:
                found.setdefault(version, place)
    return found


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Those of a release, by platform."""
    folder = tmp_path_factory.mktemp("dist")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        packed = {target: pool.submit(release.pack, target, folder) for target in pyz.PLATFORMS}
    return {target: file.result() for target, file in packed.items()}


@pytest.mark.parametrize(("debian", "version", "architectures"), HOSTS, ids=[host[0] for host in HOSTS])
def test_file_starts_on_hosts_with_its_python(
    debian: str, version: str, architectures: list[str], files: dict[str, Path]
) -> None:
    with contextlib.ExitStack() as hosts:
        compiled = None
        for architecture in architectures:
            if reason := debian_host.missing(architecture):
                pytest.skip(reason)
            host = hosts.enter_context(debian_host.debian_host(debian, version, architecture))
            if compiled:
                host.take_compiled(compiled)
            shutil.copy(files[f"linux/{architecture}"], host.root / "livenessprobe")
            with FakeDriver(host.root / "csi.sock"):
                check = host.run("/livenessprobe", "--once", "--csi-address=/csi.sock", "--probe-timeout=1m")
            shown = host.run("/livenessprobe", "--version")
            compiled = host

            assert (check.returncode, check.stdout) == (0, "ok\n"), check
            assert shown.stdout.startswith(f"livenessprobe {__version__} (Python {version}."), shown


def test_files_start_with_every_python_at_hand(
    files: dict[str, Path], folder: Path, driver: FakeDriver
) -> None:
    pythons = pythons_at_hand()
    assert pythons, "not even the one that runs this"
    for version, python in pythons.items():
        env = {"LIVENESSPROBE_PYTHON": str(python), "SHIV_ROOT": str(folder / "cache")}
        command = [str(files[OURS])]

        shown = program.run_once(["--version"], command=command, env=env)
        check = program.run_once([f"--csi-address={driver.target}", "--once"], command=command, env=env)

        assert shown.stdout.startswith(f"livenessprobe {__version__} (Python {version}."), shown
        assert (check.returncode, check.stdout) == (0, "ok\n"), check


def test_list_of_a_file_names_it_and_all_in_it(files: dict[str, Path]) -> None:
    locked = dict(re.findall(r"(?m)^([\w-]+)==(\S+)", kept.LOCK.read_text()))
    for file in files.values():
        listed = file.with_name(f"{file.name}.spdx.json")
        document = json.loads(listed.read_text())
        packages = {package["name"]: package for package in document["packages"]}
        [checksum] = packages.pop("livenessprobe")["checksums"]

        assert {name: package["versionInfo"] for name, package in packages.items()} == locked
        assert checksum == {
            "algorithm": "SHA256",
            "checksumValue": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
    before = listed.read_bytes()
    sbom.list_packed(file, document["creationInfo"]["created"])
    assert listed.read_bytes() == before


# ---- for pip and its like, and the check of manifests


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The wheel and the sdist."""
    return release.pack_distributions(tmp_path_factory.mktemp("distributions"))


def test_wheel_and_sdist_are_what_an_index_takes(distributions: list[Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *distributions],
        capture_output=True,
        check=False,
        text=True,
    )

    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == len(distributions) == 2


def test_wheel_and_sdist_hold_the_program_and_no_more(distributions: list[Path]) -> None:
    wheel, sdist = distributions
    modules = {
        f"livenessprobe/{path.name}" for path in pyz.PACKAGE.iterdir() if path.suffix in (".py", ".pyi")
    }
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        assert {name for name in names if ".dist-info/" not in name} == modules
        [metadata] = [packed.read(name).decode() for name in names if name.endswith("METADATA")]
    with tarfile.open(sdist) as packed_too:
        files = {name.partition("/")[2] for name in packed_too.getnames()}

    assert re.findall("(?m)^(?:Name|Version): (.*)$", metadata) == ["livenessprobe", __version__]
    assert files == modules | {
        *(".gitignore", "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"),
        "proto/livenessprobe/identity.proto",
    }


@pytest.mark.parametrize("number", [0, 1], ids=["wheel", "sdist"])
def test_runs_from_an_environment_of_its_own(
    number: int, distributions: list[Path], folder: Path, driver: FakeDriver
) -> None:
    """As pip, pipx and uvx make it: a fresh one, with what the distribution says it needs."""
    environment = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    pip = [sys.executable, "-m", "pip", f"--python={environment}", "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, "--disable-pip-version-check", distributions[number]], check=True)
    command = [str(environment / "bin" / "livenessprobe")]

    shown = program.run_once(["--version"], command=command)
    check = program.run_once([f"--csi-address={driver.target}", "--once"], command=command)

    assert shown.stdout.startswith(f"livenessprobe {__version__} (Python "), shown
    assert (check.returncode, check.stdout) == (0, "ok\n"), check


@pytest.fixture(scope="session")
def wheels(distributions: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with our wheel and all that it takes to install it, and a pip."""
    folder = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, f"--dest={folder}", str(distributions[0]), "pip"], check=True)
    return folder


@pytest.mark.parametrize(
    "tool", ["pipx run --spec WHEEL", "pipx install WHEEL", "uvx --from WHEEL", "uv tool install WHEEL"]
)
def test_runs_as_an_application_of_pipx_and_uv(
    tool: str, distributions: list[Path], wheels: Path, folder: Path, driver: FakeDriver
) -> None:
    """With what was fetched before, and without leaving a trace outside the folder."""
    places = ("PIPX_HOME", "PIPX_BIN_DIR", "PIPX_MAN_DIR", "UV_CACHE_DIR", "UV_TOOL_DIR", "UV_TOOL_BIN_DIR")
    env = os.environ | {name: str(folder / name) for name in places}
    env |= {"PIP_FIND_LINKS": str(wheels), "PIP_NO_INDEX": "1"}
    env |= {"UV_FIND_LINKS": str(wheels), "UV_OFFLINE": "1", "UV_PYTHON": sys.executable}
    first, *rest = tool.replace("WHEEL", str(distributions[0])).split()
    command = [str(Path(sys.executable).with_name(first)), *rest]
    if "install" in rest:
        subprocess.run(command, check=True, env=env, capture_output=True)
        command = [f"{env['PIPX_BIN_DIR' if first == 'pipx' else 'UV_TOOL_BIN_DIR']}/livenessprobe"]
    else:
        command.append("livenessprobe")

    shown = program.run_once(["--version"], command=command, env=env)
    check = program.run_once([f"--csi-address={driver.target}", "--once"], command=command, env=env)

    assert shown.stdout.startswith(f"livenessprobe {__version__} (Python "), shown
    assert (check.returncode, check.stdout) == (0, "ok\n"), check


def test_check_of_manifests_is_listed_and_runs(folder: Path) -> None:
    file = release.pack_checker(folder)
    document = json.loads(file.with_name(f"{file.name}.spdx.json").read_text())
    packages = {package["name"]: package for package in document["packages"]}

    done = subprocess.run(
        [file, program.ROOT / "deploy" / "kubernetes" / "node-plugin.yaml"],
        capture_output=True,
        check=False,
        text=True,
    )

    assert "containers: " in done.stdout, done
    [checksum] = packages.pop("livenessprobe")["checksums"]
    assert checksum["checksumValue"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert packages.keys() == {"pyyaml"}


# ---- the layout


@pytest.fixture(scope="session")
def archives() -> dict[str, Path]:
    """The images that were built, by platform."""
    if reason := image_engine.missing():
        pytest.skip(reason)
    return built_images.archives()


class Layout:
    """What is in a layout's tar."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, bytes] = {}
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member)
                assert content
                self.files[member.name] = content.read()
        [self.top] = json.loads(self.files["index.json"])["manifests"]
        self.index = self.json(self.top)
        self.manifests = {
            "/".join((each["platform"]["os"], each["platform"]["architecture"])): each
            for each in self.index["manifests"]
        }

    def blob(self, descriptor: dict[str, Any]) -> bytes:
        return self.files[f"blobs/{descriptor['digest'].replace(':', '/')}"]

    def json(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        return dict(json.loads(self.blob(descriptor)))


@pytest.fixture(scope="session")
def layout(archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Layout:
    path = tmp_path_factory.mktemp("layout") / "image.oci.tar"
    oci.pack(list(archives.values()), NAME, path)
    return Layout(path)


def test_layout_holds_what_its_descriptors_say_and_no_more(layout: Layout) -> None:
    manifests = [layout.json(manifest) for manifest in layout.manifests.values()]
    expected = {
        "index.v1+json": [layout.top],
        "manifest.v1+json": layout.index["manifests"],
        "config.v1+json": [manifest["config"] for manifest in manifests],
        "layer.v1.tar+gzip": [layer for manifest in manifests for layer in manifest["layers"]],
    }
    for kind, descriptors in expected.items():
        for descriptor in descriptors:
            content = layout.blob(descriptor)
            assert descriptor["mediaType"] == f"application/vnd.oci.image.{kind}"
            assert descriptor["digest"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
            assert descriptor["size"] == len(content)
            if kind in ("index.v1+json", "manifest.v1+json"):
                document = json.loads(content)
                assert (document["schemaVersion"], document["mediaType"]) == (2, descriptor["mediaType"])

    digests = {each["digest"] for descriptors in expected.values() for each in descriptors}
    blobs = {f"blobs/{digest.replace(':', '/')}" for digest in digests}
    assert layout.files.keys() == blobs | {"index.json", "oci-layout"}
    assert json.loads(layout.files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}


def test_layout_has_the_images_that_were_built(layout: Layout, archives: dict[str, Path]) -> None:
    assert layout.manifests.keys() == archives.keys() == pyz.PLATFORMS.keys()
    for target, archive in archives.items():
        with tarfile.open(archive) as files:
            manifest = files.extractfile("manifest.json")
            assert manifest
            [saved] = json.load(manifest)
        described = layout.manifests[target]["platform"]
        content = layout.json(layout.manifests[target])
        made = layout.json(content["config"])

        # By this name engines know the image.
        assert content["config"]["digest"] == f"sha256:{saved['Config'].removesuffix('.json')}"
        assert described == {key: made[key] for key in ("architecture", "os", "variant") if key in made}
        assert described.get("variant") == ("v8" if target == "linux/arm64" else None)
        layers = [gzip.decompress(layout.blob(layer)) for layer in content["layers"]]
        assert [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers] == made["rootfs"][
            "diff_ids"
        ]


def test_layout_says_what_it_is(layout: Layout) -> None:
    shared = layout.index["annotations"]
    assert shared["org.opencontainers.image.version"] == __version__
    assert shared["org.opencontainers.image.title"] == "livenessprobe"
    for manifest in layout.manifests.values():
        content = layout.json(manifest)
        assert content["annotations"] == layout.json(content["config"])["config"]["Labels"]
        assert shared.items() <= content["annotations"].items()
    # Where podman and skopeo look for a name, and where containerd does.
    names = ("org.opencontainers.image.ref.name", "io.containerd.image.name")
    assert layout.top["annotations"] == dict.fromkeys(names, NAME)


def test_same_images_give_the_same_layout(layout: Layout, archives: dict[str, Path], folder: Path) -> None:
    oci.pack(list(archives.values()), NAME, folder / "again")

    assert (folder / "again").read_bytes() == layout.path.read_bytes()


@pytest.fixture
def podman() -> Iterator[Podman]:
    if reason := podman_engine.missing():
        pytest.skip(reason)
    with podman_engine.podman() as engine:
        yield engine


@pytest.mark.parametrize("target", pyz.PLATFORMS)
def test_engine_takes_the_image_for_its_machine(target: str, layout: Layout, podman: Podman) -> None:
    architecture = target.partition("/")[2]
    if reason := debian_host.missing(architecture):
        pytest.skip(reason)
    podman.must("pull", "--quiet", f"--arch={architecture}", f"oci-archive:{layout.path}")
    emulator = debian_host.emulator(architecture)
    emulated = [f"--volume={emulator}:/emulator:ro", "--entrypoint=/emulator"] if emulator else []
    command = [f"/usr/bin/python{image.PYTHON}", "-IS", "/livenessprobe"] if emulator else []

    shown = podman.must("run", "--rm", "--network=none", *emulated, NAME, *command, "--version")

    assert shown.startswith(f"livenessprobe {__version__} (Python {image.PYTHON}.")
    config = layout.json(layout.manifests[target])["config"]["digest"].removeprefix("sha256:")
    assert podman.must("image", "inspect", "--format={{.Architecture}} {{.Id}}", NAME) == (
        f"{architecture} {config}"
    )


# ---- the whole


def test_no_engine_is_told_before_anything_is_built() -> None:
    done = subprocess.run(
        [sys.executable, program.ROOT / "build" / "here" / "release.py", "registry.example/livenessprobe"],
        capture_output=True,
        check=False,
        env=os.environ | {"DOCKER_HOST": "unix:///nowhere.sock"},
        text=True,
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("livenessprobe: no Docker engine answers: .*\n", done.stderr)


def test_checksums_are_checked_by_sha256sum(files: dict[str, Path]) -> None:
    folder = next(iter(files.values())).parent
    release.write_checksums(folder)
    release.write_checksums(folder)  # the same, and without one of the file itself
    command = ["sha256sum", "--check", "--strict", release.CHECKSUMS]

    whole = subprocess.run(command, cwd=folder, capture_output=True, check=False, text=True)

    assert whole.returncode == 0, whole.stderr
    everything = {path.name for path in folder.iterdir()} - {release.CHECKSUMS}
    assert {line.removesuffix(": OK") for line in whole.stdout.splitlines()} == everything

    changed = min(everything)
    content = (folder / changed).read_bytes()
    (folder / changed).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    broken = subprocess.run(command, cwd=folder, capture_output=True, check=False, text=True)
    (folder / changed).write_bytes(content)
    assert f"{changed}: FAILED" in broken.stdout
    assert broken.returncode == 1


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole release, as `make release` builds it."""
    if reason := image_engine.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SOURCE", built_images.SOURCE)
        release.build(NAME.rpartition(":")[0], folder)
    return folder


def test_whole_release_is_all_that_the_page_names(whole: Path) -> None:
    targets = [release.file_name(target) for target in pyz.PLATFORMS]
    made = {path.name for path in whole.iterdir()}
    patterns = [
        re.escape(name).replace("VERSION", re.escape(__version__)).replace("ARCH", "(amd64|arm64)")
        for name in column(PAGE, "file", "what it is")
    ]

    assert made == {
        *targets,
        *(f"{name}.spdx.json" for name in targets),
        release.checker_name(),
        f"{release.checker_name()}.spdx.json",
        *release.distribution_names(),
        release.layout_name(),
        *(release.contents_name(target) for target in pyz.PLATFORMS),
        release.CHECKSUMS,
    }
    for name in made:
        assert [pattern for pattern in patterns if re.fullmatch(pattern, name)], name
    for pattern in patterns:
        assert [name for name in made if re.fullmatch(pattern, name)], pattern


def test_whole_release_is_what_its_parts_are(
    whole: Path, files: dict[str, Path], distributions: list[Path], layout: Layout
) -> None:
    """Built a second time, it has the same bytes."""
    subprocess.run(["sha256sum", "--check", "--quiet", release.CHECKSUMS], cwd=whole, check=True)
    for file in [*files.values(), *distributions]:
        assert (whole / file.name).read_bytes() == file.read_bytes(), file.name
    again = Layout(whole / release.layout_name())
    assert again.top["annotations"] == layout.top["annotations"]
    for target, manifest in layout.manifests.items():
        ours, theirs = layout.json(manifest), again.json(again.manifests[target])
        assert theirs["layers"] == ours["layers"]
        config, its_config = layout.json(ours["config"]), again.json(theirs["config"])
        del config["config"]["Labels"][image_engine.MARK.partition("=")[0]]
        assert its_config == config
