"""Puts images for several machines into one OCI image layout, a tar: everything a registry holds of them, in one file."""

import hashlib
import json
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tars

MEDIA_TYPE = "application/vnd.oci.image"


class Layout:
    """A layout in the making: https://github.com/opencontainers/image-spec/blob/main/image-layout.md"""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def add(self, kind: str, content: bytes, **more: Any) -> dict[str, Any]:
        """Take a blob in; return its descriptor."""
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        descriptor = {"digest": f"sha256:{digest}", "mediaType": f"{MEDIA_TYPE}.{kind}", "size": len(content)}
        return descriptor | more

    def add_json(self, kind: str, content: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        document = {"schemaVersion": 2, "mediaType": f"{MEDIA_TYPE}.{kind}", **content}
        return self.add(kind, _json(document), **more)

    def add_image(self, archive: Path) -> dict[str, Any]:
        """Take in what image.py has built. Its configuration stays as it is, and so does the image's ID."""
        with tarfile.open(archive) as files:
            [manifest] = json.loads(tars.read(files, "manifest.json"))
            configuration = tars.read(files, manifest["Config"])
            layers = [
                self.add("layer.v1.tar+gzip", _compress(tars.read(files, layer)))
                for layer in manifest["Layers"]
            ]
        made = json.loads(configuration)
        content = {
            "config": self.add("config.v1+json", configuration),
            "layers": layers,
            "annotations": made["config"]["Labels"],
        }
        platform = {key: made[key] for key in ("architecture", "os", "variant") if key in made}
        return self.add_json("manifest.v1+json", content, platform=platform)

    def write(self, target: Path, index: Mapping[str, Any]) -> None:
        """Write the tar; this blob is the one to be read first."""
        top = {"schemaVersion": 2, "mediaType": f"{MEDIA_TYPE}.index.v1+json", "manifests": [index]}
        files = {"oci-layout": _json({"imageLayoutVersion": "1.0.0"}), "index.json": _json(top)}
        files |= {f"blobs/sha256/{digest}": self.blobs[digest] for digest in sorted(self.blobs)}
        with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as archive:
            for name, content in files.items():
                tars.add(archive, name, content)


def pack(archives: Sequence[Path], name: str, target: Path) -> None:
    """Put the images of these archives into one layout, as `REGISTRY/NAME:TAG`."""
    layout = Layout()
    manifests = [layout.add_image(archive) for archive in archives]
    each = [json.loads(layout.blobs[_digest(manifest)])["annotations"].items() for manifest in manifests]
    shared = dict(sorted(set.intersection(*map(set, each))))
    # Podman and skopeo want the full name; containerd, which would take that for a tag, has its own.
    names = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
    index = layout.add_json(
        "index.v1+json", {"manifests": manifests, "annotations": shared}, annotations=names
    )
    layout.write(target, index)


def _digest(descriptor: Mapping[str, Any]) -> str:
    return str(descriptor["digest"]).removeprefix("sha256:")


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _compress(content: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)  # gzip, without a name or a time
    return packer.compress(content) + packer.flush()
