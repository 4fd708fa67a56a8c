"""The command line: from arguments to an exit code."""

import logging
import sys
from collections.abc import Sequence

from livenessprobe import __version__, config, goflags, log, postponed
from livenessprobe.config import Exit
from livenessprobe.writer import write_out

_logger = logging.getLogger(__name__)


def run(arguments: Sequence[str]) -> Exit:
    """Do what the command line asks for; return the exit code."""
    try:
        given = goflags.parse(arguments, config.FLAGS)
    except goflags.HelpRequested:
        write_out(1, config.usage())
        return Exit.OK
    except goflags.FlagError as error:
        # One line: kubectl describe shows the end of a container's output, and that should be the reason.
        write_out(2, f"livenessprobe: {error}; -h lists all flags")
        return Exit.FLAGS
    log.setup(*config.log_settings(given))
    try:
        return _run(given)
    except config.ConfigError as error:
        _logger.error("Bad configuration", {"err": error.reason, "flag": error.flag, "value": error.value})
    except Exception as error:
        log.report(error)
    finally:
        log.flush()
    return Exit.CONFIGURATION


def _run(given: config.Given) -> Exit:
    settings = config.decide(given)
    for message, flag in settings.warnings:
        _logger.warning(message, {"flag": flag})
    if settings.version:
        from livenessprobe.versions import grpcio

        python_version = sys.version.split()[0]
        write_out(1, f"livenessprobe {__version__} (Python {python_version}, grpcio {grpcio()})")
        return Exit.OK
    if settings.once:
        from livenessprobe.once import once

        return once(settings)
    from livenessprobe.listening import listen
    from livenessprobe.resolving import Interrupted

    try:
        listeners = listen(settings)
    except Interrupted:
        _logger.info("Stopping")
        return Exit.OK
    postponed.postpone(postponed.UNUSED_SERVING)
    from livenessprobe.serve import serve

    return serve(settings, listeners)
