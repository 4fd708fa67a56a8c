"""The bench's table: each figure's name, unit and budget, and whether the measurement is within it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from figures import Figures

REFERENCE_MB = 19.5  # the reference's stripped binary, which the file's budget refers to


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that a figure, or its ratio to the reference's, may be; and the goal below it, if there is one."""

    limit: float
    goal: float | None = None
    ratio: bool = False

    def judge(self, value: float | None, ratio: float | None) -> str:
        judged = ratio if self.ratio else value
        if judged is None:
            return ""
        if judged > self.limit:
            return "over"
        return "ok, above goal" if self.goal is not None and judged > self.goal else "ok"

    def __str__(self) -> str:
        times = "x" if self.ratio else ""
        return f"{self.limit:g}{times}" + (f" ({self.goal:g}{times})" if self.goal is not None else "")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of the table: the median of its samples, or another percentile."""

    title: str
    unit: str
    key: str
    budget: Budget | None = None
    digits: int = 2
    percent: int = 50

    def value(self, figures: Figures) -> float | None:
        if self.percent != 50:
            return figures.percentile(self.key, self.percent)
        return figures.median(self.key)


ROWS = (
    Row("CPU a check, one every 2 s, idle included", "ms", "cadence", Budget(0.85, 0.6, ratio=True)),
    Row("latency, one every 2 s: p50", "ms", "cadence latency", Budget(0.95, 0.8, ratio=True)),
    Row("CPU a check, in a burst", "ms", "burst", Budget(0.85, 0.6, ratio=True), digits=3),
    Row("latency, in a burst: p50", "ms", "latency", Budget(0.9, 0.7, ratio=True)),
    Row("latency, in a burst: p99", "ms", "latency", Budget(0.9, 0.7, ratio=True), percent=99),
    Row("idle wake-ups", "/s", "wake-ups", Budget(0)),
    Row("resident memory: at start", "MiB", "resident at start", digits=1),
    Row(
        "resident memory: after 2,000 checks", "MiB", "resident after 2,000", Budget(0.78, 0.7, ratio=True), 1
    ),
    Row("resident memory: most, storm included", "MiB", "peak", digits=1),
    Row("anonymous memory: at start", "MiB", "anonymous at start", digits=1),
    Row(
        "anonymous memory: after 2,000 checks",
        "MiB",
        "anonymous after 2,000",
        Budget(1.2, 1.0, ratio=True),
        1,
    ),
    Row("proportional memory: at start", "MiB", "proportional at start", digits=1),
    Row("proportional memory: after 2,000 checks", "MiB", "proportional after 2,000", digits=1),
    Row("threads: at start", "", "threads at start", digits=0),
    Row("threads: after 2,000 checks", "", "threads after 2,000", digits=0),
    Row("start to listening", "ms", "listening", Budget(3.2, 2.5, ratio=True), digits=1),
    Row("start to first ok", "ms", "first ok", Budget(4.0, 3.0, ratio=True), digits=1),
    Row("first run, with unpacking, to first ok", "ms", "first run", Budget(300, 200), digits=0),
    Row("--once, whole run", "ms", "once", Budget(100), digits=1),
    Row("file", "MB", "bytes", Budget(0.60 * REFERENCE_MB, 0.50 * REFERENCE_MB)),
    Row("storm: until all are answered", "ms", "storm", digits=0),
    Row("storm: answered ok", "", "storm ok", digits=0),
    Row("storm: probes seen by the driver", "", "storm probes", digits=0),
    Row("storm: probes at one time", "", "storm at once", Budget(1), digits=0),
    Row("CPU a check: of the driver, in a burst", "ms", "driver", digits=3),
    Row("CPU a check: of the client, in a burst", "ms", "client", digits=3),
)
LEGEND = (
    "Medians; memory, threads, wake-ups and storm are taken once. A budget (in brackets: the goal) is the most allowed;"
    " 1x: as much as the reference."
)
# What must not grow with the number of processors, and how much it may seem to.
INDEPENDENT = (
    *("cadence", "cadence latency", "burst", "latency"),
    *("resident after 2,000", "anonymous after 2,000", "threads after 2,000"),
)
INDEPENDENCE = Budget(1.1, 1.0, ratio=True)


def table(all_figures: Sequence[Figures]) -> list[str]:
    """Lay out the figures; the first are those of the program under test, with which the others are compared."""
    first, *others = all_figures
    head = ["", "unit", "budget", "", first.program.name]
    for other in others:
        head += [other.program.name, "ratio"]
    lines = [head]
    for row in ROWS:
        value = row.value(first)
        verdict, cells = "", []
        for other in others:
            compared = row.value(other)
            reference = other.program.name == "reference"
            ratio = _ratio(value, compared) if reference else _ratio(compared, value)
            cells += [_number(compared, row.digits), _number(ratio, 2)]
            if row.budget and row.budget.ratio and reference:
                verdict = row.budget.judge(value, ratio)
        if row.budget and not row.budget.ratio:
            verdict = row.budget.judge(value, None)
        budget = str(row.budget) if row.budget else ""
        lines.append([row.title, row.unit, budget, verdict, _number(value, row.digits), *cells])
    return align(lines, left=4)


def independence(usual: Figures, many: Figures) -> str:
    """Judge the program on a machine of many processors by itself on this one."""
    over = []
    for row in ROWS:
        ratio = _ratio(row.value(many), row.value(usual)) if row.key in INDEPENDENT else None
        if INDEPENDENCE.judge(None, ratio) == "over":
            over.append(f"{row.title} ({ratio:.2f})")
    return f"{many.program.name}: {INDEPENDENCE} of the program's own figures: {'over in ' if over else 'ok'}{'; '.join(over)}"


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def align(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """Columns of the same width, the first ones flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
