"""The driver's states that a soak goes through, and the checks it makes in each."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig import Driver, Running

RESTART_EVERY = 10
# Each phase's share of the checks: a small one if its checks last until the timeout.
SHARES = {"healthy": 0.5, "failing": 0.4, "restarting": 0.04, "hung": 0.03, "absent": 0.03}
EXPECTED = {"healthy": {200}, "failing": {500}, "restarting": {200, 500}, "hung": {500}, "absent": {500}}


def run(phase: str, running: Running, driver: Driver, checks: int) -> Counter[int]:
    """Bring the driver into the phase and make the checks; return their statuses (0: no answer). Healthy afterwards."""
    if phase == "restarting":
        steps = _restarting(driver, checks)
    elif phase == "absent":
        steps = _absent(driver, checks)
    else:
        steps = iter(range(checks))
        driver.set(phase)
    statuses: Counter[int] = Counter()
    for _ in steps:
        status = 0
        with contextlib.suppress(OSError):
            status = running.get().status
        statuses[status] += 1
    driver.set("healthy")
    return statuses


def _restarting(driver: Driver, checks: int) -> Iterator[int]:
    """The first of these checks finds the driver dead."""
    for number in range(checks):
        if number % RESTART_EVERY == 0:
            driver.kill()
        elif number % RESTART_EVERY == 1:
            driver.start()
        yield number
    if checks % RESTART_EVERY == 1:
        driver.start()


def _absent(driver: Driver, checks: int) -> Iterator[int]:
    """Half of the checks find a socket that refuses, the others none."""
    driver.kill()
    for number in range(checks):
        if number == checks // 2:
            driver.path.unlink()
        yield number
    driver.start()
