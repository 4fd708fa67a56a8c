"""Writes the lock files: the newest versions that pyproject.toml allows, with the hashes of all their wheels.

One lock serves every CPython and machine. What this machine configures for pip or uv has no say.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
COMPILE = """uv --quiet --no-config pip compile --upgrade --universal --python-version 3.10 --no-python-downloads
    --only-binary :all: --generate-hashes --no-annotate --no-header --no-emit-index-url --no-emit-find-links"""


def lock(name: str, purpose: str, *options: str) -> None:
    """Write one lock file."""
    path = HERE / name
    compiled = subprocess.run(
        [sys.executable, "-m", *COMPILE.split(), "pyproject.toml", *options],
        cwd=HERE.parent.parent,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    path.write_text(f"# {purpose} Written by `make lock` from pyproject.toml.\n{compiled}")


if __name__ == "__main__":
    lock("requirements.lock", "What is packed into bin/livenessprobe.")
    lock(
        "requirements-dev.lock",
        "What builds and tests it.",
        "--group",
        "dev",
        "-c",
        "build/here/requirements.lock",
    )
