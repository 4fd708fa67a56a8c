"""`make picture`: plays the demo, and draws what it printed as docs/demo.svg, the picture in the README.

python examples/demo_picture.py bin/livenessprobe docs/demo.svg
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

DEMO = Path(__file__).with_name("demo.py")
COLUMNS = 120
STYLES = {
    r"(?m)^\S.*:$": "bold",
    r"(?m)^\$ .*$": "cyan",
    r"(?m)^  log: .*$": "color(246)",
    r"-> 200 .*?(?=   \()|-> ok|healthy again|All as expected\.": "green",
    r"-> (500|[^2o]).*?(?=   \()": "red",
}


def drawn(printed: str) -> str:
    """The SVG of these lines on a terminal."""
    text = Text(printed.strip("\n"))
    for pattern, style in STYLES.items():
        text.highlight_regex(pattern, style)
    console = Console(file=io.StringIO(), record=True, width=COLUMNS)
    console.print(text)
    picture = console.export_svg(title="make demo", theme=MONOKAI, unique_id="demo")
    # Nothing is fetched to show it: everybody has a monospaced font.
    return re.sub(r"(?s) *@font-face \{.*?\}\n", "", picture)


def main(program: str, picture: str) -> int:
    demo = subprocess.run([sys.executable, DEMO, program], check=False, stdout=subprocess.PIPE, text=True)
    if demo.returncode:
        sys.stdout.write(demo.stdout)
    else:
        Path(picture).write_text(drawn(demo.stdout))
    return demo.returncode


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/demo_picture.py bin/livenessprobe docs/demo.svg")
    sys.exit(main(*sys.argv[1:]))
