"""Lists what is in an image: an SPDX document beside its archive, by Syft, which reads the image as scanners do.

python build/sbom.py bin/livenessprobe-amd64.tar
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyz

SYFT = Path(sys.executable).with_name("syft")


def list_content(archive: Path) -> Path:
    """Write the document; the same image gives the same bytes."""
    document = archive.with_suffix(".spdx.json")
    with tarfile.open(archive) as files:
        [manifest] = json.loads(_read(files, "manifest.json"))
        created = json.loads(_read(files, manifest["Config"]))["created"]
    environment = os.environ | {"SYFT_CHECK_FOR_APP_UPDATE": "false"}
    name = ["--source-name=livenessprobe", f"--source-version={pyz.release()}"]
    done = subprocess.run(
        [SYFT, "scan", "--quiet", *name, "--output=spdx-json", f"docker-archive:{archive}"],
        check=True,
        env=environment,
        stdout=subprocess.PIPE,
    )
    content = json.loads(done.stdout)
    # Syft takes the time of day and a random number for these.
    content["creationInfo"]["created"] = created
    content["documentNamespace"] = f"urn:sha256:{manifest['Config'].removesuffix('.json')}"
    document.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    return document


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file
    return file.read()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("archive", type=Path)
    print(list_content(parser.parse_args().archive))
