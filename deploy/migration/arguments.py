"""A sidecar's arguments: how the program reads them, and which of them the kubelet does not pass on as intended."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from finding import Finding, Kind

from livenessprobe import config, goflags
from livenessprobe.quoting import quote

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manifest import Container

    from livenessprobe.config import Config, Endpoint

# The flags that say whether it serves, what, and where.
SERVING = frozenset(("once", "version", "http-endpoint", "health-port", "metrics-address", "metrics-path"))


def arguments(container: Container) -> tuple[str, ...]:
    return (*container.command[1:], *container.args)


def parse(container: Container) -> Config | Finding:
    """Read the arguments as the program does: what it accepts, or a finding in its own words."""
    try:
        return config.parse(arguments(container))
    except goflags.HelpRequested:
        return Finding(Kind.BREAKS, "it prints its usage and ends")
    except goflags.FlagError as error:
        return Finding(Kind.REFUSED, f"exit 2: {error}")
    except config.ConfigError as error:
        values = {"err": error.reason, "flag": error.flag, "value": error.value}
        pairs = "".join(f" {key}={quote(value)}" for key, value in values.items())
        return Finding(Kind.REFUSED, f'exit 1: "Bad configuration"{pairs}')


def given(container: Container) -> set[str]:
    """Name the flags that are given, whether their values are known or not."""
    return unknown(container).union(goflags.parse(arguments(container), config.FLAGS))


def unknown(container: Container) -> set[str]:
    """Name the flags whose values are elsewhere; all flags, if an unknown argument does not say which flag it is."""
    names = {re.split("[= ]", written.lstrip("-"))[0] for written in container.unknown}
    known = {flag.name for flag in config.FLAGS}
    return known if names - known else names


def served(container: Container) -> list[Endpoint]:
    """Where a container listens while the pod runs, as far as that can be known."""
    accepted = parse(container)
    if isinstance(accepted, Finding) or accepted.once or accepted.version or container.must_end:
        return []
    if unknown(container) & SERVING:
        return []
    return [each for each in (accepted.health, accepted.metrics) if each]


def written(container: Container) -> Iterator[Finding]:
    """Judge how the arguments are written: a value may be accepted and yet not be the one that was meant."""
    for argument in container.unknown:
        yield Finding(
            Kind.UNKNOWN,
            f"{argument}: the variable's value is not in this file; not checked, and neither is what depends on it",
        )
    for argument, variable in container.undefined:
        text = f"{argument}: the container has no variable {variable}, so the text stays as it is"
        yield Finding(Kind.BREAKS, text)
    for argument in arguments(container):
        if found := re.search(r"\$\{([^}]*)\}", argument):
            text = f"{argument}: Kubernetes does not replace {found[0]}: write $({found[1]}), or the value"
            yield Finding(Kind.BREAKS, text)
        if re.search(r"\s-", argument):
            yield Finding(Kind.BREAKS, f"{argument}: two flags in one argument: make each an item of args")
        elif not argument.isprintable():
            yield Finding(
                Kind.BREAKS, f"{argument}: a character that cannot be printed, or a line end of YAML"
            )
        elif " " in argument:
            yield Finding(Kind.BREAKS, f"{argument}: a space in an argument: write --flag=value, without it")
