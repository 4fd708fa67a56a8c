"""status.py: the pages for people as text, from values alone; that they are served is in test_serve.py."""

from __future__ import annotations

from livenessprobe import status
from livenessprobe.health import HEALTHY, failed
from livenessprobe.history import Change, Seen
from livenessprobe.status import Program

NOW = 1000_000.9  # of a monotonic clock
AHEAD = 1795364340.9 - NOW  # Sun Nov 22 2026, 16:19:00 UTC
DAY = 86400.0


def page(seen: Seen | None = None, *, up: float = 16.0, name: str = "fake.csi.k8s.io") -> list[str]:
    """The lines of /statusz."""
    versions = (("Python", "3.11.2"), ("Binary", "0.1.0"))
    program = Program(NOW - up, versions, ("/healthz", "/statusz"), "/csi/csi.sock")
    return status.statusz(program, name, seen, NOW, AHEAD).split("\n")


def test_before_the_first_check() -> None:
    assert page(name="") == [
        "",
        "livenessprobe statusz",
        "Warning: this page is for people; what it shows, and how, may change in any release.",
        "",
        "Started: Sun Nov 22 16:18:44 UTC 2026",
        "Up: 0 hr 00 min 16 sec",
        "Python version: 3.11.2",
        "Binary version: 0.1.0",
        "Paths: /healthz /statusz",
        "",
        "Driver address: /csi/csi.sock",
        "Driver name: not known yet",
        "Last verdict: none yet, as nobody has asked for one",
        "",
    ]


def test_what_is_wrong_since_when_and_what_was_before() -> None:
    changes = (
        Change(NOW - 2 * DAY, HEALTHY, 0, 0.0),
        Change(NOW - 3725.0, failed("Internal", "no disk"), 1, 0.5),
    )
    seen = Seen(failed("Internal", "none"), NOW - 1.5123, NOW - 1.5, changes)
    shown = page(seen, up=3 * DAY + 59.9)

    assert shown[4:6] == ["Started: Thu Nov 19 16:18:01 UTC 2026", "Up: 72 hr 00 min 59 sec"]
    assert shown[11:] == [
        "Driver name: fake.csi.k8s.io",
        "Last verdict: failed: rpc error: code = Internal desc = none",
        "Since: Sun Nov 22 15:16:55 UTC 2026, for 1 hr 02 min 05 sec",
        "Last check: Sun Nov 22 16:18:59 UTC 2026, 0 hr 00 min 01 sec ago, took 0.012 s",
        "",
        "Last changes, the newest first:",
        "Sun Nov 22 15:16:55 UTC 2026  failed: rpc error: code = Internal desc = no disk",
        "Fri Nov 20 16:19:00 UTC 2026  healthy: ok",
        "",
    ]


def test_days_of_one_digit_are_padded() -> None:
    assert page(up=17 * DAY)[4] == "Started: Thu Nov  5 16:19:00 UTC 2026"


def test_no_foreign_text_forges_a_line() -> None:
    foreign = "a\nLast verdict: healthy: ok\x1b[2J"
    escaped = r"a\nLast verdict: healthy: ok\x1b[2J"
    verdict = failed("Internal", foreign)
    shown = page(Seen(verdict, NOW, NOW, (Change(NOW, verdict, 1, 0.0),)), name=foreign)

    assert f"Driver name: {escaped}" in shown
    assert f"Last verdict: failed: rpc error: code = Internal desc = {escaped}" in shown
    assert shown[-2].endswith(f"  failed: rpc error: code = Internal desc = {escaped}")
    assert all(line.isprintable() for line in shown)


def test_flags_are_listed_by_name() -> None:
    assert status.flagz([("v", "0"), ("csi-address", "/a\n=b"), ("http-endpoint", "")]).split("\n") == [
        "",
        "livenessprobe flagz",
        "Warning: this page is for people; what it shows, and how, may change in any release.",
        "",
        r"csi-address=/a\n=b",
        "http-endpoint=",
        "v=0",
        "",
    ]
