"""Lines of the log: their exact format, what is shown, what no text can do, and where a line cannot be written."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import resource
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import program
import pytest
from hypothesis import given
from hypothesis import strategies as st

from livenessprobe.log import Handler, JSONFormatter, KlogFormatter
from livenessprobe.quoting import cut, quote

if TYPE_CHECKING:
    from collections.abc import Iterator

KLOG = re.compile(
    r"(?P<severity>[IWEF])(?P<month>\d\d)(?P<day>\d\d) (?P<clock>\d\d:\d\d:\d\d)\.(?P<micro>\d{6}) "
    r'(?P<pid>[ \d]{6}\d) (?P<file>\w+\.py):(?P<line>\d+)\] (?P<message>"(?:[^"\\]|\\.)*")(?P<values>.*)'
)
VALUE = re.compile(r' (?P<key>\w+)=(?P<value>"(?:[^"\\]|\\.)*"|[\w.+-]+)')
FORMATTERS = [KlogFormatter(), JSONFormatter()]
ANY_TEXT = st.text(st.characters()) | st.binary().map(lambda data: data.decode(errors="surrogateescape"))


def record(
    message: str = "Message",
    *args: object,
    level: int = logging.INFO,
    error: BaseException | None = None,
    at: float | None = None,
    pid: int | None = None,
) -> logging.LogRecord:
    exc_info = (type(error), error, error.__traceback__) if error else None
    made = logging.LogRecord("livenessprobe.driver", level, "/x/driver.py", 73, message, args, exc_info)
    made.created = made.created if at is None else at
    made.process = made.process if pid is None else pid
    return made


def text_line(*args: Any, **options: Any) -> str:
    return KlogFormatter().format(record(*args, **options))


def json_line(*args: Any, **options: Any) -> dict[str, object]:
    return dict(json.loads(JSONFormatter().format(record(*args, **options))))


# ---- text


def test_the_line_of_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    try:
        line = text_line("Message", {"key": "value", "n": 3}, at=1795404545.528510, pid=9037)
    finally:
        monkeypatch.undo()
        time.tzset()

    assert line == 'I1123 03:29:05.528510    9037 driver.py:73] "Message" key="value" n=3'


def test_a_line_of_now() -> None:
    line = KLOG.fullmatch(text_line())

    assert line
    assert int(line["pid"]) == os.getpid()
    assert (line["file"], line["line"], line["message"], line["values"]) == (
        "driver.py",
        "73",
        '"Message"',
        "",
    )


@pytest.mark.parametrize(("pid", "shown"), [(1, "      1"), (9037, "   9037"), (4194304, "4194304")])
def test_the_pid_is_padded_to_seven(pid: int, shown: str) -> None:
    assert f" {shown} driver.py:73] " in text_line(pid=pid)


@pytest.mark.parametrize(("fraction", "shown"), [(0.0, "000000"), (0.5, "500000"), (0.999999762, "999999")])
def test_microseconds(fraction: float, shown: str) -> None:
    line = KLOG.fullmatch(text_line(at=1795404545 + fraction))

    assert line
    assert line["micro"] == shown


@pytest.mark.parametrize(
    ("level", "severity"),
    [
        (logging.CRITICAL, "F"),
        (logging.ERROR, "E"),
        (logging.WARNING, "W"),
        (logging.INFO, "I"),
        (logging.INFO - 5, "I"),
    ],
)
def test_severities(level: int, severity: str) -> None:
    assert text_line(level=level)[0] == severity


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("text", '"text"'),
        ("", '""'),
        ('a "b" \\ \n', r'"a \"b\" \\ \n"'),
        (3, "3"),
        (-1.5, "-1.5"),
        (True, "true"),
        (False, "false"),
        (["a"], "\"['a']\""),
        (None, '"None"'),
    ],
)
def test_values_in_text(value: object, shown: str) -> None:
    assert text_line("Message", {"key": value}).endswith(f'] "Message" key={shown}')


# ---- JSON


def test_the_json_of_the_contract() -> None:
    line = JSONFormatter().format(record("Message", {"key": "value"}, at=1795405140.9302786))

    assert line == (
        '{"ts":1795405140930.2786,"caller":"livenessprobe/driver.py:73","msg":"Message","v":0,"key":"value"}'
    )


@pytest.mark.parametrize(
    ("level", "start"),
    [
        (logging.CRITICAL, {}),
        (logging.ERROR, {}),
        (logging.WARNING, {"v": 0}),
        (logging.INFO, {"v": 0}),
        (logging.INFO - 5, {"v": 5}),
    ],
)
def test_v_is_on_info_lines_only(level: int, start: dict[str, object]) -> None:
    line = json_line("Message", {"err": "broken", "n": 1}, level=level)

    assert list(line) == ["ts", "caller", "msg", *start, "err", "n"]
    assert line.items() >= start.items()


@pytest.mark.parametrize("value", ["text", "", 'a "b" \\ \n \x00 \u2028', "größer 🦄", 3, -1.5, True, False])
def test_values_in_json(value: object) -> None:
    line = json_line("Message", {"key": value})

    assert line["key"] == value
    assert type(line["key"]) is type(value)


def test_other_values_are_text_in_json() -> None:
    assert json_line("Message", {"key": ["a"]})["key"] == "['a']"


# ---- foreign text


@given(ANY_TEXT, ANY_TEXT)
def test_no_text_can_forge_a_line(message: str, value: str) -> None:
    for formatter in FORMATTERS:
        line = formatter.format(record(message, {"key": value, "last": 1}))
        assert line.isprintable()
        assert line.encode(errors="backslashreplace").decode().splitlines() == [line]

    text = KLOG.fullmatch(text_line(message, {"key": value, "last": 1}))
    assert text
    assert text["message"] == quote(message)
    assert text["values"] == f" key={quote(value)} last=1"


@given(st.text(), st.text())
def test_json_gives_every_text_back(message: str, value: str) -> None:
    line = json_line(message, {"key": value})

    assert (line["msg"], line["key"]) == (message, value)


@pytest.mark.parametrize("long", ["x" * 4097, "\n" * 5000, "🦄" * 1_000_000], ids=["x", "lines", "unicorns"])
def test_texts_over_4_kib_are_cut_and_say_so(long: str) -> None:
    line = json_line(long, {"key": long})

    assert line["msg"] == line["key"] == cut(long) != long
    assert f"(cut, {len(long.encode())} bytes in all)" in str(line["key"])
    assert text_line(long, {"key": long}).endswith(f"] {quote(cut(long))} key={quote(cut(long))}")


# ---- records of libraries


def raised() -> ZeroDivisionError:
    try:
        1 // 0  # noqa: B018
    except ZeroDivisionError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("args", "error", "message", "values"),
    [
        (("%s took %d ms", "a\nb", 3), None, "a\nb took 3 ms", {}),
        (("100 %",), None, "100 %", {}),
        (("%(a)s", {"a": 1}), None, "%(a)s", {"a": 1}),
        (("%d", "no number"), None, "%d", {}),
        (("too many", 1, 2), None, "too many", {}),
        (("failed",), raised(), "failed", {"err": repr(raised())}),
        (("failed: %s", "x"), raised(), "failed: x", {"err": repr(raised())}),
        (("failed", {"err": "ours", "n": 1}), raised(), "failed", {"err": "ours", "n": 1}),
    ],
)
def test_a_library_s_record_is_one_line(
    args: tuple[object, ...], error: Exception | None, message: str, values: dict[str, object]
) -> None:
    line = json_line(*args, level=logging.ERROR, error=error)
    assert {key: line[key] for key in line if key not in ("ts", "caller")} == {"msg": message, **values}

    text = KLOG.fullmatch(text_line(*args, level=logging.ERROR, error=error))
    assert text
    assert text["message"] == quote(message)
    assert [match["key"] for match in VALUE.finditer(text["values"])] == list(values)


def test_exc_info_without_an_exception() -> None:
    made = record()
    made.exc_info = (None, None, None)

    assert KlogFormatter().format(made).endswith('] "Message"')


# ---- what is shown: set up in a process of its own, as it is global

SHOW = """
import json, logging, sys
from livenessprobe import log

