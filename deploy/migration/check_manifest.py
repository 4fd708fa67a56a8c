"""Says what would change if this livenessprobe took the place of the one in a manifest.

    python bin/check-manifest [--image IMAGE] FILE...        (-: standard input)

The arguments are read by livenessprobe.config itself, so the check and the program never disagree.
Exit code 0: nothing would break; 1: something would; 2: a file cannot be read, or is not a manifest.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from finding import Finding, Kind
from manifest import pods
from sidecar import check
from yaml_nodes import ManifestError

from livenessprobe.quoting import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manifest import Container, Pod

IMAGE = "registry.example/csi/livenessprobe:0.1.0"


def report(pod: Pod, container: Container, image: str) -> tuple[list[str], bool]:
    """Return what there is to say about one container, and whether something would break."""
    findings: list[Finding] = list(check(pod, container))
    lines = [f"{pod.name}, container {container.name}"]
    lines += [f"  {finding.kind.value:9} {finding.text}" for finding in findings]
    if container.image != image:
        lines.append(f"  {'image':9} {image} (instead of {container.image or 'none'})")
    return lines, any(finding.kind in (Kind.REFUSED, Kind.BREAKS) for finding in findings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the files; return the exit code."""
    # End as other tools do once the reader, such as `head`, has seen enough.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    parser = argparse.ArgumentParser(
        prog="check-manifest", description="What would change if this livenessprobe took over?"
    )
    parser.add_argument("--image", default=IMAGE, help=f"the image to suggest (default: {IMAGE})")
    parser.add_argument("files", nargs="*", metavar="FILE", help="a manifest; - is standard input")
    options = parser.parse_args(arguments)
    if not options.files:
        return _fail("no manifest given: name a FILE (FILE=path with make), or - for standard input")
    checked = broken = alike = 0
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
                _print(lines)
                checked, broken = checked + 1, broken + breaks
            for like in pod.lookalikes:
                _print([f"{pod.name}, container {like}", "  looks like a livenessprobe, not judged"])
                alike += 1
    total = f"livenessprobe containers: {checked}; with something that would break: {broken}"
    print(f"{total}; that look like one, not judged: {alike}" if alike else total)
    if not checked + alike:
        print("Nothing here looks like one: no image, program, name or flags of a livenessprobe in any pod.")
    return 1 if broken else 0


def _print(lines: Sequence[str]) -> None:
    # What a manifest contains may be aimed at the terminal.
    print(*map(printable, lines), sep="\n", end="\n\n")


def _fail(text: str) -> int:
    print(f"check-manifest: {printable(' '.join(text.split()))}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
