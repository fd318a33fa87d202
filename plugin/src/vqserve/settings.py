"""vqserve's own environment variables: how `vqserve serve` tells vLLM's processes what it decided."""

from __future__ import annotations

import math
import os
from typing import Literal

from vqserve.format.errors import UsageError

WARM_UP_SECONDS = "VQSERVE_WARM_UP_SECONDS"
"""How long the warm-up may take; 600 if it is not set."""

STALL_SECONDS = "VQSERVE_STALL_SECONDS"
"""How long an engine that has requests may finish no step until `/live` calls it stuck; 120 if it is not set."""

SPINE = "VQSERVE_SPINE"
"""`packed`: the spine's layers are multiplied in 4 bit; `dequantized`: as the weights they stand for. If it is not set,
packed wherever vLLM can."""

Spine = Literal["packed", "dequantized"]


def warm_up_seconds() -> float:
    """What `WARM_UP_SECONDS` says.

    Raises:
        UsageError: No number of seconds, or one that is not above 0 and finite.
    """
    return _seconds(WARM_UP_SECONDS, "600")


def stall_seconds() -> float:
    """What `STALL_SECONDS` says.

    Raises:
        UsageError: No number of seconds, or one that is not above 0 and finite.
    """
    return _seconds(STALL_SECONDS, "120")


def wanted_spine() -> Spine | None:
    """What `SPINE` says.

    Raises:
        UsageError: Something that it cannot say.
    """
    text = os.environ.get(SPINE)
    if text in ("packed", "dequantized"):
        return "packed" if text == "packed" else "dequantized"
    if text:
        raise UsageError(f"{SPINE}={text}: expected packed or dequantized; set it to one of them, or unset it")
    return None


def _seconds(name: str, default: str) -> float:
    text = os.environ.get(name) or default
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"{name}={text}: expected a number of seconds; set it, or unset it")
    return seconds