verbosity, vmodule, json_lines = json.loads(sys.argv[1])
log.setup(verbosity, [tuple(entry) for entry in vmodule], json_lines)
for module in ("driver", "web", "app"):
    scope = {"log": logging.getLogger("livenessprobe." + module).log}
    for level in (logging.CRITICAL, logging.ERROR, logging.WARNING, *range(logging.INFO, 10, -1)):
        exec(compile(f"log({level}, 'm', {{'l': {level}}})", module + ".py", "exec"), scope)
library = logging.getLogger("some.library")
library.info("too quiet")
library.warning("%s", "loud\\nenough")
try:
    raise OSError("broken")
except OSError:
    library.exception("failed")
"""


def shown(verbosity: int, vmodule: dict[str, int], *, json_lines: bool = False) -> list[str]:
    """The lines on standard error."""
    arguments = json.dumps([verbosity, list(vmodule.items()), json_lines])
    done = subprocess.run(
        [sys.executable, "-c", SHOW, arguments],
        check=True,
        capture_output=True,
        cwd=program.ROOT,
        text=True,
    )
    assert not done.stdout
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    ("verbosity", "vmodule", "most"),
    [
        (0, {}, {"driver": 0, "web": 0, "app": 0}),
        (5, {}, {"driver": 5, "web": 5, "app": 5}),
        (0, {"driver": 5}, {"driver": 5, "web": 0, "app": 0}),
        (2, {"driver": 5, "web": 4}, {"driver": 5, "web": 4, "app": 2}),
        (3, {"driver": 1}, {"driver": 3, "web": 3, "app": 3}),
        (0, {"*": 1}, {"driver": 1, "web": 1, "app": 1}),
        (0, {"w?b": 9, "[ab]pp": 3}, {"driver": 0, "web": 9, "app": 3}),
        (0, {"DRIVER": 5, "driv": 5}, {"driver": 0, "web": 0, "app": 0}),
    ],
)
def test_verbosity_and_vmodule(verbosity: int, vmodule: dict[str, int], most: dict[str, int]) -> None:
    ours = [KLOG.fullmatch(line) for line in shown(verbosity, vmodule)][:-2]

    assert all(ours)
    seen = [(line["file"], int(line["values"].removeprefix(" l="))) for line in ours if line]
    assert seen == [
        (f"{module}.py", level)
        for module in ("driver", "web", "app")
        for level in (50, 40, 30, *range(20, 19 - most[module], -1))
    ]


def test_json_ignores_vmodule() -> None:
    lines = [json.loads(line) for line in shown(1, {"driver": 5}, json_lines=True)]

    assert [(line["caller"].partition(":")[0], line["l"]) for line in lines if "l" in line] == [
        (f"livenessprobe/{module}.py", level)
        for module in ("driver", "web", "app")
        for level in (50, 40, 30, 20, 19)
    ]


def test_libraries_are_heard_from_warnings_on_in_our_format() -> None:
    loud, failed = shown(5, {})[-2:]

    assert loud.startswith("W")
    assert loud.endswith(r'] "loud\nenough"')
    assert failed.startswith("E")
    assert failed.endswith("""] "failed" err="OSError('broken')\"""")


