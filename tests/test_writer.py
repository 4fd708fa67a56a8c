"""Lines to descriptors that take nothing, or not now: nobody waits, lines stay whole and in order, losses are counted."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import resource
import select
import socket
import subprocess
import termios
import threading
import time
import tty
from functools import partial
from typing import TYPE_CHECKING

import pytest

from livenessprobe.writer import MOMENT_SECONDS, MOST_BYTES, Writer, write_out

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PIPE_BYTES = 2 * resource.getpagesize()
LINE = 64  # bytes, with its end
FITTING = MOST_BYTES // LINE


def on(descriptor: int) -> Writer:
    return Writer(descriptor, "{} lost".format)


def line(n: int) -> str:
    return f"{n:0{LINE - 1}d}"


def write(writer: Writer, *lines: str) -> None:
    """Write lines; fails if that waits for a reader."""

    def write_all() -> None:
        for each in lines:
            writer.write(each)

    at_once(write_all)


def at_once(act: Callable[[], None]) -> None:
    """Do what must not wait for a reader; fails if it does, instead of waiting with it."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def flush(writer: Writer) -> None:
    """Wait until all is written; fails if that takes too long."""
    end = time.monotonic() + 20
    writer.flush(20)
    assert time.monotonic() < end


def take(descriptor: int, size: int) -> bytes:
    """What there is, up to so many bytes; fails if nothing comes."""
    assert select.select([descriptor], [], [], 20.0)[0]
    return os.read(descriptor, size)


def read_until(descriptor: int, last: str, seconds: float = 20.0) -> list[str]:
    """All lines, up to one that matches; fails if none comes."""
    data, end = b"", time.monotonic() + seconds
    while not re.search(rf"(?m)^{last}\r?\n\Z", data.decode()):
        assert select.select([descriptor], [], [], max(0, end - time.monotonic()))[0], data[-1000:]
        more = os.read(descriptor, 65536)
        assert more, data[-1000:]
        data += more
    return [each.rstrip("\r") for each in data.decode().split("\n")[:-1]]


def fill(descriptor: int) -> int:
    """Take all the room there is; return how many bytes that was."""
    os.set_blocking(descriptor, False)
    size = 0
    with contextlib.suppress(BlockingIOError):
        for step in (1024, 1):
            with contextlib.suppress(BlockingIOError):
                while True:
                    size += os.write(descriptor, b"\n" * step)
    os.set_blocking(descriptor, True)
    return size


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Takes two pages."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    yield from _closing(reader, writer)


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    reader, writer = pty.openpty()
    tty.setraw(writer)
    yield from _closing(reader, writer)


@contextlib.contextmanager
def sockets(kind: socket.SocketKind) -> Iterator[tuple[int, int]]:
    reader, writer = socket.socketpair(socket.AF_UNIX, kind)
    yield from _closing(reader.detach(), writer.detach())


def _closing(reader: int, writer: int) -> Iterator[tuple[int, int]]:
    try:
        yield reader, writer
    finally:
        # A writer's thread that is still waiting gets an error.
        os.close(reader)
        os.close(writer)


KINDS: dict[str, Callable[[], contextlib.AbstractContextManager[tuple[int, int]]]] = {
    "pipe": pipe,
    "terminal": terminal,
    "stream socket": partial(sockets, socket.SOCK_STREAM),
    "packet socket": partial(sockets, socket.SOCK_SEQPACKET),
}


# ---- nobody reads for now


@pytest.mark.parametrize("kind", KINDS)
def test_lines_that_nobody_reads_are_kept_in_order_and_then_counted(kind: str) -> None:
    with KINDS[kind]() as (reader, descriptor):
        writer = on(descriptor)
        write(writer, *map(line, range(20_000)))
        *kept, told = read_until(reader, r"\d+ lost")
        write(writer, "after")
        after = read_until(reader, "after")

    assert FITTING <= len(kept) < 20_000
    assert kept == [line(n) for n in range(len(kept))]
    assert told == f"{20_000 - len(kept)} lost"
    assert after == ["after"]


