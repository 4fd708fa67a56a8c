"""Writes the lock files: the newest versions that pyproject.toml allows, with the hashes of all their wheels.

One lock serves every CPython and machine. This machine's settings for pip or uv are ignored.
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
    packed = "build/here/requirements.lock"
    lock("requirements.lock", "What is packed into bin/livenessprobe.")
    lock(
        "requirements-build.lock",
        "What builds it and runs the demo.",
        "--group=build",
        f"--constraint={packed}",
    )
    # The tests' environment is the build's with more in it, so both have the same versions.
    built = "build/here/requirements-build.lock"
    lock(
        "requirements-test.lock",
        "What tests it.",
        "--group=test",
        f"--constraint={packed}",
        f"--constraint={built}",
    )
