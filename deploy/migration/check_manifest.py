"""Says what would change where this livenessprobe takes the place of the one in a manifest.

    python deploy/migration/check_manifest.py [--image IMAGE] FILE...        (-: standard input)

The arguments are read by livenessprobe.config itself, so the check and the program never disagree.
Exit code 0: nothing would break; 1: something would; 2: a file cannot be read, or is no manifest.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from manifest import Container, Pod, pods
from sidecar import Finding, Kind, check
from yaml_nodes import ManifestError

IMAGE = "quay.io/k8scsi/livenessprobe:canary"


def report(pod: Pod, container: Container, image: str) -> tuple[list[str], bool]:
    """Return what is to be said of one container, and whether something would break."""
    findings: list[Finding] = list(check(pod, container))
    lines = [f"{pod.name}, container {container.name}"]
    lines += [f"  {finding.kind.value:9} {finding.text}" for finding in findings]
    if container.image != image:
        lines.append(f"  {'image':9} {image} (instead of {container.image or 'none'})")
    return lines, any(finding.kind in (Kind.REFUSED, Kind.BREAKS) for finding in findings)


def main() -> int:
    """Check the files; return the exit code."""
    parser = argparse.ArgumentParser(description="What would change where this livenessprobe takes over?")
    parser.add_argument("--image", default=IMAGE, help=f"the image to suggest (default: {IMAGE})")
    parser.add_argument("files", nargs="*", metavar="FILE", help="a manifest; - is standard input")
    options = parser.parse_args()
    if not options.files:
        return _fail("no manifest given: make check-manifest FILE=path, or FILE=- for standard input")
    checked = broken = 0
    for name in options.files:
        try:
            data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
            found = pods(data.decode())
        except OSError as error:
            return _fail(f"{name}: {(error.strerror or str(error)).lower()}")
        except UnicodeDecodeError:
            return _fail(f"{name}: not text")
        except ManifestError as error:
            return _fail(f"{name}: {error}")
        for pod in found:
            for container in pod.containers:
                lines, breaks = report(pod, container, options.image)
                print("\n".join(lines), end="\n\n")
                checked, broken = checked + 1, broken + breaks
    print(f"livenessprobe containers: {checked}; with something that would break: {broken}")
    return 1 if broken else 0


def _fail(text: str) -> int:
    print(f"check-manifest: {' '.join(text.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    # As other tools end where the reader, such as `head`, has seen enough.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
