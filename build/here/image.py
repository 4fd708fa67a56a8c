"""Builds the image in a Docker engine, for its machine or another one.

    python build/here/image.py [--platform linux/arm64] quay.io/k8scsi/livenessprobe:canary

The same sources and packages give the same image, to the byte, whichever of Docker's two builders is at work.
Leaves the image in the engine and, for `docker load`, in bin/livenessprobe-ARCHITECTURE.tar, with an SPDX document
that lists its contents beside it. The variable DOCKER names a client other than `docker`, BUILD_IMAGE the image to
build in, SOURCE the address of the sources for the label, if that isn't the clone's origin.
"""

import argparse
import datetime as dt
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

import pyz
import sbom
import tars

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "Dockerfile.distroless"
# As debian:trixie has it.
PYTHON = "3.13"
MADE_HERE = "livenessprobe-base:trixie"
DOCKER = os.environ.get("DOCKER") or "docker"

LAYERS = ("parts of Debian, and the libraries", "the program")


def docker(*arguments: str | Path, check: bool = True) -> str:
    """Have Docker do something; return what it prints."""
    done = subprocess.run([DOCKER, *arguments], check=False, capture_output=True, text=True)
    if check and done.returncode:
        sys.exit(f"{DOCKER} {arguments[0]} failed:\n{done.stdout[-5000:]}{done.stderr[-5000:]}".rstrip())
    return done.stdout.strip() if done.returncode == 0 else ""


def engine_platform() -> str:
    """The platform of the engine, or a line that says what is missing."""
    try:
        platform = docker("version", "--format", "{{.Server.Os}}/{{.Server.Arch}}", check=False)
    except FileNotFoundError:
        platform = ""
    if not platform:
        sys.exit(
            "livenessprobe: no Docker engine answers: install one (apt-get install docker.io), start it, or set DOCKER_HOST"
        )
    return platform


def build_image() -> str:
    """The image to build in: the one asked for, the public one, or one made here where that cannot be pulled."""
    if chosen := os.environ.get("BUILD_IMAGE"):
        return chosen
    match = re.search(r"^ARG BUILD_IMAGE=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert match
    for image in (match[1], MADE_HERE):
        if docker("image", "inspect", "--format", "{{.Id}}", image, check=False):
            return image
    if docker("pull", "--quiet", match[1], check=False):
        return match[1]
    subprocess.run(
        [ROOT / "build" / "here" / "base.sh", MADE_HERE], check=True, env=os.environ | {"DOCKER": DOCKER}
    )
    return MADE_HERE


def git(*arguments: str) -> str:
    """What git says; nothing if this is not a clone, or if it has no such setting."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        # It does not matter who owns the clone: building runs its code anyway.
        command = ["git", "-C", str(ROOT), "-c", f"safe.directory={ROOT}", *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit("livenessprobe: this is a clone, and there is no git here: apt-get install git")
    if done.returncode > 1:
        sys.exit(f"livenessprobe: git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def build_time() -> int:
    """Seconds since 1970: the time stamp of everything in the image, the last commit's unless one is set."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH") or git("log", "-1", "--format=%ct") or "315532800"
    if not seconds.isdecimal():
        sys.exit(f"livenessprobe: SOURCE_DATE_EPOCH={seconds}: write a number of seconds since 1970")
    return int(seconds)


def labels(seconds: int) -> dict[str, str]:
    """What the image says about itself that the Dockerfile cannot know."""
    changed = "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
    revision = git("rev-parse", "HEAD")
    remote = git("config", "--get", "remote.origin.url")
    known = {
        "created": date(seconds),
        "source": os.environ.get("SOURCE") or (remote if remote.startswith("https://") else ""),
        "revision": revision and revision + changed,
        "version": pyz.release(),
    }
    return {f"org.opencontainers.image.{name}": value for name, value in known.items() if value}


def run_builder(architecture: str, seconds: int, more_labels: Sequence[str]) -> str:
    """Run the Dockerfile; return the image's id."""
    mark = f"livenessprobe.build={uuid.uuid4().hex}"
    arguments = {
        "ARCHITECTURE": architecture,
        "BUILD_IMAGE": build_image(),
        "MARK": mark.partition("=")[2],
        "SOURCE_DATE_EPOCH": str(seconds),
    }
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "id")
        options = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        options += [f"--label={name}={value}" for name, value in labels(seconds).items()]
        options += [f"--label={label}" for label in more_labels]
        # Not from its cache: it has to have the newest packages.
        options += ["--no-cache", "--force-rm", f"--iidfile={written}", f"--file={DOCKERFILE}"]
        try:
            docker("build", *options, ROOT)
        finally:
            # The old builder leaves half a gigabyte of intermediate images behind each time.
            docker("image", "prune", "--force", f"--filter=label={mark}", check=False)
        return written.read_text()