def test_a_stopped_terminal_takes_all_once_it_goes_on() -> None:
    with terminal() as (reader, descriptor):
        writer = on(descriptor)
        termios.tcflow(descriptor, termios.TCOOFF)  # ^S
        write(writer, *map(line, range(10)))
        writer.flush(0.1)
        assert not select.select([reader], [], [], 0)[0]
        termios.tcflow(descriptor, termios.TCOON)  # ^Q

        assert read_until(reader, line(9)) == [line(n) for n in range(10)]


@pytest.mark.parametrize("more", [0, 1, 2])
def test_the_queue_takes_64_kib_and_tells_at_once_when_there_is_room_again(more: int) -> None:
    assert MOST_BYTES == 64 * 1024
    with pipe() as (reader, descriptor):
        taken = fill(descriptor)
        writer = on(descriptor)
        write(writer, *map(line, range(FITTING + more)))
        take(reader, taken)
        lines = read_until(reader, f"{more} lost" if more else line(FITTING - 1))
        flush(writer)

        assert not select.select([reader], [], [], 0)[0]

    assert lines == [line(n) for n in range(FITTING)] + [f"{more} lost"] * bool(more)


def test_what_is_written_leaves_its_room_in_the_queue() -> None:
    with pipe() as (reader, descriptor):
        writer = on(descriptor)
        for n in range(FITTING):
            write(writer, line(n))
            flush(writer)
            take(reader, LINE)
        taken = fill(descriptor)
        write(writer, *map(line, range(FITTING)))
        take(reader, taken)

        assert read_until(reader, line(FITTING - 1)) == [line(n) for n in range(FITTING)]


def test_a_byte_too_many_does_not_fit() -> None:
    with pipe() as (reader, descriptor):
        taken = fill(descriptor)
        writer = on(descriptor)
        write(writer, *map(line, range(FITTING - 1)))
        write(writer, "x" * LINE)
        take(reader, taken)

        assert read_until(reader, "1 lost")[-2:] == [line(FITTING - 2), "1 lost"]


def test_after_a_loss_no_line_is_taken_before_the_queue_is_empty() -> None:
    """Not even one that there would be room for: there is one gap, not many."""
    with pipe() as (reader, descriptor):
        taken = fill(descriptor)
        writer = on(descriptor)
        write(writer, *("x" * size for size in (30_000, 30_000, 30_000, 10)))
        take(reader, taken)
        lines = read_until(reader, r"\d lost")

    assert [len(each) for each in lines[:-1]] == [30_000, 30_000]
    assert lines[-1] == "2 lost"


def test_a_line_longer_than_the_queue_is_taken_alone() -> None:
    with pipe() as (reader, descriptor):
        writer = on(descriptor)
        write(writer, "x" * 2 * MOST_BYTES, "too many")

        assert [len(each) for each in read_until(reader, "1 lost")] == [2 * MOST_BYTES, len("1 lost")]


def test_beside_another_writer_lines_stay_whole_and_nobody_waits() -> None:
    """Room that was there a moment ago is now taken by the other writer."""
    busy = ["sh", "-c", "while :; do echo other; done"]
    ours: list[str] = []
    end = time.monotonic() + 60
    with pipe() as (reader, descriptor), subprocess.Popen(busy, stdout=descriptor) as other:
        try:
            writer = on(descriptor)
            write(writer, *map(line, range(3000)))
            with open(os.dup(reader), encoding="utf-8") as stream:
                while not ours or not ours[-1].endswith(" lost"):
                    assert time.monotonic() < end
                    ours += [each for each in [stream.readline().rstrip("\n")] if each != "other"]
        finally:
            other.kill()
    *kept, told = ours

    assert kept == [line(n) for n in range(len(kept))]
    assert told == f"{3000 - len(kept)} lost"


