"""Versions of libraries, without loading them."""

import importlib.metadata
import subprocess
import sys

import program

from livenessprobe import versions


def test_grpcio_has_the_version_of_its_package() -> None:
    assert versions.grpcio() == importlib.metadata.version("grpcio")


def test_it_is_not_loaded_for_that() -> None:
    code = "import sys; from livenessprobe import versions; versions.grpcio(); print('grpc' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, cwd=program.ROOT, text=True
    )
    assert done.stdout == "False\n"


def test_without_it_there_is_none() -> None:
    code = "import sys; from livenessprobe import versions; sys.path[:] = []; print(versions.grpcio())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, cwd=program.ROOT, text=True
    )
    assert done.stdout == "none\n"
