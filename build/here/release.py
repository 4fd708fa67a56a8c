"""Builds everything in a release into dist/, from scratch, with checksums: docs/release.md says what each file is.

    python build/here/release.py quay.io/k8scsi/livenessprobe

The same sources and packages give the same bytes.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checker
import image
import oci
import pyz
import sbom

DIST = image.ROOT / "dist"
CHECKSUMS = "SHA256SUMS"


def file_name(platform: str) -> str:
    return f"livenessprobe-{pyz.release()}-{platform.replace('/', '-')}"


def checker_name() -> str:
    return f"check-manifest-{pyz.release()}"


def distribution_names() -> list[str]:
    """Of the wheel and the sdist."""
    return [f"livenessprobe-{pyz.release()}-py3-none-any.whl", f"livenessprobe-{pyz.release()}.tar.gz"]


def layout_name() -> str:
    return f"livenessprobe-{pyz.release()}-image.oci.tar"


def contents_name(platform: str) -> str:
    """Of the list of what is in an image."""
    return f"livenessprobe-{pyz.release()}-image-{platform.replace('/', '-')}.spdx.json"


def pack(platform: str, folder: Path) -> Path:
    """Pack the program for a platform, and list what is in it."""
    file = folder / file_name(platform)
    pyz.build(pyz.PYTHONS, pyz.PLATFORMS[platform], file)
    sbom.list_packed(file, image.date(image.build_time()))
    return file


def pack_checker(folder: Path) -> Path:
    """Pack the check of manifests, and list what is in it."""
    file = folder / checker_name()
    checker.pack(file)
    sbom.list_packed(file, image.date(image.build_time()))
    return file


def pack_distributions(folder: Path) -> list[Path]:
    """Make the wheel and the sdist, for pip and its like."""
    command = [sys.executable, "-m", "hatchling", "build", f"--directory={folder}"]
    time = {"SOURCE_DATE_EPOCH": str(image.build_time())}
    subprocess.run(command, cwd=image.ROOT, env=os.environ | time, check=True, stdout=subprocess.DEVNULL)
    return [folder / name for name in distribution_names()]


def make_image(platform: str, name: str, folder: Path, elsewhere: Path) -> Path:
    """Build the image for a platform, and list what is in it; return its archive, which is not part of the release."""
    archive = image.make(platform, name, elsewhere)
    shutil.move(sbom.list_content(archive), folder / contents_name(platform))
    return archive


def write_checksums(folder: Path) -> None:
    """The lines that `sha256sum --check` reads."""
    files = sorted(path for path in folder.iterdir() if path.name != CHECKSUMS)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / CHECKSUMS).write_text("".join(lines))


def build(repository: str, folder: Path) -> None:
    """Build it all; a folder without checksums is not whole."""
    image.engine_platform()
    image.build_image()  # here, since two at once would make it twice
    name = f"{repository}:v{pyz.release()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
        images = [
            pool.submit(make_image, platform, name, folder, Path(temporary)) for platform in pyz.PLATFORMS
        ]
        files = [pool.submit(pack, platform, folder) for platform in pyz.PLATFORMS]
        files += [pool.submit(pack_checker, folder)]
        pack_distributions(folder)
        oci.pack([archive.result() for archive in images], name, folder / layout_name())
        for file in files:
            file.result()
    write_checksums(folder)


def main() -> None:
    """Build what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("repository", help="REGISTRY/NAME of the image")
    options = parser.parse_args()
    build(options.repository, DIST)
    for path in sorted(DIST.iterdir()):
        print(f"{path.stat().st_size:>10}  {path.relative_to(image.ROOT)}")


if __name__ == "__main__":
    main()
