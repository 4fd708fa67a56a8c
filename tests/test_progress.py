"""What --once says while it waits, and when, by the tests' own clock; test_once.py shows that it reaches the user."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from livenessprobe.health import Outcome, Verdict
from livenessprobe.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MISSING = Verdict(Outcome.UNREACHABLE, "no such file or directory", "cannot connect to it", may_heal=True)


class Check:
    """A check that waits, and a clock that goes on meanwhile."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.progress = Progress(lambda: self.now)

    def says(
        self,
        log: pytest.LogCaptureFixture,
        *lasts: float,
        on_terminal: bool = False,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[tuple[float, Mapping[str, object]]]:
        """What is said, and when, until the check has lasted this many seconds in all."""
        log.set_level(logging.INFO, "livenessprobe.progress")
        begun, said_at = self.now, []

        def done(seconds: float) -> bool:
            self.now += seconds
            meanwhile()
            ended = self.now - begun > sum(lasts)
            if not ended:
                said_at.append(self.now - begun)
            return ended

        self.progress.say("/csi/csi.sock", 33.4, done, on_terminal=on_terminal)
        assert {(line.levelno, line.msg) for line in log.records} <= {
            (logging.INFO, "Waiting for the CSI driver")
        }
        return [
            (at, line.args)
            for at, line in zip(said_at, log.records, strict=True)
            if isinstance(line.args, dict)
        ]


def test_elsewhere_it_says_so_every_10_seconds(caplog: pytest.LogCaptureFixture) -> None:
    said = Check().says(caplog, 31)

    assert [(at, values["waited"]) for at, values in said] == [(10, "10s"), (20, "20s"), (30, "30s")]
    assert said[0][1] == {
        "for": "its answer to Probe",
        "address": "/csi/csi.sock",
        "waited": "10s",
        "longest": "33s",
    }


def test_on_a_terminal_it_says_so_soon_too(caplog: pytest.LogCaptureFixture) -> None:
    said = Check().says(caplog, 11, on_terminal=True)

    assert [at for at, _ in said] == pytest.approx([0.3, 10.3])
    assert [values["waited"] for _, values in said] == ["0s", "10s"]


def test_nothing_is_said_of_a_short_check(caplog: pytest.LogCaptureFixture) -> None:
    assert not Check().says(caplog, 9)
    assert not Check().says(caplog, 0.2, on_terminal=True)


def test_what_is_waited_for_is_said(caplog: pytest.LogCaptureFixture) -> None:
    check = Check()
    said = check.says(caplog, 11, meanwhile=lambda: check.progress.wait(MISSING))

    assert [values["for"] for _, values in said] == ["cannot connect to it"]


def test_an_obstacle_is_one_until_an_attempt_takes_longer_than_one_that_finds_no_driver() -> None:
    check = Check()
    assert check.progress.obstacle() is None
    check.progress.begin()
    assert check.progress.obstacle() is None, "there was no attempt yet that failed"

    check.progress.wait(MISSING)
    check.now += 3600
    assert check.progress.obstacle() is MISSING
    check.progress.begin()
    check.now += 0.09
    assert check.progress.obstacle() is MISSING
    check.now += 0.02
    assert check.progress.obstacle() is None
    check.progress.wait(MISSING)
    assert check.progress.obstacle() is MISSING

    check.now = 0.0
    check.progress.begin()
    check.now = 0.1
    assert check.progress.obstacle() is None