def test_a_description_that_is_non_blocking_loses_no_line_either() -> None:
    with pipe() as (reader, descriptor):
        taken = fill(descriptor)
        os.set_blocking(descriptor, False)
        writer = on(descriptor)
        write(writer, *map(line, range(FITTING)))
        writer.flush(0.1)  # so that the first line meets no room
        take(reader, taken)

        assert read_until(reader, line(FITTING - 1)) == [line(n) for n in range(FITTING)]
        assert not os.get_blocking(descriptor)


# ---- nobody ever takes them


def closed() -> int:
    descriptor = fcntl.fcntl(0, fcntl.F_DUPFD, 500)
    os.close(descriptor)
    return descriptor


def nobody_reads() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_device() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("descriptor", [closed, nobody_reads, full_device])
def test_what_cannot_be_written_is_lost_at_once_and_told_where_it_can_be(
    descriptor: Callable[[], int],
) -> None:
    number = descriptor()
    writer = on(number)
    for _ in range(3):
        write(writer, "lost")
        flush(writer)
    with pipe() as (reader, other):
        os.dup2(other, number)
        write(writer, "next")
        lines = read_until(reader, "next")
        flush(writer)
        os.close(number)

    assert lines == ["3 lost", "next"]


def test_out_of_memory_it_goes_on_later() -> None:
    told: list[int] = []

    def loss(lines: int) -> str:
        told.append(lines)
        if len(told) == 1:
            raise MemoryError
        return f"{lines} lost"

    with pipe() as (reader, descriptor):
        taken = fill(descriptor)
        writer = Writer(descriptor, loss)
        write(writer, *("x" * 30_000 for _ in range(3)))
        take(reader, taken)
        read_until(reader, "x{30000}\nx{30000}")
        end = time.monotonic() + 20
        while not told:
            assert time.monotonic() < end
        write(writer, "next")

        assert read_until(reader, "next") == ["1 lost", "next"]
    assert told == [1, 1]


def test_what_was_torn_is_not_continued_by_the_next_line() -> None:
    with pipe() as (reader, descriptor):
        writer = on(descriptor)
        write(writer, "x" * 100_000)
        assert take(reader, 1) == b"x"
        number = os.dup(reader)
        with pipe() as (other_reader, other):
            os.dup2(other_reader, reader)  # nobody reads the first pipe any more once this is closed too:
            os.close(number)
            flush(writer)
            os.dup2(other, descriptor)
            write(writer, "next")
            lines = read_until(other_reader, "next")
            flush(writer)

    assert lines == ["", "1 lost", "next"]


# ---- threads


