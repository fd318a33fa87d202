"""What a preflight says of one thing it looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Verdict(Enum):
    """How bad it is."""

    OK = "ok"
    UNKNOWN = "unknown"
    """It could not be looked at from here."""
    WARN = "warn"
    """It serves, but slower, or it may hang."""
    FAIL = "FAIL"
    """It cannot serve."""


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        what: What was looked at.
        verdict: How bad it is.
        found: What was seen, with its unit.
        remedy: What to do about it; empty if nothing.
        environment: Variables to set for the server because of it.
        arguments: Arguments of vLLM to add because of it.
    """

    what: str
    verdict: Verdict
    found: str
    remedy: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