# ---- where a line cannot be written


@contextmanager
def small_pipe() -> Iterator[tuple[int, int]]:
    """Takes two pages; read without blocking."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 2 * resource.getpagesize())
    os.set_blocking(reader, False)
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def handler_on(descriptor: int, formatter: logging.Formatter = FORMATTERS[0]) -> Handler:
    handler = Handler(descriptor)
    handler.setFormatter(formatter)
    return handler


def read(descriptor: int) -> list[str]:
    data = b""
    try:
        while chunk := os.read(descriptor, 65536):
            data += chunk
    except BlockingIOError:
        pass
    assert data.endswith(b"\n") or not data
    return data.decode().splitlines()


@pytest.mark.parametrize("formatter", FORMATTERS, ids=["text", "json"])
def test_a_full_pipe_does_not_block_and_the_loss_is_told_later(formatter: logging.Formatter) -> None:
    with small_pipe() as (reader, writer), closing(handler_on(writer, formatter)) as handler:
        for n in range(500):
            handler.handle(record("Event", {"n": n}))
        kept = read(reader)
        for n in range(500, 502):
            handler.handle(record("Event", {"n": n}))
        told, *after = read(reader)

    assert 0 < len(kept) < 500
    expected = [formatter.format(record("Event", {"n": n}))[-12:] for n in range(502)]
    assert [line[-12:] for line in kept] == expected[: len(kept)]
    lost = formatter.format(record("Log lines were lost", {"lines": 500 - len(kept)}, level=logging.WARNING))
    assert told.endswith(lost.partition("Log lines")[2])
    assert [line[-12:] for line in after] == expected[500:]


def test_a_line_of_which_only_a_part_was_taken_is_not_continued_by_the_next() -> None:
    with small_pipe() as (reader, writer), closing(handler_on(writer)) as handler:
        handler.handle(record("\0" * 4000))  # 16 KB, as each is written as \x00
        first_part = os.read(reader, 65536).decode()
        handler.handle(record("next"))
        end, told, after = read(reader)

    assert len(first_part) == 2 * resource.getpagesize()
    assert "\n" not in first_part
    assert end == ""
    assert told.endswith('"Log lines were lost" lines=1')
    assert after.endswith('] "next"')


def test_lines_are_counted_once_when_the_note_alone_was_taken() -> None:
    with small_pipe() as (reader, writer), closing(handler_on(writer)) as handler:
        os.write(writer, b"\n" * 2 * resource.getpagesize())
        handler.handle(record("lost"))
        read(reader)
        handler.handle(record("\0" * 4000))  # room for the note, not for all of this
        os.read(reader, 65536)
        handler.handle(record("next"))
        lines = read(reader)

    assert lines[-2].endswith('"Log lines were lost" lines=1')
    assert lines[-1].endswith('] "next"')


def closed_descriptor() -> int:
    descriptor = fcntl.fcntl(0, fcntl.F_DUPFD, 500)
    os.close(descriptor)
    return descriptor


def descriptor_nobody_reads() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    "descriptor",
    [closed_descriptor, descriptor_nobody_reads, lambda: os.open("/dev/full", os.O_WRONLY)],
    ids=["closed", "nobody reads", "/dev/full"],
)
def test_a_line_that_cannot_be_written_is_no_error(descriptor: Any) -> None:
    number = descriptor()
    with closing(handler_on(number)) as handler:
        for _ in range(3):
            handler.handle(record())
    try:
        os.close(number)
    except OSError:
        assert descriptor is closed_descriptor


def test_lines_of_many_threads_do_not_mix() -> None:
    reader, writer = os.pipe()
    lines: list[str] = []
    with open(reader, encoding="utf-8") as stream:
        collecting = threading.Thread(target=lambda: lines.extend(stream))
        collecting.start()
        with closing(handler_on(writer)) as handler:

            def work(name: str) -> None:
                for _ in range(50):
                    handler.handle(record(name * 1500))

            threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        os.close(writer)
        collecting.join()

    messages = [found["message"] for line in lines if (found := KLOG.fullmatch(line.rstrip("\n")))]
    assert len(messages) == len(lines)
    assert {message for message in messages if "lost" not in message} <= {
        f'"{name * 1500}"' for name in "abcd"
    }
