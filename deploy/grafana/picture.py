"""What dashboard.json shows, drawn without Grafana: asks a Prometheus each panel's queries and writes an SVG.

    python deploy/grafana/picture.py --prometheus http://127.0.0.1:9090 --seconds 21600 > dashboard.svg

Every variable of the dashboard stands at All. `make dashboard` draws docs/dashboard.svg with it, from a recorded run.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

DASHBOARD = Path(__file__).with_name("dashboard.json")
WIDTH, ROW = 50, 30  # pixels of a unit of the dashboard's grid
HEAD = 26
STEPS = 150
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
GOOD, BAD = "#56a64b", "#e02f44"
UNITS = {"s": " s", "bytes": " MiB", "ops": "/s", "percentunit": " %", "reqps": "/s"}
SCALES = {"bytes": 2**-20, "percentunit": 100}


class Series(NamedTuple):
    """One line of a graph."""

    name: str
    points: list[tuple[float, float]]


class Window(NamedTuple):
    """Which Prometheus is asked, and for which time, in seconds."""

    prometheus: str
    begin: float
    end: float
    rate_interval: str

    def ask(self, panel: dict[str, Any], target: dict[str, Any]) -> list[Series]:
        """The result of one query, as Grafana would ask it; an error of Prometheus' is raised."""
        query = expanded(target["expr"], self.rate_interval)
        if target.get("instant"):
            found = self._api("query", query=query, time=self.end)
            return [Series(_name(panel, target, one["metric"]), _points([one["value"]])) for one in found]
        step = (self.end - self.begin) / STEPS
        found = self._api("query_range", query=query, start=self.begin, end=self.end, step=step)
        return [Series(_name(panel, target, one["metric"]), _points(one["values"])) for one in found]

    def _api(self, path: str, **parameters: str | float) -> list[dict[str, Any]]:
        url = f"{self.prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - as the caller said
            return list(json.load(answer)["data"]["result"])


def expanded(expression: str, rate_interval: str, **chosen: str) -> str:
    """A query with its variables replaced by what is chosen, the others by All."""
    expression = expression.replace("$__rate_interval", rate_interval)
    for variable in ("driver_name", "namespace", "pod"):
        expression = expression.replace(f"${variable}", chosen.get(variable, ".*"))
    return expression


def _points(values: list[tuple[float, str]]) -> list[tuple[float, float]]:
    return [(at, value) for at, text in values if math.isfinite(value := float(text))]


def _name(panel: dict[str, Any], target: dict[str, Any], labels: dict[str, str]) -> str:
    if panel["type"] == "table":
        return ", ".join(
            f"{name} {value}" for name, value in sorted(labels.items()) if name not in ("job", "instance")
        )
    name = str(target["legendFormat"])
    for label, value in labels.items():
        name = name.replace("{{" + label + "}}", value)
    return re.sub(r" *\{\{\w+\}\}", "", name)  # labels that the series has not


# ---- drawing


