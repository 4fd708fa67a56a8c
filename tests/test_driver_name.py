"""Learning the driver's name: the tests answer for the driver, threads are real, and all waiting is for events."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager
from queue import Empty, Queue
from typing import TYPE_CHECKING

import pytest

from livenessprobe.driver_name import DELAYS, Naming
from livenessprobe.stopping import Stop

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NOTHING = ("", "")  # there was no connection


class Driver:
    """Reports when it is asked, and answers when the test does."""

    def __init__(self) -> None:
        self.asked: Queue[float] = Queue()
        self.answers: Queue[tuple[str, str]] = Queue()
        self.socket = 1

    def name(self, deadline: float) -> tuple[str, str]:
        self.asked.put(deadline - time.monotonic())
        return self.answers.get(timeout=10)

    def identity(self) -> int:
        return self.socket

    def answer(self, name: str, problem: str = "") -> None:
        """Wait until it is asked, then answer."""
        assert 2.0 < self.asked.get(timeout=10) <= 3.0
        self.answers.put((name, problem))


class Scene:
    def __init__(self, driver: Driver | None = None, delays: Sequence[float] = DELAYS) -> None:
        self.driver = driver or Driver()
        self.learnt: Queue[str] = Queue()
        self.naming = Naming(self.driver, 3.0, self.learnt.put, delays)
        self.stop = Stop()
        self._thread = threading.Thread(target=self.naming.run, args=(self.stop,), daemon=True)

    @contextmanager
    def running(self) -> Iterator[Scene]:
        self._thread.start()
        try:
            yield self
        finally:
            self.end()

    def end(self) -> None:
        """Afterwards it has said whatever it had to say."""
        self.stop.set()
        self.driver.answers.put(NOTHING)  # for an attempt that may be under way
        self._thread.join(10)
        assert not self._thread.is_alive()

    def replace_driver(self) -> None:
        self.driver.socket += 1
        self.naming.reached()


@pytest.fixture
def scene() -> Iterator[Scene]:
    with Scene().running() as running:
        yield running


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "livenessprobe.driver_name")
    return caplog


def test_the_name_is_learnt_and_told_once(scene: Scene, log: pytest.LogCaptureFixture) -> None:
    scene.driver.answer("one.csi")
    assert scene.learnt.get(timeout=10) == "one.csi"
    scene.replace_driver()
    scene.driver.answer("one.csi")
    scene.replace_driver()
    scene.driver.answer("two.csi")
    assert scene.learnt.get(timeout=10) == "two.csi"
    scene.end()

    assert scene.learnt.empty()
    assert [(line.msg, line.args) for line in log.records] == [
        ("Learnt the CSI driver's name", {"driver": "one.csi"}),
        ("Learnt the CSI driver's name", {"driver": "two.csi"}),
    ]


def test_a_driver_that_is_the_same_is_not_asked_again() -> None:
    with Scene(delays=(0.01,)).running() as scene:
        scene.driver.answer("one.csi")
        scene.learnt.get(timeout=10)
        scene.replace_driver()
        scene.driver.answer("two.csi")
        scene.learnt.get(timeout=10)
        for _ in range(100):
            scene.naming.reached()

        with pytest.raises(Empty):
            scene.driver.asked.get(timeout=0.2)


def test_what_goes_wrong_is_said_once_until_it_changes(scene: Scene, log: pytest.LogCaptureFixture) -> None:
    for problem in ("broken", "broken", "otherwise", "", "otherwise"):
        scene.driver.answer("", problem)
        scene.replace_driver()
    scene.driver.answer("one.csi")
    assert scene.learnt.get(timeout=10) == "one.csi"
    scene.end()

    assert [(line.msg, line.args) for line in log.records if line.levelno == logging.WARNING] == [
        ("Cannot learn the CSI driver's name", {"reason": reason})
        for reason in ("broken", "otherwise", "otherwise")
    ]


def test_what_goes_wrong_otherwise_each_time_is_said_five_times_until_there_is_a_name(
    scene: Scene, log: pytest.LogCaptureFixture
) -> None:
    for round_ in range(2):
        for number in range(7):
            scene.driver.answer("", f"request {number} failed")
            scene.replace_driver()
            scene.driver.answer(*NOTHING)  # which does not count
            scene.replace_driver()
        scene.driver.answer(f"{round_}.csi")
        assert scene.learnt.get(timeout=10) == f"{round_}.csi"
        scene.replace_driver()
    scene.end()

    said = [line.args for line in log.records if line.levelno == logging.WARNING]
    assert said == [{"reason": f"request {number} failed"} for number in range(5)] * 2


def test_no_connection_is_not_worth_a_line(scene: Scene, log: pytest.LogCaptureFixture) -> None:
    scene.driver.answer(*NOTHING)
    scene.replace_driver()
    scene.driver.answer("one.csi")
    scene.learnt.get(timeout=10)
    scene.end()

    assert [line.levelno for line in log.records] == [logging.INFO]


def test_a_name_stays_known_while_it_cannot_be_learnt_again(scene: Scene) -> None:
    scene.driver.answer("one.csi")
    scene.replace_driver()
    scene.driver.answer("", "broken")
    scene.replace_driver()
    scene.driver.answer("one.csi")
    scene.end()

    assert [scene.learnt.get_nowait() for _ in range(scene.learnt.qsize())] == ["one.csi"]


def test_it_waits_longer_each_time_and_a_minute_at_most() -> None:
    assert DELAYS == (1, 2, 4, 8, 16, 32, 60)


def test_after_a_failure_it_asks_again_by_itself() -> None:
    with Scene(delays=(0.05, 0.1, 0.3)).running() as scene:
        begin = time.monotonic()
        for number, waited in enumerate((0, 0.05, 0.15, 0.45, 0.75)):
            scene.driver.answer("", f"broken for the {number}th time")
            assert time.monotonic() - begin >= waited
        scene.driver.answer("one.csi")
        assert scene.learnt.get(timeout=10) == "one.csi"


def test_another_driver_is_asked_as_often_at_first() -> None:
    with Scene(delays=(0.01, 3600.0)).running() as scene:
        for _ in range(2):
            scene.driver.answer(*NOTHING)
            scene.driver.answer(*NOTHING)
            scene.replace_driver()
        scene.driver.answer("one.csi")
        assert scene.learnt.get(timeout=10) == "one.csi"


def test_a_driver_may_be_reached_before_anybody_has_asked() -> None:
    scene = Scene()
    scene.naming.reached()
    with scene.running():
        scene.driver.answer("one.csi")
        assert scene.learnt.get(timeout=10) == "one.csi"


def test_a_driver_replaced_during_the_question_is_asked_again(scene: Scene) -> None:
    scene.driver.asked.get(timeout=10)
    scene.driver.socket += 1
    scene.driver.answers.put(("one.csi", ""))
    assert scene.learnt.get(timeout=10) == "one.csi"

    scene.naming.reached()
    scene.driver.answer("two.csi")
    assert scene.learnt.get(timeout=10) == "two.csi"


def test_a_stop_ends_the_wait() -> None:
    with Scene().running() as scene:
        scene.driver.answer("one.csi")
        scene.learnt.get(timeout=10)


def test_a_stop_during_the_question_ends_it_without_a_word(log: pytest.LogCaptureFixture) -> None:
    with Scene().running() as scene:
        scene.driver.asked.get(timeout=10)
        scene.stop.set()
        scene.driver.answers.put(("", "Canceled"))
    assert not log.records


def test_a_stop_before_the_first_question() -> None:
    scene = Scene()
    scene.stop.set()
    with scene.running():
        pass
    assert scene.driver.asked.empty()


class BusyDriver(Driver):
    """Answers at once, and is a different driver each time somebody looks."""

    def name(self, deadline: float) -> tuple[str, str]:
        return "one.csi", ""

    def identity(self) -> int:
        self.socket += 1
        return self.socket


def test_a_stop_at_many_moments_of_the_loop() -> None:
    for turns in range(300):
        scene = Scene(BusyDriver())
        with scene.running():
            for _ in range(turns % 20):
                scene.naming.reached()
