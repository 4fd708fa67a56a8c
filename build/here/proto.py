"""Generates livenessprobe/identity_pb2.py and its types from proto/, below the given folder."""

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

PROTO = Path(__file__).parent.parent.parent / "proto"


def generate(folder: Path) -> None:
    """Write the generated code below this folder, at its package's path."""
    failed = protoc.main(
        [
            "protoc",
            f"--proto_path={PROTO}",
            f"--proto_path={files('grpc_tools') / '_proto'}",
            f"--python_out={folder}",
            f"--pyi_out={folder}",
            str(PROTO / "livenessprobe" / "identity.proto"),
        ]
    )
    if failed:
        sys.exit(failed)


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
