"""The log: klog text or JSON on standard error, one line per event, and a line never blocks the program.

Elsewhere a line is written with the standard logging module, as a constant message and a dict of values:
`logger.info("Message", {"key": value})`. Verbosity n is the level logging.INFO - n; errors have the key "err".
What libraries log is not shown.
"""

import fnmatch
import logging
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress

from livenessprobe.quoting import cut, quote
from livenessprobe.writer import Writer

_logger = logging.getLogger(__name__)
_SEVERITIES = {logging.CRITICAL: "F", logging.ERROR: "E", logging.WARNING: "W"}


def setup(verbosity: int, vmodule: Sequence[tuple[str, int]], json_lines: bool) -> None:
    """Write our log, and nothing of any library, to standard error; vmodule applies to text only, as in klog."""
    warnings.simplefilter("ignore")
    logging.getLogger().handlers = [logging.NullHandler()]
    modules = () if json_lines else tuple(vmodule)
    ours = logging.getLogger("livenessprobe")
    ours.setLevel(max(1, logging.INFO - max([verbosity, *(level for _, level in modules)])))
    handler = Handler(JSONFormatter() if json_lines else KlogFormatter())
    handler.addFilter(lambda record: _enabled(record, verbosity, modules))
    ours.handlers = [handler]
    # Otherwise whatever ends a thread, or fails while an object is freed, would print a traceback.
    threading.excepthook = sys.unraisablehook = _report_failed


def _report_failed(failed: "threading.ExceptHookArgs | sys.UnraisableHookArgs") -> None:
    with suppress(MemoryError):
        report(failed.exc_value)


def report(error: BaseException | None) -> None:
    """Write the line for an error that nobody expected: a defect, unless the system denied something."""
    denied = ""
    with suppress(ImportError):  # it may be what is broken
        from livenessprobe.limits import denial

        denied = denial(error)
    if denied:
        _logger.critical("The system denies what is needed", {"err": denied})
    else:
        _logger.critical("Unexpected error, please report it", {"err": repr(error)})


def flush() -> None:
    """Give the last lines a moment to be written."""
    for handler in logging.getLogger("livenessprobe").handlers:
        handler.flush()


def _enabled(record: logging.LogRecord, verbosity: int, modules: Sequence[tuple[str, int]]) -> bool:
    level = logging.INFO - record.levelno
    if level <= verbosity:
        return True
    return any(level <= most for pattern, most in modules if fnmatch.fnmatchcase(record.module, pattern))


class Handler(logging.Handler):
    """Hands lines to a writer; what that doesn't take is counted, and reported later."""

    def __init__(self, formatter: logging.Formatter, descriptor: int = 2) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._writer = Writer(descriptor, self._loss)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, or lose it."""
        self._writer.write(self.format(record))

    def flush(self) -> None:
        """Give the last lines a moment to be written."""
        self._writer.flush()

    def _loss(self, lines: int) -> str:
        # Of the code, since a packed module has no file.
        here = Handler._loss.__code__
        values = {"lines": lines}
        return self.format(
            logging.LogRecord(
                __name__,
                logging.WARNING,
                here.co_filename,
                here.co_firstlineno,
                "Log lines were lost",
                (values,),
                None,
            )
        )


def _values(record: logging.LogRecord) -> Mapping[str, object]:
    return record.args if isinstance(record.args, Mapping) else {}  # none were given


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
        return header + quote(cut(record.msg)) + pairs

    @staticmethod
    def _value(value: object) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int | float):
            return str(value)
        return quote(cut(str(value)))


class JSONFormatter(logging.Formatter):
    """One JSON object per line, with the keys of the Kubernetes components; ts in milliseconds since the epoch."""

    def __init__(self) -> None:
        super().__init__()
        from json import dumps  # only where asked for: it costs start-up time

        self._dumps = dumps

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its end."""
        line: dict[str, object] = {
            "ts": record.created * 1e3,
            "caller": f"livenessprobe/{record.filename}:{record.lineno}",
            "msg": cut(record.msg),
        }
        if record.levelno <= logging.WARNING:
            line["v"] = max(0, logging.INFO - record.levelno)
        for key, value in _values(record).items():
            line[key] = value if isinstance(value, bool | int | float) else cut(str(value))
        return self._dumps(line, separators=(",", ":"))