def settle(saved: Path, settled: Path, tag: str, architecture: str, seconds: int) -> None:
    """Rewrite a saved image without anything that differs between two builds or two builders.

    The old builder also labels every image with its own machine's architecture.
    """
    with tarfile.open(saved) as source, tarfile.open(settled, "w", format=tarfile.GNU_FORMAT) as target:
        [manifest] = json.loads(tars.read(source, "manifest.json"))
        built = json.loads(tars.read(source, manifest["Config"]))
        kept = ("Entrypoint", "Env", "ExposedPorts", "Labels")
        made = {
            "architecture": architecture,
            **({"variant": "v8"} if architecture == "arm64" else {}),
            "os": "linux",
            "created": date(seconds),
            "config": {key: built["config"][key] for key in kept},
            "rootfs": built["rootfs"],
            "history": [{"created": date(seconds), "created_by": what} for what in LAYERS],
        }
        config = json.dumps(made, sort_keys=True).encode()
        name = f"{hashlib.sha256(config).hexdigest()}.json"
        layers = [f"{digest.removeprefix('sha256:')}.tar" for digest in built["rootfs"]["diff_ids"]]
        tars.add(
            target,
            "manifest.json",
            json.dumps([{"Config": name, "RepoTags": [tag], "Layers": layers}]).encode(),
        )
        tars.add(target, name, config)
        for old, new in zip(manifest["Layers"], layers, strict=True):
            tars.add(target, new, tars.read(source, old))


def date(seconds: int) -> str:
    """As image formats and SPDX want it."""
    return dt.datetime.fromtimestamp(seconds, dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def make(platform: str, tag: str, folder: Path, more_labels: Sequence[str] = ()) -> Path:
    """Build for a platform; return the archive of the image, which the engine does not keep."""
    architecture = platform.partition("/")[2]
    seconds = build_time()
    pyz.build([PYTHON], pyz.PLATFORMS[platform], ROOT / "bin" / "image" / architecture / "livenessprobe")
    built = run_builder(architecture, seconds, more_labels)
    archive = folder / f"livenessprobe-{architecture}.tar"
    with tempfile.TemporaryDirectory() as temporary:
        saved = Path(temporary, "saved.tar")
        docker("save", f"--output={saved}", built)
        settle(saved, archive, tag, architecture, seconds)
    docker("rmi", built, check=False)
    return archive


def build(platform: str, tag: str, folder: Path, more_labels: Sequence[str] = ()) -> Path:
    """Build for a platform, and leave the image in the engine; return its archive."""
    archive = make(platform, tag, folder, more_labels)
    docker("load", f"--input={archive}")
    return archive


def main() -> None:
    """Build what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--platform", choices=pyz.PLATFORMS, help="instead of the engine's")
    parser.add_argument("tag", help="REGISTRY/NAME:TAG")
    options = parser.parse_args()
    platform = options.platform or engine_platform()
    if platform not in pyz.PLATFORMS:
        sys.exit(f"livenessprobe: the engine is {platform}: choose PLATFORM={' or '.join(pyz.PLATFORMS)}")
    archive = build(platform, options.tag, ROOT / "bin")
    contents = sbom.list_content(archive)
    print(f"{options.tag} for {platform}: {archive.relative_to(ROOT)}, {contents.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
