"""`make audit`: looks the locked packages up in a database of known vulnerabilities; exits 1 if a packed one has any.

Packages that only build and test are reported too, but fail nothing: no user runs them. If the database cannot be
reached, a line says so, and that is not a failure: nothing was looked up, so nothing was found.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PACKED = "requirements.lock"
LOCKS = (PACKED, "requirements-test.lock")
# Only what pip-audit says about the service: anything wrong with a lock file, or with itself, is a failure.
UNREACHABLE = re.compile(r"requests\.exceptions\.|pip_audit\._service\.interface\.|Could not connect")


def look_up(lock: Path, service: str) -> list[str] | None:
    """The lines to print, beginning with a summary; None if the service cannot be reached."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip_audit", "--require-hashes", "--disable-pip"),
            *("--vulnerability-service=osv", f"--osv-url={service}", "--progress-spinner=off"),
            f"--cache-dir={HERE.parent.parent / '.cache' / 'pip-audit'}",
            *("--format=json", f"--requirement={lock}"),
        ],
        capture_output=True,
        check=False,
        text=True,
    )
    if not done.stdout:
        if UNREACHABLE.search(done.stderr):
            return None
        sys.exit(f"audit: pip-audit failed:\n{done.stderr}")
    packages = json.loads(done.stdout)["dependencies"]
    found = [
        f"  {package['name']} {package['version']}: {entry['id']}, fixed in"
        f" {', '.join(entry['fix_versions']) or 'no version yet'}: {entry['description']}"
        for package in packages
        for entry in package["vulns"]
    ]
    return [f"{lock.name}: {len(packages)} packages, known vulnerabilities: {len(found) or 'none'}", *found]


def main() -> None:
    service = sys.argv[1]
    found = False
    for name in LOCKS:
        lines = look_up(HERE / name, service)
        if lines is None:
            print(f"audit: NOT AUDITED, {name} and what follows: {service} cannot be reached from here")
            break
        print("\n".join(lines))
        found = found or (name == PACKED and len(lines) > 1)
    sys.exit(found)


if __name__ == "__main__":
    main()
