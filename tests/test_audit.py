"""`make audit`, beside a server that plays the database of vulnerabilities."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import subprocess
import sys
import threading
from http import HTTPStatus
from typing import TYPE_CHECKING

import audit
import kept
import program
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.unmeasured

PACKED = len(re.findall("(?m)^[a-z]", kept.LOCK.read_text()))
FOUND = {
    "schema_version": "1.6.0",
    "id": "TEST-2026-1",
    "summary": "a made one",
    "affected": [
        {
            "package": {"ecosystem": "PyPI", "name": name},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "999.1"}]}],
        }
        for name in ("grpcio", "grpcio-tools")
    ],
}


@contextlib.contextmanager
def database(status: int, vulnerable: str = "", most: int = 1_000_000) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the packages it was asked about; after most of them it is overloaded."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(query["package"]["name"])
            body = json.dumps({"vulns": [FOUND]} if asked[-1] == vulnerable else {}).encode()
            self.send_response(status if len(asked) <= most else HTTPStatus.SERVICE_UNAVAILABLE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/query", asked
        server.shutdown()
        serving.join()


def run(service: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(program.ROOT / "build" / "here" / "audit.py"), service]
    return subprocess.run(command, capture_output=True, check=False, text=True)


def test_packed_and_development_packages_are_looked_up() -> None:
    with database(200) as (service, asked):
        done = run(service)
    assert done.returncode == 0, done.stderr
    packed, development = done.stdout.splitlines()
    assert packed == f"requirements.lock: {PACKED} packages, known vulnerabilities: none"
    assert development.endswith(", known vulnerabilities: none")
    assert {"grpcio", "protobuf", "prometheus-client", "pytest"} <= set(asked)


def test_a_known_vulnerability_is_told_and_fails() -> None:
    with database(200, "grpcio") as (service, _):
        done = run(service)
    assert done.returncode == 1
    assert f"requirements.lock: {PACKED} packages, known vulnerabilities: 1" in done.stdout
    assert "TEST-2026-1, fixed in 999.1: a made one" in done.stdout


def test_one_of_what_no_user_runs_is_told_and_fails_nothing() -> None:
    with database(200, "grpcio-tools") as (service, _):
        done = run(service)
    assert done.returncode == 0
    assert re.search(r"requirements-test.lock: \d+ packages, known vulnerabilities: 1", done.stdout)
    assert "  grpcio-tools 1." in done.stdout


@pytest.mark.parametrize("status", [0, 403, 503])
def test_without_the_database_that_is_said_and_nothing_fails(status: int) -> None:
    with database(status or 200) as (service, _):
        if status:
            done = run(service)
    if not status:  # nobody listens there any more
        done = run(service)
    assert done.returncode == 0
    assert done.stdout == (
        f"audit: NOT AUDITED, requirements.lock and what follows: {service} cannot be reached from here\n"
    )


def test_what_was_found_before_the_database_went_away_fails() -> None:
    with database(200, "grpcio", most=PACKED) as (service, _):
        done = run(service)
    assert f"requirements.lock: {PACKED} packages, known vulnerabilities: 1" in done.stdout
    assert "NOT AUDITED, requirements-test.lock and what follows" in done.stdout
    assert done.returncode == 1


def test_a_lock_file_that_cannot_be_read_is_a_failure(folder: Path) -> None:
    lock = folder / "broken.lock"
    lock.write_text("grpcio>=1\n")
    with database(200) as (service, _), pytest.raises(SystemExit, match="pip-audit failed"):
        audit.look_up(lock, service)
