"""The command line: from arguments to the exit code of what they ask for."""

import logging
import sys
from collections.abc import Sequence

from livenessprobe import __version__, config, goflags, log
from livenessprobe.config import Exit
from livenessprobe.writer import write_out

_logger = logging.getLogger(__name__)


def run(arguments: Sequence[str]) -> Exit:
    """Do what the command line asks for; return the exit code."""
    try:
        return _run(arguments)
    finally:
        log.flush()


def _run(arguments: Sequence[str]) -> Exit:
    try:
        parsed = config.parse(arguments)
    except goflags.HelpRequested:
        write_out(2, goflags.usage("livenessprobe", config.FLAGS).rstrip())
        return Exit.OK
    except goflags.FlagError as error:
        write_out(2, f"{error}\n{goflags.usage('livenessprobe', config.FLAGS)}".rstrip())
        return Exit.FLAGS
    except config.ConfigError as error:
        log.setup(0, (), config.wants_json(arguments))
        return _refuse(error)
    log.setup(parsed.verbosity, parsed.vmodule, parsed.json_logs)
    for message, flag in parsed.warnings:
        _logger.warning(message, {"flag": flag})
    try:
        if parsed.version:
            from livenessprobe.driver import GRPC_VERSION

            python_version = sys.version.split()[0]
            write_out(1, f"livenessprobe {__version__} (Python {python_version}, grpcio {GRPC_VERSION})")
            return Exit.OK
        if parsed.once:
            from livenessprobe.once import once

            return once(parsed)
        from livenessprobe.serve import serve

        return serve(parsed)
    except config.ConfigError as error:
        return _refuse(error)
    except Exception as error:
        _logger.critical("Unexpected error, please report it", {"err": repr(error)})
        return Exit.CONFIGURATION


def _refuse(error: config.ConfigError) -> Exit:
    _logger.error("Bad configuration", {"err": error.reason, "flag": error.flag, "value": error.value})
    return Exit.CONFIGURATION
