"""The log: klog text or JSON on standard error, one line an event, and a line never blocks the program.

Elsewhere a line is written with the standard logging module, as a constant message and a dict of values:
`logger.info("Message", {"key": value})`. Verbosity n is the level logging.INFO - n; errors have the key "err".
"""

import fnmatch
import logging
import os
import select
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from livenessprobe.quoting import cut, quote

# On Linux a pipe that polls writable takes this much without blocking (PIPE_BUF, pipe(7)).
_CHUNK = 4096
_SEVERITIES = {logging.CRITICAL: "F", logging.ERROR: "E", logging.WARNING: "W"}


def setup(verbosity: int, vmodule: Sequence[tuple[str, int]], json_lines: bool) -> None:
    """Write our log, and warnings of libraries, to standard error; vmodule applies to text only, as in klog."""
    logging.raiseExceptions = False  # a line that cannot be written is not a reason to print a traceback
    modules = () if json_lines else tuple(vmodule)
    handler = Handler()
    handler.setFormatter(JSONFormatter() if json_lines else KlogFormatter())
    logging.getLogger().handlers = [handler]
    ours = logging.getLogger("livenessprobe")
    ours.setLevel(max(1, logging.INFO - max([verbosity, *(level for _, level in modules)])))
    ours.propagate = False
    own = Handler()
    own.setFormatter(handler.formatter)
    own.addFilter(lambda record: _enabled(record, verbosity, modules))
    ours.handlers = [own]


def _enabled(record: logging.LogRecord, verbosity: int, modules: Sequence[tuple[str, int]]) -> bool:
    level = logging.INFO - record.levelno
    if level <= max(verbosity, 0):
        return True
    return any(level <= most for pattern, most in modules if fnmatch.fnmatchcase(record.module, pattern))


class Handler(logging.Handler):
    """Writes to descriptor 2 what it takes without blocking; counts what it does not take, and says so later."""

    def __init__(self, descriptor: int = 2) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lost = 0
        self._torn = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, or lose it."""
        if self._lost:
            note = logging.LogRecord(
                record.name,
                logging.WARNING,
                record.pathname,
                record.lineno,
                "Log lines were lost",
                ({"lines": self._lost},),
                None,
            )
            if self._write(self.format(note)):
                self._lost = 0
        if self._lost or not self._write(self.format(record)):
            self._lost += 1

    def _write(self, line: str) -> bool:
        """Return whether all was written; after a part of a line, the next one does not continue it."""
        data = rest = ("\n" * self._torn + line + "\n").encode(errors="backslashreplace")
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        with suppress(OSError):  # closed, or nobody reads any more
            while rest and poll.poll(0):
                rest = rest[os.write(self._descriptor, rest[:_CHUNK]) :]
        if len(rest) < len(data):
            self._torn = bool(rest)
        return not rest


def _values(record: logging.LogRecord) -> Mapping[str, object]:
    """Return a line's values; a library's positional arguments and exception become values too."""
    values: dict[str, object] = dict(record.args) if isinstance(record.args, Mapping) else {}
    if record.exc_info and record.exc_info[1] is not None:
        values = {"err": repr(record.exc_info[1]), **values}
    return values


def _message(record: logging.LogRecord) -> str:
    if not isinstance(record.args, Mapping):
        with suppress(TypeError, ValueError):  # a library's arguments that do not fit its message
            return record.getMessage()
    return str(record.msg)


class KlogFormatter(logging.Formatter):
    """`I1123 03:29:05.528510    9037 driver.py:73] "Message" key="value" n=3`, the format of Kubernetes' klog."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its end."""
        severity = _SEVERITIES.get(record.levelno, "I")
        moment = time.strftime("%m%d %H:%M:%S", time.localtime(record.created))
        microseconds = int(record.created % 1 * 1e6)
        header = (
            f"{severity}{moment}.{microseconds:06d} {record.process:7d} {record.filename}:{record.lineno}] "
        )
        pairs = "".join(f" {key}={self._value(value)}" for key, value in _values(record).items())
        return header + quote(cut(_message(record))) + pairs

    @staticmethod
    def _value(value: object) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int | float):
            return str(value)
        return quote(cut(str(value)))


class JSONFormatter(logging.Formatter):
    """One JSON object a line, with the keys of the Kubernetes components; ts in milliseconds since the epoch."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its end."""
        import json  # only where asked for: it costs start-up time

        line: dict[str, object] = {
            "ts": round(record.created * 1e3, 4),
            "caller": f"livenessprobe/{record.filename}:{record.lineno}",
            "msg": cut(_message(record)),
        }
        if record.levelno <= logging.WARNING:
            line["v"] = max(0, logging.INFO - record.levelno)
        for key, value in _values(record).items():
            line[key] = value if isinstance(value, bool | int | float) else cut(str(value))
        return json.dumps(line, separators=(",", ":"))
