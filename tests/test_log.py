"""Lines of the log: their exact format, what is shown, what no text can do, and what if a line cannot be written."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import peers
import program
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_writer import read_until

from livenessprobe.log import Handler, JSONFormatter, KlogFormatter
from livenessprobe.quoting import cut, quote

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import ProbeFactory

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
    at: float | None = None,
    pid: int | None = None,
) -> logging.LogRecord:
    made = logging.LogRecord("livenessprobe.driver", level, "/x/driver.py", 73, message, args, None)
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


# ---- what is shown: set up in a process of its own, as it is global

SHOW = """
import json, logging, sys
from livenessprobe import log

verbosity, vmodule, json_lines = json.loads(sys.argv[1])
log.setup(verbosity, [tuple(entry) for entry in vmodule], json_lines)
for module in ("driver", "web", "app"):
    scope = {"log": logging.getLogger("livenessprobe." + module).log}
    for level in (logging.CRITICAL, logging.ERROR, logging.WARNING, *range(logging.INFO, 0, -1)):
        exec(compile(f"log({level}, 'm', {{'l': {level}}})", module + ".py", "exec"), scope)
"""

NOISE = """
import logging, sys, threading, warnings
from livenessprobe import log

class Unclean:
    def __del__(self):
        raise OSError("in vain")

log.setup(20, [], sys.argv[1] == "json")
for name in ("", "some.library", "livenessprobe2"):
    library = logging.getLogger(name)
    library.critical("%s", "loud\\nenough")
    try:
        raise OSError("broken")
    except OSError:
        library.exception("failed")
    library.error("%d", "arguments that do not fit")
