"""What there is to say about a sidecar: one line of the report."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.Enum):
    """What a finding means to those who deploy; REFUSED and BREAKS have to be dealt with first."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    BREAKS = "breaks"
    WARNS = "warns"
    UNKNOWN = "unknown"
    SERVES = "serves"
    CHANGES = "changes"
    ADVICE = "advice"


@dataclass(frozen=True, slots=True)
class Finding:
    """A line, whose text may contain anything that a manifest does: it is escaped when it is printed."""

    kind: Kind
    text: str
