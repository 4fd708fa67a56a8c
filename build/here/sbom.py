"""Lists what is in an image or a packed file: an SPDX document beside it, by Syft, which reads them as scanners do.

python build/here/sbom.py bin/livenessprobe-amd64.tar
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pyz
import tars

SYFT = Path(sys.executable).with_name("syft")
CACHE = Path(__file__).parents[2] / ".cache" / "syft"


def list_content(archive: Path) -> Path:
    """Write the document of an image; the same image gives the same bytes."""
    with tarfile.open(archive) as files:
        [manifest] = json.loads(tars.read(files, "manifest.json"))
        created = json.loads(tars.read(files, manifest["Config"]))["created"]
    digest = manifest["Config"].removesuffix(".json")
    return _write(archive.with_suffix(".spdx.json"), _scan(f"docker-archive:{archive}"), created, digest)


def list_packed(file: Path, created: str) -> Path:
    """Write the document of a packed file, which names it by its checksum."""
    with tempfile.TemporaryDirectory() as folder:
        # Syft looks into an archive only if its name ends like one.
        archive = Path(folder, "livenessprobe.zip")
        archive.symlink_to(file.absolute())
        content = _scan(f"file:{archive}")
    [digest] = [
        checksum["checksumValue"]
        for package in content["packages"]
        if package["name"] == "livenessprobe"
        for checksum in package.get("checksums", ())
    ]
    return _write(file.with_name(f"{file.name}.spdx.json"), content, created, digest)


def _scan(source: str) -> dict[str, Any]:
    name = ["--source-name=livenessprobe", f"--source-version={pyz.release()}"]
    done = subprocess.run(
        [SYFT, "scan", "--quiet", *name, "--output=spdx-json", source],
        check=True,
        env=os.environ | {"SYFT_CHECK_FOR_APP_UPDATE": "false", "SYFT_CACHE_DIR": str(CACHE)},
        stdout=subprocess.PIPE,
    )
    return dict(json.loads(done.stdout))


def _write(document: Path, content: dict[str, Any], created: str, digest: str) -> Path:
    # Syft takes the time of day and a random number for these.
    content["creationInfo"]["created"] = created
    content["documentNamespace"] = f"urn:sha256:{digest}"
    document.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    return document


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("archive", type=Path)
    print(list_content(parser.parse_args().archive))