warnings.warn("soon to be gone", DeprecationWarning)
warnings.warn("anyway")
thread = threading.Thread(target=lambda: 1 // 0)
thread.start()
thread.join()
Unclean()
log.flush()
"""


def shown(verbosity: int, vmodule: dict[str, int], *, json_lines: bool = False) -> list[str]:
    """The lines on standard error."""
    return said(SHOW, json.dumps([verbosity, list(vmodule.items()), json_lines]))


def said(script: str, argument: str, folder: Path = program.ROOT) -> list[str]:
    """The lines on standard error."""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", script, argument],
        check=True,
        capture_output=True,
        cwd=folder,
        text=True,
    )
    assert not done.stdout
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    ("verbosity", "vmodule", "most"),
    [
        (0, {}, {"driver": 0, "web": 0, "app": 0}),
        (5, {}, {"driver": 5, "web": 5, "app": 5}),
        (19, {}, {"driver": 19, "web": 19, "app": 19}),
        (20, {}, {"driver": 19, "web": 19, "app": 19}),
        (10**19, {}, {"driver": 19, "web": 19, "app": 19}),
        (1, {"web": 20}, {"driver": 1, "web": 19, "app": 1}),
        (0, {"driver": 5}, {"driver": 5, "web": 0, "app": 0}),
        (2, {"driver": 5, "web": 4}, {"driver": 5, "web": 4, "app": 2}),
        (3, {"driver": 1}, {"driver": 3, "web": 3, "app": 3}),
        (0, {"*": 1}, {"driver": 1, "web": 1, "app": 1}),
        (0, {"w?b": 9, "[ab]pp": 3}, {"driver": 0, "web": 9, "app": 3}),
        (0, {"DRIVER": 5, "driv": 5}, {"driver": 0, "web": 0, "app": 0}),
    ],
)
def test_verbosity_and_vmodule(verbosity: int, vmodule: dict[str, int], most: dict[str, int]) -> None:
    ours = [KLOG.fullmatch(line) for line in shown(verbosity, vmodule)]

    assert all(ours)
    seen = [(line["file"], int(line["values"].removeprefix(" l="))) for line in ours if line]
    assert [line["severity"] for line in ours if line] == [
        {50: "F", 40: "E", 30: "W"}.get(level, "I") for _, level in seen
    ]
    assert seen == [
        (f"{module}.py", level)
        for module in ("driver", "web", "app")
        for level in (50, 40, 30, *range(20, 19 - most[module], -1))
    ]


def test_json_ignores_vmodule() -> None:
    lines = [json.loads(line) for line in shown(1, {"driver": 5}, json_lines=True)]

    assert [(line["caller"].partition(":")[0], line["l"]) for line in lines] == [
        (f"livenessprobe/{module}.py", level)
        for module in ("driver", "web", "app")
        for level in (50, 40, 30, 20, 19)
    ]


@pytest.mark.parametrize("form", ["text", "json"])
def test_libraries_and_warnings_are_not_heard_and_a_defect_is_one_line(form: str) -> None:
    thread, unclean = said(NOISE, form)

    for line, error in ((thread, "ZeroDivisionError"), (unclean, "in vain")):
        assert "Unexpected error, please report it" in line
        assert error in line
        assert json.loads(line)["err"] if form == "json" else line[0] == "F"


DENIED = """
import errno
from livenessprobe import log
log.setup(0, [], False)
log.report(PermissionError(errno.EPERM, ""))
log.report(MemoryError())
log.report(None)
"""


def test_what_the_system_denies_is_no_defect() -> None:
    call, memory, defect = said(DENIED, "")

    message = '"The system denies what is needed" err="'
    assert f"{message}operation not permitted: a seccomp profile or a security module denies a call" in call
    assert f"{message}out of memory; seen from here: " in memory
    assert '"Unexpected error, please report it" err="None"' in defect


def test_a_defect_is_told_without_what_explains_it_too(folder: Path) -> None:
    """That may be what is damaged."""
    left_out = shutil.ignore_patterns("__pycache__", "limits.py")
    shutil.copytree(program.ROOT / "livenessprobe", folder / "livenessprobe", ignore=left_out)
    script = "from livenessprobe import log\nlog.setup(0, [], False)\nlog.report(MemoryError())"

    (line,) = said(script, "", folder)
    assert line.endswith('] "Unexpected error, please report it" err="MemoryError()"')


LAST_LINES = """
import logging, os
from livenessprobe import log
log.setup(0, [], False)
for n in range(200):
    logging.getLogger("livenessprobe.some").info("Line", {"n": n})
log.flush()
os._exit(0)
"""


def test_the_last_lines_are_given_a_moment() -> None:
    assert [line.partition("] ")[2] for line in said(LAST_LINES, "")] == [f'"Line" n={n}' for n in range(200)]


# ---- if a line cannot be written


@pytest.mark.parametrize("formatter", FORMATTERS, ids=["text", "json"])
def test_lost_lines_are_told_in_a_line_of_the_log(formatter: logging.Formatter) -> None:
    reader, descriptor = os.pipe()
    fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, resource.getpagesize())
    with open(reader, encoding="utf-8"), closing(Handler(formatter, descriptor)) as handler:
        for n in range(3000):
            handler.handle(record("Event", {"n": n}))
        *kept, told = read_until(reader, ".* lost.*")
        os.close(descriptor)

    assert [line.rpartition("Event")[2] for line in kept] == [
        formatter.format(record("Event", {"n": n})).rpartition("Event")[2] for n in range(len(kept))
    ]
    written = record("Log lines were lost", {"lines": 3000 - len(kept)}, level=logging.WARNING)
    assert told.partition("Log lines")[2] == formatter.format(written).partition("Log lines")[2]
    if formatter is FORMATTERS[0]:
        assert re.match(r"W.* log\.py:[1-9]\d*\] ", told)
    else:
        assert re.match(r'\{"ts":[\d.]+,"caller":"livenessprobe/log\.py:[1-9]\d*","msg"', told)


# ---- a driver's text that differs each time


def field(name: bytes, value: bytes) -> bytes:
    """A header that is in no table of HPACK's (RFC 7541, 6.2.2)."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def fail_ever_otherwise(calls: Iterator[int], connection: socket.socket) -> None:
    """Answer each call with an error whose text is not UTF-8, and has a number in it."""
    with connection.makefile("rb") as stream:
        stream.read(len(peers.PREFACE))
        connection.sendall(peers.SETTINGS)
        while header := stream.read(9):
            payload = stream.read(int.from_bytes(header[:3], "big"))
            kind, flags, number = header[3], header[4], int.from_bytes(header[5:], "big")
            if kind == 4 and not flags & 1:
                connection.sendall(peers.SETTINGS_ACK)
            if kind == 6 and not flags & 1:
                connection.sendall(peers.frame(6, payload, 1))
            if kind == 1:
                block = field(b":status", b"200") + field(b"content-type", b"application/grpc")
                text = b"disk \xff%d" % next(calls)
                block += field(b"grpc-status", b"13") + field(b"grpc-message", text)
                connection.sendall(peers.frame(1, block, 5, number))


def test_a_text_that_is_no_utf_8_and_always_another_is_news_five_times(
    probe_factory: ProbeFactory, socket_path: Path
) -> None:
    with peers.talking(partial(fail_ever_otherwise, itertools.count(1)), socket_path):
        probe = probe_factory(f"--csi-address={socket_path}", "--http-endpoint=127.0.0.1:0")
        texts = [probe.get().text for _ in range(30)]
        probe.stop()

    assert len(set(texts)) == 30
    shown = [
        found[1]
        for line in probe.log_lines
        if (found := re.search(r'driver is not healthy" err="(.*)"$', line))
    ]
    assert shown == texts[:5]
    # And no library writes about it.
    others = [line for line in probe.log_lines if "not healthy" not in line and "Cannot learn" not in line]
    assert [re.sub(r'.*\] "(\w+)".*', r"\1", line) for line in others] == ["Serving", "Stopping"]
    assert all("disk " in text and text.isprintable() for text in texts)
