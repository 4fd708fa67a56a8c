"""`make demo`: as the README promises, and with a program that misbehaves."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import program
import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unmeasured

DEMO = (sys.executable, str(program.ROOT / "examples" / "demo.py"))


def play(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DEMO, file], capture_output=True, check=False, text=True, timeout=120)


def test_it_ends_as_expected() -> None:
    done = play(program.ROOT / "bin" / "livenessprobe")

    assert done.stdout.endswith("\nAll as expected.\n"), done.stdout
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "script",
    [
        "echo no such Python >&2; exit 127",
        # It serves nobody, and ends when asked.
        """echo '"Serving" address="127.0.0.1:1"' >&2; echo 'no such Python' >&2; exit 127""",
    ],
)
def test_a_program_that_ends_ends_the_demo_at_once_with_its_words(folder: Path, script: str) -> None:
    file = folder / "livenessprobe"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)

    done = play(file)

    assert done.returncode == 1
    # It did not wait for anything.
    assert "EXPECTED" not in done.stdout
    assert done.stdout.endswith(
        "\nThe demo cannot go on: the program has ended, exit code 127, and said:\n  no such Python\n"
    ), done.stdout


def test_an_answer_that_is_another_fails_it(folder: Path) -> None:
    """A program that says `fine` where `ok` is expected, from the beginning."""
    file = folder / "livenessprobe"
    file.write_text(
        f"""#!{sys.executable}
import http.server, sys

class Fine(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"fine")

if "--once" not in sys.argv:
    server = http.server.HTTPServer(("127.0.0.1", 0), Fine)
    print(f'"Serving" address="127.0.0.1:{{server.server_port}}"', file=sys.stderr, flush=True)
    print("driver is healthy\\nthe disk is gone\\nhealthy again", file=sys.stderr, flush=True)
    server.serve_forever()
"""
    )
    file.chmod(0o755)

    done = play(file)

    assert done.returncode == 1
    assert "  EXPECTED: /healthz 200 ok\n" in done.stdout
    assert "Not as expected (" in done.stdout
