"""In CI (CI=true) a skipped test is a failure: what cannot be tried there is not tried at all."""

import os
from collections.abc import Generator

import pytest
from _pytest.reports import BaseReport


def _refuse_skip(report: BaseReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI=true forbids: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Leave a note if any were skipped, for the check of what was reached."""
    skipped = terminalreporter.config.rootpath / ".cache" / "skipped"
    skipped.unlink(missing_ok=True)
    if terminalreporter.stats.get("skipped"):
        skipped.parent.mkdir(exist_ok=True)
        skipped.touch()