def work(writer: Writer, names: str, lines: int, size: int) -> None:
    def write(name: str) -> None:
        for n in range(lines):
            writer.write(f"{name}{n:05d}" + name * size)

    threads = [threading.Thread(target=write, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
        assert not thread.is_alive()


def test_lines_of_many_threads_arrive_all_whole_and_each_thread_s_in_order() -> None:
    with pipe() as (reader, descriptor):
        writer = on(descriptor)
        work(writer, "abcd", 50, 300)
        write(writer, "end")
        *lines, _ = read_until(reader, "end")

    assert sorted(lines) == [f"{name}{n:05d}" + name * 300 for name in "abcd" for n in range(50)]
    assert [sorted(of) == of for name in "abcd" for of in [[each for each in lines if each[0] == name]]] == [
        True
    ] * 4


def test_no_line_of_many_threads_is_forgotten() -> None:
    """Each is longer than a pipe takes in one piece, and together they are far too much."""
    lines: list[str] = []
    with pipe() as (reader, descriptor):
        writer = on(descriptor)
        reading = threading.Thread(target=lambda: lines.extend(read_until(reader, "end", 60)), daemon=True)
        reading.start()
        work(writer, "abcdefgh", 200, 5000)
        flush(writer)
        write(writer, "end")
        reading.join(60)
    kept = [each for each in lines[:-1] if not each.endswith(" lost")]
    lost = sum(int(each.split()[0]) for each in lines[:-1] if each.endswith(" lost"))

    assert lines[-1] == "end"
    assert kept
    assert all(re.fullmatch(r"([a-h])\d{5}\1{5000}", each) for each in kept)
    assert len(kept) + lost == 8 * 200


def test_while_a_loss_is_told_no_line_is_taken() -> None:
    others: list[threading.Thread] = []

    def loss(lost: int) -> str:
        if not others:
            others.append(threading.Thread(target=writer.write, args=("other",), daemon=True))
            others[0].start()
            others[0].join(0.2)  # in which it would be taken
        return f"{lost} lost"

    with pipe() as (reader, descriptor):
        writer = Writer(descriptor, loss)
        write(writer, "x" * 2 * MOST_BYTES, "too many")
        lines = read_until(reader, "other")
        write(writer, "end")
        lines += read_until(reader, "end")

    assert lines[1:] == ["1 lost", "other", "end"]


@contextlib.contextmanager
def no_thread_to_be_had() -> Iterator[None]:
    before = threading.stack_size(2**46)
    try:
        yield
    finally:
        threading.stack_size(before)


def test_without_a_thread_it_writes_what_is_taken_and_nobody_waits() -> None:
    with pipe() as (reader, descriptor):
        with no_thread_to_be_had():
            writer = on(descriptor)
        write(writer, *map(line, range(1000)))
        flush(writer)
        assert os.get_blocking(descriptor)
        kept = PIPE_BYTES // LINE
        lines = read_until(reader, line(kept - 1))
        write(writer, "next")
        lines += read_until(reader, "next")

    assert lines == [*(line(n) for n in range(kept)), f"{1000 - kept} lost", "next"]


# ---- the end


def test_flush_waits_for_what_is_being_written_but_not_for_ever() -> None:
    with pipe() as (reader, descriptor):
        writer = on(descriptor)
        write(writer, "x")
        flush(writer)
        assert take(reader, 10) == b"x\n"
        fill(descriptor)
        write(writer, "y")
        begin = time.monotonic()
        writer.flush(0.1)

        assert 0.1 <= time.monotonic() - begin < 10


def test_the_last_lines_of_standard_output_and_error_have_a_second_together() -> None:
    assert 0 < 2 * MOMENT_SECONDS < 1


class Late(Writer):
    """Its thread has no turn before it is told, as on a machine that is busy."""

    def __init__(self, descriptor: int) -> None:
        self.turn = threading.Event()
        super().__init__(descriptor, "{} lost".format)

    def _write_some(self, data: bytes) -> int:
        assert self.turn.wait(20)
        return super()._write_some(data)


def test_a_thread_that_is_late_is_awaited_while_somebody_reads() -> None:
    with pipe() as (reader, descriptor):
        writer = Late(descriptor)
        writer.write("at last")
        timer = threading.Timer(2 * MOMENT_SECONDS, writer.turn.set)
        timer.daemon = True
        timer.start()
        at_once(writer.flush)

        assert select.select([reader], [], [], 0)[0]
        assert take(reader, 100) == b"at last\n"


@pytest.mark.parametrize("read", [True, False])
def test_a_thread_that_never_has_its_turn_is_given_up(read: bool) -> None:
    with pipe() as (_, descriptor):
        if not read:
            fill(descriptor)
        writer = Late(descriptor)
        writer.write("lost")
        begin = time.monotonic()
        at_once(writer.flush)
        took = time.monotonic() - begin
        writer.turn.set()

    assert took >= 5 + MOMENT_SECONDS if read else MOMENT_SECONDS <= took < 5


def test_one_text_is_written_as_a_whole_or_given_up() -> None:
    with pipe() as (reader, descriptor):
        write_out(descriptor, "two\nlines \udcff")
        assert select.select([reader], [], [], 0)[0]
        assert take(reader, 100) == b"two\nlines \\udcff\n"
        fill(descriptor)
        begin = time.monotonic()
        at_once(lambda: write_out(descriptor, "nobody reads"))

        assert MOMENT_SECONDS <= time.monotonic() - begin < 10
