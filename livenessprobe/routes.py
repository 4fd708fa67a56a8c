"""What is served at each path: routes made of plain values. They run on the server's thread, and never wait."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING

from livenessprobe import __version__
from livenessprobe.checks import Checks
from livenessprobe.exchange import Reply, Response, Route
from livenessprobe.health import Outcome, Verdict
from livenessprobe.history import History, Seen
from livenessprobe.quoting import printable

if TYPE_CHECKING:
    from livenessprobe.metrics import Metrics


def health_routes(checks: Checks) -> dict[str, Route]:
    """Answer with the verdict of a check; the paths differ in what they call good."""

    def route(*good: Outcome) -> Route:
        def ask(reply: Reply) -> None:
            def answer(verdict: Verdict) -> None:
                reply(_response(verdict, verdict.outcome in good))

            checks.ask(answer)

        return ask

    return {
        "/healthz": route(Outcome.HEALTHY),
        "/livez": route(Outcome.HEALTHY, Outcome.NOT_READY),
        "/readyz": route(Outcome.HEALTHY),
    }


@lru_cache(maxsize=2)
def _response(verdict: Verdict, good: bool) -> Response:
    """Turn a verdict into bytes, once for all who wait for it: there can be hundreds, and its text can be long."""
    status = HTTPStatus.OK if good else HTTPStatus.INTERNAL_SERVER_ERROR
    return Response(status, printable(verdict.text).encode())


def metrics_route(metrics: "Callable[[], Metrics]") -> Route:
    """Answer with the metrics, which are loaded when first needed."""

    def scrape(reply: Reply) -> None:
        reply(Response(HTTPStatus.OK, metrics().render(), metrics().content_type, may_pack=True))

    return scrape


def status_routes(
    address: str,
    flags: tuple[tuple[str, str], ...],
    paths: Iterable[str],
    history: History,
    names: deque[str],
) -> dict[str, Route]:
    """Serve the pages for people; names[0] is the driver's."""
    started = time.monotonic()
    versions = (("Python", sys.version.split()[0]), ("Binary", __version__))

    @lru_cache(maxsize=1)
    def page(name: str, seen: Seen | None, now: int) -> Response:
        """Write it once a second at most, unless something changes: long texts take time, and hundreds of clients can ask."""
        from livenessprobe.status import Program, statusz

        program = Program(started, versions, tuple(paths), address)
        return _page(statusz(program, name, seen, now, time.time() - time.monotonic()))

    def show_flags(reply: Reply) -> None:
        from livenessprobe.status import flagz

        reply(_page(flagz(flags)))

    return {
        "/statusz": lambda reply: reply(page(names[0], history.seen, int(time.monotonic()))),
        "/flagz": show_flags,
    }


def _page(text: str) -> Response:
    return Response(HTTPStatus.OK, text.encode(errors="backslashreplace"))