def _text(x: float, y: float, text: str, size: int = 11, more: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" {more}>{escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, more: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" {more}/>'


def _number(value: float, unit: str) -> str:
    return f"{value * SCALES.get(unit, 1):.3g}{UNITS.get(unit, '')}"


class Panel:
    """A panel's place, and what there is to draw in it."""

    def __init__(self, panel: dict[str, Any], window: Window) -> None:
        place = panel["gridPos"]
        self.kind, self.title, self.window = panel["type"], panel["title"], window
        self.unit = panel["fieldConfig"]["defaults"].get("unit", "")
        self.left, self.top = place["x"] * WIDTH + 6, place["y"] * ROW + 6
        self.right, self.bottom = self.left + place["w"] * WIDTH - 12, self.top + place["h"] * ROW - 12
        self.series = [series for target in panel["targets"] for series in window.ask(panel, target)]

    def svg(self) -> str:
        draw = {
            "stat": self._stat,
            "table": self._table,
            "state-timeline": self._timeline,
            "heatmap": self._heatmap,
            "timeseries": self._graph,
        }[self.kind]
        frame = _rect(self.left, self.top, self.right - self.left, self.bottom - self.top, 'class="frame"')
        content = draw() if self.series else [_text(self.left + 10, self.top + 44, "no data")]
        return "\n".join(
            [
                "<g>",
                frame,
                _text(self.left + 10, self.top + 18, self.title, 13, 'class="title"'),
                *content,
                "</g>",
            ]
        )

    def _x(self, at: float, left: float, right: float) -> float:
        return left + (at - self.window.begin) / (self.window.end - self.window.begin) * (right - left)

    def _stat(self) -> list[str]:
        text = _number(self.series[0].points[-1][1], self.unit)
        return [_text((self.left + self.right) / 2, self.bottom - 24, text, 34, 'text-anchor="middle"')]

    def _table(self) -> list[str]:
        rows = sorted(series.name for series in self.series)
        return [
            _text(self.left + 10, self.top + HEAD + 16 + 18 * number, row) for number, row in enumerate(rows)
        ]

    def _timeline(self) -> list[str]:
        """A bar for each series, of one piece for each point."""
        left, height = self.left + 190, (self.bottom - self.top - HEAD - 8) / len(self.series)
        drawn = []
        for number, series in enumerate(sorted(self.series)):
            top = self.top + HEAD + number * height
            drawn.append(_text(self.left + 10, top + height / 2 + 2, series.name))
            width = (self.right - 10 - left) / STEPS
            runs: list[list[float]] = []  # begin, end, value
            for at, value in series.points:
                x = self._x(at, left, self.right - 10 - width)
                if runs and runs[-1][2] == value and x - runs[-1][1] < width / 2:
                    runs[-1][1] = x + width
                else:
                    runs.append([x, x + width, value])
            drawn += [
                _rect(begin, top, end - begin, height - 6, f'fill="{GOOD if value else BAD}"')
                for begin, end, value in runs
            ]
        return drawn

    def _heatmap(self) -> list[str]:
        """A row for each bucket that has any; Prometheus' buckets hold those below as well."""
        rows: list[tuple[str, dict[float, float]]] = []
        below: dict[float, float] = {}
        for series in sorted(self.series, key=lambda series: float(series.name)):
            counts = dict(series.points)
            own = {at: value - below.get(at, 0.0) for at, value in counts.items()}
            below = counts
            if any(value > 0.01 for value in own.values()):
                rows.append((f"≤ {series.name} s", own))
        left, most = self.left + 70, max((value for _, own in rows for value in own.values()), default=1.0)
        height, width = (
            (self.bottom - self.top - HEAD - 12) / max(len(rows), 1),
            (self.right - 10 - left) / STEPS,
        )
        drawn = []
        for number, (name, own) in enumerate(reversed(rows)):
            top = self.top + HEAD + number * height
            drawn.append(_text(self.left + 10, top + height / 2 + 4, name))
            drawn += [
                _rect(
                    self._x(at, left, self.right - 10 - width),
                    top,
                    width,
                    height - 2,
                    f'fill="#d9480f" fill-opacity="{max(value / most, 0.05):.2f}"',
                )
                for at, value in own.items()
                if value > 0.01
            ]
        return drawn

    def _graph(self) -> list[str]:
        shown = sorted(series for series in self.series if series.points)
        left, right = self.left + 62, self.right - 10
        top, bottom = self.top + HEAD + 6, self.bottom - 14 - 14 * math.ceil(len(shown) / 2)
        highest = max(value for series in shown for _, value in series.points) or 1.0
        drawn = []
        for share in (0.0, 0.5, 1.0):
            y = bottom - share * (bottom - top)
            drawn.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            drawn.append(_text(left - 6, y + 4, _number(highest * share, self.unit), 10, 'text-anchor="end"'))
        gap = 3 * (self.window.end - self.window.begin) / STEPS
        for number, series in enumerate(shown):
            color = COLORS[number % len(COLORS)]
            path, last = [], -math.inf
            for at, value in series.points:
                step = "M" if at - last > gap else "L"
                path.append(
                    f"{step}{self._x(at, left, right):.1f} {bottom - value / highest * (bottom - top):.1f}"
                )
                last = at
            drawn.append(f'<path d="{"".join(path)}" stroke="{color}" class="line"/>')
            x = left + (number % 2) * (right - left) / 2
            y = bottom + 18 + 14 * (number // 2)
            drawn.append(_text(x, y, "■ " + series.name, 10, f'fill="{color}"'))
        return drawn


def picture(window: Window, caption: str = "") -> str:
    """All panels in their places, with a caption below."""
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    height = max(place["y"] + place["h"] for place in (panel["gridPos"] for panel in panels)) * ROW
    style = (
        "text{font-family:sans-serif} .title{font-weight:bold} .frame{fill:#fff;stroke:#d0d7de} "
        ".grid{stroke:#e5e8eb} .line{fill:none;stroke-width:1.5}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {24 * WIDTH} {height + 40}" fill="#24292e">'
    drawn = [Panel(panel, window).svg() for panel in panels]
    background = _rect(0, 0, 24 * WIDTH, height + 40, 'fill="#f6f8fa"')
    words = f"{dashboard['title']}. {caption}"
    return "\n".join(
        [
            head,
            f"<title>{escape(words)}</title>",
            f"<style>{style}</style>",
            background,
            *drawn,
            _text(12, height + 24, words, 13),
            "</svg>\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prometheus", required=True, metavar="URL")
    parser.add_argument("--seconds", type=float, default=21600.0, help="how far back, by default six hours")
    parser.add_argument("--rate-interval", default="2m", help="four times the scrape interval, by default 2m")
    parser.add_argument("--caption", default="", help="what to write below, after the dashboard's title")
    options = parser.parse_args()
    end = time.time()
    window = Window(options.prometheus.rstrip("/"), end - options.seconds, end, options.rate_interval)
    sys.stdout.write(picture(window, options.caption))


if __name__ == "__main__":
    main()
